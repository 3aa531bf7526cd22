"""Export runs for ONNX Runtime: python -m export RUN_DIR --out DIR, --split RUN1 RUN2 … --out DIR, or
--delta RUN --base DIR --out FILE
"""

import argparse
from pathlib import Path
from typing import Any

from export import cli
from export.runtime import TOLERANCE

FORMS = {
    "merged": "merged into the plain graph",
    "folded": "folded into dense bottlenecks",
    "split": "a base graph and an adapter file for each task",
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fold, export, compare, write; returns the manifest, of a delta file what it says of itself."""
    args = _parse(argv)
    if args.out.exists():
        raise ValueError(f"{args.out} exists; name another --out, or delete it first")
    from export import package

    if args.delta:
        from export import delta

        return delta.make(package.Source.open(args.delta), args.base, args.out)
    settings = {"opset": args.opset, "tolerance": args.tolerance}
    if args.split:
        from export import split

        manifest = split.build(split.named(args.split), args.out, **settings)
    else:
        manifest = package.build(package.Source.open(args.run), args.out, **settings)
    worst = max(max(task["parity"]["relative_error"].values()) for task in manifest["tasks"].values())
    size = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    print(f"{args.out}: {size:.1f} MB, {FORMS[manifest['form']]}, within {worst:.1e} of PyTorch at batches 1, 2, 3, 5")
    for name, task in manifest["tasks"].items():
        if task["adapter"]:
            print(
                f"  {name:<24} {manifest['files'][task['adapter']]['bytes'] / 1e6:8.2f} MB, {len(task['labels'])} classes"
            )
    return manifest


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
    parser.add_argument("--delta", type=Path, metavar="RUN", help="what --base lacks to be the merged export of RUN")
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="of --delta: a package of another run on the same base"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the package's folder (of --delta the file), not there yet",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset (default: the exporter's own)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"largest relative difference from PyTorch (default: {TOLERANCE:g})",
    )
    args = parser.parse_args(argv)
    if sum(each is not None for each in (args.run, args.split, args.delta)) != 1:
        parser.error("give one of RUN_DIR, --split RUN1 RUN2 … and --delta RUN")
    if (args.delta is None) != (args.base is None):
        parser.error("--delta and --base belong together: what to add, and to which package")
    return args


if __name__ == "__main__":
    cli.run(main)
