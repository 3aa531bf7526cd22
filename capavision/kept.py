"""A layer's input, from what the layer before it keeps anyway.

The gradients of an adapted layer need its input x, which a frozen one does not keep. Where x comes from an activation
or a layer norm, autograd keeps the input z of that, and x need not be kept besides. With mean μ, inverse deviation ρ,
gain γ and shift β of a norm, products with x are taken from z, and x is never formed:

    x = σ(z)                        computed again
    x = γ ⊙ ρ (z - μ) + β           x Dᵀ = ρ (z D_γᵀ - μ ⊗ D_γ 1) + D β,  D_γ = D ⊙ γ
                                    kᵀ x = γ ⊙ ((ρk)ᵀ z - (ρk)ᵀ μ ⊗ 1) + kᵀ1 ⊗ β

A ViT with all Linears adapted then keeps about as much as a frozen one (`python -m benchmarks.step`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: F.silu(node._saved_self),
}
_NORM = "NativeLayerNormBackward0"


class Tokens(NamedTuple):
    """x itself, (N, n)."""

    x: Tensor

    def times(self, D: Tensor) -> Tensor:
        """x Dᵀ, for D (r, n)."""
        return self.x @ D.to(self.x.dtype).mT

    def gathered(self, k: Tensor) -> Tensor:
        """kᵀ x, for k (N, r)."""
        return k.to(self.x.dtype).mT @ self.x


class Normalized(NamedTuple):
    """γ ⊙ ρ (z - μ) + β, for z (N, n), μ and ρ (N, 1), γ and β (n)."""

    z: Tensor
    mean: Tensor
    rstd: Tensor
    gain: Tensor
    shift: Tensor

    def times(self, D: Tensor) -> Tensor:
        """x Dᵀ, for D (r, n)."""
        D = D.to(self.z.dtype)
        scaled = D * self.gain
        return self.rstd * (self.z @ scaled.mT - self.mean * scaled.sum(1)) + D @ self.shift

    def gathered(self, k: Tensor) -> Tensor:
        """kᵀ x, for k (N, r)."""
        k = k.to(self.z.dtype)
        scaled = self.rstd * k
        return self.gain * (scaled.mT @ self.z - scaled.mT @ self.mean) + k.sum(0)[:, None] * self.shift


def rows(x: Tensor) -> Tensor:
    """(…, n) to (N, n), N = 1 of a mere (n); by reshape, which is_grads_batched can batch, and flatten not."""
    return x.reshape(-1, x.shape[-1])


def origin(x: Tensor) -> Any:
    """The autograd node that keeps what x (…, n) can be had from in the backward; None if x has to be kept itself.

    Under saved-tensor hooks, those of checkpointing among them, a node gives what it keeps only once, wherever the
    hooks stood; a compiler chooses for itself what to compute again. An x that was written into is no longer what the
    node made, even where autograd was not to see it. (What is written through `.data` leaves no trace at all.)
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return None
    node: Any = x.grad_fn
    if node is None or x._version:
        return None
    if node.name() in _ACTIVATIONS:
        return None if _hooked(node._raw_saved_self) else node
    whole = node.name() == _NORM and tuple(node._saved_normalized_shape) == x.shape[-1:]
    return node if whole and not _hooked(node._raw_saved_input) else None


def _hooked(saved: Any) -> bool:
    """Whether a node's saved tensor has hooks, or may have them."""
    return getattr(saved, "unpack_hook", saved) is not None


def opened(node: Any, dtype: torch.dtype) -> Tokens | Normalized:
    """The input of which `origin` gave the node; an activation's in `dtype`, for gradients of that."""
    if node.name() in _ACTIVATIONS:
        return Tokens(rows(_ACTIVATIONS[node.name()](node)).to(dtype))
    z = rows(node._saved_input)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    mean, rstd = (t.reshape(-1, 1).to(z.dtype) for t in (node._saved_result1, node._saved_result2))
    if torch.is_grad_enabled():  # second derivatives see what depends on z, at the same values
        mean = z.mean(1, keepdim=True)
        variance = (z - mean).square().mean(1, keepdim=True)
        rstd = (variance + (rstd**-2 - variance).detach()).rsqrt()
    gain, shift = node._saved_weight, node._saved_bias
    gain = torch.ones_like(z[0]) if gain is None else gain.to(z.dtype)
    return Normalized(z, mean, rstd, gain, torch.zeros_like(z[0]) if shift is None else shift.to(z.dtype))
