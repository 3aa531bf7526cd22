"""Does every family of timm export? One small model of each with a LoRA folded in, against PyTorch.

    python -m export.survey [--families resnet,beit] [--out docs/export_survey.md]

Per family: a LoRA on every Linear and conv layer of a small model with random weights, its deltas awakened; folded,
exported with a dynamic batch, checked by ONNX, run in ONNX Runtime at batches 1, 2 and 3, and compared with the model
as it was before folding. By dynamo; unoptimized or by legacy, and with the reason, where that fails.
"""

import contextlib
import dataclasses
import datetime
import io
import json
import platform
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

import capavision as cv
from capavision.files import replacing
from capavision.targets import near
from export import cli
from export.families import FAMILIES, awaken, calibrated, small_model
from export.graph import exporter_of, fallback_of, folded, one_line, to_onnx
from export.names import nodes
from export.runtime import relative_error
from export.store import save

BAR = 1e-5  # the largest relative error that is "ok"
AS_PYTORCH = "as near as PyTorch"  # above the bar, and no further from float64 than twice PyTorch's own float32
BATCHES = (1, 2, 3)
METHOD = cv.LoRA(rank=4, branches=2)
COLUMNS = ("family", "architecture", "result", "relative error", "exporter", "opset", "nodes", "MB", "s")


@dataclasses.dataclass(frozen=True)
class Row:
    """One family; `result` is "ok", AS_PYTORCH, "above …" or "FAILED: …"; `remark` says what there is to say of it."""

    family: str
    result: str
    seconds: float
    error: float | None = None
    exporter: str = ""
    opset: int | None = None
    nodes: int | None = None
    megabytes: float | None = None
    remark: str = ""

    @property
    def cells(self) -> tuple[object, ...]:
        figures: tuple[object, ...] = ("",) * 5
        if self.error is not None:
            figures = (f"{self.error:.1e}", self.exporter, self.opset, self.nodes, f"{self.megabytes:.1f}")
        result = f"{self.result} ({self.remark})" if self.remark else self.result
        return (self.family, FAMILIES[self.family], result, *figures, f"{self.seconds:.1f}")


def survey(family: str, opset: int | None = None) -> Row:
    """The row of a family, whatever happens."""
    start = time.perf_counter()
    try:
        found = measure(family, opset)
    except Exception as error:  # whatever goes wrong in one family is its row, and the survey goes on
        found = {"result": f"FAILED: {type(error).__name__}: {one_line(error)}"}
    return Row(family, seconds=time.perf_counter() - start, **found)


def measure(family: str, opset: int | None = None) -> dict[str, Any]:
    """What a row says, but for its seconds.

    Raises:
        ValueError: neither exporter traces the model, or its deltas move nothing.
    """
    model, example = small_model(family)
    calibrated(model, example.new_empty(8, *example.shape[1:]).normal_(generator=torch.Generator().manual_seed(8)))
    pixels = {n: torch.randn(n, *example.shape[1:], generator=torch.Generator().manual_seed(n)) for n in BATCHES}
    plain = logits(model, pixels)
    cv.inject(model, METHOD, "all", example=example)
    for i, delta in enumerate(m for m in model.modules() if isinstance(m, cv.Delta)):
        awaken(delta, seed=i, std=0.02)
    expected = logits(model, pixels)
    if not (moved := largest_error(plain, expected)) > 100 * BAR:
        raise ValueError(f"the deltas moved the logits by {moved:.1e} only, so an agreement would prove nothing")

    with contextlib.redirect_stderr(io.StringIO()):  # the row says it too
        proto = to_onnx(folded(model), example.shape[-1], {}, opset)
    about = {"exporter": exporter_of(proto), "opset": proto.opset_import[0].version}
    about |= {"nodes": sum(1 for _ in nodes(proto.graph)), "remark": fallback_of(proto)}
    found, about["megabytes"] = run(proto, pixels)
    about["error"] = error = largest_error(found, expected)
    result = "ok" if error <= BAR else f"above {BAR:g}"
    if error > BAR:  # the graph's fault, or single precision's?
        exact = logits(model.double(), {n: x.double() for n, x in pixels.items()})
        graphs, own = largest_error(found, exact), largest_error(expected, exact)
        result = AS_PYTORCH if graphs <= 2 * own else result
        told = f"off float64 by {graphs:.1e}, PyTorch's float32 by {own:.1e}"
        about["remark"] = "; ".join(filter(None, (about["remark"], told)))
    if any((found[n].argmax(1) != expected[n].argmax(1)).any() for n in BATCHES):
        result = "FAILED: another top-1"
    return {"result": result, **about}


