"""The one softmax of an attention: how keys and values are added inside it, whatever the class that computes it.

timm's attentions, and the text encoders' too, make one call of torch's scaled_dot_product_attention each. While an
attention with a prefix runs, that call is given more keys and values:

    softmax(q [P_k; k]ᵀ · scale + [0 | mask]) [P_v; v]

How it works: a torch function mode, entered by the host's forward, sees the call go by. It is traced by torch.compile
and torch.export like any other code. Keys arrive normalised and rotated where the class does so; the prefix does not.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from capavision.attention import is_layer, weight_of
from capavision.channels import Example, run_once

Shapes = tuple[torch.Size, torch.Size, torch.Size]  # of queries, keys and values


def prepended(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **rest: Any,
) -> Tensor:
    """scaled_dot_product_attention with `keys` (heads, length, width) and `values` before its own; seen by every query.

    A mask or bias over positions is 0, or True, at the prefix.
    """
    lead, length = key.shape[:-3], keys.shape[-2]
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
        seen = attn_mask.new_full((*attn_mask.shape[:-1], length), attn_mask.dtype == torch.bool)
        attn_mask = torch.cat([seen, attn_mask], -1)
    key = torch.cat([keys.to(key.dtype).expand(*lead, *keys.shape), key], -2)
    value = torch.cat([values.to(value.dtype).expand(*lead, *values.shape), value], -2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **rest)


class Prepend(TorchFunctionMode):
    """While entered, scaled_dot_product_attention has these keys and values before its own; `used` says if it ran."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.used = True
            return prepended(self.keys, self.values, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Watch(TorchFunctionMode):
    """Notes the shapes of queries, keys and values, call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Shapes] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            self.seen.append((named["query"].shape, named["key"].shape, named["value"].shape))
        return func(*args, **(kwargs or {}))


def look(model: nn.Module, hosts: Iterable[str], example: Example | None) -> dict[str, tuple[int, int, int] | str]:
    """Of each attention the widths of all its values and keys together and its heads, or why it takes no prefix."""
    calls: dict[str, list[Shapes]] = {name: [] for name in hosts}
    watch, since = _Watch(), dict.fromkeys(calls, 0)

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            since[name] = len(watch.seen)

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = watch.seen[since[name] :]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(enter(name)) for name in calls]
    hooks += [model.get_submodule(name).register_forward_hook(leave(name)) for name in calls]
    # Some of timm's classes have the call, but use it only if this flag, off by default in swin, says so.
    usual = {m: m.fused_attn for m in map(model.get_submodule, calls) if "fused_attn" in m.__dict__}
    try:
        for module in usual:
            module.fused_attn = True  # type: ignore[assignment]
        with watch:
            run_once(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, fused in usual.items():
            module.fused_attn = fused
    return {name: _judge(model.get_submodule(name), seen) for name, seen in calls.items()}


def other_softmax(host: nn.Module, kind: type, calls: int) -> str:
    """What to say of an attention that makes not one call of scaled_dot_product_attention but so many."""
    how = "no scaled_dot_product_attention" if not calls else f"{calls} of them"
    other = getattr(getattr(host, "config", None), "_attn_implementation", "sdpa") != "sdpa"  # transformers' switch
    cure = ", which model.set_attn_implementation('sdpa') brings" if other else ""
    return f"{kind.__name__} computes its softmax in a way of its own ({how} in its forward{cure})"


def _judge(host: nn.Module, seen: list[Shapes]) -> tuple[int, int, int] | str:
    if len(seen) != 1:
        return other_softmax(host, type(host), len(seen))
    query, key, value = seen[0]
    if len(key) < 4:
        return f"the keys of {type(host).__name__} have no heads: {tuple(key)}"
    heads, n_in, n_out = key[-3], key[-3] * key[-1], value[-3] * value[-1]
    rows = {weight_of(m).shape[0] for m in host.modules() if is_layer(m)}
    widths = rows | {r // 2 for r in rows} | {r // 3 for r in rows} | {2 * r // 3 for r in rows}
    fused = query[-3] * query[-1] + n_in + n_out  # fewer heads of keys than of queries: falcon, phi3
    if n_in not in widths and fused not in rows:
        return f"{type(host).__name__} attends over channels, whose keys {tuple(key)} are as long as the image is large"
    return n_out, n_in, heads
