"""A training step near the cost of the frozen layer: merge first, then one product, with factored gradients.

    M  = W + ΔW,  on its row blocks M[rows] = W[rows] + s U D         U (rows, r), D (r, n_in)
    y  = x Mᵀ + b
    dx = g M,   dU = s g[rows]ᵀ (x Dᵀ),   dD = s (g[rows] U)ᵀ x       no dense weight gradient is ever formed

The factored forward, x Wᵀ + b + s (x Dᵀ) Uᵀ, needs two thin products more over all N tokens, and another pass over y;
the merge needs one over the weight, whatever N. In multiply-adds, forward and the backward to x:

    merged    2 r n_out n_in          factored    2 r N (n_in + n_out)

so the merge is cheaper from N = n_in n_out / (n_in + n_out) tokens on: 144 for a ViT-Ti's qkv, 576 for a ViT-B's.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """ΔW[start:stop] = scale · up @ down, for up (stop - start, r) and down (r, n_in)."""

    start: int
    stop: int
    up: Tensor
    down: Tensor
    scale: float


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether merging costs fewer multiply-adds than the factored forward, for the tokens of x (…, n_in)."""
    n_out, n_in = weight.shape
    return x.numel() // n_in * (n_in + n_out) >= n_in * n_out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: list[Block]) -> Tensor:
    """x (W + ΔW)ᵀ + b, (…, n_in) to (…, n_out)."""
    factors = [factor for block in blocks for factor in (block.up, block.down)]
    rows = tuple((block.start, block.stop, block.scale) for block in blocks)
    y: Tensor = _Merged.apply(x, weight, bias, rows, *factors)
    return y


def _merge(weight: Tensor, rows: tuple[tuple[int, int, float], ...], factors: tuple[Tensor, ...]) -> Tensor:
    if len(rows) == 1 and rows[0][:2] == (0, len(weight)):
        return torch.addmm(weight, factors[0], factors[1], alpha=rows[0][2])
    merged = weight.clone()
    for (start, stop, scale), up, down in zip(rows, factors[::2], factors[1::2], strict=True):
        merged[start:stop].addmm_(up, down, alpha=scale)
    return merged


class _Merged(torch.autograd.Function):
    """Merged again in the backward: that is cheaper than to keep a copy of every weight until then."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[tuple[int, int, float], ...], *factors: Tensor
    ) -> Tensor:
        return F.linear(x, _merge(weight, rows, factors), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.rows, *factors = inputs
        ctx.save_for_backward(x, weight, *factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        g = gradients[0]
        g2, x2 = g.flatten(0, -2), x.flatten(0, -2)
        found: list[Tensor] = []
        for (start, stop, scale), up, down in zip(ctx.rows, factors[::2], factors[1::2], strict=True):
            rows = g2[:, start:stop] * scale
            found += [rows.mT @ (x2 @ down.mT), (rows @ up).mT @ x2]
        dx = (g2 @ _merge(weight, ctx.rows, tuple(factors))).view_as(x) if ctx.needs_input_grad[0] else None
        db = g2.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db, None, *found
