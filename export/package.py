"""From an adapter file to a package: fold, export, compare with PyTorch, and only then write."""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

import capavision as cv
from capavision.files import new_folder
from capavision.targets import near
from export import sizes
from export.graph import exporter_of, fallback_of, folded, to_onnx
from export.parity import PROBE, measure
from export.runtime import SCHEMA, TOLERANCE, Classifier, sha256
from export.shape import colors, fits, side
from export.store import save

ADAPTER = "adapter.safetensors"  # in a run folder
SQUASH = "squash, bicubic"  # the one way in which a package resizes
Then = Callable[[Path, dict[str, Any]], object]


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
            raise ValueError(_unfinished(path))
        about = cv.describe(file)
        _check_described(file, about)
        return cls(file, about, cv.load(file).float().eval())

    @property
    def task(self) -> str:
        """The task's name: the file's own word, else that of its folder or of the file."""
        named = self.about.get("info", {}).get("task")
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


def _unfinished(folder: Path) -> str:
    """Why there is nothing to export in a folder without an adapter file."""
    if (folder / "config.json").is_file():
        return f"{folder} holds no {ADAPTER}; finish the run first, or name an adapter file"
    if runs := sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER}")):
        return f"{folder} holds runs: {', '.join(runs[:3])}{' …' if len(runs) > 3 else ''}; name one"
    return f"{folder} is no run's folder: it holds no {ADAPTER}, and no config.json"


def _check_described(file: Path, about: dict[str, Any]) -> None:
    """Raise ValueError, with what to save, unless the file has its classes and a preprocessing that a package does."""
    classes, found = about.get("classes"), about.get("info", {}).get("preprocessing")
    if classes is None or found is None:
        lacks = f"{file} does not say its {'classes' if classes is None else 'preprocessing'}"
    elif not fits(classes, [str]) or about["num_classes"] not in (None, len(classes)):
        lacks = f"{file}: its classes are no names of its {about['num_classes']} logits"
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
    if not fits(found, {"size": side, "mean": colors, "std": colors}):
        return False
    return 0 not in found["std"] and found.get("resize", SQUASH) == SQUASH


def build(
    source: Source,
    out: Path,
    *,
    opset: int | None = None,
    exporter: str | None = None,
    dynamic_size: bool = False,
    tolerance: float = TOLERANCE,
    then: Then | None = None,
) -> dict[str, Any]:
    """Write the package of `source` to `out`, whole or not at all; returns its manifest.

    Args:
        then: what is still done to the folder and the manifest, before the folder is moved into place.

    Raises:
        ValueError: `out` exists, the model does not export (with `dynamic_size`: fixes its size), or the graph and
            PyTorch disagree.
        OSError: the disk is full.
    """
    size = source.preprocessing["size"]
    stays = any(isinstance(m, (cv.OutputDelta, cv.AttentionDelta)) for m in source.model.modules())
    with new_folder(out) as work:
        if dynamic_size:
            sizes.refuse_fixed(source.model, size)
        proto = to_onnx(folded(source.model), size, source.labels, opset, exporter=exporter, dynamic_size=dynamic_size)
        sources = {source.task: source}
        manifest = head_of("folded" if stays else "merged", proto, sources)
        write(proto, manifest, sources, work, tolerance)
        if dynamic_size:
            manifest["dynamic_size"] = sizes.compare(work / "model.onnx", source.model, size, tolerance)
            write_manifest(work, manifest)
        if then:
            then(work, manifest)
    return manifest


def write(
    proto: onnx.ModelProto, manifest: dict[str, Any], sources: Mapping[str, Source], work: Path, tolerance: float
) -> Classifier:
    """Fill a package's folder, and its manifest with the figures of every task; returns what runs it.

    Raises:
        ValueError: what `measure` refuses.
    """
    first = next(iter(sources.values()))
    save(proto, work / "model.onnx")
    _write(work / "config.json", _config(first))
    _write(work / "preprocessor_config.json", _preprocessor(first.preprocessing))
    write_manifest(work, manifest)  # the classifier wants one, the figures follow
    runtime = Classifier(work)
    measure(manifest["tasks"], {name: source.model for name, source in sources.items()}, runtime, tolerance)
    write_manifest(work, manifest)
    return runtime


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it, with the checksum of every other file in `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json")
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }
    _write(folder / "manifest.json", manifest)


def head_of(form: str, proto: onnx.ModelProto, sources: Mapping[str, Source]) -> dict[str, Any]:
    """A manifest, but for its files and figures."""
    import timm

    return {
        "schema_version": SCHEMA,
        "form": form,
        "files": {},
        "graphs": {"float32": "model.onnx"},
        "tasks": {
            name: _entry(source, adapter_of(name) if form == "split" else None) for name, source in sources.items()
        },
        "base": next(iter(sources.values())).about["base"],
        "opset": next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")),
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


def adapter_of(task: str) -> str:
    """A task's file in a split package."""
    return f"adapters/{task}.onnx_adapter"


def _entry(source: Source, adapter: str | None) -> dict[str, Any]:
    """What a manifest says of one task; `measure` fills in parity and probe."""
    return {
        "labels": list(source.labels.values()),
        "adapter": adapter,
        "source_sha256": sha256(source.path),
        "methods": [plan["method"] for plan in source.about["injections"]],
        "parity": {"tolerance": 0.0},
        "probe": {**PROBE, "logits": []},
    }


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
