"""Structured matrices: one or two trained vectors in place of a dense matrix, in the two forms of SURM.

    where="weight"                    y = (W + M) x                     on a Linear or conv; merges
    where="houlsby", "pfeiffer", …    Δ(h) = σ(M h) + b                 one structured M, the non-linearity after it

Source: SURM, arXiv 2406.17740, and its code for the adapter form.
How it runs: M is built dense, in float32, once a step; then one product serves W + M, as in the frozen model. A
        product by FFT needs complex float32 activations and gains little below a width of 1,000. The gradients of
        the vectors by FFT cost less than the dense gᵀx from some width on: `python -m benchmarks.structured`.
Differs from the authors' code: hosts need not be square; M starts at 0 and keeps a nonzero gradient in every setting;
        M has a scale, so that all structures train at the learning rates of LoRA (their code has none, and needs a
        learning rate of its own for each structure).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capavision.attention import query_value_hosts
from capavision.checks import nonzero, one_of
from capavision.delta import Delta, OutputDelta, Site, WeightDelta
from capavision.merged import Contraction
from capavision.placement import ACTIVATIONS, PLACES, inputs, starts

ON_WEIGHTS = "weight"
ALIVE_AT_ZERO = {name: act for name, act in ACTIVATIONS.items() if name != "relu"}


class Matrix(nn.Module, ABC):
    """A structured matrix; forward() gives it dense, (n_out, n_in), scaled."""

    @abstractmethod
    def forward(self) -> Tensor:
        """M, dense."""

    def contraction(self) -> Contraction | None:
        """The gradients of what M is made of without the dense one; None where there is no such way."""
        return None


@dataclass(frozen=True, kw_only=True)
class Structured(ABC):
    """The fields and the two forms that all structured methods share.

    alpha:      factor on M.
    where:      "weight", or an adapter: "houlsby" (the paper's place), "pfeiffer" or "parallel".
    activation: of the adapter form: "gelu" (the authors'), "silu" or "tanh"; "relu" would never leave M = 0.

    Why alpha is 30: at 1 a step of the optimizer moves ΔW about as far as LoRA's does with alpha = rank, but spread
    over all ranks, which is too little. 30 gives 84 to 92 % of val200 at lr 1e-3 to 3e-3, where 1 and 3 stay at 48 to
    76 % and 100 fails (docs/structured.md).

    Raises:
        ValueError: alpha 0 or not finite, an unknown place or activation.
    """

    alpha: float = 30.0
    where: str = ON_WEIGHTS
    activation: str = "gelu"

    def __post_init__(self) -> None:
        nonzero("alpha", self.alpha, "M")
        one_of("where", self.where, [ON_WEIGHTS, *PLACES])
        one_of("activation", self.activation, ALIVE_AT_ZERO)
        placement = WeightDelta if self.where == ON_WEIGHTS else OutputDelta
        object.__setattr__(self, "placement", placement)

    @abstractmethod
    def matrix(self, site: Site, n_out: int, n_in: int) -> Matrix:
        """The structured matrix of that shape, which starts at 0."""

    def targets(self, model: nn.Module) -> dict[str, str | None]:
        if self.where == ON_WEIGHTS:
            return query_value_hosts(model)
        return dict.fromkeys(PLACES[self.where](model))

    def starts(self, model: nn.Module) -> dict[str, str]:
        return starts(model, self.where)

    def build(self, site: Site) -> Delta:
        if self.where == ON_WEIGHTS:
            return OnWeight(self.matrix(site, site.n_out, site.n_in))
        matrix = self.matrix(site, site.n_out, inputs(site, self.where))
        return OnOutput(self, matrix, site.zeros(site.n_out), site.axis)


class OnWeight(WeightDelta):
    """ΔW = M."""

    def __init__(self, M: Matrix) -> None:
        super().__init__()
        self.M = M

    def weight(self) -> Tensor:
        dense: Tensor = self.M()
        return dense

    def contractions(self) -> list[Contraction] | None:
        found = self.M.contraction()
        return None if found is None else [found]


class Dense(Matrix):
    """A matrix that is what it is: what a structured one folds into."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value


class OnOutput(OutputDelta):
    """σ(M h) + b along the channel axis."""

    def __init__(self, config: Structured, M: Matrix, bias: Tensor, axis: int) -> None:
        super().__init__()
        self.config, self.axis = config, axis
        self.M, self.bias = M, nn.Parameter(bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = (x if self.config.where == "parallel" else y).movedim(self.axis, -1)
        h = ALIVE_AT_ZERO[self.config.activation](F.linear(h, self.M().to(h.dtype)))
        return (h + self.bias.to(h.dtype)).movedim(-1, self.axis)

    def folded(self) -> "OnOutput":
        return OnOutput(self.config, Dense(self.M().detach().clone()), self.bias.detach().clone(), self.axis)


def toeplitz(v: Tensor, n_out: int, n_in: int) -> Tensor:
    """The dense Toeplitz matrix whose diagonals are `v` (…, n_out + n_in - 1), lower left first read backwards.

    M[i, j] = v[i - j + n_in - 1]. A view of v, flipped: its gradient is a sum along diagonals, without atomics.

    >>> toeplitz(torch.arange(4.0), 2, 3)
    tensor([[2., 1., 0.],
            [3., 2., 1.]])
    """
    assert v.shape[-1] == n_out + n_in - 1
    return v.unfold(-1, n_in, 1).flip(-1)


def circulant(c: Tensor, sign: int = 1) -> Tensor:
    """C[i, j] = c[(i - j) mod n] of first columns `c` (…, n); with sign=-1 the part above the diagonal changes sign.

    >>> circulant(torch.tensor([1.0, 2.0, 3.0]))
    tensor([[1., 3., 2.],
            [2., 1., 3.],
            [3., 2., 1.]])
    """
    n = c.shape[-1]
    return toeplitz(torch.cat([sign * c[..., 1:], c], -1), n, n)


def blocks_for(n_out: int, n_in: int) -> tuple[int, int]:
    """How many square blocks cover an (n_out, n_in) matrix along its longer side, and their size.

    >>> blocks_for(3072, 768), blocks_for(32, 27)
    ((4, 768), (2, 27))
    """
    short, long = sorted((n_out, n_in))
    return -(-long // short), short


def tiled(squares: Tensor, n_out: int, n_in: int) -> Tensor:
    """Square blocks (count, n, n) side by side along the longer side of (n_out, n_in), the last one cut to fit."""
    if n_out >= n_in:
        return squares.flatten(0, 1)[:n_out]
    return squares.transpose(0, 1).flatten(1)[:, :n_in]


def correlation(g: Tensor, x: Tensor, period: int) -> Tensor:
    """r[…, k] = Σ_t Σ_j g[t, …, (j + k) mod period] x[t, …, j], by FFT; shorter rows count as ended by zeros.

    >>> correlation(torch.eye(3)[:1], torch.tensor([[1.0, 2.0, 3.0]]), 3).round()
    tensor([1., 3., 2.])
    """
    spectrum = (torch.fft.rfft(g, period) * torch.fft.rfft(x, period).conj()).sum(0)
    r: Tensor = torch.fft.irfft(spectrum, period)
    return r


def correlation_cost(values: int, period: int) -> float:
    """Of `values` transformed, each in 2.5 operations a level, at an eighth of the rate of a wide product's."""
    return 8 * 2.5 / 2 * log2(period) * values


def toeplitz_contraction(v: Tensor, n_out: int, n_in: int) -> Contraction:
    """The gradient of v in `toeplitz(v, n_out, n_in)`: gᵀx summed along its diagonals."""
    period = n_out + n_in  # no shift of x along g comes round

    def gradients(g: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor]:
        return (correlation(g, x, period).roll(n_in - 1)[: len(v)],)

    return Contraction(0, n_out, gradients, (v,), correlation_cost(2 * period, period))


def circulant_contraction(c: Tensor, n_out: int, n_in: int) -> Contraction:
    """The gradient of c (count, n) in `tiled(circulant(c), n_out, n_in)`."""
    n = c.shape[-1]

    def gradients(g: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor]:
        return (correlation(_tiles(g, n), _tiles(x, n), n),)

    return Contraction(0, n_out, gradients, (c,), correlation_cost(c.numel() + n, n))


def _tiles(x: Tensor, n: int) -> Tensor:
    """(…, m) to (…, ⌈m / n⌉, n), the last one filled with zeros."""
    missing = -x.shape[-1] % n
    filled = F.pad(x, (0, missing)) if missing else x
    return filled.reshape(*filled.shape[:-1], filled.shape[-1] // n, n)
