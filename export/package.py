"""From an adapter file to a package: fold, export, compare with PyTorch, and only then write.

The reference is the model as trained, masks and all, so the comparison covers folding and exporting at once. The gate
is relative: the largest difference over the largest logit, at batches 1, 2, 3 and 5, with equal top-1.
"""

import copy
import dataclasses
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

import capavision as cv
from capavision.files import new_folder, refuse_existing
from capavision.targets import near
from export.graph import folded, to_onnx
from export.runtime import FILES, SCHEMA, TOLERANCE, Classifier, random_pixels, relative_error, sha256

ADAPTER = "adapter.safetensors"  # in a run folder
BATCHES = (1, 2, 3, 5)
WARN = 1e-5
SQUASH = "squash, bicubic"  # the one way in which a package resizes
PROBE = {"seed": 20240701, "count": 1}


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter file as the exporter sees it: its path, what it says of itself, and its model."""

    path: Path
    about: dict[str, Any]
    model: nn.Module

    @classmethod
    def open(cls, path: Path) -> "Source":
        """A run folder or an adapter file.

        Raises:
            ValueError: no finished run, or a file that does not load.
        """
        if not path.exists():
            raise ValueError(f"{path} is not there; {_near(path)}")
        file = path / ADAPTER if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{path} holds no {ADAPTER}; finish the run first, or name an adapter file")
        about = cv.describe(file)
        _check_described(file, about)
        return cls(file, about, cv.load(file).float().eval())


def _near(path: Path) -> str:
    """The runs and adapter files in the nearest folder that there is."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    there = [p.name for p in folder.iterdir() if p.suffix == ".safetensors" or (p / ADAPTER).is_file()]
    return f"in {folder}, {near(path.absolute().relative_to(folder).parts[0], there)}"


def _check_described(file: Path, about: dict[str, Any]) -> None:
    """Raise ValueError, with what to save, unless the file has its classes and a preprocessing that a package does."""
    found = about["info"].get("preprocessing")
    if about["classes"] is None or found is None:
        lacks = f"{file} does not say its {'classes' if about['classes'] is None else 'preprocessing'}"
    elif not _squashes(found):
        lacks = f"{file}: its preprocessing is {found}, which no package does"
    else:
        return
    raise ValueError(
        f"{lacks}; save it with classes=['ant', …], info={{'preprocessing': {{'size': 224, 'mean': [0.5, 0.5, 0.5], "
        "'std': [0.5, 0.5, 0.5]}}: the whole image is squashed to size × size, bicubic, never cropped; a timm data "
        "config has the size in input_size[-1]"
    )


def _squashes(found: Any) -> bool:
    if not isinstance(found, dict) or found.get("resize", SQUASH) != SQUASH:
        return False
    size, colors = found.get("size"), [found.get("mean"), found.get("std")]
    if not all(isinstance(each, list) and [type(x) in (int, float) for x in each] == [True] * 3 for each in colors):
        return False
    return type(size) is int and size > 0 and 0 not in colors[1]


def build(source: Source, out: Path, *, opset: int | None = None, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Write the package of `source` to `out`, whole or not at all; returns its manifest.

    Raises:
        ValueError: `out` exists, the model does not export, or the graph and PyTorch disagree.
        OSError: the disk is full.
    """
    refuse_existing(out)
    preprocessing, classes = source.about["info"]["preprocessing"], source.about["classes"]
    labels = {str(i): name for i, name in enumerate(classes)}
    proto = to_onnx(folded(source.model), preprocessing["size"], labels, opset)
    with new_folder(out) as work:
        onnx.save(proto, work / "model.onnx")
        onnx.checker.check_model(str(work / "model.onnx"), full_check=True)
        _write(work / "config.json", _config(source, labels))
        _write(work / "preprocessor_config.json", _preprocessor(preprocessing))
        manifest = _manifest(source, work, opset=proto.opset_import[0].version) | {"parity": {}, "probe": {}}
        _write(work / "manifest.json", manifest)  # the classifier wants one, the figures follow
        runtime = Classifier(work)
        manifest["parity"] = parity(runtime.logits, source.model, runtime, tolerance)
        manifest["probe"] = probe(runtime, source.model)
        _write(work / "manifest.json", manifest)
    return manifest


def parity(
    exported: Callable[[np.ndarray], np.ndarray], model: nn.Module, runtime: Classifier, tolerance: float
) -> dict[str, Any]:
    """Relative error by batch size, and how far the adapted logits lie from the base's.

    Raises:
        ValueError: an error above `tolerance`, another top-1, or an adapter that changes nothing.
    """
    size = runtime.preprocessor["size"]["height"]
    errors = {}
    for batch in BATCHES:
        pixels = random_pixels(batch, batch, size)
        found, expected = exported(pixels), reference(model, runtime, pixels)
        errors[str(batch)] = error = relative_error(found, expected)
        if not error <= tolerance:
            raise ValueError(
                f"at batch {batch} ONNX Runtime and PyTorch differ by {error:.1e} of the largest logit, above "
                f"{tolerance:g}; nothing was written"
            )
        if (found.argmax(1) != expected.argmax(1)).any():
            raise ValueError(f"at batch {batch} ONNX Runtime and PyTorch disagree on top-1; nothing was written")
        if error > WARN:
            print(f"warning: at batch {batch} the relative error is {error:.1e}", file=sys.stderr)
    return {
        "relative_error": errors,
        "tolerance": tolerance,
        "distance_to_base": _distance(model, runtime, max(errors.values())),
    }


def _distance(model: nn.Module, runtime: Classifier, error: float) -> float | None:
    """How far the deltas move the logits: parity would prove nothing of deltas that do not."""
    if not any(isinstance(module, cv.Delta) for module in model.modules()):
        return None
    pixels = random_pixels(BATCHES[-1], BATCHES[-1], runtime.preprocessor["size"]["height"])
    base = cv.remove(copy.deepcopy(model))
    distance = relative_error(reference(base, runtime, pixels), reference(model, runtime, pixels))
    if distance <= 10 * error:
        raise ValueError(f"the adapter moves the logits by {distance:.1e} only, as if untrained; nothing was written")
    return distance


@torch.inference_mode()
def reference(model: nn.Module, runtime: Classifier, pixels: np.ndarray) -> np.ndarray:
    """PyTorch's logits for the same pixels."""
    return model(torch.from_numpy(runtime.normalize(pixels))).numpy()


def probe(runtime: Classifier, model: nn.Module) -> dict[str, Any]:
    """A seeded input and PyTorch's logits for it, which `export.verify` runs again."""
    pixels = random_pixels(PROBE["seed"], PROBE["count"], runtime.preprocessor["size"]["height"])
    return {**PROBE, "logits": reference(model, runtime, pixels).tolist()}


def _config(source: Source, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "architecture": source.about["base"]["model"] if source.about["base"] else None,
        "num_classes": len(labels),
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
        "task": source.about["info"].get("task"),
    }


def _preprocessor(preprocessing: dict[str, Any]) -> dict[str, Any]:
    size = preprocessing["size"]
    return {
        "size": {"height": size, "width": size},
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
        "do_convert_rgb": True,
    }


def _manifest(source: Source, folder: Path, opset: int) -> dict[str, Any]:
    import timm

    return {
        "schema_version": SCHEMA,
        "files": {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in FILES},
        "adapter_sha256": sha256(source.path),
        "base": source.about["base"],
        "methods": [plan["method"] for plan in source.about["injections"]],
        "merged": not any(isinstance(m, (cv.OutputDelta, cv.AttentionDelta)) for m in source.model.modules()),
        "opset": opset,
        "versions": {
            "capavision": cv.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))
