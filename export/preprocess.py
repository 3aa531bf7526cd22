"""A graph that takes any image as it is: uint8 (height, width, 3) in, probabilities out.

    squash to size × size, cubic, antialiased -> clamp to 0 … 255, round -> (x / 255 - mean) / std -> model -> softmax

This is Pillow's BICUBIC: coefficient -0.5, a support that grows with the scale, weights beyond the border left out, and
8-bit values between its two passes, first along rows, then along columns. Decoding, EXIF and colour modes stay outside.
"""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CUBIC = {
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
    joined = onnx.ModelProto()
    joined.CopyFrom(proto)
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
    constants = {
        "first": np.array([0], np.int64),
        "width": np.array([width], np.int64),
        "height": np.array([height], np.int64),
        "black": np.float32(0),
        "white": np.float32(255),
        "mean": mean,
        "std": std,
    }
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        inputs = [f"preprocess.{name}" if name in constants else name for name in inputs]
        nodes.append(helper.make_node(op, inputs, [output], f"preprocess.node{len(nodes)}", **attributes))
        return output

    def pass_along(axis: int, size: str, x: str) -> str:
        x = add("Resize", [x, "", "", size], f"{size}.resized", axes=[axis], **CUBIC)
        x = add("Clip", [x, "black", "white"], f"{size}.clamped")
        return add("Round", [x], f"{size}.rounded")

    x = add("Transpose", ["image"], "image.planes", perm=[2, 0, 1])
    x = add("Unsqueeze", [x, "first"], "image.batch")
    x = add("Cast", [x], "image.float", to=TensorProto.FLOAT)
    x = pass_along(2, "height", pass_along(3, "width", x))
    x = add("Div", [x, "white"], "image.unit")
    x = add("Sub", [x, "mean"], "image.centred")
    add("Div", [x, "std"], "pixel_values")
    return nodes, [numpy_helper.from_array(np.asarray(v), f"preprocess.{k}") for k, v in constants.items()]
