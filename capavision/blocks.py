"""Finds MLPs and blocks in a model, and where attention and MLP end, by looking at names, shapes and declarations."""

import re
from typing import Any

from torch import nn

from capavision.attention import attentions, classifier, is_layer, is_weighted, weight_of, weighted
from capavision.delta import WeightDelta

_MLP_NAMES = {"mlp", "ffn", "feed_forward", "mlp_channels", "DenseReluDense"}


def mlps(model: nn.Module) -> list[str]:
    """The outermost MLPs, by name or class; token mixers, position MLPs and the classifier's own do not count."""
    heads = {part for head in classifier(model).values() for part in head.modules()}
    inner = tuple(f"{owner}." for owner in attentions(model))  # position MLPs inside an attention
    found: list[str] = []
    for name, module in model.named_modules():
        last, kind = name.rpartition(".")[2], type(module).__name__.lower()
        is_mlp = last in _MLP_NAMES or ("." in name and ("mlp" in kind or "feedforward" in kind))
        inside = name.startswith(inner) or any(name.startswith(f"{outer}.") for outer in found)
        beside = "token" in last or "rel_pos" in name  # mixes tokens, or makes biases of positions
        if not is_mlp or inside or beside or not name or isinstance(module, nn.Sequential):
            continue
        has_weights = sum(is_layer(m) for m in module.modules()) > 1
        if has_weights and not heads.intersection(module.modules()):
            found.append(name)
    return found


def blocks(model: nn.Module) -> list[str]:
    """The modules that own an MLP directly: transformer, mixer and ConvNeXt blocks. Without an MLP, `stacked`."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in mlps(model))
    return [name for name in owners if name and not _is_list(model.get_submodule(name))] or stacked(model)


def stacked(model: nn.Module) -> list[str]:
    """The blocks that the model itself declares: residual blocks, cells, dense layers; in vgg the convs.

    timm's group_matcher(coarse=False), made for layer-wise learning rates, says how they are called. Where it does not
    say, what stands around attentions, and without one the outermost modules of at least two layers, lists and
    Sequentials opened: torchvision's resnets, inception.
    """
    matcher = getattr(model, "group_matcher", None)
    declared = matcher(coarse=False) if callable(matcher) else None
    found = _declared(model, declared) if isinstance(declared, dict) else []
    return found or _around_attentions(model) or _outermost(model)


def ends(model: nn.Module) -> list[str]:
    """What each attention and each MLP returns, before the residual sum: the module itself, or its last projection."""
    return _attention_ends(model) + mlp_ends(model)


def mlp_ends(model: nn.Module) -> list[str]:
    """What each MLP returns: the module itself, or where none is a module the ends of `spans`."""
    return mlps(model) or list(spans(model))


def _attention_ends(model: nn.Module) -> list[str]:
    outside = _outside_attentions(model)
    owners = []
    for owner in attentions(model):
        around = owner.rpartition(".")[0]
        beside = [layer for layer in outside if around and layer.startswith(f"{around}.")]
        alone = len(beside) == 1 and isinstance(model.get_submodule(beside[0]), nn.Linear)
        owners.append(beside[0] if alone else owner)  # BERT's attention.self has its projection beside it
    return owners


def spans(model: nn.Module) -> dict[str, str]:
    """The MLPs of a model in which none is a module, by their ends, each with its start.

    They are two layers that widen and narrow again what a block passes on: BERT's output.dense with intermediate.dense,
    BART's fc2 with fc1.
    """
    found: dict[str, str] = {}
    if mlps(model):
        return found
    of_attentions = _attention_ends(model)
    layers = [layer for layer in _outside_attentions(model) if layer not in of_attentions]
    for block in _around_attentions(model):
        own = [layer for layer in layers if layer.startswith(f"{block}.")]
        shapes = [weight_of(model.get_submodule(layer)).shape for layer in own]
        if len(own) == 2 and shapes[0] == shapes[1][::-1]:
            found[own[1]] = own[0]
    return found


def _outside_attentions(model: nn.Module) -> list[str]:
    inside = tuple(f"{owner}." for owner in attentions(model))
    return [layer for layer in weighted(model) if not layer.startswith(inside)]


def _around_attentions(model: nn.Module) -> list[str]:
    """The innermost items of lists that hold an attention and other layers: BERT's layer.0, whose MLP is no module."""
    outside = _outside_attentions(model)
    found: dict[str, None] = {}
    for owner in attentions(model):
        parts = owner.split(".")
        for depth in range(len(parts), 1, -1):
            name = ".".join(parts[:depth])
            holds_more = any(layer.startswith(f"{name}.") for layer in outside)
            if holds_more and _is_list(model.get_submodule(name.rpartition(".")[0])):
                found[name] = None
                break
    return list(found)


def _declared(model: nn.Module, matcher: dict[str, Any]) -> list[str]:
    """The modules that a pattern of `matcher` spells out whole; the stem, and what a pattern only appends, left out."""
    specs = [(part, spec) for part, spec in matcher.items() if spec]
    entries = [(part, e) for part, spec in specs for e in ([(spec, None)] if isinstance(spec, str) else spec)]
    stem = [re.compile(pattern) for part, (pattern, _) in entries if part == "stem"]
    whole = [re.compile(pattern) for part, (pattern, appended) in entries if part != "stem" and appended is None]
    layers = weighted(model)
    found: list[str] = []
    for name, _ in model.named_modules():
        if any(p.match(f"{name}.") for p in stem) or not any(p.fullmatch(name) for p in whole):
            continue
        if any(layer == name or layer.startswith(f"{name}.") for layer in layers):
            found.append(name)
    return found


def _outermost(model: nn.Module, prefix: str = "") -> list[str]:
    heads = set(classifier(model).values())
    found: list[str] = []
    for child, module in model.get_submodule(prefix).named_children():
        name = f"{prefix}.{child}" if prefix else child
        if sum(is_weighted(m) for m in module.modules()) < 2 or heads.intersection(module.modules()):
            continue
        found += _outermost(model, name) if _is_list(module) else [name]
    return found


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def group(model: nn.Module, name: str, placement: type) -> list[str] | None:
    """The hosts of a named group, or None if `name` is not one: attention, mlp, linear, conv, all."""
    if placement is not WeightDelta:
        return {"attention": attentions, "mlp": mlp_ends, "block": blocks}.get(name, lambda _: None)(model)
    hosts = weighted(model)
    inside = {"attention": attentions, "mlp": mlps}
    if name in inside:
        owners = tuple(f"{owner}." for owner in inside[name](model))
        pairs = [layer for pair in spans(model).items() for layer in pair] if name == "mlp" else []
        return [host for host in hosts if host.startswith(owners) or host in pairs]
    if name in ("linear", "conv"):
        return [host for host, module in hosts.items() if isinstance(module, nn.Linear) == (name == "linear")]
    return list(hosts) if name == "all" else None
