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

import torch
from torch import Tensor, nn

from capavision.checks import whole
from capavision.delta import Method, Site
from capavision.structured import Matrix, Structured, blocks_for, tiled


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
        return tiled(displaced(self.scale * self.g, self.h), *self.shape)


def displaced(g: Tensor, h: Tensor) -> Tensor:
    """M = Σ_i C(g_i) S(h_i), (…, n, n) of g and h (…, rank, n), without a product of matrices.

    The displacement gives M's diagonals as running sums, i + 1 modulo n:

        M[i + 1, j + 1] = M[i, j] - 2 Σ_r g_r[i + 1] h_r[n - 1 - j]

    After n such steps a diagonal would be at minus its start, which is therefore the sum over all of them.
    """
    n = g.shape[-1]
    twice = torch.cat([g, g], -1)[..., 1:]
    steps = (twice.unfold(-1, n, 1) * h.flip(-1)[..., None]).sum(-3)  # (n, n), of column j and diagonal d
    sums = steps.cumsum(-2)
    diagonals = torch.sub(sums[..., -1:, :], sums - steps, alpha=2)  # M[(d + j) mod n, j]
    twisted = torch.cat([diagonals, diagonals], -1).flatten(-2)[..., n:]  # read in rows of one less: M[i, j], turned
    return twisted.reshape(*g.shape[:-2], n, 2 * n - 1)[..., :n].transpose(-1, -2)
