"""A folded model as an ONNX graph with a dynamic batch, without a trace of the machine that made it."""

import contextlib
import copy
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

import capavision as cv
from export import names

OPSETS = (18, 20, 23)  # the widest reach, PyTorch's own choice, the newest that PyTorch writes
OPSET = 20
LEGACY_OPSET = 20  # the newest that the legacy exporter writes
Inputs = Mapping[str, tuple[Tensor, dict[int, str]]]  # by name: an example, and the symbols of its free axes


def folded(model: nn.Module) -> nn.Module:
    """A folded copy in float32 on the CPU, in eval; the model itself is left alone."""
    copied = cv.fold(copy.deepcopy(model).cpu().float())
    return copied.eval()


def to_onnx(
    model: nn.Module,
    size: int,
    labels: dict[str, str],
    opset: int | None = None,
    *,
    exporter: str | None = None,
    dynamic_size: bool = False,
    inputs: Inputs | None = None,
) -> onnx.ModelProto:
    """Trace `model` at (batch, 3, size, size); `exporter_of` tells by which exporter.

    Args:
        model: folded, in eval, float32, on the CPU.
        size: height and width, fixed in the graph unless `dynamic_size`.
        labels: class index as text -> name, stored in the graph.
        opset: one of OPSETS; None is 20.
        exporter: "dynamo" or "legacy"; None is dynamo and, where that fails, legacy, with a warning. With
            `dynamic_size` it is dynamo alone, because legacy would take sizes for constants and not say so.
        dynamic_size: leave height and width open too.
        inputs: what `model` takes after the image.

    Raises:
        ValueError: another opset or exporter, or a model that the exporter cannot trace.
    """
    opset = OPSET if opset is None else opset
    check_choices(opset, exporter)
    for module in model.modules():  # timm's global switch would come too late for a live model
        if getattr(module, "fused_attn", False) and not isinstance(getattr(module, "delta", None), cv.AttentionDelta):
            module.fused_attn = False  # type: ignore[assignment]
    kinds = [exporter] if exporter else ["dynamo"] if dynamic_size or opset > LEGACY_OPSET else list(EXPORTERS)
    proto, kind = _first_that_works(
        kinds, model, size, opset, ["batch", "height", "width"] if dynamic_size else ["batch"], inputs or {}
    )
    names.restore(proto, model)
    return _clean(proto, {"format_version": "1", "exporter": kind, "id2label": json.dumps(labels)})


def check_choices(opset: int | None, exporter: str | None) -> None:
    """Raise ValueError unless there is such an opset, and such an exporter that writes it."""
    if opset is not None and opset not in OPSETS:
        raise ValueError(f"opset {opset} is none of {', '.join(map(str, OPSETS))}")
    if exporter is not None and exporter not in EXPORTERS:
        raise ValueError(f"exporter {exporter!r} is none of {', '.join(EXPORTERS)}")
    if exporter == "legacy" and (opset or OPSET) > LEGACY_OPSET:
        raise ValueError(f"the legacy exporter writes no opset above {LEGACY_OPSET}, so not {opset}; take dynamo")


def exporter_of(proto: onnx.ModelProto) -> str:
    """The exporter that traced a graph of `to_onnx`: "dynamo" or "legacy"."""
    kind: str = next(prop.value for prop in proto.metadata_props if prop.key == "exporter")
    return kind


def _first_that_works(
    kinds: list[str], model: nn.Module, size: int, opset: int, axes: list[str], inputs: Inputs
) -> tuple[onnx.ModelProto, str]:
    """The graph by the first of these exporters that can trace the model, and which it was."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))  # a batch of 1 would be baked in
    failures: list[tuple[str, Exception]] = []
    for kind in kinds:
        model.train().eval()  # drops what some attentions cache, and a failed exporter leaves tracers there
        try:
            with _quiet():
                proto = EXPORTERS[kind](model, pixels, opset, axes, inputs)
        except Exception as error:  # the exporters raise many classes
            failures.append((kind, error))
            continue
        if failures:
            print(f"warning: {_told(model, failures)}; the {kind} exporter took over", file=sys.stderr)
        return proto, kind
    raise ValueError(_told(model, failures)) from failures[-1][1]


def _told(model: nn.Module, failures: list[tuple[str, Exception]]) -> str:
    reasons = (f"{kind}: {(str(error).strip() or type(error).__name__).splitlines()[0]}" for kind, error in failures)
    return f"{type(model).__name__} does not export ({'; '.join(reasons)})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither exporter's warnings nor its log."""
    usual = {log: log.level for log in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    for log in usual:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in usual.items():
            log.setLevel(level)


def _dynamo(model: nn.Module, pixels: Tensor, opset: int, axes: list[str], inputs: Inputs) -> onnx.ModelProto:
    if axes == ["batch"]:
        dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    else:
        dims = dict(zip((0, 2, 3), axes, strict=True))  # by name alone: their ranges are the model's affair
    symbols = {name: torch.export.Dim(name, min=0) for _, free in inputs.values() for name in free.values()}
    more = tuple({axis: symbols[name] for axis, name in free.items()} for _, free in inputs.values())
    program: Any = torch.onnx.export(
        model,
        (pixels, *(example for example, _ in inputs.values())),
        dynamo=True,
        opset_version=opset,
        verbose=False,
        input_names=["pixel_values", *inputs],
        output_names=["logits"],
        dynamic_shapes=(dims, more) if inputs else (dims,),
    )
    proto: onnx.ModelProto = program.model_proto
    return proto


def _legacy(model: nn.Module, pixels: Tensor, opset: int, axes: list[str], inputs: Inputs) -> onnx.ModelProto:
    if inputs:
        raise ValueError("it gives inputs no default")
    with tempfile.TemporaryDirectory() as folder:  # a file, because in memory it ends at 2 GB
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (pixels,),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_axes={"pixel_values": dict(zip((0, 2, 3), axes, strict=False)), "logits": {0: "batch"}},
        )
        return onnx.load(path)


EXPORTERS: dict[str, Callable[[nn.Module, Tensor, int, list[str], Inputs], onnx.ModelProto]] = {
    "dynamo": _dynamo,
    "legacy": _legacy,
}


def _clean(proto: onnx.ModelProto, about: dict[str, str]) -> onnx.ModelProto:
    """Without stack traces, paths of this machine and stale shapes."""
    proto.doc_string = ""
    for graph in names.graphs(proto.graph):
        del graph.value_info[:]  # stale entries break later quantisation
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            del part.metadata_props[:]
            part.doc_string = ""
    onnx.helper.set_model_props(proto, about)
    return proto