@torch.inference_mode()
def logits(model: torch.nn.Module, pixels: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
    """PyTorch's logits by batch size."""
    model.train().eval()  # clears what some models cache in eval
    return {n: model(x).numpy() for n, x in pixels.items()}


def run(proto: onnx.ModelProto, pixels: dict[int, torch.Tensor]) -> tuple[dict[int, np.ndarray], float]:
    """ONNX Runtime's logits by batch size, and the graph's size on the disk in MB."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(proto, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = {n: session.run(["logits"], {"pixel_values": x.numpy()})[0] for n, x in pixels.items()}
        return found, sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6


def largest_error(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> float:
    """The largest relative error of any batch."""
    return max(relative_error(found[n], expected[n]) for n in expected)


def table(rows: Iterable[Row]) -> str:
    """
    >>> print(table([Row("beit", "FAILED: why", 1.0)]).splitlines()[-1])
    | beit | beit_base_patch16_224 | FAILED: why |  |  |  |  |  | 1.0 |
    """
    return "\n".join(map(line, (COLUMNS, ["---"] * len(COLUMNS), *(row.cells for row in rows))))


def line(cells: Iterable[object]) -> str:
    """One line of a table; a bar inside a cell is escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def summary(rows: Sequence[Row]) -> str:
    """How many are ok, how many are not and why, by which exporter, and the figures of all that export."""
    exported = [row for row in rows if row.result in ("ok", AS_PYTORCH)]
    ok = sum(row.result == "ok" for row in exported)
    legacy = sum(row.exporter == "legacy" for row in exported)
    text = f"{len(exported)} of {len(rows)} export, {len(exported) - legacy} by dynamo and {legacy} by legacy: "
    text += f"{ok} are ok, {len(exported) - ok} as near as PyTorch; {len(rows) - len(exported)} do not."
    if exported:
        errors, seconds = [row.error for row in exported if row.error is not None], [row.seconds for row in exported]
        text += f" Relative error: median {np.median(errors):.1e}, largest {max(errors):.1e}."
        text += f" Seconds: median {np.median(seconds):.1f}, largest {max(seconds):.1f}."
    return text


def document(rows: Sequence[Row], command: str) -> str:
    """What --out writes."""
    import timm

    version = {"python": platform.python_version(), "capavision": cv.__version__, "torch": torch.__version__}
    version |= {"timm": timm.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return f"""# Export of timm's families

One small model of each family, random weights, float32. A LoRA (rank 4, 2 branches) sits on every Linear and conv layer
and moves the logits; the model is folded, exported with a dynamic batch, checked by `onnx.checker`, and run in ONNX
Runtime at batches {", ".join(map(str, BATCHES))}, against PyTorch's model before folding.

- "ok": every logit is within {BAR:g} of the largest, and top-1 is equal.
- "as near as PyTorch": above that, with equal top-1. Deep nets of random weights amplify rounding: PyTorch in float32
  is as far from PyTorch in float64. The graph is no further from float64 than twice that; both figures are given.

The exporter is dynamo, with fused attention off. Where its graph is refused or wrong, dynamo traces again without
PyTorch's optimizer; where dynamo fails, legacy does. The reason is given.

`{command}`, {datetime.date.today():%d %B %Y}: {sum(row.seconds for row in rows) / 60:.0f} minutes on
{torch.get_num_threads()} thread of a CPU ({platform.machine()}); {", ".join(f"{k} {v}" for k, v in version.items())}.

{summary(rows)}

{table(rows)}
"""


class Progress:
    """Rows found so far, in a file beside the document, so that the same command goes on where it stopped."""

    def __init__(self, out: Path | None, settings: dict[str, Any]) -> None:
        self.path = out.with_name(f"{out.name}.part.jsonl") if out else None
        self.settings = settings
        self.rows: dict[str, Row] = {}
        if self.path and self.path.is_file():
            with _damage_told(self.path):
                head, *rest = self.path.read_text().splitlines()
                if json.loads(head) != settings:
                    raise ValueError(f"it is of {head}, this is {json.dumps(settings)}")
                self.rows = {row.family: row for row in (Row(**json.loads(text)) for text in rest)}

    def add(self, row: Row) -> None:
        """Keep it, on the disk too."""
        self.rows[row.family] = row
        if self.path:
            kept = [self.settings, *map(dataclasses.asdict, self.rows.values())]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(json.dumps(each) + "\n" for each in kept))

    def finish(self) -> None:
        """The document has it all."""
        if self.path:
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _damage_told(path: Path) -> Any:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not go on ({error}); delete it to start anew") from error


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Survey, print a row as each is known, write the document."""
    parser = cli.Parser(prog="python -m export.survey", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="A,B", help="some of them (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too, as Markdown")
    args = parser.parse_args(argv)
    families = list(dict.fromkeys(args.families.split(",")))
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"--families: {name!r} is unknown; {near(name, FAMILIES)}")
    import timm

    settings = {"torch": torch.__version__, "timm": timm.__version__, "onnxruntime": onnxruntime.__version__}
    progress = Progress(args.out, settings)
    print(table(progress.rows[name] for name in families if name in progress.rows), flush=True)
    for name in families:
        if name not in progress.rows:
            progress.add(survey(name))
            print(line(progress.rows[name].cells), flush=True)
    rows = [progress.rows[name] for name in families]
    print(f"\n{summary(rows)}")
    if args.out:
        some = "" if families == list(FAMILIES) else f" --families {','.join(families)}"
        with replacing(args.out) as temporary:
            temporary.write_text(document(rows, f"python -m export.survey{some} --out {args.out}"), encoding="utf-8")
        progress.finish()
    return rows


if __name__ == "__main__":
    cli.run(main, stopped="the rows found are kept beside --out, and the same command goes on")
