"""Low displacement rank: sums of circulants times skew-circulants, which hold every Toeplitz matrix and its inverse.

    ΔW = (alpha / √n) Σ_i C(g_i) S(h_i),    i = 1..rank
    C(g)[i, j] = g[(i - j) mod n],    S(h)[i, j] = h[i - j] where i ≥ j, else -h[n + i - j]

Source: SURM, arXiv 2406.17740; the class of matrices is that of arXiv 1510.01722: rank(Z_1 ΔW - ΔW Z_-1) ≤ rank, with
        Z_f the down-shift whose top right corner is f. rank=2 contains every Toeplitz matrix.
Shapes: g, h (tiles, rank, n) with n = min(n_out, n_in): ⌈longer / shorter⌉ square blocks side by side, the last one cut
        to fit (the authors take square hosts only).
Cost:   2 · rank · n values of a square host, as LoRA of that rank; rank n from rank=1 on.
Start:  h uniform as nn.Linear, g = 0: ΔW = 0, the model is unchanged.
Differs from the authors' code: S(h) is skew-circulant at every n (their root of -1 is off by one), 1/√n keeps steps
        near LoRA's size, and it merges.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from capavision.checks import whole
from capavision.delta import Method, Site, product
from capavision.structured import Matrix, Structured, blocks_for, circulant, tiled


@dataclass(frozen=True)
class LDR(Structured, Method):
    """ΔW of low displacement rank, or such an adapter; see `capavision.structured.Structured` for the shared fields.

    rank: the displacement rank, the number of summed products.

    Default hosts: q and v of every attention; without attention every Linear, else every conv.

    Raises:
        ValueError: rank below 1; see Structured.

    >>> LDR(rank=2).name
    'ldr'
    """

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rank", self.rank)

    def matrix(self, site: Site, n_out: int, n_in: int) -> "LowDisplacement":
        return LowDisplacement(self, site, n_out, n_in)


class LowDisplacement(Matrix):
    """(alpha / √n) Σ_i C(g_i) S(h_i), tiled."""

    def __init__(self, config: LDR, site: Site, n_out: int, n_in: int) -> None:
        super().__init__()
        self.shape = n_out, n_in
        tiles, n = blocks_for(n_out, n_in)
        self.scale = config.alpha * n**-0.5
        self.g = nn.Parameter(site.zeros(tiles, config.rank, n))
        self.h = nn.Parameter(site.uniform("h", tiles, config.rank, n))

    def forward(self) -> Tensor:
        # [C(g_1) … C(g_r)] [S(h_1); …; S(h_r)]: the sum over i is one product a tile
        left = circulant(self.scale * self.g).transpose(1, 2).flatten(2)
        right = circulant(self.h, sign=-1).flatten(1, 2)
        return tiled(product(left, right), *self.shape)
