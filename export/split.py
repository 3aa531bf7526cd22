"""One base graph for several runs, and one adapter file for each: python -m export --split RUN1 RUN2 … --out DIR

What some run trained is an input of the graph, with a default: no rank, the base's own biases and norms, and the head
of the first run, so that the graph without an adapter is the first run's model without its deltas. An
adapter fills every slot, those that its run left alone with their default or rank 0. So it cannot be half of another.
"""

import copy
import dataclasses
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import capavision as cv
from capavision import host as hosting
from capavision.attention import classifier, is_weighted
from capavision.ending import remove
from capavision.files import new_folder
from capavision.inject import base_tensors, injections
from capavision.state import trained
from export.graph import folded, to_onnx
from export.names import rename
from export.package import Then, adapter_of, head_of, write, write_manifest
from export.parity import parity
from export.runtime import TOLERANCE, Runtime
from export.session import model_version
from export.shape import apart
from export.slots import EXAMPLE, Slot, free_axes, opened
from export.source import Source

_LOG = logging.getLogger(__name__)
MERGED = "export it merged, python -m export RUN --out DIR"
CLASSES = "classes"  # the free axis of a head
LONGEST = 200  # bytes of a task's name: file systems end at 255, and a name has an ending
_INNER = "model."


@dataclasses.dataclass(frozen=True)
class Opening:
    """One input of the base graph besides the image: its default, and the axis whose length a task may choose."""

    default: Tensor
    axis: int | None = None
    symbol: str = ""

    def example(self) -> Tensor:
        """A value to trace the graph with."""
        if self.axis is None:
            return self.default
        shape = list(self.default.shape)
        shape[self.axis] = EXAMPLE + 2 * (self.symbol == CLASSES)
        return torch.ones(shape)


class Opened(nn.Module):
    """`model` with some of its tensors as further inputs."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, pixel_values: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        logits: Tensor = torch.func.functional_call(self.model, given, (pixel_values,))
        return logits


def named(arguments: Sequence[str]) -> dict[str, Source]:
    """The runs by task: RUN goes by the task that it was trained on, NAME=RUN by that name.

    Raises:
        ValueError: two of one name, a name that no file can have, a run that does not load.
    """
    found: dict[str, Source] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        given = bool(equals) and not Path(argument).exists()
        source = Source.open(Path(path if given else argument))
        name = name if given else source.task
        if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > LONGEST:
            raise ValueError(f"{argument}: {name!r} cannot name a file; give another name: NAME={argument}")
        if name.casefold() in map(str.casefold, found):
            raise ValueError(f"{argument} is the second run of task {name}; tell them apart: --split NAME={argument}")
        found[name] = source
    return found


def build(
    sources: dict[str, Source],
    out: Path,
    *,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
    then: Then | None = None,
) -> dict[str, Any]:
    """Write the split package of `sources`, by task, to `out`; all else is as in `export.package.build`.

    Raises:
        ValueError: also runs on different bases, sizes or preprocessings; a delta without low-rank factors; adapters
            that differ in more than values.
    """
    base, slots = _common_base(sources), _slots(sources)
    openings = _openings(sources, base, slots)
    with new_folder(out) as work:
        _LOG.info("tracing the base of %d tasks", len(sources))
        proto, base_sha256 = _graph(base, slots, openings, next(iter(sources.values())), opset)
        manifest = head_of("split", proto, sources) | {"base_sha256": base_sha256, "slots": list(openings)}
        (work / "adapters").mkdir()
        for name, source in sources.items():
            write_adapter(work / adapter_of(name), _values(source, slots[name], openings), base_sha256)
        runtime = write(proto, manifest, sources, work, tolerance)
        manifest["base_parity"] = parity(lambda pixels: _unadapted(runtime, pixels), base, runtime, tolerance)
        write_manifest(work, manifest)
        if then:
            then(work, manifest)
    return manifest


def _common_base(sources: dict[str, Source]) -> nn.Module:
    """The model that all runs began with, under the first one's head."""
    (name, first), *others = sources.items()
    plain = _plain(name, first)
    head = tuple(f"{part}." for part in classifier(plain))
    tensors = {key: t for key, t in base_tensors(plain).items() if not key.startswith(head)}
    for other, source in others:
        for what in ("base", "preprocessing"):
            mine, theirs = (_said(each, what) for each in (first, source))
            if mine != theirs:
                mine, theirs = apart(mine, theirs)
                raise ValueError(
                    f"the runs of one package share base and preprocessing, and {other} has {what} {theirs}, {name} "
                    f"has {mine}; export it to a package of its own"
                )
        found = base_tensors(_plain(other, source))
        for key, tensor in tensors.items():
            if not torch.equal(tensor, found[key]):
                raise ValueError(
                    f"{name} and {other} were trained on other base weights: {key} differs (random ones depend on the "
                    f"number of classes); {MERGED}"
                )
    return plain


