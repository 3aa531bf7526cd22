"""Latency, throughput and memory of a package's graphs: python -m export.bench DIR [--run RUN_DIR]

With --run they stand beside the plain base graph (the same model exported without its adapter) and PyTorch. Rounds
visit all of them, each round in another order, so that whatever else the machine does meets all; a ratio is taken
within a round, to the base graph (else to float32), and given as the median with its 95 % interval and quartiles.
Inputs are random and normalised already, texts are tokens already, all of one length; the preprocess graph gets one
image of 640 × 480, which it also resizes. The graphs of a split package run with the adapter of the run's task, or of
the first. Idle threads do not spin, or those of one model would slow the next.
"""

import copy
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from export import cli, memory, session
from export.runtime import check_files, read_manifest, sha256

if TYPE_CHECKING:
    from export.source import Source

PHOTO = (480, 640, 3)
TOKENS = 64  # of a text
Call = Callable[[], Any]


def opened(graph: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def feeds(session: onnxruntime.InferenceSession, batch: int, tokens: int = TOKENS) -> dict[str, np.ndarray]:
    """An input for a graph: random pixels, a whole image, or texts of so many tokens, whose values cost no time."""
    given, rng = session.get_inputs()[0], np.random.default_rng(0)
    if given.name == "input_ids":
        return {each.name: np.ones((batch, tokens), np.int64) for each in session.get_inputs()}
    if given.name == "image":
        return {"image": rng.integers(0, 256, PHOTO, np.uint8)}
    size = [n if isinstance(n, int) else 224 for n in given.shape[2:]]
    return {given.name: rng.standard_normal((batch, 3, *size), np.float32)}


def interleaved(calls: dict[str, Call], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each call in each round, after two rounds to warm up."""
    names, times = list(calls), {name: np.zeros(rounds + 2) for name in calls}
    for turn in range(rounds + 2):
        for i in np.random.default_rng(turn).permutation(len(names)):
            start = perf_counter()
            calls[names[i]]()
            times[names[i]][turn] = 1000 * (perf_counter() - start)
    return {name: values[2:] for name, values in times.items()}


def rows(times: dict[str, np.ndarray], batch: int, threads: int) -> list[dict[str, Any]]:
    """Latency, throughput, and the ratio to the first of them within a round.

    >>> rows({"base": np.array([10.0, 20.0]), "int8": np.array([5.0, 10.0])}, 1, 1)[1]["ratio"]["median"]
    0.5
    """
    reference, found = next(iter(times.values())), []
    for name, values in times.items():
        ratios = np.sort(values / reference)
        low, median, high = np.percentile(ratios, [25, 50, 75])
        rank = int(max(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5, 0))  # of the interval's ends, from either side
        p50, p95 = np.percentile(values, [50, 95])
        found.append(
            {
                "name": name,
                "batch": batch,
                "threads": threads,
                "p50_ms": float(p50),
                "p95_ms": float(p95),
                "per_second": float(1000 * batch / p50),
                "ratio": {
                    "median": float(median),
                    "interval95": [float(ratios[rank]), float(ratios[-1 - rank])],
                    "quartiles": [float(low), float(high)],
                },
            }
        )
    return found


def torch_calls(source: "Source", batch: int, tokens: int, threads: int, compiled: bool) -> dict[str, Call]:
    """PyTorch's own forward pass of the folded model, eager and, where asked for, compiled."""
    import torch

    from export.graph import folded, outputs

    torch.set_num_threads(threads)
    model, given = folded(source.model), source.example(batch, tokens)
    models: dict[str, Any] = {"pytorch": model}
    if compiled:
        torch.compiler.reset()  # or the second batch size would be compiled as a symbol
        models["pytorch, compiled"] = torch.compile(copy.deepcopy(model), dynamic=False)

    def call(chosen: Any) -> Call:
        def forward() -> Any:
            with torch.inference_mode():
                return outputs(chosen, given)

        return forward

    return {name: call(chosen) for name, chosen in models.items()}


def write_base(source: "Source", manifest: dict[str, Any], path: Path) -> None:
    """The graph of the model without its adapter, but with its head; exported as the package was."""
    import capavision as cv
    from export.store import save

    plain = cv.remove(copy.deepcopy(source.model)).eval()
    save(source.traced(plain, manifest["opset"], exporter=manifest["exporter"]), path)


def nodes(graph: Path) -> int | None:
    """How many nodes a graph has; None where onnx is not installed."""
    try:
        import onnx
    except ImportError:
        return None
    return len(onnx.load(graph, load_external_data=False).graph.node)


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    versions = {}
    for name in ("onnxruntime", "torch", "timm", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, "python": platform.python_version()} | versions


def measure(
    graphs: dict[str, Path], adapter: onnxruntime.LoraAdapter | None, source: "Source | None", args: Any
) -> list[dict[str, Any]]:
    """Every batch size with every number of threads; `adapter` fills the slots of a package's own graphs."""
    found, options = [], onnxruntime.RunOptions()
    if adapter:
        options.add_active_adapter(adapter)
    for threads in args.threads:
        for batch in args.batches:
            calls: dict[str, Call] = {}
            for name, graph in graphs.items():
                if name == "preprocess" and batch > 1:
                    continue  # it takes one image
                model = opened(graph, threads)
                calls[name] = _run(model, feeds(model, batch, args.tokens), None if name == "base" else options)
            if source:
                calls |= torch_calls(source, batch, args.tokens, threads, args.compile)
            found += rows(interleaved(calls, args.rounds), batch, threads)
    return found


def _run(model: onnxruntime.InferenceSession, given: dict[str, np.ndarray], options: Any) -> Call:
    return lambda: model.run(None, given, options)


def peaks(graphs: dict[str, Path], source: "Source | None", args: Any) -> dict[str, float | None]:
    """Peak memory of each, at the largest batch size, on the first number of threads; None where there is no figure."""
    batch, threads, found = max(args.batches), args.threads[0], dict[str, float | None]()
    runs = {"pytorch": ("torch", source.path)} if source else {}
    for name, (kind, path) in ({name: ("onnx", graph) for name, graph in graphs.items()} | runs).items():
        try:
            found[name] = memory.peak(kind, path, batch, threads, args.tokens)
        except ValueError as error:  # the times are measured, and worth keeping
            print(f"note: {error}", file=sys.stderr)
            found[name] = None
    return found


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    about = result["machine"]
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    reference = result["rows"][0]["name"] + ("" if "base" in result["graphs"] else " (--run brings the plain base)")
    texts = f"texts of {result['tokens']} tokens; " if "tokens" in result else ""
    print(f"{texts}{result['rounds']} rounds; ratios to {reference}, within a round: median (its 95 % interval)")
    for row in result["rows"]:
        low, high = row["ratio"]["interval95"]
        ratio = f"{row['ratio']['median']:.3f} ({low:.3f} … {high:.3f})"
        print(
            f"{row['name']:<18} batch {row['batch']:<3} threads {row['threads']:<3} p50 {row['p50_ms']:8.2f} ms  "
            f"p95 {row['p95_ms']:8.2f} ms  {row['per_second']:8.1f}/s  {ratio}"
        )
    for name, graph in result["graphs"].items():
        parts = [f"{graph['bytes'] / 1e6:.1f} MB"]
        parts += [f"{graph['nodes']} nodes"] if graph["nodes"] is not None else []
        print(f"{name:<18} {', '.join(parts)}")
    for name, peak in result["peak_memory_mb"].items():
        print(f"{name:<18} peak {'unknown' if peak is None else f'{peak:.0f} MB'} (PSS, the whole process)")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Time everything, print the table, return it."""
    args = _parser().parse_args(argv)
    cli.at_least(1, args, "batches", "threads", "rounds", "tokens")
    if args.compile and not args.run:
        raise ValueError("--compile compiles the run's model; name it with --run")
    manifest = read_manifest(args.package)
    check_files(args.package, manifest)
    graphs = {name: args.package / file for name, file in manifest["graphs"].items()}
    if args.beside:
        graphs["beside"] = _peer(args.beside, graphs["float32"])
    source = _source(args.run, manifest, args.package) if args.run else None
    adapter = _adapter(args.package, manifest, source)
    with tempfile.TemporaryDirectory() as folder:
        if source:
            write_base(source, manifest, Path(folder) / "base.onnx")
            graphs = {"base": Path(folder) / "base.onnx", **graphs}
        result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
        result |= {"tokens": args.tokens} if "input" in manifest else {}
        result["rows"] = measure(graphs, adapter, source, args)
        result["graphs"] = {n: {"bytes": _bytes(graph), "nodes": nodes(graph)} for n, graph in graphs.items()}
        result["peak_memory_mb"] = peaks(graphs, source, args) if args.memory else {}
    show(result)
    if args.json:
        cli.write_json(args.json, result)
    return result


def _peer(graph: Path, ours: Path) -> Path:
    """`graph`, if its first input is the package's own; some name the texts of a pair besides."""
    if not graph.is_file():
        raise ValueError(f"there is no file {graph}")
    try:
        theirs = opened(graph, 1).get_inputs()[0]
    except Exception as error:  # onnxruntime raises classes of its own
        raise ValueError(f"{graph} does not load ({cli.first_line(error)})") from error
    own = opened(ours, 1).get_inputs()[0]
    if (theirs.name, theirs.type) != (own.name, own.type):
        raise ValueError(
            f"{graph} takes {theirs.name}, {theirs.type}, the package {own.name}, {own.type}; export it with that input"
        )
    return graph


def _source(run: Path, manifest: dict[str, Any], package: Path) -> "Source":
    from export.source import Source

    source = Source.open(run)
    if sha256(source.path) not in [task["source_sha256"] for task in manifest["tasks"].values()]:
        raise ValueError(f"{package} was not made of {run}; name the run it was exported from")
    return source


def _adapter(package: Path, manifest: dict[str, Any], source: "Source | None") -> onnxruntime.LoraAdapter | None:
    tasks = list(manifest["tasks"].values())
    made_of = [task for task in tasks if source and task["source_sha256"] == sha256(source.path)]
    file = (made_of or tasks)[0]["adapter"]
    return session.adapter(package / file, manifest["slots"], manifest["base_sha256"]) if file else None


def _bytes(graph: Path) -> int:
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m export.bench", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="a run in it: brings the plain base and PyTorch")
    parser.add_argument(
        "--batches",
        type=cli.numbers,
        default=[1],
        metavar="N,…",
        help="images or texts a call, one or several (default: 1)",
    )
    parser.add_argument(
        "--threads", type=cli.numbers, default=[os.cpu_count()], metavar="N,…", help="of all (default: all cores)"
    )
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="timed rounds (default: 50)")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"of a text (default: {TOKENS})")
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="FILE.onnx",
        help="another program's graph with the same inputs, such as optimum's",
    )
    parser.add_argument("--compile", action="store_true", help="PyTorch's torch.compile too; takes minutes")
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="leave out peak memory, which takes a process each"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    cli.run(main)
