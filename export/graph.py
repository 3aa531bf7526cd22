"""A folded model as an ONNX graph with a dynamic batch, without a trace of the machine that made it."""

import copy
import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import nn

import capavision as cv


def folded(model: nn.Module) -> nn.Module:
    """A folded copy in float32 on the CPU, in eval; the model itself is left alone."""
    copied = cv.fold(copy.deepcopy(model).cpu().float())
    return copied.eval()


def to_onnx(
    model: nn.Module,
    size: int,
    labels: dict[str, str],
    opset: int | None = None,
    inputs: Mapping[str, tuple[torch.Tensor, dict[int, str]]] | None = None,
) -> onnx.ModelProto:
    """Trace `model` at (batch, 3, size, size).

    Args:
        model: folded, in eval, float32, on the CPU.
        size: height and width, fixed in the graph.
        labels: class index as text -> name, stored in the graph.
        opset: None takes the exporter's own.
        inputs: further inputs by name, with an example and the symbols of its free axes; they follow the image.

    Raises:
        ValueError: the exporter cannot trace the model.
    """
    for module in model.modules():  # timm's global switch would come too late for a live model
        if getattr(module, "fused_attn", False) and not isinstance(getattr(module, "delta", None), cv.AttentionDelta):
            module.fused_attn = False  # type: ignore[assignment]
    more = inputs or {}
    symbols = {name: torch.export.Dim(name, min=0) for _, free in more.values() for name in free.values()}
    free: tuple[Any, ...] = ({0: torch.export.Dim("batch", min=1)},)
    if more:
        free += (tuple({axis: symbols[name] for axis, name in axes.items()} for _, axes in more.values()),)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                model,
                (
                    torch.randn(2, 3, size, size),
                    *(example for example, _ in more.values()),
                ),  # a batch of 1 would be baked in
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=["pixel_values", *more],
                output_names=["logits"],
                dynamic_shapes=free,
            )
        except Exception as error:  # the exporter raises many classes
            raise ValueError(f"{type(model).__name__} does not export: {str(error).splitlines()[0]}") from error
    return _clean(program.model_proto, labels)


def _clean(proto: onnx.ModelProto, labels: dict[str, str]) -> onnx.ModelProto:
    del proto.graph.value_info[:]  # stale entries break later quantisation
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]  # stack traces with the paths of this machine
    onnx.helper.set_model_props(proto, {"format_version": "1", "id2label": json.dumps(labels)})
    return proto
