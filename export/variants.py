"""The other graphs of a package, each made of its model.onnx: smaller ones, and one that takes images as they are.

What a smaller graph costs is measured, not promised: its accuracy beside float32's on the run's own validation images
is written into the manifest. The test split is never touched.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from export import splits
from export.half import half
from export.preprocess import with_preprocessing
from export.quantize import dynamic, static
from export.runtime import Classifier, random_pixels, read_json

if TYPE_CHECKING:
    from export.package import Source
    from vtab.data import Data

FILES = {
    "int8": "model_int8.onnx",
    "int8-static": "model_int8_static.onnx",
    "float16": "model_float16.onnx",
    "preprocess": "model_preprocess.onnx",
}
KINDS = {
    "int8": "dynamic: MatMul and Gemm, int8 weights per channel, uint8 activations",
    "int8-static": "static QDQ: MatMul, Gemm and Conv, int8 weights per channel, uint8 activations",
    "float16": "float16 weights and arithmetic, float32 inputs and outputs",
}
QUANTIZED = ("int8", "int8-static")
INLINE = 1_500_000_000  # bytes; a larger graph keeps its weights in a file beside it
BATCH = 16
RANDOM = {"seed": 20240702, "images": 64}  # pixels to compare on where there are no images


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which variants to add, and what to measure them on."""

    names: tuple[str, ...] = ()
    calibration_images: int = 128
    calibration_seed: int = 0
    data_root: Path | None = None

    def __post_init__(self) -> None:
        if self.calibration_images < 1:
            raise ValueError(f"--calibration-images {self.calibration_images} must be at least 1")

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Wanted":
        """As the flags say."""
        flags = [*args.quantize, *(["float16"] if args.half else []), *(["preprocess"] if args.preprocess else [])]
        return cls(tuple(dict.fromkeys(flags)), args.calibration_images, args.calibration_seed, args.data_root)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Wanted`."""
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


def add_variants(source: "Source", folder: Path, manifest: dict[str, Any], wanted: Wanted) -> None:
    """Make the variants in a package's folder, compare each with model.onnx, and note both in the manifest.

    Args:
        source: what the package was made of; beside it lies its run's config.json, if it has one.
        folder: the package, written but for its variants, its manifest too.
        manifest: as it will be written; changed here.
        wanted: which variants.

    Raises:
        ValueError: a variant that this model has no use for, or that needs images which are not there; one whose output
            is not finite; images of other classes.
    """
    # TODO(merge): imported late because package imports this module
    from export.package import write_manifest

    if not wanted.names:
        return
    labels = manifest["tasks"][source.task]["labels"]
    data = _data(source, labels, wanted)
    proto = onnx.load(folder / manifest["graphs"]["float32"])
    for name in wanted.names:
        _save(_made(name, proto, folder, data, wanted), folder / FILES[name], proto)
        manifest["graphs"][name] = FILES[name]
    write_manifest(folder, manifest)
    float32 = Classifier(folder)
    for name in wanted.names:
        if name in KINDS:
            manifest["quantization"][name] = about = _about(name, folder, wanted)
            about |= compared(float32, Classifier(folder, variant=name), data)
            print(said(name, about, manifest["files"][FILES["float32"]]["bytes"]))


def _data(source: "Source", labels: list[str], wanted: Wanted) -> "Data | None":
    """The run's images; None, with the reason on stderr, where they cannot be opened and nothing depends on them."""
    run = splits.settings(source.path)
    needed = wanted.data_root is not None or "int8-static" in wanted.names
    if not set(wanted.names) & KINDS.keys():
        return None
    if not run and not needed:
        return None
    try:
        return splits.open_data(run, source.task, wanted.data_root, labels)
    except (ValueError, OSError) as error:
        if "int8-static" in wanted.names and wanted.data_root is None:
            raise ValueError(
                f"--quantize int8-static measures scales on the run's training images: {error}; name their --data-root"
            ) from error
        if wanted.data_root is not None:
            raise
        print(f"note: the run's images do not open ({error}); --data-root names another place", file=sys.stderr)
        return None


def _made(name: str, proto: onnx.ModelProto, folder: Path, data: "Data | None", wanted: Wanted) -> onnx.ModelProto:
    if name == "int8":
        return dynamic(proto)
    if name == "float16":
        return half(proto)
    if name == "preprocess":
        return with_preprocessing(proto, read_json(folder / "preprocessor_config.json"))
    assert data is not None
    return static(proto, calibration(Classifier(folder), data, wanted))


def calibration(runtime: Classifier, data: "Data", wanted: Wanted) -> np.ndarray:
    """Training images, drawn by the seed, as the graph takes them."""
    split = data.splits["train"]
    rng = np.random.default_rng(wanted.calibration_seed)
    chosen = np.sort(rng.permutation(len(split))[: wanted.calibration_images])
    return runtime.normalize(split.decode(runtime.preprocessor["size"]["height"])[chosen])


def _save(proto: onnx.ModelProto, path: Path, like: onnx.ModelProto) -> None:
    """Write a graph as clean as the one it was made of, and check it in full."""
    del proto.graph.value_info[:]
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del part.metadata_props[:]
    proto.metadata_props.extend(like.metadata_props)
    large = proto.ByteSize() > INLINE
    onnx.save(proto, path, save_as_external_data=large, location=f"{path.name}.data")
    onnx.checker.check_model(str(path), full_check=True)


def _about(name: str, folder: Path, wanted: Wanted) -> dict[str, Any]:
    about = {"kind": KINDS[name], "bytes": sum(p.stat().st_size for p in folder.glob(f"{FILES[name]}*"))}
    if name == "int8-static":
        about["calibration"] = {
            "split": "train", "images": wanted.calibration_images, "seed": wanted.calibration_seed,
        }  # fmt: skip
    return about


def compared(float32: Classifier, variant: Classifier, data: "Data | None") -> dict[str, Any]:
    """Top-1 of both on the validation images; without images, how often both agree on random pixels.

    Raises:
        ValueError: logits that are not finite.
    """
    size = float32.preprocessor["size"]["height"]
    if data is None:
        pixels = random_pixels(RANDOM["seed"], RANDOM["images"], size)
        found = [top1(runtime, _pieces(pixels)) for runtime in (float32, variant)]
        agreement = 100 * float((found[0] == found[1]).mean())
        return {"agreement_on_random_pixels": {**RANDOM, "top1": agreement}}
    split = data.splits["val"]
    first, second = (
        top1(runtime, (pixels for pixels, _ in split.batches(size, BATCH))) for runtime in (float32, variant)
    )
    right = [100 * float((found == split.labels).mean()) for found in (first, second)]
    agreement = 100 * float((first == second).mean())
    return {
        "validation": {"images": len(split), "float32": right[0], "quantized": right[1], "agreement": agreement},
    }


def _pieces(pixels: np.ndarray) -> Iterator[np.ndarray]:
    return (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))


def top1(runtime: Classifier, batches: Iterator[np.ndarray]) -> np.ndarray:
    """The most probable class of every image.

    Raises:
        ValueError: logits that are not finite.
    """
    found = []
    for pixels in batches:
        logits = runtime.logits(pixels)
        if not np.isfinite(logits).all():
            raise ValueError(f"the {runtime.variant} graph gives logits that are not finite; nothing was written")
        found.append(logits.argmax(1))
    return np.concatenate(found)


def said(name: str, about: dict[str, Any], float32_bytes: int) -> str:
    """One line on what a variant saves and costs."""
    size = f"{name}: {about['bytes'] / 1e6:.1f} MB, {about['bytes'] / float32_bytes:.2f} of float32"
    if "validation" in about:
        found = about["validation"]
        cost = f"{found['images']} validation images: {found['float32']:.1f} % -> {found['quantized']:.1f} %"
    else:
        found = about["agreement_on_random_pixels"]
        cost = f"the same top-1 as float32 on {found['top1']:.1f} % of {found['images']} images of random pixels"
    return f"{size}; {cost}"
