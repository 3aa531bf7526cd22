"""Which variants of a package are wanted: the flags of python -m export that ask for more graphs than model.onnx."""

import argparse
import dataclasses
from pathlib import Path

QUANTIZED = ("int8", "int8-static")
USED_BY = {  # which variants a flag is for, and their flags
    "calibration_images": (("int8-static",), "--quantize int8-static"),
    "calibration_seed": (("int8-static",), "--quantize int8-static"),
    "data_root": ((*QUANTIZED, "float16"), "--quantize or --half"),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which variants to add, and what to measure them on.

    names: of int8, int8-static, float16, preprocess
    calibration_images: training images that int8-static measures its scales on
    calibration_seed: which ones
    data_root: the task's images, where they are no longer where the run had them; of texts or questions a file
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
        """As the flags say.

        Raises:
            ValueError: a number too low, a flag that no wanted variant uses.
        """
        flags = [*args.quantize, *(["float16"] if args.half else []), *(["preprocess"] if args.preprocess else [])]
        given = {name: getattr(args, name) for name in USED_BY if getattr(args, name) is not None}
        wanted = cls(tuple(dict.fromkeys(flags)), **given)
        for name in given:
            users, asked = USED_BY[name]
            if not set(users) & set(wanted.names):
                raise ValueError(f"--{name.replace('_', '-')} has no use without {asked}; add that, or leave it out")
        return wanted


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `Wanted.of` reads."""
    group = parser.add_argument_group("variants", "more graphs, beside model.onnx")
    group.add_argument(
        "--quantize",
        action="append",
        default=[],
        choices=QUANTIZED,
        help="int8 (MatMul and Gemm; no data needed) or int8-static (convolutions too; scales measured on training "
        "images); may be given twice",
    )
    group.add_argument("--half", action="store_true", help="float16 weights, for half the size")
    group.add_argument("--preprocess", action="store_true", help="uint8 image of any size in, probabilities out")
    group.add_argument("--calibration-images", type=int, metavar="N", help="images for int8-static (default: 128)")
    group.add_argument("--calibration-seed", type=int, metavar="N", help="which images (default: 0)")
    group.add_argument(
        "--data-root",
        type=Path,
        metavar="PATH",
        help="the task's images, if no longer where the run had them; of texts a file with one a line, of questions "
        "one in SQuAD's format",
    )
