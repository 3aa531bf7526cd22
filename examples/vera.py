"""VeRA, arXiv 2310.11454: a low-rank update whose matrices stay random, scaled by two trained vectors.

    ΔW = diag(b) B diag(d) A

Shapes: A (rank, n_in), B (n_out, rank) drawn from the seed; d (rank), b (n_out) trained.
Start:  b = 0, so ΔW = 0 and the model is unchanged.
"""

from dataclasses import dataclass

import torch
from torch import nn

from capavision import Method, Site, WeightDelta
from capavision.attention import query_value_hosts


@dataclass(frozen=True)
class VeRA(Method):
    """VeRA on Linear and conv weights.

    rank: rows of A; costs one trained value each.
    """

    rank: int = 64
    placement = WeightDelta

    def targets(self, model):
        return query_value_hosts(model)

    def build(self, site: Site):
        return Scaled(site, self.rank)


class Scaled(WeightDelta):
    """ΔW = diag(b) B diag(d) A."""

    def __init__(self, site, rank):
        super().__init__()
        self.register_buffer("A", site.uniform("A", rank, site.n_in), persistent=False)  # the seed rebuilds them
        self.register_buffer("B", site.uniform("B", site.n_out, rank), persistent=False)
        self.d = nn.Parameter(torch.full_like(self.A[:, 0], 0.1))
        self.b = nn.Parameter(site.zeros(site.n_out))

    def weight(self):
        return self.b[:, None] * (self.B * self.d) @ self.A
