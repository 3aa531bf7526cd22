"""A training step near the cost of the frozen layer: merge first, then one product, with factored gradients.

    M  = W + ΔW,  on its row blocks M[rows] = W[rows] + s U D        U (rows, r), D (r, n_in)
    y  = x Mᵀ + b                                                     (a conv: y = x * M + b)
    dx = g M,   dU = s g[rows]ᵀ h,  h = x Dᵀ,   dD = s (g[rows] U)ᵀ x     no dense weight gradient is ever formed

A Linear's other way is the factored forward, x Wᵀ + b + s (x Dᵀ) Uᵀ, with two thin products more over all N tokens and
another pass over y; the merge needs one over the weight, whatever N. In multiply-adds, forward and the backward to x:

    merged    2 r n_out n_in          factored    2 r N (n_in + n_out)

so the merge is cheaper from N = n_in n_out / (n_in + n_out) tokens on: 144 for a ViT-Ti's qkv, 576 for a ViT-B's.

A conv's other way is the dense gradient of M, of which dU and dD follow. At each output place, for K = n_in · kernel:

    factored    2 r (K + n_out)       dense       n_out K

Here h is the conv of x with D's r kernels, and dD the weight gradient of that thin conv.

A ΔW of full rank is merged as well. Where it is made of few values, their gradients can follow from g and x by a
`Contraction` that costs less than gᵀx, for example a correlation by FFT for a circulant matrix.

Under autocast M is summed in float32 and rounded once; the thin products run on rounded factors, as they would anyway.
Rounding W + ΔW costs no accuracy: `python -m benchmarks.half`.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from capavision import kept

Rows = tuple[tuple[int, int, float], ...]  # start, stop, scale
Sizes = tuple[int, ...]

MKL = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
IN_CACHE = 2**18  # values of g and x that a contraction takes at a time, so that it finds its own again: 1 MB


class Block(NamedTuple):
    """ΔW[start:stop] = scale · up @ down, for up (stop - start, r) and down (r, n_in)."""

    start: int
    stop: int
    up: Tensor
    down: Tensor
    scale: float


class Contraction(NamedTuple):
    """How the gradients of the `tensors` that ΔW[start:stop] is made of follow from N tokens of g and x.

    gradients: of (g[:, start:stop], x, *tensors), one for each of the tensors.
    cost:      a token's, in the multiply-adds of a wide product that take as long.
    """

    start: int
    stop: int
    gradients: Callable[..., Iterable[Tensor]]
    tensors: tuple[Tensor, ...]
    cost: float


class Geometry(NamedTuple):
    """How a conv of one group moves over its input."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (b, n_in, …) * weight (n_out, n_in, …) + bias."""
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, *self, *self._rest)
        return y

    def to_input(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `conv` to x."""
        return self._backward(g, x, weight, (True, False))

    def to_weight(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `conv` to weight."""
        return self._backward(g, x, weight, (False, True))

    @property
    def _rest(self) -> tuple[bool, list[int], int]:
        return False, [0] * len(self.stride), 1

    def _backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Tensor:
        found = torch.ops.aten.convolution_backward(g, x, weight, None, *self, *self._rest, [*wanted, False])
        gradient: Tensor = found[wanted.index(True)]
        return gradient


def as_they_are(factor: Tensor) -> AbstractContextManager[Any]:
    """A product of weights in the dtype they have, where autocast would round them to half precision first."""
    kind = factor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def linear_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether merging costs fewer multiply-adds than the factored forward, for the tokens of x (…, n_in)."""
    n_out, n_in = weight.shape
    return x.numel() // n_in * (n_in + n_out) >= n_in * n_out


def contractions_pay(x: Tensor, weight: Tensor, contractions: list[Contraction]) -> bool:
    """Whether they cost less than gᵀx; only where their costs were measured, which is on a CPU and with MKL."""
    return x.device.type == "cpu" and MKL and sum(each.cost for each in contractions) < weight.numel()


def conv_pays(weight: Tensor, blocks: list[Block]) -> bool:
    """Whether factored gradients cost fewer multiply-adds than that of W + ΔW."""
    n_out, K = len(weight), weight[0].numel()
    return sum(2 * len(block.down) * (K + block.stop - block.start) for block in blocks) < n_out * K


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, blocks: list[Block], dtype: torch.dtype | None = None
) -> Tensor:
    """x (W + ΔW)ᵀ + b, (…, n_in) to (…, n_out), in `dtype`; None is that of x."""
    rows, *factors = _flat(blocks, weight.dtype)
    origin = kept.origin(x) if torch.is_grad_enabled() else None
    dtype = dtype or x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        return F.linear(x, _merge(weight, rows, tuple(factors), x.dtype), bias)
    y: Tensor = _Linear.apply(x, origin, weight, _rounded(x, weight, rows, tuple(factors)), bias, rows, *factors)
    return y


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    blocks: list[Block],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x * (W + ΔW) + b, (b, n_in, …) to (b, n_out, …), in `dtype`; None is that of x."""
    rows, *factors = _flat(blocks, weight.dtype)
    dtype = dtype or x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    rounded = _rounded(x, weight, rows, tuple(factors))
    y: Tensor = _Conv.apply(x, weight, rounded, bias, geometry, rows, *factors)
    return y


def contracted(x: Tensor, merged: Tensor, bias: Tensor | None, contractions: list[Contraction]) -> Tensor:
    """x mergedᵀ + b, (…, n_in) to (…, n_out), for merged = W + ΔW of a frozen W."""
    ways = tuple((c.start, c.stop, c.gradients, len(c.tensors)) for c in contractions)
    tensors = (tensor.to(merged.dtype) for c in contractions for tensor in c.tensors)
    y: Tensor = _Contracted.apply(x, merged, bias, ways, *tensors)
    return y


def _flat(blocks: list[Block], dtype: torch.dtype) -> tuple[Any, ...]:
    rows = tuple((block.start, block.stop, block.scale) for block in blocks)
    return rows, *(factor.to(dtype) for block in blocks for factor in (block.up, block.down))


def _merge(weight: Tensor, rows: Rows, factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """W + ΔW, in the shape and memory format of W; of a conv the very bits of the host's `weight`, and so of fold."""
    with as_they_are(weight):
        if weight.dim() == 2 and len(rows) == 1 and rows[0][:2] == (0, len(weight)):
            return torch.addmm(weight, factors[0], factors[1], alpha=rows[0][2]).to(dtype)
        merged = weight.clone()
        for (start, stop, scale), up, down in zip(rows, factors[::2], factors[1::2], strict=True):
            some = merged[start:stop]
            if torch._C._are_functorch_transforms_active():  # vmap cannot add many ΔW to one W in place
                merged = merged.slice_scatter(some + (scale * (up @ down)).view(some.shape), 0, start, stop)
            else:
                some.add_((scale * (up @ down)).view(some.shape))
        return merged.to(dtype)


def _rounded(x: Tensor, weight: Tensor, rows: Rows, factors: tuple[Tensor, ...]) -> Tensor | None:
    """W + ΔW in the lower precision of x, for forward and backward: a frozen layer under autocast keeps as much.

    Its own graph serves second derivatives; in the first ones the gradient that would go through it is None.
    """
    return None if x.dtype == weight.dtype else _merge(weight, rows, factors, x.dtype)


class _Linear(torch.autograd.Function):
    """Merged again in the backward if not `rounded`: cheaper than to keep a copy of every weight until then."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        origin: Any,
        weight: Tensor,
        rounded: Tensor | None,
        bias: Tensor | None,
        rows: Rows,
        *factors: Tensor,
    ) -> Tensor:
        return F.linear(x, _merge(weight, rows, factors, x.dtype) if rounded is None else rounded, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.origin, weight, rounded, _, ctx.rows, *factors = inputs
        ctx.save_for_backward(None if ctx.origin else x, weight, rounded, *factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, merged, *factors = ctx.saved_tensors
        g = kept.rows(gradients[0])
        inputs = kept.opened(ctx.origin, g.dtype) if x is None else kept.Tokens(kept.rows(x))
        found: list[Tensor] = []
        for (start, stop, scale), up, down in zip(ctx.rows, factors[::2], factors[1::2], strict=True):
            rows = g.narrow(1, start, stop - start)
            dU, dD = rows.mT @ inputs.times(down).to(g.dtype), inputs.gathered(rows @ up.to(g.dtype))
            found += [scale * dU.to(up.dtype), scale * dD.to(down.dtype)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ (_merge(weight, ctx.rows, tuple(factors), g.dtype) if merged is None else merged)
            dx = dx.reshape(*gradients[0].shape[:-1], -1)
        db = g.sum(0) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, db, None, *found


class _Contracted(torch.autograd.Function):
    """No gradient goes through W + ΔW, whose graph is there for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, merged: Tensor, bias: Tensor | None, ways: Any, *tensors: Tensor) -> Tensor:
        return F.linear(x, merged, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, merged, _, ctx.ways, *tensors = inputs
        ctx.save_for_backward(x, merged, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, *tensors = ctx.saved_tensors
        g2, x2 = gradients[0].reshape(-1, len(merged)), x.reshape(-1, merged.shape[1])
        some = max(1, IN_CACHE // sum(merged.shape))
        found: list[Tensor] = []
        for start, stop, contract, count in ctx.ways:
            own = tensors[len(found) : len(found) + count]
            pairs = zip(torch.split(g2.narrow(1, start, stop - start), some), torch.split(x2, some), strict=True)
            found += [torch.stack(each).sum(0) for each in zip(*(contract(*pair, *own) for pair in pairs), strict=True)]
        dx = (g2 @ merged).view_as(x) if ctx.needs_input_grad[0] else None
        db = g2.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, None, *found


class _Conv(torch.autograd.Function):
    """As `_Linear`, with channels in front and a kernel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        rounded: Tensor | None,
        bias: Tensor | None,
        geometry: Geometry,
        rows: Rows,
        *factors: Tensor,
    ) -> Tensor:
        return geometry.conv(x, _merge(weight, rows, factors, x.dtype) if rounded is None else rounded, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, rounded, _, ctx.geometry, ctx.rows, *factors = inputs
        ctx.save_for_backward(x, weight, rounded, *factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, merged, *factors = ctx.saved_tensors
        g, found = gradients[0], []
        for (start, stop, scale), up, down in zip(ctx.rows, factors[::2], factors[1::2], strict=True):
            kernels = down.to(x.dtype).view(-1, *weight.shape[1:])
            dU, dD = _thin(g.narrow(1, start, stop - start), x, up.to(x.dtype), kernels, ctx.geometry)
            found += [scale * dU.to(up.dtype), scale * dD.to(down.dtype)]
        dx = None
        if ctx.needs_input_grad[0]:
            merged = _merge(weight, ctx.rows, tuple(factors), x.dtype) if merged is None else merged
            dx = ctx.geometry.to_input(g, x, merged)
        db = g.sum([0, *range(2, g.dim())]) if ctx.needs_input_grad[3] else None
        return dx, None, None, db, None, None, *found


def _thin(g: Tensor, x: Tensor, up: Tensor, kernels: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """dU (rows, r) and dD (r, K) of a conv, for r `kernels`, without the scale."""
    places = _places(g)  # (b, rows, L)
    k = _each(up.mT, places)
    if _is_product(kernels, geometry):  # a library's conv of few channels is several times slower
        flat = _places(x)
        h, dD = _each(kernels.flatten(1), flat), (k @ flat.mT).sum(0)
    else:
        h = _places(geometry.conv(x, kernels))
        dD = geometry.to_weight(k.reshape(*k.shape[:2], *g.shape[2:]), x, kernels).reshape(len(kernels), -1)
    return (places @ h.mT).sum(0), dD


def _places(x: Tensor) -> Tensor:
    """(b, n, …) to (b, n, L)."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:]))


def _each(left: Tensor, right: Tensor) -> Tensor:
    """left (m, n) @ each of right (b, n, l): matmul would copy all of `right` into one matrix."""
    return torch.bmm(left.expand(len(right), -1, -1), right)


def _is_product(kernels: Tensor, geometry: Geometry) -> bool:
    """Whether the conv is one matrix product: a kernel of 1, every place, no border."""
    return kernels[0, 0].numel() == 1 and set(geometry.stride) == {1} and set(geometry.padding) == {0}