def _said(source: Source, what: str) -> Any:
    return source.about["base"] if what == "base" else {"resize": "squash, bicubic", **source.preprocessing}


def _plain(name: str, source: Source) -> nn.Module:
    if not injections(source.model):
        raise ValueError(f"{name} is a tied model, which shares its weights with no other; {MERGED}")
    return remove(copy.deepcopy(source.model)).eval()


def _slots(sources: dict[str, Source]) -> dict[str, dict[str, Slot]]:
    """Of each task its slots by host, those of the classifier left out: a head is replaced whole."""
    found: dict[str, dict[str, Slot]] = {}
    first: dict[str, tuple[str, Slot]] = {}
    for task, source in sources.items():
        head = tuple(f"{part}." for part in classifier(source.model))
        found[task] = {}
        for host, module in source.model.named_modules():
            delta = getattr(module, hosting.SLOT, None)
            if not isinstance(delta, cv.Delta) or f"{host}.".startswith(head):
                continue
            slot = opened(delta)
            if slot is None:
                method = next(plan.method.name for plan in injections(source.model) if host in plan.hosts)
                raise ValueError(
                    f"{task}: {host} carries {method}, which is no product of thin matrices, so no slot holds it; "
                    f"{MERGED}, or as a delta, python -m export --delta RUN --base PACKAGE --out FILE"
                )
            other, like = first.setdefault(host, (task, slot))
            if (type(like), like.settings) != (type(slot), slot.settings):
                raise ValueError(
                    f"{host} carries a {_kind(like)} in {other} and a {_kind(slot)} in {task}, and one graph has room "
                    "for one kind there; put them into packages of their own"
                )
            found[task][host] = slot
    return found


def _kind(slot: Slot) -> str:
    names = {"Product": "low-rank weight", "Beside": "bottleneck", "Ahead": "prefix"}
    return " ".join([names[type(slot).__name__], *slot.settings])


def _openings(sources: dict[str, Source], base: nn.Module, slots: dict[str, dict[str, Slot]]) -> dict[str, Opening]:
    found: dict[str, Opening] = {}
    everywhere = {host: slot for each in slots.values() for host, slot in each.items()}
    for number, (host, slot) in enumerate(everywhere.items()):
        tensors = dict(slot.named_parameters())
        for name, axis in free_axes(slot).items():
            # A symbol for each host: ONNX Runtime takes like symbols for like lengths, and plans memory by them.
            default = tensors[name].detach()
            default = torch.zeros_like(default) if axis is None else default.narrow(axis, 0, 0)
            found[f"{host}.{hosting.SLOT}.{name}"] = Opening(
                default, axis, f"rank_{number}" if axis is not None else ""
            )
    own = base_tensors(base)
    for name in _replaced(sources, base):
        free = _is_last_layer(sources, name)
        found[name] = Opening(own[name].detach(), 0 if free else None, CLASSES if free else "")
    return found


