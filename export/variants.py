"""The other graphs of a package, each made of its model.onnx: smaller ones, and one that takes images as they are.

What a smaller graph costs is measured, not promised: its accuracy beside float32's on the run's own validation images
is written into the manifest. The test split is never touched.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from export import splits
from export.answerer import Answerer
from export.half import Watch, half
from export.package import write_manifest
from export.preprocess import with_preprocessing
from export.quantize import dynamic, static
from export.runtime import Classifier, Runtime, random_pixels, read_json, relative_error
from export.source import Source
from export.store import load, save
from export.text_source import TextSource
from export.wanted import Wanted

if TYPE_CHECKING:
    from export.splits import Data
    from export.tokens import Text

    Inputs = Data | list[Text] | None  # what there is of a task to measure on

FILES = {
    "int8": "model_int8.onnx",
    "int8-static": "model_int8_static.onnx",
    "float16": "model_float16.onnx",
    "preprocess": "model_preprocess.onnx",
}
KINDS = {  # of those that compute with other numbers
    "int8": "dynamic: MatMul and Gemm, int8 weights per channel, uint8 activations",
    "int8-static": "static QDQ: MatMul, Gemm and Conv, int8 weights per channel, uint8 activations",
    "float16": "float16 weights and arithmetic, float32 inputs and outputs",
}
WATCHED = 8  # images whose values must stay in float16's range
SEED, SAMPLES = 20240702, 64  # of random inputs to compare on where there are no images and no texts
_LOG = logging.getLogger(__name__)
COMPARED = {
    "agreement_on_random_pixels": "images of random pixels",
    "agreement_on_random_tokens": "texts, every second one of random tokens (--data-root FILE: of yours)",
    "agreement_on_random_windows": "windows, every second one of random tokens (--data-root FILE: on your questions)",
    "agreement_on_texts": "texts",
    "agreement_on_questions": "questions",
}


def add_variants(sources: dict[str, Source], folder: Path, manifest: dict[str, Any], wanted: Wanted) -> None:
    """Make variants in a package's folder, compare each with model.onnx, and note files and figures in the manifest.

    Args:
        sources: by task what the package was made of; beside each lies its run's config.json, if it has one.
        folder: the package, whole but for its variants.
        manifest: as it stands in the folder; changed here, and written with the new files' checksums.
        wanted: which variants.

    Raises:
        ValueError: a variant that this model has no use for, or that needs images which are not there; one whose output
            is not finite; images of other classes.
    """
    if "int8-static" in wanted.names and manifest["form"] == "split":
        raise ValueError(
            "--quantize int8-static has one set of scales, and each task its own activations; take --quantize int8, or "
            "export the runs one by one"
        )
    data = {task: _data(task, source, wanted) for task, source in sources.items()}
    proto = load(folder / manifest["graphs"]["float32"])
    for name in wanted.names:
        _LOG.info("making %s", name)
        _save(_made(name, proto, folder, next(iter(data.values())), wanted), folder / FILES[name], proto)
        manifest["graphs"][name] = FILES[name]
    write_manifest(folder, manifest)
    if "float16" in wanted.names:
        _refuse_overflow(proto, Classifier(folder), data)
    for name in wanted.names:
        if name in KINDS:
            _LOG.info("comparing %s with float32", name)
            manifest["quantization"][name] = _measured(name, folder, sources, data, wanted)
    write_manifest(folder, manifest)


def check(source: Source, wanted: Wanted) -> None:
    """Raise ValueError for a variant that there is for images only, before anything is traced."""
    flags = {"int8-static": "--quantize int8-static", "float16": "--half", "preprocess": "--preprocess"}
    if unfit := [name for name in wanted.names if name not in source.variants]:
        raise ValueError(
            f"{flags[unfit[0]]} is for images, and {source.path} is of {source.kind}s; they take --quantize int8"
        )


def _data(task: str, source: Source, wanted: Wanted) -> "Inputs":
    """The run's images; None, with the reason on stderr, where they do not open and nothing depends on them.

    Of a run on texts or questions those in the file that --data-root names.
    """
    if isinstance(source, TextSource):
        return source.read(wanted.data_root) if wanted.data_root else None
    run, given = splits.settings(source.path), wanted.data_root is not None
    needed = given or "int8-static" in wanted.names
    if not set(wanted.names) & KINDS.keys() or not (run or needed):
        return None
    try:
        return splits.open_data(run, task, wanted.data_root, list(source.labels.values()))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if given or (needed and isinstance(error, ModuleNotFoundError)):
            raise
        if needed:
            raise ValueError(
                f"--quantize int8-static measures its scales on the run's training images; name their --data-root "
                f"({error})"
            ) from error
        print(f"note: the run's images do not open ({error}); --data-root names another place", file=sys.stderr)
        return None


def _made(name: str, proto: onnx.ModelProto, folder: Path, data: "Inputs", wanted: Wanted) -> onnx.ModelProto:
    if name == "int8":
        return dynamic(proto)
    if name == "float16":
        return half(proto)
    if name == "preprocess":
        return with_preprocessing(proto, read_json(folder / "preprocessor_config.json"))
    assert not isinstance(data, list | None)
    return static(proto, calibration(Classifier(folder), data, wanted))


def calibration(runtime: Classifier, data: "Data", wanted: Wanted) -> np.ndarray:
    """Training images, drawn by the seed, as the graph takes them."""
    split = data.splits["train"]
    drawn = np.random.default_rng(wanted.calibration_seed).permutation(len(split))[: wanted.calibration_images]
    return runtime.normalize(split.decode(runtime.preprocessor["size"]["height"])[np.sort(drawn)])


def _refuse_overflow(proto: onnx.ModelProto, runtime: Classifier, data: "dict[str, Inputs]") -> None:
    """Raise ValueError if a value of the graph leaves float16's range on some of the images that there are."""
    watch, size = Watch(proto), runtime.preprocessor["size"]["height"]
    for task, images in data.items():
        few = images.splits["val"].head(WATCHED).decode(size) if images else random_pixels(0, WATCHED, size)
        watch.check(runtime.normalize(few), runtime.run_options(task))


