"""Bottleneck adapters, plain and CapaBoost.

    Δ(h) = scale · ( Σ_i (U ⊙ M_i) σ((D ⊙ N_i) h + b_D) + b_U ),    i = 1..branches
         = scale · ( [U⊙M_1 … U⊙M_d] σ([D⊙N_1; …; D⊙N_d] h + [b_D; …; b_D]) + b_U )

Source: CapaBoost, arXiv 2407.01320, for the masked sum; the non-linearity σ stays inside each branch. Where it stands:
        `capavision.placement`.
Shapes: D (rank, c_in), b_D (rank), U (c_out, rank), b_U (c_out) trained; N_i, M_i as D and U. Biases are not masked.
Cost:   rank · (c_in + c_out + 1) + c_out values; two products of width branches · rank.
Start:  D uniform as nn.Linear, U = b_D = b_U = 0: Δ = 0, the model is unchanged.
Differs from the authors' code: theirs starts U at N(0, 0.02²), adds b_U once per branch, and trains b_D from the first
        branch alone; here b_U stands outside the sum and b_D gets every branch's gradient.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from capavision.checks import nonzero, one_of, whole
from capavision.delta import Method, OutputDelta, Site
from capavision.masks import Factor, Sharing
from capavision.placement import ACTIVATIONS, PLACES, inputs, starts


@dataclass(frozen=True)
class Adapter(Sharing, Method):
    """A bottleneck adapter, or CapaBoost-Adapter when branches > 1.

    rank:       width of one branch's bottleneck.
    where:      "pfeiffer", "houlsby" or "parallel", see `capavision.placement`; targets given to inject replace its
                hosts, so where="parallel", targets="attn" puts one beside each attention.
    activation: "relu" (the authors' for pfeiffer), "gelu", "silu" (theirs for houlsby) or "tanh".
    scale:      factor on the whole adapter.
    branches, density, masks: see `capavision.masks.Sharing`.

    Raises:
        ValueError: rank below 1, scale 0 or not finite, an unknown place or activation, masks that cannot be served.

    >>> Adapter(rank=16, where="parallel").activation
    'relu'
    """

    rank: int = 32
    where: str = "pfeiffer"
    activation: str = "relu"
    scale: float = 1.0

    placement = OutputDelta

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rank", self.rank)
        nonzero("scale", self.scale, "Δ")
        one_of("where", self.where, PLACES)
        one_of("activation", self.activation, ACTIVATIONS)

    def targets(self, model: nn.Module) -> dict[str, str | None]:
        return dict.fromkeys(PLACES[self.where](model))

    def starts(self, model: nn.Module) -> dict[str, str]:
        return starts(model, self.where)

    def build(self, site: Site) -> "Bottleneck":
        down = self.factor(site.uniform("D", self.rank, inputs(site, self.where)), site.key("D"), dim=0)
        up = self.factor(site.zeros(site.n_out, self.rank), site.key("U"), dim=1)
        return Bottleneck(self, down, site.zeros(self.rank), up, site.zeros(site.n_out), site.axis)


class Bottleneck(OutputDelta):
    """scale · (U σ(D h + b_D) + b_U) along the channel axis, D and U seen through their masks."""

    def __init__(self, config: Adapter, D: Factor, b_D: Tensor, U: Factor, b_U: Tensor, axis: int) -> None:
        super().__init__()
        self.config, self.axis = config, axis
        self.D, self.U = D, U
        self.b_D, self.b_U = nn.Parameter(b_D), nn.Parameter(b_U)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x if self.config.where == "parallel" else y
        h = h.movedim(self.axis, -1)
        down, up = self.D().to(h.dtype), self.U().to(h.dtype)
        tiled = self.b_D.repeat(down.shape[0] // self.b_D.shape[0])
        h = ACTIVATIONS[self.config.activation](F.linear(h, down, tiled.to(h.dtype)))
        return self.config.scale * F.linear(h, up, self.b_U.to(h.dtype)).movedim(-1, self.axis)

    def folded(self) -> "Bottleneck":
        down, up = (Factor(factor().detach().clone(), None, factor.dim) for factor in (self.D, self.U))
        bias = self.b_D.detach().repeat(down.value.shape[0] // self.b_D.shape[0])
        return Bottleneck(self.config, down, bias, up, self.b_U.detach().clone(), self.axis)
