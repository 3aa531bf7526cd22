"""Toeplitz updates: constant along each diagonal, at full rank.

    ΔW = (alpha / √n) T          n = min(n_out, n_in)
    kind="general":              T[i, j] = t[i - j + n_in - 1]
    kind="symmetric":            T[i, j] = t[|i - j|]
    product=True:                T = T(t) T(a), each of that kind

Source: SURM, arXiv 2406.17740; its code trains the product of two symmetric ones.
Shapes: t (n_out + n_in - 1) or (max(n_out, n_in)), so hosts may have any shape; T(a) is (n_in, n_in).
Cost:   2n - 1 values of a square host, n where symmetric; twice as many for the product. Rank n.
Start:  t = 0, a uniform: ΔW = 0, the model is unchanged.
Differs from the authors' code: rectangular hosts are served, and 1/√n makes a step of t as large in ΔW as in t.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capavision.checks import one_of
from capavision.delta import Method, Site, product
from capavision.merged import Contraction
from capavision.structured import Matrix, Structured, toeplitz, toeplitz_contraction


def _length(kind: str, n_out: int, n_in: int) -> int:
    return n_out + n_in - 1 if kind == "general" else max(n_out, n_in)


def _diagonals(kind: str, t: Tensor, n_out: int, n_in: int) -> Tensor:
    return t if kind == "general" else torch.cat([t[1:n_in].flip(0), t[:n_out]])


@dataclass(frozen=True)
class Toeplitz(Structured, Method):
    """Toeplitz ΔW, or a Toeplitz adapter; see `capavision.structured.Structured` for the fields all share.

    kind:    "general" (twice the values) or "symmetric" (the authors').
    product: train two Toeplitz matrices and use their product, as the authors do.

    Default hosts: q and v of every attention; without attention every Linear, else every conv.

    Raises:
        ValueError: an unknown kind; see Structured.

    >>> Toeplitz(kind="symmetric", product=True).where
    'weight'
    """

    kind: str = "general"
    product: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kind", self.kind, ["general", "symmetric"])

    def matrix(self, site: Site, n_out: int, n_in: int) -> "ToeplitzMatrix":
        return ToeplitzMatrix(self, site, n_out, n_in)


class ToeplitzMatrix(Matrix):
    """(alpha / √n) T(t), or (alpha / √n) T(t) T(a)."""

    def __init__(self, config: Toeplitz, site: Site, n_out: int, n_in: int) -> None:
        super().__init__()
        self.kind, self.shape = config.kind, (n_out, n_in)
        self.scale = config.alpha * min(n_out, n_in) ** -0.5
        self.t = nn.Parameter(site.zeros(_length(self.kind, n_out, n_in)))
        self.a = nn.Parameter(site.uniform("a", _length(self.kind, n_in, n_in))) if config.product else None

    def forward(self) -> Tensor:
        n_out, n_in = self.shape
        T = toeplitz(self.diagonals(), n_out, n_in)
        return T if self.a is None else product(T, toeplitz(_diagonals(self.kind, self.a, n_in, n_in), n_in, n_in))

    def diagonals(self) -> Tensor:
        """Those of T(t), scaled."""
        return _diagonals(self.kind, self.scale * self.t, *self.shape)

    def contraction(self) -> Contraction | None:
        return None if self.a is not None else toeplitz_contraction(self.diagonals(), *self.shape)
