"""A graph of 16-bit floats, by the converter that comes with ONNX Runtime: half the bytes.

It is for downloads, and for GPUs. On a CPU ONNX Runtime computes such a graph in float32 between its float16 weights,
no faster than the float32 graph: an accuracy measured there says what rounding the weights costs, not what a GPU's sums
do.
"""

import copy

import numpy as np
import onnx
import onnxruntime
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from export.session import plain

LARGEST = float(np.finfo(np.float16).max)
LIMIT = 2**31 - 1  # bytes of a graph that the converter takes


def half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with float16 weights and arithmetic; its inputs and outputs stay float32.

    Slots (initializers that a task's adapter overrides) are inputs, so they stay float32 too.

    Raises:
        ValueError: a weight beyond float16's range, which the converter would cut off; a graph of more than 2 GB.
    """
    if sum(tensor.ByteSize() for tensor in proto.graph.initializer) > LIMIT:
        raise ValueError("--half: the converter takes no graph of more than 2 GB; leave it out")
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            largest = np.abs(onnx.numpy_helper.to_array(tensor)).max(initial=0)
            if largest > LARGEST:
                raise ValueError(f"--half: {tensor.name} holds {largest:.3g}, and float16 ends at {LARGEST:.0f}")
    converted: onnx.ModelProto = convert_float_to_float16(copy.deepcopy(proto), keep_io_types=True)
    OnnxModel.graph_topological_sort(converted.graph)  # the converter appends its casts at the end
    return converted


class Watch:
    """Finds the largest values of a float32 graph: beyond float16's range a GPU's logits are no numbers, though a CPU,
    which computes between the weights in float32, gives fine ones.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        watched = copy.deepcopy(proto)
        del watched.graph.output[:]
        self.names = [name for node in proto.graph.node for name in node.output if name]
        watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names)
        self.session = plain(watched.SerializeToString())

    def check(self, pixels: np.ndarray, options: onnxruntime.RunOptions | None) -> None:
        """Raise ValueError for a value that float16 cannot hold, on these inputs of the graph."""
        for pixel in pixels:
            values = self.session.run(self.names, {"pixel_values": pixel[None]}, options)
            for name, value in zip(self.names, values, strict=True):
                if value.dtype == np.float32 and (top := np.abs(value[np.isfinite(value)]).max(initial=0)) > LARGEST:
                    raise ValueError(
                        f"--half: {name} reaches {top:.3g}, and float16 ends at {LARGEST:.0f}: on a GPU the logits "
                        "would be no numbers; leave it out"
                    )
