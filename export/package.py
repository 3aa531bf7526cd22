"""From an adapter file to a package: fold, export, compare with PyTorch, and only then write."""

import logging
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

import capavision as cv
from capavision.files import new_folder
from export.graph import exporter_of, fallback_of, folded
from export.parity import PROBE, measure
from export.runtime import SCHEMA, TOLERANCE, Runtime, sha256
from export.source import Source, write_json
from export.store import save

_LOG = logging.getLogger(__name__)
Then = Callable[[Path, dict[str, Any]], object]


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
    stays = any(isinstance(m, (cv.OutputDelta, cv.AttentionDelta)) for m in source.model.modules())
    with new_folder(out) as work:
        _LOG.info("tracing %s", source.architecture or "the model")
        proto = source.traced(folded(source.model), opset, exporter=exporter, dynamic_size=dynamic_size)
        sources = {source.task: source}
        manifest = head_of("folded" if stays else "merged", proto, sources)
        runtime = write(proto, manifest, sources, work, tolerance)
        if more := source.compared(runtime, tolerance, dynamic_size):
            manifest |= more
            write_manifest(work, manifest)
        if then:
            then(work, manifest)
    return manifest


def write(
    proto: onnx.ModelProto, manifest: dict[str, Any], sources: Mapping[str, Source], work: Path, tolerance: float
) -> Runtime:
    """Fill a package's folder, and its manifest with the figures of every task; returns what runs it.

    Raises:
        ValueError: what `measure` refuses.
    """
    _LOG.info("comparing ONNX Runtime with PyTorch")
    first = next(iter(sources.values()))
    save(proto, work / "model.onnx")
    write_json(work / "config.json", _config(first))
    first.write_input(work)
    write_manifest(work, manifest)  # the runtime wants one, the figures follow
    runtime = Runtime(work)
    measure(manifest["tasks"], {name: source.model for name, source in sources.items()}, runtime, tolerance)
    write_manifest(work, manifest)
    return runtime


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it, with the checksum of every other file in `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / "manifest.json")
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }
    write_json(folder / "manifest.json", manifest)


def head_of(form: str, proto: onnx.ModelProto, sources: Mapping[str, Source]) -> dict[str, Any]:
    """A manifest, but for its files and figures."""
    first = next(iter(sources.values()))
    return {
        "schema_version": SCHEMA,
        "form": form,
        "files": {},
        "graphs": {"float32": "model.onnx"},
        "tasks": {
            name: _entry(source, adapter_of(name) if form == "split" else None) for name, source in sources.items()
        },
        **first.input,
        "base": first.base,
        "opset": next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")),
        "exporter": exporter_of(proto),
        "fallback": fallback_of(proto),  # why it is not by the first way that was tried
        "versions": {
            "capavision": cv.__version__,
            "torch": torch.__version__,
            **first.builder,
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
        **source.regression,
        "adapter": adapter,
        "source_sha256": sha256(source.path),
        "methods": [plan["method"] for plan in source.about["injections"]],
        "parity": {"tolerance": 0.0},
        "probe": {**PROBE, "logits": []},
    }


def _config(source: Source) -> dict[str, Any]:
    return {
        "architecture": source.architecture,
        "num_classes": len(source.labels),
        "id2label": source.labels,
        "label2id": {name: int(index) for index, name in source.labels.items()},
        "task": source.task,
    }
