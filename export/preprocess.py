"""A graph that takes any image as it is: uint8 (height, width, 3) in, probabilities out.

    squash to size × size, cubic, antialiased, clamped and rounded -> (x / 255 - mean) / std -> model -> softmax

The resize is Pillow's BICUBIC: coefficient -0.5, a support that grows with the scale, weights beyond the border left
out, 8-bit values between its two passes: rows first, but columns where the height shrinks by more than twice what the
width does (Pillow 13; older ones always take rows first). ONNX Runtime's kernel for uint8 on the CPU is within one grey
level of it. That for CUDA ignores the coefficient (microsoft/onnxruntime#25264): run this graph on the CPU. Decoding,
EXIF and colour modes stay outside.
"""

import copy
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CUBIC: dict[str, Any] = {
    "mode": "cubic",
    "cubic_coeff_a": -0.5,
    "antialias": 1,
    "exclude_outside": 1,
    "coordinate_transformation_mode": "half_pixel",
}


def with_preprocessing(proto: onnx.ModelProto, preprocessor: dict[str, Any]) -> onnx.ModelProto:
    """The classifier behind the preprocessing of its package, and a softmax behind that.

    Args:
        proto: pixel_values float32 (batch, 3, H, W) -> logits float32 (batch, classes).
        preprocessor: preprocessor_config.json, read.

    Raises:
        ValueError: an opset before 18, whose Resize has no antialiasing.
    """
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset < 18:
        raise ValueError(f"--preprocess needs opset 18 or newer, for an antialiased Resize; this graph has {opset}")
    joined = copy.deepcopy(proto)
    nodes, constants = _before(preprocessor)
    after = helper.make_node("Softmax", ["logits"], ["probabilities"], "preprocess.softmax", axis=-1)
    joined.graph.ClearField("node")
    joined.graph.node.extend([*nodes, *proto.graph.node, after])
    joined.graph.initializer.extend(constants)
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])
    slots = [given for given in proto.graph.input if given.name != "pixel_values"]
    joined.graph.ClearField("input")
    joined.graph.input.extend([image, *slots])
    classes = proto.graph.output[0].type.tensor_type.shape.dim[1]
    found = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, None])
    found.type.tensor_type.shape.dim[1].CopyFrom(classes)
    joined.graph.ClearField("output")
    joined.graph.output.append(found)
    return joined


def _before(preprocessor: dict[str, Any]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes from image to pixel_values, and the constants that they read."""
    height, width = preprocessor["size"]["height"], preprocessor["size"]["width"]
    mean, std = (np.array(preprocessor[key], np.float32).reshape(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    constants: dict[str, np.ndarray] = {
        "zero": np.array([0], np.int64),
        "height": np.array([height], np.int64),
        "width": np.array([width], np.int64),
        "size": np.array([height, width], np.int64),
        "two": np.array([2], np.int64),
        "white": np.array(255, np.float32),
        "mean": mean,
        "std": std,
    }
    names = {name: f"preprocess.{name}" for name in constants}
    nodes: list[onnx.NodeProto] = []

    def add(op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"preprocess.value{len(nodes)}"
        read = [names.get(name, name) for name in inputs]
        nodes.append(helper.make_node(op, read, [output], f"preprocess.node{len(nodes)}", **attributes))
        return output

    tall = add("Shape", "image", start=0, end=1)
    wide = add("Shape", "image", start=1, end=2)
    shrinks = add("Sub", tall, "height")
    most = add("Max", add("Mul", add("Sub", wide, "width"), "two"), "zero")
    x = add("Unsqueeze", add("Transpose", "image", perm=[2, 0, 1]), "zero")
    x = add("Resize", x, "", "", add("Where", add("Greater", shrinks, most), "height", tall), axes=[2], **CUBIC)
    x = add("Cast", add("Resize", x, "", "", "size", axes=[2, 3], **CUBIC), to=TensorProto.FLOAT)
    add("Div", add("Sub", add("Div", x, "white"), "mean"), "std", output="pixel_values")
    return nodes, [numpy_helper.from_array(value, names[name]) for name, value in constants.items()]
