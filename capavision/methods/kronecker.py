"""Kronecker updates: a product of two small matrices that multiplies their ranks.

    ΔW = alpha · B ⊗ A,    ΔW[i·r + k, j·m + l] = alpha · B[i, j] A[k, l],    m = n_in / r

Source: SURM, arXiv 2406.17740 (whose scale is alpha / r).
Shapes: A (r, n_in / r), B (n_out / r, r); r divides both sides of ΔW.
Cost:   n_in + n_out values whatever r; rank min(r, n_in/r) · min(r, n_out/r), 576 of 768 at best.
Start:  A uniform over its rows as nn.Linear, B = 0: ΔW = 0, the model is unchanged.
Differs from the authors' code: r is found instead of asked for, so every shape is served; adapters use B ⊗ A, not
        its transpose.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capavision.checks import whole
from capavision.delta import Method, Site
from capavision.merged import Contraction
from capavision.structured import Matrix, Structured


def best_split(n_out: int, n_in: int) -> int:
    """The common divisor r of both sides that gives B ⊗ A the highest rank; the smallest one if several do.

    >>> best_split(768, 768), best_split(3072, 768), best_split(32, 27)
    (24, 32, 1)
    """
    common = math.gcd(n_out, n_in)
    divisors = [r for r in range(1, common + 1) if common % r == 0]
    return max(divisors, key=lambda r: (min(r, n_in // r) * min(r, n_out // r), -r))


@dataclass(frozen=True)
class Kronecker(Structured, Method):
    """Kronecker ΔW, or a Kronecker adapter; see `capavision.structured.Structured` for the fields all share.

    split: r in the equation, a divisor of both sides of every host; None takes each host's best.
    alpha: factor on M; 10 gives 87.5 % of val200, 1 gives 72.5 %, see docs/structured.md.

    Default hosts: q and v of every attention; without attention every Linear, else every conv.

    Raises:
        ValueError: split below 1, or (by inject) no divisor of a host's sides; see Structured.

    >>> Kronecker(split=32).alpha
    10.0
    """

    split: int | None = None
    alpha: float = field(default=10.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is not None:
            whole("split", self.split)

    def matrix(self, site: Site, n_out: int, n_in: int) -> "KroneckerMatrix":
        r = self.split or best_split(n_out, n_in)
        if n_out % r or n_in % r:
            raise ValueError(f"split={r} does not divide both sides of ({n_out}, {n_in}); leave it out, or name hosts")
        return KroneckerMatrix(self.alpha, site.zeros(n_out // r, r), site.uniform("A", r, n_in // r))


class KroneckerMatrix(Matrix):
    """alpha · B ⊗ A."""

    def __init__(self, scale: float, B: Tensor, A: Tensor) -> None:
        super().__init__()
        self.scale, self.B, self.A = scale, nn.Parameter(B), nn.Parameter(A)

    def forward(self) -> Tensor:
        return torch.kron(self.B, self.scale * self.A)

    def contraction(self) -> Contraction:
        (q, r), m = self.B.shape, self.A.shape[1]
        cost = 3 * 2 * r * (q * r + r * m)  # four products, of so few columns that they run at a third of the rate
        return Contraction(0, q * r, _to_factors, (self.B, self.scale * self.A), cost)


def _to_factors(g: Tensor, x: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token's G (q, r) and X (r, m), where Y = B X Aᵀ: dB = Σ G (X Aᵀ)ᵀ and dA = Σ (Gᵀ B) X."""
    (q, r), m = B.shape, A.shape[1]
    X = x.reshape(-1, m)  # (N · r, m)
    G = g.reshape(-1, r).mT.reshape(-1, q)  # (r · N, q): the one copy, after which all four are plain products
    dB = G.mT @ (A @ X.mT).reshape(-1, r)
    dA = (G @ B).reshape(r, -1) @ X
    return dB, dA
