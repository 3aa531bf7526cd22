"""The class swap: how a module gains a delta and stays itself.

`attach` gives a host a child named "delta" and swaps its class for a generated subclass. Its identity, its parameters'
names, `isinstance` and its attributes stay; `detach` gives the class back, and with it every bit of the base.

How it works:

    class AdaptedLinear(nn.Linear):           # made once per host class; then host.__class__ = AdaptedLinear
        @property
        def weight(self):                     # whoever reads the weight gets W + ΔW: beit, eva, swin_v2, every conv
            return self._parameters["weight"] + self.delta.weight()
        def forward(self, x):                 # if ΔW is factored, and the class's forward exactly nn.Linear.forward
            return F.linear(x, self._parameters["weight"], self.bias) + self.delta(x)

    class AdaptedMlp(Mlp):                    # a block: the base forward runs, its output gains Δ(x, y)
        def forward(self, x, *args, **kwargs):
            y = Mlp.forward(self, x, *args, **kwargs)
            return y + self.delta(x, y)

    class TappedLinear(nn.Linear):            # the first of two modules that stand for a block, see capavision.span
        def forward(self, x):
            self._span.put(x)
            return nn.Linear.forward(self, x)
    class SpanningLinear(nn.Linear):          # the second: its x is what the first was given
        def forward(self, h):
            x = self._span.take()
            y = nn.Linear.forward(self, h)
            return y + self.delta(x, y)

    class PrefixedAttention(Attention):       # an attention: its one softmax sees more keys and values
        def forward(self, *args, **kwargs):
            with Prepend(*self.delta()):          # refused if no softmax came by: transformers' switch to "eager"
                return Attention.forward(self, *args, **kwargs)

    class MaskedLinear(nn.Linear):            # one depth of a weight-tied model, see capavision.tying
        @property
        def weight(self):
            return self._parameters["weight"] * self.mask
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from capavision import merged
from capavision.delta import AttentionDelta, Delta, OutputDelta, WeightDelta, adapted, first_input, input_name
from capavision.softmax import Prepend, other_softmax
from capavision.span import Span
from capavision.wrappers import is_sharded

SLOT = "delta"
_SPAN = "_span"


def _base_weight(host: Any, traced: Any) -> Tensor:
    """W; for a torch.fx tracer without its name, under which the graph would find W + ΔW."""
    base: Tensor = host._parameters["weight"]
    return base.detach() if isinstance(traced, Proxy) else base


def _adapted_weight(host: Any) -> Tensor:
    base: Tensor = host._parameters["weight"]
    if is_sharded(base) and all(map(is_sharded, host.delta.parameters())):
        return base  # fully_shard asks for the parameter it keeps; around a forward it makes base and delta whole
    delta: Tensor = host.delta.weight()
    base = _base_weight(host, delta)
    return base + delta.view_as(base).to(base.dtype)


def _linear_forward(host: Any, x: Tensor) -> Tensor:
    base: Tensor = host._parameters["weight"]
    dtype = _merged_dtype(host, x)
    if not host.delta.factored and base.dtype == delta_dtype(base):
        ways = host.delta.contractions() if dtype == base.dtype and torch.is_grad_enabled() else None
        if ways is not None and merged.contractions_pay(x, base, ways):
            return merged.contracted(x, host.weight, host.bias, ways)
        return F.linear(x, host.weight, host.bias)
    if dtype and merged.linear_pays(x, base) and (blocks := host.delta.blocks()) is not None:
        return merged.linear(x, base, host.bias, blocks, dtype)
    added: Tensor = host.delta(x)
    return F.linear(x, _base_weight(host, x), host.bias) + added


def _conv_forward(host: Any, x: Tensor) -> Tensor:
    base: Tensor = host._parameters["weight"]
    simple = host.groups == 1 and host.padding_mode == "zeros" and not isinstance(host.padding, str)
    if simple and torch.is_grad_enabled() and (dtype := _merged_dtype(host, x)) and x.dim() == base.dim():
        blocks = host.delta.blocks()
        if blocks is not None and merged.conv_pays(base, blocks):
            geometry = merged.Geometry(host.stride, host.padding, host.dilation)
            return merged.conv(x, base, host.bias, geometry, blocks, dtype)
    y: Tensor = type(host)._base.forward(host, x)
    return y


def _merged_dtype(host: Any, x: Any) -> torch.dtype | None:
    """What the product with W + ΔW runs in: the weight's dtype, or autocast's; None where ΔW acts on its own.

    That is beside a W in half precision, which would swallow a small ΔW; beside a trained or sharded W; in what is
    traced for others to run; and under forward-mode differentiation.
    """
    if isinstance(x, Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined,no-untyped-call]
        return None
    if forward_ad._current_level >= 0:
        return None
    base: Tensor = host._parameters["weight"]
    if base.dtype != delta_dtype(base) or base.requires_grad or is_sharded(base):
        return None
    kind = x.device.type
    lower = base.dtype is torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if lower else base.dtype
    return dtype if x.dtype in (dtype, base.dtype) else None


def _replicate(host: Any) -> Any:
    raise TypeError(
        "nn.DataParallel assigns weights to its copies, and this one is computed; wrap the model in "
        "torch.nn.parallel.DistributedDataParallel"
    )


_CONVS = {kind.forward: kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _weight_body(base: type) -> dict[str, Any]:
    body: dict[str, Any] = {"weight": property(_adapted_weight), "_replicate_for_data_parallel": _replicate}
    own: Any = base
    if own.forward is nn.Linear.forward:
        body["forward"] = _linear_forward
    elif own.forward in _CONVS and own._conv_forward is _CONVS[own.forward]:
        body["forward"] = _conv_forward
    return body


def _output_body(base: type) -> dict[str, Any]:
    name = input_name(base)
    return _added(base, lambda _, args, kwargs: first_input(name, args, kwargs))


def _spanning_body(base: type) -> dict[str, Any]:
    return _added(base, lambda host, *_: host._span.take())


def _added(base: type, read: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> dict[str, Any]:
    def forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        x = read(host, args, kwargs)
        y = base.forward(host, *args, **kwargs)  # type: ignore[attr-defined]
        return adapted(x, y, lambda y: host.delta(x, y))

    if issubclass(base, nn.Sequential):  # its own forward iterates over it, and must not meet the delta there
        return {"forward": forward, "__iter__": _links, "__len__": lambda host: sum(1 for _ in host)}
    return {"forward": forward}


def _links(host: Any) -> Iterator[nn.Module]:
    return (module for name, module in host._modules.items() if name != SLOT)


def _tapped_body(base: type) -> dict[str, Any]:
    name = input_name(base)

    def forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        host._span.put(first_input(name, args, kwargs))
        return base.forward(host, *args, **kwargs)  # type: ignore[attr-defined]

    return {"forward": forward}


def _prefixed_body(base: type) -> dict[str, Any]:
    def forward(host: Any, *args: Any, **kwargs: Any) -> Any:
        prefix = Prepend(*host.delta())
        with prefix:
            y = base.forward(host, *args, **kwargs)  # type: ignore[attr-defined]
        if not prefix.used:
            raise ValueError(f"{other_softmax(host, base, 0)}, so its prefix would do nothing")
        return y

    # timm's flag for the call that Prepend waits for; a switch of the base class must not lead past the prefix
    return {"forward": forward, "fused_attn": property(lambda host: True)}


def _frozen_body(base: type) -> dict[str, Any]:
    def train(host: Any, mode: bool = True) -> Any:
        return base.train(host, False)  # type: ignore[attr-defined]

    def reset_running_stats(host: Any) -> None:
        """Nothing: torch.optim.swa_utils.update_bn would zero what a norm in eval never measures again."""

    return {"train": train, "reset_running_stats": reset_running_stats}


def _masked_weight(host: Any) -> Tensor:
    weight: Tensor = host._parameters["weight"] * host.mask
    return weight


def _masked_body(base: type) -> dict[str, Any]:
    return {"weight": property(_masked_weight)}


_BODIES: dict[str, Callable[[type], dict[str, Any]]] = {
    "Adapted": _weight_body,
    "Extended": _output_body,
    "Tapped": _tapped_body,
    "Spanning": _spanning_body,
    "Prefixed": _prefixed_body,
    "Frozen": _frozen_body,
    "Masked": _masked_body,
}
_classes: dict[tuple[type, str], type] = {}


def _generated(base: type, kind: str) -> type:
    if (base, kind) not in _classes:

        def reduce(host: Any, protocol: Any) -> Any:  # a generated class pickles as its base and its kind
            return _new, (base, kind), host.__getstate__()

        own = {"_base": base, "_kind": kind, "__reduce_ex__": reduce, "__module__": base.__module__}
        body = {**own, **_BODIES[kind](base)}
        _classes[base, kind] = type(f"{kind}{base.__name__}", (base,), body)
    return _classes[base, kind]


def _new(base: type, kind: str) -> Any:
    cls: Any = _generated(base, kind)
    return cls.__new__(cls)


def _swap(module: nn.Module, kind: str) -> None:
    module.__class__ = _generated(type(module), kind)


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return "_base" in type(module).__dict__


def attach(model: nn.Module, name: str, delta: Delta, start: str | None = None) -> None:
    """Give the module `name` a delta and the class that uses it. It must not have one yet.

    Where the delta reads the input of another module, `start`, that one gets its class, too.
    """
    host = model.get_submodule(name)
    assert not is_swapped(host)
    setattr(host, SLOT, delta.train(host.training))
    if start is None:
        kinds = {"Adapted": WeightDelta, "Extended": OutputDelta, "Prefixed": AttentionDelta}
        _swap(host, next(kind for kind, placement in kinds.items() if isinstance(delta, placement)))
        return
    span = Span(start, name)
    for module, kind in ((model.get_submodule(start), "Tapped"), (host, "Spanning")):
        assert not is_swapped(module)
        module.__dict__[_SPAN] = span
        _swap(module, kind)


def spanned(module: nn.Module) -> Span | None:
    """The span that the module starts or ends, if any."""
    return module.__dict__.get(_SPAN)


def joined(start: nn.Module, host: nn.Module) -> bool:
    """Whether they start and end one span."""
    span = spanned(start)
    return span is not None and span is spanned(host)


def serves(module: nn.Module) -> bool:
    """Whether the module carries a delta, or starts the span of one."""
    return isinstance(getattr(module, SLOT, None), Delta) or spanned(module) is not None


def detach(module: nn.Module, training: bool) -> None:
    """Give `module` its own class back and drop its delta; a frozen norm goes back to the model's mode, `training`."""
    if is_swapped(module):
        module.__class__ = type(module)._base  # type: ignore[attr-defined]
        module.__dict__.pop(_SPAN, None)
        if isinstance(getattr(module, SLOT, None), Delta):
            delattr(module, SLOT)
        elif "_trained_before" in module.__dict__:
            module.train(module.__dict__.pop("_trained_before") and training)


