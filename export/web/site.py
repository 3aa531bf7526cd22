"""From a package to a static site: the page's own files, ONNX Runtime Web, the graph, and a small file for each task.

index.html, *.js, style.css    the page, the same in every site
ort/                           ONNX Runtime Web
site.json                      names, labels, size, mean and std; length and checksum of what the page loads
model.onnx                     the package's graph; of a split package its slots are inputs
tasks/0.safetensors, …         of a split package: what each task puts into the slots

ONNX Runtime Web loads no .onnx_adapter, and refuses to override an initializer. An initializer of a slot is therefore
left out, which makes the slot an input that the page must fill: it always does.
"""

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from safetensors.numpy import load, save

from capavision.files import new_folder, refuse_existing
from export import images
from export.runtime import Classifier, random_pixels, relative_error, sha256
from export.web import npm

MAX_BYTES = 2**31 - 1  # of the graph: what a browser's 4 GB of wasm memory hold twice, and protobuf once


def build(package: Path, out: Path, *, variant: str = "float32", runtime: Path | None = None) -> dict[str, Any]:
    """Write the site of `package` to `out`, whole or not at all; returns what its site.json holds.

    Args:
        package: what `python -m export` wrote.
        out: a folder that is not there yet.
        variant: which of the package's graphs.
        runtime: ONNX Runtime Web's npm package as a file; None takes it from the cache or through npm.

    Raises:
        ValueError: `out` exists, no package, a graph too large for a browser, or no runtime.
        OSError: the disk is full.
    """
    refuse_existing(out)
    classifier = Classifier(package, variant=variant)  # which compares the checksums
    classifier.pixels()  # or it is refused
    with new_folder(out) as work:
        _copy_page(work)
        npm.unpack(work / "ort", runtime)
        _write_graph(classifier, work)
        slots = _write_slots(classifier, work)
        site = _describe(classifier, work, slots)
        (work / "site.json").write_text(json.dumps(site, indent=1))
    return site


def _copy_page(work: Path) -> None:
    for source in (resources.files("export.web") / "page").iterdir():
        (work / source.name).write_bytes(source.read_bytes())


def _write_graph(classifier: Classifier, work: Path) -> None:
    graph = classifier.folder / classifier.manifest["graphs"][classifier.variant]
    if graph.with_name(f"{graph.name}.data").exists() or graph.stat().st_size > MAX_BYTES:
        raise ValueError(f"{graph} is larger than a browser loads (2 GB); export a smaller model, or take a --variant")
    if classifier.manifest["form"] != "split":
        shutil.copyfile(graph, work / "model.onnx")
        return
    proto = onnx.load(graph)
    slots = set(classifier.manifest["slots"])
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in slots]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.save(proto, work / "model.onnx")


def _write_slots(classifier: Classifier, work: Path) -> list[str | None]:
    """A file for each task, tried with ONNX Runtime against the probe; None for a task whose graph has no slots."""
    tasks = classifier.manifest["tasks"]
    if classifier.manifest["form"] != "split":
        return [None] * len(tasks)
    (work / "tasks").mkdir()
    names = [f"tasks/{number}.safetensors" for number in range(len(tasks))]  # a task's own name may be any text
    for name, task in zip(names, tasks.values(), strict=True):
        adapter = onnxruntime.AdapterFormat.read_adapter(str(classifier.folder / task["adapter"]))
        values = {key: np.ascontiguousarray(value.numpy()) for key, value in adapter.get_parameters().items()}
        (work / name).write_bytes(save(values))  # save_file would let only its owner read it, and no web server
    _try_slots(classifier, work, names)
    return list(names)


def _try_slots(classifier: Classifier, work: Path, names: list[str]) -> None:
    """Raise ValueError unless the page's graph, filled, gives the logits of the package's."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(work / "model.onnx", options, providers=["CPUExecutionProvider"])
    pixels = random_pixels(0, 1, classifier.preprocessor["size"]["height"])
    for name, task in zip(names, classifier.tasks, strict=True):
        feeds = {**load((work / name).read_bytes()), "pixel_values": classifier.normalize(pixels)}
        error = relative_error(session.run(["logits"], feeds)[0], classifier.logits(pixels, task))
        if not error <= classifier.manifest["tasks"][task]["parity"]["tolerance"]:
            raise ValueError(f"the page's graph differs by {error:.1e} for {task}; nothing was written")


def _describe(classifier: Classifier, work: Path, slots: list[str | None]) -> dict[str, Any]:
    tasks, preprocessor = classifier.manifest["tasks"], classifier.preprocessor
    architecture = json.loads((classifier.folder / "config.json").read_text())["architecture"]
    return {
        "title": ", ".join(tasks),
        "height": preprocessor["size"]["height"],
        "width": preprocessor["size"]["width"],
        "mean": preprocessor["image_mean"],
        "std": preprocessor["image_std"],
        "max_pixels": images.LIMIT,
        "model": {
            "name": architecture or "a model of its own",
            "variant": classifier.variant,
            "file": _file(work, "model.onnx"),
        },
        "runtime": {"version": npm.VERSION, "wasm": _file(work, "ort/ort.wasm")},
        "tasks": [
            {"name": name, "labels": task["labels"], "slots": _file(work, path) if path else None}
            for (name, task), path in zip(tasks.items(), slots, strict=True)
        ],
    }


def _file(work: Path, path: str) -> dict[str, Any]:
    return {"path": path, "bytes": (work / path).stat().st_size, "sha256": sha256(work / path)}