def _save(proto: onnx.ModelProto, path: Path, like: onnx.ModelProto) -> None:
    """Write a graph as clean as the one it was made of, and check it in full."""
    graph = proto.graph
    del graph.value_info[:]
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    proto.metadata_props.extend(like.metadata_props)
    save(proto, path)


def _measured(
    name: str, folder: Path, sources: dict[str, Source], data: "dict[str, Inputs]", wanted: Wanted
) -> dict[str, Any]:
    """What the manifest says of a variant that computes with other numbers."""
    size = sum(path.stat().st_size for path in folder.glob(f"{FILES[name]}*"))
    about: dict[str, Any] = {"kind": KINDS[name], "bytes": size}
    scales = ""
    if name == "int8-static":
        split = next(iter(data.values())).splits["train"]
        images = min(wanted.calibration_images, len(split))
        about["calibration"] = {"split": "train", "images": images, "seed": wanted.calibration_seed}
        scales = f"; scales from {images} training images"
    opens = next(iter(sources.values())).opens
    float32, variant = opens(folder), opens(folder, variant=name)
    found = {task: compared(float32, variant, images, task) for task, images in data.items()}
    for task, figures in found.items():
        if "validation" in figures:  # a final run trains on these images too
            figures["validation"]["seen_in_training"] = splits.settings(sources[task].path).get("stage") == "final"
        share = size / sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        print(said(name, share, size, task, figures) + scales)
    return about | (next(iter(found.values())) if len(found) == 1 else {"tasks": found})


