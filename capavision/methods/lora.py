"""Low-rank updates, plain and CapaBoost.

    ΔW = (alpha / rank) Σ_i (B ⊙ M_i)(A ⊙ N_i),    i = 1..branches
       = (alpha / rank) [B⊙M_1 … B⊙M_d] [A⊙N_1; …; A⊙N_d]

Source: LoRA, arXiv 2106.09685 (branches=1); CapaBoost, arXiv 2407.01320.
Shapes: A (rank, n_in), B (n_out, rank) trained; N_i, M_i masks of the same shapes, fixed; ΔW (n_out, n_in). A conv's
        weight counts as (out_channels, in_channels / groups · kernel), grouped and depthwise ones too.
Cost:   rank · (n_in + n_out) values; two products of width branches · rank, however many branches.
Start:  A uniform as in loralib, B = 0: ΔW = 0, the model is unchanged.
Differs from the authors' code: its A has fan-in rank instead of n_in, so it starts √(n_in/rank) times larger, and its
        later branches start with B ≠ 0; here one A and one B serve all branches from the first step.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from capavision.attention import query_value_hosts
from capavision.checks import nonzero, whole
from capavision.delta import Factors, Method, Site, WeightDelta, product
from capavision.masks import Sharing


@dataclass(frozen=True)
class LoRA(Sharing, Method):
    """LoRA, or CapaBoost-LoRA when branches > 1.

    rank:  of one branch; ΔW has rank up to branches · rank.
    alpha: ΔW is scaled by alpha / rank, once for all branches.
    branches, density, masks: see `capavision.masks.Sharing`.

    Default hosts: q and v of every attention (the papers' choice); without attention every Linear, else every conv.

    Raises:
        ValueError: rank below 1, alpha 0 or not finite, or a setting of the masks that cannot be served.

    >>> LoRA(rank=4, branches=2).density
    0.5
    """

    rank: int = 8
    alpha: float = 8.0

    placement = WeightDelta

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rank", self.rank)
        nonzero("alpha", self.alpha, "ΔW")

    def targets(self, model: nn.Module) -> dict[str, str | None]:
        return query_value_hosts(model)

    def build(self, site: Site) -> "LowRank":
        return LowRank(self, site)


class LowRank(WeightDelta):
    """ΔW = scale · B A, both seen through their masks."""

    factored = True

    def __init__(self, config: LoRA, site: Site) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        self.A = config.factor(site.uniform("A", config.rank, site.n_in), site.key("A"), dim=0)
        self.B = config.factor(site.zeros(site.n_out, config.rank), site.key("B"), dim=1)

    def weight(self) -> Tensor:
        return self.scale * product(self.B(), self.A())

    def factors(self) -> Factors:
        return Factors(self.B(), self.A(), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A().to(x.dtype)), self.B().to(x.dtype)) * self.scale
