"""Export a run for ONNX Runtime: python -m export RUN_DIR --out DIR"""

from pathlib import Path
from typing import Any

from export import cli
from export.runtime import TOLERANCE
from export.wanted import Wanted, add_flags


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fold, export, compare, write; returns the manifest."""
    parser = cli.Parser(
        prog="python -m export",
        description="Fold a trained adapter into its model, export it, compare with PyTorch, write the package.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a finished run's folder, or an adapter file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the package's folder, not there yet")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX opset (default: the exporter's own)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"largest relative difference from PyTorch (default: {TOLERANCE:g})",
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    wanted = Wanted.of(args)
    if args.out.exists():
        raise ValueError(f"{args.out} exists; name another --out, or delete it first")
    from export.package import Source, build
    from export.variants import add_variants as variants

    source = Source.open(args.run)
    manifest = build(
        source,
        args.out,
        opset=args.opset,
        tolerance=args.tolerance,
        then=lambda folder, manifest: variants([source], folder, manifest, wanted),
    )
    worst = max(max(task["parity"]["relative_error"].values()) for task in manifest["tasks"].values())
    size = manifest["files"]["model.onnx"]["bytes"] / 1e6
    kind = "merged into the plain graph" if manifest["form"] == "merged" else "folded into dense bottlenecks"
    print(f"{args.out}: {size:.1f} MB, {kind}, within {worst:.1e} of PyTorch at batches 1, 2, 3, 5")
    return manifest


if __name__ == "__main__":
    cli.run(main)
