"""What works in which of timm's 98 families: every promise of every method, kept or not, family by family.

    python -m benchmarks.coverage [--families resnet,beit] [--methods lora,adapter] [--out docs/coverage.md]

Per family one small model with random weights, in float64, see export/families.py; `chain` of tests/families.py is the
test: inject, one training step in train() mode, save, load on a fresh base, fold, remove.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import capavision as cv
from benchmarks.tables import add_methods, check_methods, check_names, measured, row, table
from export.families import FAMILIES
from tests.families import Outcome, RefusedError, chain, chain_of_norms, family_model
from vtab.cli import Parser, run
from vtab.textfile import write

# Method and targets; a method without an entry runs with its default settings on its default hosts.
SETTINGS: dict[str, tuple[cv.Method, str | None]] = {
    "lora": (cv.LoRA(rank=4, branches=2), "all"),
    "adapter": (cv.Adapter(rank=8, branches=2), None),
}
NORMS = "batch norms"  # the row of families that have them: statistics left to train
COLUMNS = ("family", "architecture", "method", "hosts", "trained values", "unused", "batch norms", "result", "s")


@dataclass(frozen=True)
class Row:
    """One method in one family; `result` is "ok", "refused: …" or "FAILED: …"."""

    family: str
    method: str
    result: str
    seconds: float
    outcome: Outcome | None = None

    @property
    def cells(self) -> tuple[object, ...]:
        o = self.outcome
        counts = (o.hosts, f"{o.values:,}", o.unused or "", o.norms or "") if o else ("", "", "", "")
        return (self.family, FAMILIES[self.family], self.method, *counts, self.result, f"{self.seconds:.1f}")


def sweep(families: Sequence[str], methods: Sequence[str]) -> Iterator[Row]:
    """The rows in order, each as soon as it is known."""
    for family in families:
        outcome = None
        for name in methods:
            start = time.perf_counter()
            result, outcome = attempt(family, *setting(name))
            yield Row(family, name, result, time.perf_counter() - start, outcome)
        if outcome and outcome.norms:
            start = time.perf_counter()
            yield Row(family, NORMS, norms(family), time.perf_counter() - start)


def setting(name: str) -> tuple[cv.Method, str | None]:
    """The method in the settings of the sweep, and its targets."""
    return SETTINGS.get(name) or (cv.Method.known[name](), None)


def attempt(family: str, method: cv.Method, targets: str | None) -> tuple[str, Outcome | None]:
    """The result in words, and what the chain saw where it was gone through."""
    try:
        model, x = family_model(family)
        with tempfile.TemporaryDirectory() as folder:
            return "ok", chain(model, x, method, targets, Path(folder) / "it.safetensors")
    except RefusedError as refusal:
        return f"refused: {refusal}", None
    except Exception as error:  # whatever goes wrong in one family is its row, and the sweep goes on
        return failure(error), None


def norms(family: str) -> str:
    """The same for batch norms that are left to train: their statistics are saved and loaded."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            chain_of_norms(*family_model(family), Path(folder) / "it.safetensors")
    except Exception as error:
        return failure(error)
    return "ok"


def failure(error: Exception) -> str:
    """What went wrong, on one line."""
    return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def summary(rows: Sequence[Row]) -> str:
    """Per method how many families keep every promise, refuse or fail, and how many of them have batch norms."""
    lines = []
    for name in dict.fromkeys(r.method for r in rows):
        mine = [r for r in rows if r.method == name]
        results = [r.result.partition(":")[0] for r in mine]
        normed = sum(name == NORMS or (r.outcome is not None and r.outcome.norms > 0) for r in mine if r.result == "ok")
        counts = [results.count(word) for word in ("ok", "refused", "FAILED")]
        method, targets = setting(name) if name != NORMS else (cv.LinearProbe(), "the head; `freeze_norm=False`")
        lines.append((f"`{method}`", targets or "its default hosts", len(mine), *counts, normed))
    columns = ("method", "targets", "families", "ok", "refused", "failed", "ok with batch norms")
    return table(columns, lines)


def document(rows: Sequence[Row], command: str, seconds: float) -> str:
    """What --out writes."""
    return f"""# Coverage of timm's families

One small model of each of timm's {len(FAMILIES)} families, random weights, float64. "ok" means that all of this held:

- inject leaves the output as it was, bit for bit;
- after one training step in train() mode every delta's parameters have a finite gradient, the gradient of a weight's
  delta is the weight's own carried on by the chain rule, and the deltas moved the output ("unused" counts the hosts
  whose own weights get no gradient either: branches that the forward pass does not use);
- save, then load on a fresh base, gives the same output bit for bit, batch norms included;
- fold: each weight is W + ΔW exactly, each bottleneck the same function, the output the same to 1e-6 of the movement;
- remove gives every bit, class and flag of the base back.

By default batch norms keep the base's statistics; a family that has them gets a row more, "{NORMS}", in which they
train beside the classifier (`freeze_norm=False`), are saved, loaded on a fresh base and removed.

{measured(command, seconds)}

{summary(rows)}

{table(COLUMNS, [r.cells for r in rows])}
"""


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the sweep, print a row as each is known, write the document."""
    args = parse(argv)
    names = args.methods.split(",")
    start, rows = time.perf_counter(), []
    print(table(COLUMNS, []), flush=True)
    for found in sweep(args.families.split(","), names):
        rows.append(found)
        print(row(found.cells), flush=True)
    print(f"\n{summary(rows)}")
    if args.out:
        some = "" if args.families == ",".join(FAMILIES) else f" --families {args.families}"
        command = f"python -m benchmarks.coverage{some} --methods {args.methods}"
        write(args.out, document(rows, command, time.perf_counter() - start))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; families and methods are checked before anything runs."""
    parser = Parser(prog="python -m benchmarks.coverage", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", default=",".join(FAMILIES), metavar="A,B", help="some of them (default: all)")
    add_methods(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there too, with date and versions")
    args = parser.parse_args(argv)
    check_names("--families", args.families, FAMILIES)
    return check_methods(args)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
