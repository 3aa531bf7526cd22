"""Finds attentions, the rows of q, k and v in them, and the classifier, by looking at names and shapes."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

Span = tuple[int, int]

_QUERY = {"q", "wq", "to_q", "to_query", "q_proj", "q_lin", "query", "query_proj"}
_VALUE = {"v", "wv", "to_v", "to_value", "v_proj", "v_lin", "value", "value_proj"}
_FUSED = {"qkv": "qkv", "qkv_proj": "qkv", "to_qkv": "qkv", "Wqkv": "qkv", "kv": "kv", "to_kv": "kv", "qk": "qk"}
_FUSED |= {"c_attn": "qkv", "query_key_value": ""}  # the latter holds q, k and v head by head
_HEAD_BY_HEAD = {"key_dim", "halo_size", "multi_query", "scale_attn", "slope_rate"}  # attributes of attentions
_WRAPPED = {"conv", "c", "linear", "proj"}  # timm wraps projections: qkv.conv, q.c, q_proj.linear, query.proj
_HEADS = ("classifier", "classification_head", "qa_outputs", "score", "head", "fc", "lm_head")
_BEFORE_HEADS = ("pre_classifier", "pooler")  # as new as the head (DistilBERT, DeBERTa): frozen they stay random


def is_weighted(module: nn.Module) -> bool:
    """Whether `module` is a Linear or Conv with a weight of its own: what a weight delta can be added to."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) and module._parameters.get("weight") is not None


def is_layer(module: nn.Module) -> bool:
    """Whether `module` multiplies by a weight of its own: is_weighted, or a class of its own like GPT-2's Conv1D."""
    weight = module._parameters.get("weight")
    tables = (nn.Embedding, nn.EmbeddingBag)
    return is_weighted(module) or (weight is not None and weight.ndim > 1 and not isinstance(module, tables))


def weight_of(module: nn.Module) -> Tensor:
    """The module's own weight parameter, whatever class it wears now."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight


def classifier(model: nn.Module) -> dict[str, nn.Module]:
    """The trained head by qualified name: what get_classifier() returns, else usual names at the top level."""
    if callable(get := getattr(model, "get_classifier", None)):
        heads = get()
        found = list(heads) if isinstance(heads, (tuple, list)) else [heads]
    else:
        found = _children(model, _HEADS)[:1]
        found += _children(model, _BEFORE_HEADS) if found else []
    names = {module: name for name, module in model.named_modules()}
    return {names[m]: m for m in found if m in names and any(True for _ in m.parameters())}


def _children(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    return [child for name in names if isinstance(child := getattr(model, name, None), nn.Module)]


def outside_head(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of `model` but those of its classifier, by name; a shared one once."""
    head = {id(p) for module in classifier(model).values() for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in head and p.is_floating_point()}


def weighted(model: nn.Module, which: Callable[[nn.Module], bool] = is_weighted) -> dict[str, nn.Module]:
    """Every Linear and Conv of `model` but those of its classifier, by qualified name; or what else `which` says."""
    head = {part for module in classifier(model).values() for part in module.modules()}
    return {name: m for name, m in model.named_modules() if which(m) and m not in head}


def _role(name: str) -> tuple[str, str]:
    """The projection's telling name and the attention's: 'blocks.0.attn.qkv.conv' -> ('qkv', 'blocks.0.attn')."""
    parts = name.split(".")
    if parts[-1] in _WRAPPED and len(parts) > 1:
        parts.pop()
    return parts[-1], ".".join(parts[:-1])


def parts_of(model: nn.Module, name: str) -> dict[str, Span]:
    """The rows of q, k and v in the fused projection `name`; empty where the layout cannot be told.

    The rows are [q | k | v], each of the attention's width. Projections that interleave q, k and v head by head
    (levit, tiny_vit, efficientformer, efficientvit_mit, halo attention, the maxxvit convs with head_first, gpt_bigcode,
    codegen, minimax) have none.
    """
    role, parent_name = _role(name)
    letters = _FUSED.get(role, "")
    parent, host = model.get_submodule(parent_name), model.get_submodule(name)
    interleaved = any(hasattr(parent, sign) for sign in _HEAD_BY_HEAD)
    if interleaved or getattr(parent, "head_first", False) or not letters:
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
    owners = [owner for role, owner in map(_role, weighted(model, is_layer)) if role in known and owner]
    return list(dict.fromkeys(owners))


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
