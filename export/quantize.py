"""Graphs of 8-bit integers, by ONNX Runtime's own quantizer.

int8          weights of MatMul and Gemm as int8, a scale for each output channel; an activation's scale is taken from
              the values that come by (MatMulInteger), over the whole batch: an image's logits depend a little on the
              images beside it. No data needed; convolutions stay as they are. Tables that are looked up by an input,
              as a text's tokens are, become int8 too, with one scale.
int8-static   convolutions too; activations have fixed scales, measured on training images (QuantizeLinear and
              DequantizeLinear around each operator, which the runtime fuses).

Attention's own products, of two activations, stay float32 in both: int8 there costs accuracy and saves no weight.
"""

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

DENSE = ("MatMul", "Gemm")
BATCH = 8  # calibration images a run


def dynamic(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with int8 weights in MatMul and Gemm.

    Slots (initializers that a task's adapter overrides) stay float32.

    Raises:
        ValueError: most weights are of convolutions, which this leaves alone.
    """
    share = dense_share(proto)
    if share < 0.5:
        raise ValueError(
            f"--quantize int8 covers MatMul and Gemm, which hold {100 * share:.0f} % of this model's weights: it is "
            "convolutional; --quantize int8-static covers convolutions"
        )
    slots = [i for i in proto.graph.initializer if i.name in {given.name for given in proto.graph.input}]
    plain = copy.deepcopy(proto)
    for slot in slots:
        plain.graph.initializer.remove(slot)  # what is no constant is not quantised
    kinds = [*DENSE, "Gather"] if tables(proto) else list(DENSE)
    quantised = _written(
        lambda path: quantize_dynamic(
            plain, path, op_types_to_quantize=kinds, per_channel=True, weight_type=QuantType.QInt8
        )
    )
    quantised.graph.initializer.extend(slots)
    return quantised


def static(proto: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
    """The graph with int8 weights and fixed activation scales in MatMul, Gemm and convolutions.

    Args:
        proto: the float32 graph.
        images: what the scales are measured on, as the graph takes them: float32 (n, 3, H, W).
    """
    return _written(
        lambda path: quantize_static(
            copy.deepcopy(proto),  # it moves the weights it is given into a file
            path,
            _Images(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*DENSE, "Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    )


def dense_share(proto: onnx.ModelProto) -> float:
    """Which share of all weights MatMul and Gemm multiply with; tables, which nothing multiplies with, left out."""
    sizes = {i.name: math.prod(i.dims) for i in proto.graph.initializer if i.name not in tables(proto)}
    dense = {name for node in proto.graph.node if node.op_type in DENSE for name in node.input}
    found = sum(size for name, size in sizes.items() if name in dense)
    return float(found / max(sum(sizes.values()), 1))


def tables(proto: onnx.ModelProto) -> set[str]:
    """The initializers that an input of the graph looks up rows of."""
    given, constants = ({each.name for each in part} for part in (proto.graph.input, proto.graph.initializer))
    looks = [node.input for node in proto.graph.node if node.op_type == "Gather" and node.input[1] in given]
    return {table for table, _ in looks if table in constants}


class _Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime is not typed
    def __init__(self, images: np.ndarray) -> None:
        starts = range(0, len(images), BATCH)
        self.batches: Iterator[np.ndarray] = (images[start : start + BATCH] for start in starts)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch}


def _written(quantise: Callable[[str], None]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantised.onnx"
        quantise(str(path))
        return onnx.load(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises its own preprocessing, which renames tensors and gains nothing on these graphs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
