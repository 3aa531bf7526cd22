"""Which variants of a package are wanted: the flags of python -m export that ask for more graphs than model.onnx."""

import argparse
import dataclasses
from pathlib import Path

QUANTIZED = ("int8", "int8-static")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which variants to add, and what to measure them on.

    names: of int8, int8-static, float16, preprocess
    calibration_images: training images that int8-static measures its scales on
    calibration_seed: which ones
    data_root: the task's images, where they are no longer where the run had them
    """

    names: tuple[str, ...] = ()
    calibration_images: int = 128
    calibration_seed: int = 0
    data_root: Path | None = None

    def __post_init__(self) -> None:
        if self.calibration_images < 1:
            raise ValueError(f"--calibration-images {self.calibration_images} must be at least 1")
        if self.calibration_seed < 0:
            raise ValueError(f"--calibration-seed {self.calibration_seed} must not be negative")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Wanted":
        """As the flags say."""
        flags = [*args.quantize, *(["float16"] if args.half else []), *(["preprocess"] if args.preprocess else [])]
        return cls(tuple(dict.fromkeys(flags)), args.calibration_images, args.calibration_seed, args.data_root)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `Wanted.of` reads."""
    group = parser.add_argument_group("variants", "more graphs, beside model.onnx")
    group.add_argument(
        "--quantize",
        action="append",
        default=[],
        choices=QUANTIZED,
        metavar="KIND",
        help="int8 (MatMul and Gemm; no data needed) or int8-static (convolutions too; scales measured on training "
        "images); may be given twice",
    )
    group.add_argument("--half", action="store_true", help="float16 weights, for half the size")
    group.add_argument("--preprocess", action="store_true", help="uint8 image of any size in, probabilities out")
    group.add_argument(
        "--calibration-images", type=int, default=128, metavar="N", help="images for int8-static (default: 128)"
    )
    group.add_argument("--calibration-seed", type=int, default=0, metavar="N", help="which images (default: 0)")
    group.add_argument(
        "--data-root", type=Path, metavar="PATH", help="the task's images, if no longer where the run had them"
    )
