"""A graph of 16-bit floats, by the converter that comes with ONNX Runtime: half the bytes.

It is for downloads, and for GPUs. On a CPU ONNX Runtime computes such a graph in float32 between its float16 weights,
no faster than the float32 graph: an accuracy measured there says what rounding the weights costs, not what a GPU's sums
do.
"""

import copy

import numpy as np
import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

LARGEST = float(np.finfo(np.float16).max)


def half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with float16 weights and arithmetic; its inputs and outputs stay float32.

    Slots (initializers that a task's adapter overrides) are inputs, so they stay float32 too.

    Raises:
        ValueError: a weight beyond float16's range, which the converter would cut off.
    """
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            largest = np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0)
            if largest > LARGEST:
                raise ValueError(f"--half: {tensor.name} holds {largest:.3g}, and float16 ends at {LARGEST:.0f}")
    converted: onnx.ModelProto = convert_float_to_float16(copy.deepcopy(proto), keep_io_types=True)
    OnnxModel.graph_topological_sort(converted.graph)  # the converter appends its casts at the end
    return converted
