"""Finds attentions, MLPs and blocks in a model, and q, k, v in fused projections, by looking at names and shapes."""

import re
from typing import Any

from torch import Tensor, nn

from capavision.delta import WeightDelta

Span = tuple[int, int]

_QUERY = {"q", "wq", "to_q", "to_query", "q_proj", "q_lin", "query", "query_proj"}
_VALUE = {"v", "wv", "to_v", "to_value", "v_proj", "v_lin", "value", "value_proj"}
_FUSED = {"qkv": "qkv", "qkv_proj": "qkv", "to_qkv": "qkv", "Wqkv": "qkv", "kv": "kv", "to_kv": "kv", "qk": "qk"}
_WRAPPED = {"conv", "c", "linear", "proj"}  # timm wraps projections: qkv.conv, q.c, q_proj.linear, query.proj
_MLP_NAMES = {"mlp", "ffn", "feed_forward", "mlp_channels"}


def is_weighted(module: nn.Module) -> bool:
    """Whether `module` is a Linear or Conv with a weight of its own: what a weight delta can be added to."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) and module._parameters.get("weight") is not None


def weight_of(module: nn.Module) -> Tensor:
    """The module's own weight parameter, whatever class it wears now."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def classifier(model: nn.Module) -> dict[str, nn.Module]:
    """The trained head by qualified name: what get_classifier() returns, else a usual name at the top level."""
    found: list[nn.Module] = []
    if callable(get := getattr(model, "get_classifier", None)):
        heads = get()
        found = list(heads) if isinstance(heads, (tuple, list)) else [heads]
    else:
        usual = ("classifier", "head", "fc", "score", "lm_head")
        found = [child for name in usual if isinstance(child := getattr(model, name, None), nn.Module)][:1]
    names = {module: name for name, module in model.named_modules()}
    return {names[m]: m for m in found if m in names and any(True for _ in m.parameters())}


def outside_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of `model` but those of its classifier, by name; a shared one once."""
    head = {id(p) for module in classifier(model).values() for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in head and p.is_floating_point()}


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Every Linear and Conv of `model` but those of its classifier, by qualified name."""
    head = {part for module in classifier(model).values() for part in module.modules()}
    return {name: m for name, m in model.named_modules() if is_weighted(m) and m not in head}


def _role(name: str) -> tuple[str, str]:
    """The projection's telling name and the attention's: 'blocks.0.attn.qkv.conv' -> ('qkv', 'blocks.0.attn')."""
    parts = name.split(".")
    if parts[-1] in _WRAPPED and len(parts) > 1:
        parts.pop()
    return parts[-1], ".".join(parts[:-1])


def parts_of(model: nn.Module, name: str) -> dict[str, Span]:
    """The rows of q, k and v in the fused projection `name`; empty where the layout cannot be told.

    The rows are [q | k | v], each of the attention's width. Projections that interleave q, k and v head by head
    (levit, tiny_vit, efficientformer, efficientvit_mit, halo attention, the maxxvit convs with head_first) have none.
    """
    role, parent_name = _role(name)
    letters = _FUSED.get(role, "")
    parent, host = model.get_submodule(parent_name), model.get_submodule(name)
    interleaved = getattr(parent, "head_first", False) or hasattr(parent, "key_dim") or hasattr(parent, "halo_size")
    if interleaved or not letters:
        return {}
    n_out, n_in = weight_of(host).shape[0], weight_of(host).shape[1] * int(getattr(host, "groups", 1))
    width = n_out // len(letters)
    widths = [getattr(parent, "dim_out", None) or getattr(parent, "dim", None) or n_in]
    if hasattr(parent, "num_heads") and isinstance(head_dim := getattr(parent, "head_dim", None), int):
        widths.append(int(parent.num_heads) * head_dim)  # type: ignore[arg-type]
    if n_out % len(letters) or width not in widths:
        return {}
    return {letter: (i * width, (i + 1) * width) for i, letter in enumerate(letters)}


def attentions(model: nn.Module) -> list[str]:
    """The modules that own a projection called q, v, qkv or alike."""
    known = _QUERY | _VALUE | set(_FUSED)
    owners = [owner for role, owner in map(_role, weighted(model)) if role in known and owner]
    return list(dict.fromkeys(owners))


def mlps(model: nn.Module) -> list[str]:
    """The outermost MLPs, by name or class; token mixers, position MLPs and the classifier's own do not count."""
    heads = set(classifier(model).values())
    inner = tuple(f"{owner}." for owner in attentions(model))  # position MLPs inside an attention
    found: list[str] = []
    for name, module in model.named_modules():
        last, kind = name.rpartition(".")[2], type(module).__name__.lower()
        is_mlp = last in _MLP_NAMES or ("." in name and ("mlp" in kind or "feedforward" in kind))
        inside = name.startswith(inner) or any(name.startswith(f"{outer}.") for outer in found)
        beside = "token" in last or "rel_pos" in name  # mixes tokens, or makes biases of positions
        if not is_mlp or inside or beside or not name or isinstance(module, nn.Sequential):
            continue
        has_weights = sum(is_weighted(m) for m in module.modules()) > 1
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
    say, the outermost modules of at least two layers, lists and Sequentials opened: torchvision's resnets, inception.
    """
    matcher = getattr(model, "group_matcher", None)
    declared = matcher(coarse=False) if callable(matcher) else None
    found = _declared(model, declared) if isinstance(declared, dict) else []
    return found or _outermost(model)


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


def query_value_hosts(model: nn.Module) -> dict[str, str | None]:
    """The papers' default: q and v of every attention; without one every Linear, in convolutional nets every conv.

    A fused projection whose rows cannot be told apart is adapted whole. A net counts as convolutional where its
    Linears, the classifier's surroundings aside, hold less than half of its weights.
    """
    hosts: dict[str, str | None] = {}
    everything = _away_from_head(model)
    for name in everything:
        role = _role(name)[0]
        if role in _QUERY | _VALUE:
            hosts[name] = None
        elif role in _FUSED:
            wanted = "".join(letter for letter in "qv" if letter in parts_of(model, name))
            hosts[name] = wanted or None
    if hosts:
        return hosts
    linears = {name: module for name, module in everything.items() if isinstance(module, nn.Linear)}
    convs = {name: module for name, module in everything.items() if name not in linears}
    sizes = [sum(weight_of(module).numel() for module in part.values()) for part in (linears, convs)]
    return dict.fromkeys(linears if sizes[0] >= sizes[1] else convs)


def _away_from_head(model: nn.Module) -> dict[str, nn.Module]:
    """weighted(model) without what stands beside the classifier in a small module of its own (head.pre_logits)."""
    everything = weighted(model)
    for name in classifier(model):
        around = f"{name.rpartition('.')[0]}."
        beside = [host for host in everything if host.startswith(around)]
        if 2 * len(beside) < len(everything):
            everything = {host: module for host, module in everything.items() if host not in beside}
    return everything


def group(model: nn.Module, name: str, placement: type) -> list[str] | None:
    """The hosts of a named group, or None if `name` is not one: attention, mlp, linear, conv, all."""
    if placement is not WeightDelta:
        return {"attention": attentions, "mlp": mlps, "block": blocks}.get(name, lambda _: None)(model)
    hosts = weighted(model)
    inside = {"attention": attentions, "mlp": mlps}
    if name in inside:
        owners = tuple(f"{owner}." for owner in inside[name](model))
        return [host for host in hosts if host.startswith(owners)]
    if name in ("linear", "conv"):
        return [host for host, module in hosts.items() if isinstance(module, nn.Linear) == (name == "linear")]
    return list(hosts) if name == "all" else None
