"""Export runs for ONNX Runtime: python -m export RUN_DIR --out DIR, --split RUN1 RUN2 … --out DIR, or
--delta RUN --base DIR --out FILE
"""

import argparse
import functools
import logging
import math
from pathlib import Path
from typing import Any

from export import cli
from export.runtime import TOLERANCE
from export.wanted import Wanted, add_flags

_LOG = logging.getLogger("export")
FORMS = {
    "merged": "merged into the plain graph",
    "folded": "folded into dense bottlenecks or prefixes",
    "split": "a base graph and an adapter file for each task",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fold, export, compare, write; returns the manifest."""
    args = _parse(argv)
    if args.out.exists():
        raise ValueError(f"{args.out} exists; name another --out, or delete it first")
    with cli.narrated():
        manifest = _made(args)
    if not args.delta:
        _tell(args.out, manifest)
    return manifest


def _made(args: argparse.Namespace) -> dict[str, Any]:
    _LOG.info("loading %s", ", ".join(map(str, args.split or [args.delta or args.run])))
    from export import delta, package, split
    from export.graph import check_choices
    from export.source import Source

    wanted = Wanted.of(args)
    check_choices(args.opset, args.exporter)
    if args.delta:
        source = Source.open(args.delta)
        _refuse_texts("--delta", source)
        return delta.make(source, args.base, args.out, args.tolerance)
    if args.split:
        runs = split.named(args.split)
        _refuse_texts("--split", *runs.values())
        return split.build(runs, args.out, opset=args.opset, tolerance=args.tolerance, then=_adding(runs, wanted))
    source = Source.open(args.run)
    return package.build(
        source,
        args.out,
        opset=args.opset,
        exporter=args.exporter,
        dynamic_size=args.dynamic_size,
        tolerance=args.tolerance,
        then=_adding({source.task: source}, wanted),
    )


def _adding(sources: dict[str, Any], wanted: Wanted) -> Any:
    """What makes the variants of a package of these tasks, where any are wanted."""
    from export.variants import add_variants, check

    for source in sources.values():
        check(source, wanted)
    return functools.partial(add_variants, sources, wanted=wanted) if wanted.names else None


def _refuse_texts(flag: str, *sources: Any) -> None:
    for source in sources:
        if source.kind != "image":
            raise ValueError(
                f"{flag} is for runs on images, and {source.path} is of {source.kind}s; export it by itself"
            )


def _tell(out: Path, manifest: dict[str, Any]) -> None:
    files, tasks = manifest["files"], manifest["tasks"]
    worst = max(max(task["parity"]["relative_error"].values()) for task in tasks.values())
    size = sum(each["bytes"] for name, each in files.items() if name.startswith("model.onnx")) / 1e6
    form = FORMS[manifest["form"]] + (", height and width open" if "dynamic_size" in manifest else "")
    form += ", length open" if "input" in manifest else ""
    print(f"{out}: {size:.1f} MB, {form}, within {worst:.1e} of PyTorch at batches 1, 2, 3, 5")
    for name, task in tasks.items():
        if task["adapter"]:
            print(f"  {name}: {files[task['adapter']]['bytes'] / 1e6:.2f} MB, {len(task['labels'])} classes")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m export",
        description="Fold a trained adapter into its model, export it, compare with PyTorch, write the package.",
    )
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN_DIR", help="a finished run's folder, or an adapter file"
    )
    parser.add_argument(
        "--split", nargs="+", metavar="RUN", help="several runs on one base, a task each (NAME=RUN names it)"
    )
    parser.add_argument(
        "--delta", type=Path, metavar="RUN", help="a file of what --base lacks to be RUN's package; see export.delta"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="of --delta: a package of another run on the same base"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write: the package's folder (of --delta the file), not there yet",
    )
    parser.add_argument("--opset", type=int, metavar="{18,20,23}", help="ONNX opset (default: 20)")
    parser.add_argument(
        "--exporter",
        metavar="{dynamo,legacy}",
        help="PyTorch's (default: dynamo, and legacy where that fails; the manifest says which)",
    )
    parser.add_argument(
        "--dynamic-size", action="store_true", help="leave height and width open, where the architecture allows it"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"largest relative difference from PyTorch (default: {TOLERANCE:g})",
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    if sum(bool(each) for each in (args.run, args.split, args.delta)) != 1:
        parser.error("give one of RUN_DIR, --split RUN1 RUN2 … and --delta RUN")
    if not args.out:
        parser.error("name what to write: --out DIR, not there yet")
    if args.delta and (args.quantize or args.half or args.preprocess):
        parser.error("--quantize, --half and --preprocess are for packages; a delta has none of them")
    if (args.delta is None) != (args.base is None):
        parser.error("--delta and --base belong together: what to add, and to which package")
    if (args.split or args.delta) and (args.exporter or args.dynamic_size):
        parser.error("--exporter and --dynamic-size are for RUN_DIR alone; a delta takes those of its base")
    if args.delta and args.opset:
        parser.error("--opset is for packages; a delta takes that of its base")
    if not 0 < args.tolerance < math.inf:
        parser.error(f"--tolerance {args.tolerance:g} must be a positive number")
    return args


if __name__ == "__main__":
    cli.run(main)
