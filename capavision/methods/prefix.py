"""Prefix tuning, plain and CapaBoost: trained keys and values that every query of an attention may look at.

    softmax(q [P_k; k]ᵀ · scale) [P_v; v]          per head
    branches=d:    P_k = [K ⊙ M_1; …; K ⊙ M_d],    P_v = [V ⊙ N_1; …; V ⊙ N_d]

Source: prefix tuning, arXiv 2101.00190, in its form without a reparametrisation; for masks, arXiv 2407.01320, which
        names prefixes but, as far as we know, does not say how it masks them. So this is our reading: d masked views
        are d · length prefix tokens that share one softmax with the image's own. Summing masked views instead would
        only rescale the prefix, and a softmax a branch would be another function than a wider prefix is.
Shapes: K (length, heads · key width), V (length, heads · value width) trained, as many heads as the attention's keys.
Cost:   length · (n_k + n_v) values; d · length more keys in the softmax, at run time too: it does not fold away.
Start:  K uniform, V = 0. Not the plain model: the prefix takes length / (length + tokens) of the attention, roughly.
Hosts:  every attention that calls torch's scaled_dot_product_attention once, as transformers' encoders do too, set to
        "sdpa"; one that stops calling it is refused when it runs. A mask (of padding, say) or a bias over positions is
        0 at the prefix. Keys that a class normalises or rotates meet the prefix after that.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from capavision.attention import attentions
from capavision.checks import whole
from capavision.delta import AttentionDelta, Method, Site
from capavision.masks import Factor, Sharing


@dataclass(frozen=True)
class Prefix(Sharing, Method):
    """Prefix tuning of attentions, or CapaBoost-Prefix when branches > 1.

    length: stored prefix tokens an attention.
    branches, density, masks: see `capavision.masks.Sharing`.

    Default hosts: every attention that can take one.

    Raises:
        ValueError: length below 1, masks that cannot be served; (by inject) an attention with a softmax of its own.

    >>> Prefix(length=4, branches=2).density
    0.5
    """

    length: int = 10

    placement = AttentionDelta

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("length", self.length)

    def targets(self, model: nn.Module) -> dict[str, str | None]:
        return dict.fromkeys(attentions(model))

    def build(self, site: Site) -> "KeysValues":
        K = self.factor(site.uniform("K", self.length, site.n_in), site.key("K"), dim=0)
        V = self.factor(site.zeros(self.length, site.n_out), site.key("V"), dim=0)
        return KeysValues(K, V, site.heads)


class KeysValues(AttentionDelta):
    """P_k and P_v, split into heads."""

    def __init__(self, K: Factor, V: Factor, heads: int) -> None:
        super().__init__()
        self.K, self.V, self.heads = K, V, heads

    def forward(self) -> tuple[Tensor, Tensor]:
        keys, values = (P().unflatten(1, (self.heads, -1)).transpose(0, 1) for P in (self.K, self.V))
        return keys, values

    def folded(self) -> "KeysValues":
        K, V = (Factor(P().detach().clone(), None, 0) for P in (self.K, self.V))
        return KeysValues(K, V, self.heads)
