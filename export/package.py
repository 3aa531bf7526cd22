"""From an adapter file to a package: fold, export, compare with PyTorch, and only then write.

The reference is the model as trained, masks and all, so the comparison covers folding and exporting at once. The gate
is relative: the largest difference over the largest logit, at batches 1, 2, 3 and 5, with equal top-1.
"""

import copy
import dataclasses
import functools
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
from capavision.inject import injections
from capavision.targets import near
from export import sizes
from export.graph import exporter_of, fallback_of, folded, to_onnx
from export.runtime import SCHEMA, TOLERANCE, Classifier, random_pixels, relative_error, sha256
from export.store import save

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

    @property
    def task(self) -> str:
        """The task's name: the file's own word, else that of its folder or of the file."""
        named = self.about["info"].get("task")
        if isinstance(named, str) and named:
            return named
        return self.path.absolute().parent.name if self.path.name == ADAPTER else self.path.stem

    @property
    def labels(self) -> dict[str, str]:
        """Class index as text -> name."""
        return {str(i): name for i, name in enumerate(self.about["classes"])}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """size, mean, std."""
        found: dict[str, Any] = self.about["info"]["preprocessing"]
        return found


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


Then = Callable[[Path, dict[str, Any]], None]


def nothing(folder: Path, manifest: dict[str, Any]) -> None:
    """Add nothing to a package."""


def build(
    source: Source,
    out: Path,
    *,
    opset: int | None = None,
    exporter: str | None = None,
    dynamic_size: bool = False,
    tolerance: float = TOLERANCE,
    then: Then = nothing,
) -> dict[str, Any]:
    """Write the package of `source` to `out`, whole or not at all; returns its manifest.

    Args:
        then: what is still done to the folder and the manifest, before the folder is moved into place.

    Raises:
        ValueError: `out` exists, the model does not export (with `dynamic_size`: fixes its size), or the graph and
            PyTorch disagree.
        OSError: the disk is full.
    """
    refuse_existing(out)
    size = source.preprocessing["size"]
    if dynamic_size:
        sizes.refuse_fixed(source.model, size)
    proto = to_onnx(folded(source.model), size, source.labels, opset, exporter=exporter, dynamic_size=dynamic_size)
    stays = any(isinstance(m, (cv.OutputDelta, cv.AttentionDelta)) for m in source.model.modules())
    with new_folder(out) as work:
        write_graph(proto, work)
        write_configs(source, work)
        manifest = head_of("folded" if stays else "merged", proto, source) | {"tasks": {source.task: entry(source)}}
        write_manifest(work, manifest)  # the classifier wants one, the figures follow
        measure(manifest, {source.task: source}, Classifier(work), tolerance)
        if dynamic_size:
            manifest["dynamic_size"] = sizes.compare(work / "model.onnx", source.model, size, tolerance)
        write_manifest(work, manifest)
        then(work, manifest)
    return manifest


def write_graph(proto: onnx.ModelProto, work: Path) -> None:
    """The float32 graph, checked in full; above 1.5 GB its weights lie beside it."""
    save(proto, work / "model.onnx")


def write_configs(source: Source, work: Path) -> None:
    """What a package says in the formats of others."""
    _write(work / "config.json", _config(source))
    _write(work / "preprocessor_config.json", _preprocessor(source.preprocessing))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it, with the checksum of every other file in `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json")
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }
    _write(folder / "manifest.json", manifest)


def head_of(form: str, proto: onnx.ModelProto, source: Source) -> dict[str, Any]:
    """What a manifest says of the package as a whole."""
    import timm

    return {
        "schema_version": SCHEMA,
        "form": form,
        "files": {},
        "graphs": {"float32": "model.onnx"},
        "tasks": {},
        "base": source.about["base"],
        "opset": proto.opset_import[0].version,
        "exporter": exporter_of(proto),
        "fallback": fallback_of(proto),  # why it is not by the first way that was tried
        "versions": {
            "capavision": cv.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        },
        "quantization": {},
    }


def entry(source: Source, adapter: str | None = None) -> dict[str, Any]:
    """What a manifest says of one task; `measure` fills in parity and probe."""
    return {
        "labels": list(source.labels.values()),
        "adapter": adapter,
        "source_sha256": sha256(source.path),
        "methods": [plan["method"] for plan in source.about["injections"]],
        "parity": {},
        "probe": {},
    }


def measure(manifest: dict[str, Any], sources: dict[str, Source], runtime: Classifier, tolerance: float) -> None:
    """Compare every task with its own model as trained, and note the figures and a probe in the manifest.

    Raises:
        ValueError: a task that differs by more than `tolerance`, or whose adapter changes nothing.
    """
    for name, source in sources.items():
        task = manifest["tasks"][name]
        try:
            task["parity"] = parity(functools.partial(runtime.logits, task=name), source.model, runtime, tolerance)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        task["probe"] = probe(runtime, source.model)


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
    if not any(plan.hosts or plan.trained for plan in injections(model)):
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


def _config(source: Source) -> dict[str, Any]:
    return {
        "architecture": source.about["base"]["model"] if source.about["base"] else None,
        "num_classes": len(source.labels),
        "id2label": source.labels,
        "label2id": {name: int(index) for index, name in source.labels.items()},
        "task": source.task,
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


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))
