"""The two ends of a delta's life: fold writes it into the weights, remove takes it out."""

import torch
from torch import nn

from capavision import host as hosting
from capavision.delta import Delta
from capavision.inject import injections, own_tensors, whole_head
from capavision.tying import tied, untie
from capavision.wrappers import RECORD, bare, refuse_sharded

_ELSEWHERE = "save it (capavision.save puts the deltas together) and load the file onto a base that is not"


def fold(model: nn.Module) -> nn.Module:
    """Write every ΔW into its host's weight: a plain model again, same classes, same keys. In place, one way.

    Block adapters and prefixes are not linear, so they stay, but dense: masks and shared values become one bottleneck
    of width branches · rank, or branches · length keys and values. In a tied model every depth gets a weight of its
    own, W ⊙ M_l.

    Raises:
        ValueError: the model carries no injection and is not tied, stands in a wrapper for many processes, or is
            sharded.

    >>> plain = fold(copy.deepcopy(model))  # doctest: +SKIP
    """
    inner = bare(model)
    if tied(inner):
        untie(inner)
        return model
    if not injections(inner):
        raise ValueError("the model carries no injection, so there is nothing to fold")
    refuse_sharded(inner, _ELSEWHERE)
    for host in [m for m in inner.modules() if isinstance(getattr(m, hosting.SLOT, None), Delta)]:
        hosting.fold(host)
    _release(inner, keep_deltas=True)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take every delta out: the base's classes, weights and requires_grad as they were, bit for bit. In place.

    The classifier keeps what it learned.

    Raises:
        ValueError: the model is tied (what its blocks held before is gone), stands in a wrapper for many processes,
            or is sharded.

    >>> base = remove(model)  # doctest: +SKIP
    """
    inner = bare(model)
    refuse_sharded(inner, _ELSEWHERE)
    if tied(inner):
        raise ValueError(
            "the model is tied, and its blocks' earlier weights are gone; capavision.fold(model) unties it"
        )
    take_out(inner)
    return model


@torch.no_grad()
def take_out(model: nn.Module) -> None:
    """What `remove` does to a model that it does not refuse."""
    own = own_tensors(model, injections(model))
    for plan in reversed(injections(model)):
        for name, original in plan.originals.items():
            own[name].copy_(original)
    _release(model)


def _release(model: nn.Module, keep_deltas: bool = False) -> None:
    if plans := injections(model):
        newer = tuple(f"{name}." for name in whole_head(model, {*plans[0].hosts, *plans[0].head}))
        before = set(plans[0].frozen)
        for name, p in model.named_parameters():
            p.requires_grad_(name in before or name.startswith(newer))
        delattr(model, RECORD)
    for module in list(model.modules()):
        if not (keep_deltas and hosting.serves(module)):
            hosting.detach(module, model.training)