def compared(float32: Runtime, variant: Runtime, data: "Inputs", task: str) -> dict[str, Any]:
    """Top-1 of both on the validation images; without labels, how often both agree: on texts or questions, or on random
    inputs.

    Raises:
        ValueError: logits that are not finite.
    """
    if isinstance(data, list) and isinstance(float32, Answerer) and isinstance(variant, Answerer):
        return _same_answers(float32, variant, data)
    if data is None or isinstance(data, list):
        return _agreement(float32, variant, data, task)
    size, split = float32.pixels().size[0], data.splits["val"]
    batches = [(pixels for pixels, _ in split.batches(size, splits.BATCH)) for _ in range(2)]
    first, second = (np.stack(logits(*each, task)).argmax(1) for each in zip((float32, variant), batches, strict=True))
    right = {"float32": _percent(first == split.labels), "quantized": _percent(second == split.labels)}
    return {"validation": {"images": len(split), **right, "agreement": _percent(first == second)}}


def _same_answers(float32: Answerer, variant: Answerer, questions: "list[Any]") -> dict[str, Any]:
    said = [[found[0].text for found in each.answer(questions)] for each in (float32, variant)]
    same = np.array([one == two for one, two in zip(*said, strict=True)])
    return {"agreement_on_questions": {"questions": len(questions), "top1": _percent(same)}}


def _agreement(float32: Runtime, variant: Runtime, items: "list[Text] | None", task: str) -> dict[str, Any]:
    """On these texts, or on random inputs; of a regression the largest difference over the largest answer, of random
    windows of questions how often start and end are the same."""
    taken = float32.input
    if items is not None:
        about: dict[str, Any] = {"texts": len(items)}
        name, batches = "texts", [(taken.prepare([item]) for item in items) for _ in range(2)]
    else:
        about = {"seed": SEED, f"{taken.kind}s": SAMPLES}
        name, batches = f"random_{taken.unit}", [taken.each(SEED, SAMPLES) for _ in range(2)]
    first, second = (logits(*each, task) for each in zip((float32, variant), batches, strict=True))
    if first[0].shape == (1,):
        return {f"agreement_on_{name}": about | {"relative_error": relative_error(np.stack(second), np.stack(first))}}
    same = [np.array_equal(one.argmax(-1), two.argmax(-1)) for one, two in zip(first, second, strict=True)]
    return {f"agreement_on_{name}": about | {"top1": _percent(np.array(same))}}


def _percent(hits: np.ndarray) -> float:
    return 100 * float(hits.mean())


def logits(runtime: Runtime, batches: Iterable[Any], task: str) -> list[np.ndarray]:
    """Of every image, text or window.

    Raises:
        ValueError: logits that are not finite.
    """
    found: list[np.ndarray] = []
    for batch in batches:
        answer = runtime.logits(batch, task)
        if not np.isfinite(answer).all():
            raise ValueError(f"the {runtime.variant} graph gives logits that are not finite; leave that variant out")
        found += list(answer)
    return found


def said(name: str, share: float, size: int, task: str, figures: dict[str, Any]) -> str:
    """One line on what a variant saves and costs.

    >>> said("int8", 0.3, 6_500_000, "pets", {"validation": {"images": 200, "float32": 91.0, "quantized": 90.5}})
    'int8: 6.5 MB, 0.30 of float32; pets: 91.0 % -> 90.5 % of 200 validation images'
    """
    if "validation" in figures:
        found = figures["validation"]
        cost = f"{found['float32']:.1f} % -> {found['quantized']:.1f} % of {found['images']} validation images"
        cost += " (the run trained on them)" if found.get("seen_in_training") else ""
    else:
        ((key, found),) = figures.items()
        count = next(found[kind] for kind in ("images", "texts", "questions") if kind in found)
        of = f"{count} {COMPARED[key]}"
        if "top1" in found:
            cost = f"float32's answer on {found['top1']:.1f} % of {of}"
        else:
            cost = f"within {found['relative_error']:.1e} of float32's largest answer on {of}"
    return f"{name}: {size / 1e6:.1f} MB, {share:.2f} of float32; {task}: {cost}"
