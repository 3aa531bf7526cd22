"""Circulant updates: one vector in place of a matrix, at full rank.

    ΔW = (alpha / √n) C(c),    C(c)[i, j] = c[(i - j) mod n]
    product=True:    a ⊙ c in place of c

Source: SURM, arXiv 2406.17740; its code trains the product, which reaches the same matrices with twice the values (the
        second vector only scales each coordinate's step).
Shapes: c and a (tiles, n) with n = min(n_out, n_in): ⌈longer / shorter⌉ square blocks side by side, the last one
        cut to fit (the authors take square hosts only).
Cost:   n_out values of a square host, twice as many for the product; rank n.
Start:  c = 0, a uniform of variance 1: ΔW = 0, the model is unchanged.
Differs from the authors' code: every value stands n times in ΔW, so 1/√n makes |ΔW| = alpha |c|; c is the first column
        (their docstring's matrix is another one), and odd sizes are right.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from capavision.delta import Method, Site
from capavision.merged import Contraction
from capavision.structured import Matrix, Structured, blocks_for, circulant, circulant_contraction, tiled


@dataclass(frozen=True)
class Circulant(Structured, Method):
    """Circulant ΔW, or a circulant adapter; see `capavision.structured.Structured` for the fields all share.

    product: train two vectors and use their product, as the authors do.

    Default hosts: q and v of every attention; without attention every Linear, else every conv.

    Raises:
        ValueError: see Structured.

    >>> Circulant(where="houlsby").activation
    'gelu'
    """

    product: bool = False

    def matrix(self, site: Site, n_out: int, n_in: int) -> "Circulants":
        return Circulants(self, site, n_out, n_in)


class Circulants(Matrix):
    """(alpha / √n) C(c), tiled."""

    def __init__(self, config: Circulant, site: Site, n_out: int, n_in: int) -> None:
        super().__init__()
        self.shape = n_out, n_in
        tiles, n = blocks_for(n_out, n_in)
        self.scale = config.alpha * n**-0.5
        self.c = nn.Parameter(site.zeros(tiles, n))
        self.a = nn.Parameter((3 * n) ** 0.5 * site.uniform("a", tiles, n)) if config.product else None

    def columns(self) -> Tensor:
        """The first column of each tile."""
        c = self.c if self.a is None else self.a * self.c
        first: Tensor = self.scale * c
        return first

    def forward(self) -> Tensor:
        return tiled(circulant(self.columns()), *self.shape)

    def contraction(self) -> Contraction:
        return circulant_contraction(self.columns(), *self.shape)