def _replaced(sources: dict[str, Source], base: nn.Module) -> list[str]:
    """The base's own tensors that some run trained, the head's first."""
    own = base_tensors(base)
    head = tuple(f"{part}." for part in classifier(base))
    others = {name for source in sources.values() for name in trained(source.model) if name in own}
    names = [name for name in own if name.startswith(head)]
    names += [name for name in own if name in others and name not in names]
    names = [name for name in names if own[name].is_floating_point()]
    for task, source in sources.items():
        share = sum(own[name].numel() for name in trained(source.model) if name in own and not name.startswith(head))
        if share > 0.5 * sum(t.numel() for t in own.values()):
            raise ValueError(f"{task} trained most of the base, so there is nothing to share; {MERGED}")
    return names


def _is_last_layer(sources: dict[str, Source], name: str) -> bool:
    """Whether axis 0 of the tensor counts the classes, in every run."""
    models = [source.model for source in sources.values()]
    shapes = [base_tensors(model)[name].shape for model in models]
    layers = [model.get_submodule(name.rpartition(".")[0]) for model in models]
    counts = [len(source.labels) for source in sources.values()]
    return all(is_weighted(m) and s[:1] == (n,) for m, s, n in zip(layers, shapes, counts, strict=True))


def _values(source: Source, slots: dict[str, Slot], openings: dict[str, Opening]) -> dict[str, np.ndarray]:
    """What the run puts into every opening."""
    own, head = base_tensors(source.model), tuple(f"{part}." for part in classifier(source.model))
    plain = folded(source.model)
    values = {name: opening.default for name, opening in openings.items()}
    values |= {name: base_tensors(plain)[name] if name.startswith(head) else own[name] for name in values.keys() & own}
    for host, slot in slots.items():
        values |= {f"{host}.{hosting.SLOT}.{name}": value for name, value in slot.named_parameters()}
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in values.items()}


def _graph(
    base: nn.Module, slots: dict[str, dict[str, Slot]], openings: dict[str, Opening], first: Source, opset: int | None
) -> tuple[onnx.ModelProto, str]:
    """The base graph with its slots, and the checksum of its weights."""
    model = copy.deepcopy(base)
    for host, slot in {host: slot for each in slots.values() for host, slot in each.items()}.items():
        hosting.attach(model, host, copy.deepcopy(slot))
    inputs = {
        name: (opening.example(), {} if opening.axis is None else {opening.axis: opening.symbol})
        for name, opening in openings.items()
    }
    wrapped = Opened(model.eval(), list(openings)).eval()
    proto = to_onnx(wrapped, first.preprocessing["size"], first.labels, opset, exporter="dynamo", inputs=inputs)
    rename(proto.graph, {tensor.name: tensor.name.removeprefix(_INNER) for tensor in proto.graph.initializer})
    base_sha256 = _checksum(proto.graph)
    proto.metadata_props.add(key="base_sha256", value=base_sha256)
    for name, opening in openings.items():
        default = np.ascontiguousarray(opening.default.numpy())
        proto.graph.initializer.append(onnx.numpy_helper.from_array(default, name))
    return proto, base_sha256


def _checksum(graph: onnx.GraphProto) -> str:
    """sha256 over the initializers, sorted by name: names, types, shapes, bytes."""
    found = hashlib.sha256()
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        array = onnx.numpy_helper.to_array(tensor)
        found.update(f"{tensor.name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def write_adapter(path: Path, values: dict[str, np.ndarray], base_sha256: str) -> None:
    """An .onnx_adapter file that says which base it is for."""
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(model_version(base_sha256))
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    file.export_adapter(str(path))


def _unadapted(runtime: Runtime, pixels: np.ndarray) -> np.ndarray:
    logits: np.ndarray = runtime.session.run(["logits"], {"pixel_values": runtime.normalize(pixels)})[0]
    return logits
