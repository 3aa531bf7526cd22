"""PyTorch's names for the initializers of an exported graph.

An exporter folds transposes and batch norms into constants of its own and merges those of equal value, so that few
parameters keep their names. Here every initializer gets one back, by the first of these that holds:

    blocks.0.norm1.weight         the parameter or buffer of this value; of several, the first in state-dict order
    blocks.0.mlp.fc1.weight.T     its transpose
    stages.0.gamma.reshape        its values in another shape
    stem.conv.bias                the layer's, though the value is another: a batch norm was folded into it
    blocks.0.attn.Reshape.shape   no parameter: the module it is used in, the operator, ONNX's word for that input

A name that is taken gets "_2", "_3", …
"""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from torch import Tensor, nn

SCOPES = "pkg.torch.onnx.name_scopes"  # where the dynamo exporter says which module a node is of
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}  # operators whose inputs 1 and 2 are a weight and a bias


@dataclass(frozen=True)
class Use:
    """The first node that reads an initializer, at which of its inputs, and the module it is of."""

    node: onnx.NodeProto
    position: int
    scope: str


def restore(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Rename the initializers of `proto`, in place; `model` is what was exported, and metadata still there."""
    tensors, uses = _tensors(model), _uses(proto.graph, model)
    by_value: dict[tuple[str, bytes], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        by_value[_value(tensor.numpy())].append(name)

    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)  # names that one value may have -> its initializers
    for initializer in proto.graph.initializer:
        array, use = onnx.numpy_helper.to_array(initializer), uses.get(initializer.name)
        groups[_candidates(initializer.name, array, use, tensors, by_value)].append(initializer.name)
    names: dict[str, str] = {}
    unknown = groups.pop((), [])
    for candidates, group in groups.items():
        names |= _shared_out(candidates, group, uses)
    opsets = {each.domain: each.version for each in proto.opset_import}
    for name in sorted(unknown, key=lambda name: uses[name].position if name in uses else 0):  # a weight, then its bias
        names[name] = _by_use(name, uses[name], tensors, names, opsets) if name in uses else name
    rename(proto.graph, names)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            for each in inner:
                yield from graphs(each)


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of subgraphs too."""
    for each in graphs(graph):
        yield from each.node


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers in state-dict order, then buffers that are not saved."""
    named = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        named.setdefault(name, buffer)
    return {name: t.detach().cpu() for name, t in named.items()}


def _value(array: np.ndarray) -> tuple[str, bytes]:
    """What two arrays share exactly if they hold the same bytes of the same type, in whatever shape."""
    return array.dtype.str, hashlib.blake2b(np.ascontiguousarray(array).data).digest()


def _uses(graph: onnx.GraphProto, model: nn.Module) -> dict[str, Use]:
    initializers, modules = {i.name for i in graph.initializer}, {name for name, _ in model.named_modules()}
    uses: dict[str, Use] = {}
    for node in nodes(graph):
        for position, name in enumerate(node.input):
            if name in initializers and name not in uses:
                uses[name] = Use(node, position, _scope(node, modules))
    return uses


def _scope(node: onnx.NodeProto, modules: set[str]) -> str:
    """The innermost module that a node is of: dynamo has metadata, legacy calls it "/blocks/blocks.0/attn/MatMul"."""
    for prop in node.metadata_props:
        if prop.key == SCOPES:
            return next((s for s in reversed(ast.literal_eval(prop.value)[:-1]) if s in modules), "")
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        if path and part.startswith(f"{path[-1]}."):  # a member of a list has the list's name too
            path.pop()
        path.append(part)
    return next((s for s in (".".join(path[:end]) for end in range(len(path), 0, -1)) if s in modules), "")


def _candidates(
    own: str,
    array: np.ndarray,
    use: Use | None,
    tensors: dict[str, Tensor],
    by_value: dict[tuple[str, bytes], list[str]],
) -> tuple[str, ...]:
    """The names that the value of an initializer may have, best first; () for no parameter's."""
    same = by_value.get(_value(array), [])
    if array.size == 1:  # a number is a parameter's only where that parameter is used
        same = [name for name in same if name == own or (use and name.rpartition(".")[0] == use.scope)]
    if exact := [name for name in same if tensors[name].shape == array.shape]:
        return tuple(exact)
    if array.ndim == 2 and min(array.shape) > 1:
        turned = [name for name in by_value.get(_value(array.T), []) if tensors[name].shape == array.shape[::-1]]
        if turned:
            return tuple(f"{name}.T" for name in turned)
    return tuple(f"{name}.reshape" for name in same)


def _shared_out(candidates: tuple[str, ...], group: list[str], uses: dict[str, Use]) -> dict[str, str]:
    """Initializers of one value share out its names: a lone one takes the first, several keep to their modules."""
    if len(group) == 1:
        return {group[0]: candidates[0]}
    names = {own: own for own in group if own in candidates}
    free = [name for name in candidates if name not in names]
    for own in group:
        if own in names:
            continue
        near = [name for name in free if own in uses and name.startswith(f"{uses[own].scope}.")]
        names[own] = next(iter(near or free), candidates[0])
        free = [name for name in free if name != names[own]]
    return names


def _by_use(own: str, use: Use, tensors: dict[str, Tensor], names: dict[str, str], opsets: dict[str, int]) -> str:
    """The name of what has no parameter's value."""
    if own in tensors:
        return own
    node, weight = use.node, f"{use.scope}.weight"
    if node.op_type in LAYERS and use.position == 2:
        sibling: str = names.get(node.input[1], node.input[1]).removesuffix(".T")
        if sibling.endswith(".weight"):
            return sibling.removesuffix("weight") + "bias"
    if node.op_type in LAYERS and use.position == 1 and weight in tensors:
        transposed = any(a.name == "transB" and a.i for a in node.attribute) or node.op_type.startswith("Conv")
        return weight if transposed else f"{weight}.T"
    return ".".join(part for part in (use.scope, node.op_type, _formal(node, use.position, opsets)) if part)


def _formal(node: onnx.NodeProto, position: int, opsets: dict[str, int]) -> str:
    """ONNX's word for an input of an operator."""
    try:
        inputs = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain).inputs
    except onnx.defs.SchemaError:
        return str(position)
    formal: str = inputs[min(position, len(inputs) - 1)].name  # the last of a variadic operator stands for the rest
    return formal


def _unique(names: dict[str, str], graph: onnx.GraphProto) -> dict[str, str]:
    """The same names, none twice and none that is an input's, an output's or another value's."""
    taken = {value.name for value in (*graph.input, *graph.output)} - names.keys()
    taken |= {name for node in nodes(graph) for name in node.output}
    unique = {}
    for own, name in names.items():
        free, count = name, 1
        while free in taken:
            count += 1
            free = f"{name}_{count}"
        taken.add(free)
        unique[own] = free
    return unique


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give initializers other names, wherever they are read; a name that is taken gets a number behind it."""
    names = _unique(names, graph)
    for value in (*graph.initializer, *graph.input):
        value.name = names.get(value.name, value.name)
    for node in nodes(graph):
        node.input[:] = [names.get(name, name) for name in node.input]