def fold(host: nn.Module) -> None:
    """Write W + ΔW into a new weight parameter, summed in float32 or better; elsewhere make the delta dense."""
    delta = getattr(host, SLOT)
    if isinstance(delta, (OutputDelta, AttentionDelta)):
        setattr(host, SLOT, delta.folded())
        return
    base = host._parameters["weight"]
    assert base is not None
    exact = base.detach().to(delta_dtype(base))
    weight = (exact + delta.weight().detach().view_as(exact)).to(base.dtype)
    detach(host, host.training)
    # A new parameter: a weight that two modules share must not change under the other one.
    host.weight = nn.Parameter(weight, requires_grad=base.requires_grad)


def mask(host: nn.Module, bits: Tensor) -> None:
    """Show `host` its weight through `bits`, 0/1 of the weight's shape; they are never saved."""
    assert not is_swapped(host)
    host.register_buffer("mask", bits, persistent=False)
    _swap(host, "Masked")


def unmask(host: nn.Module) -> None:
    """Give a masked host its own class and its unmasked weight back."""
    assert is_masked(host)
    host.__class__ = type(host)._base  # type: ignore[attr-defined]
    del host.mask


def is_masked(module: nn.Module) -> bool:
    """Whether the module sees its weight through a mask of ours."""
    return type(module).__dict__.get("_kind") == "Masked"


def delta_dtype(weight: Tensor) -> torch.dtype:
    """The dtype deltas are kept in beside `weight`: float32, or float64 on a float64 base."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics."""
    return isinstance(module, _BatchNorm)


def batch_norm_statistics(model: nn.Module) -> tuple[str, ...]:
    """The buffers that batch norms change in train mode, by name."""
    norms = [(name, m) for name, m in model.named_modules() if is_batch_norm(m)]
    return tuple(f"{name}.{buffer}" for name, m in norms for buffer, _ in m.named_buffers(recurse=False))


def freeze_batch_norm(model: nn.Module) -> list[nn.Module]:
    """Keep every batch norm in eval for good, so that running statistics stay those of the base; returns them."""
    norms: list[nn.Module] = [m for m in model.modules() if is_batch_norm(m) and not is_swapped(m)]
    for norm in norms:
        norm.__dict__["_trained_before"] = norm.training or not model.training
        _swap(norm, "Frozen")
        norm.train(False)
    return norms
