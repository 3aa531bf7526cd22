"""Learned masks: one prototype for all hosts, seen by each of them through a mask of its own; both are trained.

    V ⊙ M_h,    M_h = 1 at the round(density · size) largest |S_h|, else 0,    ∂loss/∂|S_h| := ∂loss/∂M_h

Source: ProPETL, arXiv 2305.17682, and its code for the scores: their start, their gradient, a learning rate of theirs.
Shapes: V (rows, cols), one for all hosts of an injection whose factors share place in the delta, shape and axis;
        S_h (branches, rows, cols), the scores of one host.
Cost:   trained: V and every S_h. Stored: V, and one bit a score, which counts as 1/32 of a value.
Start:  S_h uniform in ±1/√cols from the host's key; V as the method starts it on the first host.
Differs from the authors' code: biases are each host's own (theirs are shared); several branches have a mask each (they
        have one); the kept entries are counted by rounding; an adapter's scores lie as its weights do, theirs are
        transposed and so start in the other side's range.

How it works: only the first host's factor owns V. The others look it up there at every use, so that `parameters`,
state dicts and whoever walks through them (an EMA, DDP, the file) meet it once.
"""

import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from capavision.masks import Factor, uniform
from capavision.wrappers import is_sharded

MASK_RATIO = 30  # the learning rate of scores beside that of values
SCORES, BITS = "scores", "bits"  # what a model has, and what its file has in its place


def largest(scores: Tensor, keep: int) -> Tensor:
    """1 at the `keep` entries of largest |score| of each branch, exactly as many even among equals; else 0.

    >>> largest(torch.tensor([[[0.1, -0.4], [0.2, 0.0]]]), keep=2)
    tensor([[[0., 1.],
             [1., 0.]]])
    """
    flat = scores.detach().abs().flatten(1)
    kept = flat.topk(keep, dim=1, sorted=False).indices
    return torch.zeros_like(flat).scatter(1, kept, 1.0).view_as(scores)


class LearnedFactor(Factor):
    """A factor whose masks follow from trained scores, and whose values may be another factor's.

    scores: (branches, rows, cols), trained; keep: entries that each branch's mask keeps.
    """

    def __init__(self, value: Tensor, dim: int, scores: Tensor, keep: int) -> None:
        super().__init__(value, None, dim)
        self.scores = nn.Parameter(scores)
        self.keep = keep
        self._owner: tuple[LearnedFactor, ...] = ()  # in a tuple, so that torch does not take it for a child

    @property
    def prototype(self) -> nn.Parameter:
        """V, wherever it lives."""
        return self._owner[0].value if self._owner else self.value

    def look_up(self, owner: "LearnedFactor") -> None:
        """Use the owner's prototype from now on."""
        del self.value
        self._owner = (owner,)

    def forward(self) -> Tensor:
        value = self.prototype
        if is_sharded(value) and not is_sharded(self.scores):
            raise ValueError(
                "the prototype of learned masks is used in every block, and fully_shard of single blocks keeps it from "
                "all but one; call fully_shard(model) on the whole model only"
            )
        size = self.scores.abs()
        mask = largest(self.scores, self.keep) + (size - size.detach())  # the second term is 0; it has the gradient
        return (value.unsqueeze(self.dim) * mask.movedim(0, self.dim)).flatten(self.dim, self.dim + 1)

    def extra_repr(self) -> str:
        branches, rows, cols = self.scores.shape
        return f"({rows}, {cols}), branches={branches}, keep={self.keep}"


def learned(value: Tensor, branches: int, density: float, key: str, dim: int) -> LearnedFactor:
    """A factor that starts from `value`, its scores drawn from `key`.

    Raises:
        ValueError: a density that keeps nothing of this shape, or all of it.
    """
    keep = round(density * value.numel())
    if not 0 < keep < value.numel():
        kept = "none" if keep == 0 else "all"
        raise ValueError(
            f"density={density} keeps {kept} of the {value.numel()} entries of a {tuple(value.shape)} factor, which "
            f"leaves no mask to learn; {'raise' if keep == 0 else 'lower'} density"
        )
    scores = uniform(f"{key}/scores", branches, *value.shape).to(value)
    return LearnedFactor(value, dim, scores, keep)


def share(deltas: Iterable[nn.Module]) -> None:
    """Give factors of the same place, shape and axis the first one's prototype."""
    owners: dict[tuple[str, torch.Size, int], LearnedFactor] = {}
    for delta in deltas:
        for place, factor in delta.named_modules():
            if isinstance(factor, LearnedFactor):
                owner = owners.setdefault((place, factor.value.shape, factor.dim), factor)
                if owner is not factor:
                    factor.look_up(owner)


def factors(model: nn.Module) -> dict[str, LearnedFactor]:
    """The learned factors of `model` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LearnedFactor)}


def packed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file stores: `tensors` of `model`, with the bits of its learned masks in place of their scores."""
    stored = dict(tensors)
    for name, factor in factors(model).items():
        mask = largest(stored.pop(f"{name}.{SCORES}"), factor.keep)
        stored[f"{name}.{BITS}"] = torch.from_numpy(np.packbits(mask.cpu().numpy().astype(bool)))
    return stored


def unpacked(path: str | os.PathLike[str], model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model holds: `tensors` of the file, with scores in place of bits.

    Kept entries get one score and the others another: the mean of such entries at the start, (2 - density) / 2 and
    (1 - density) / 2 of the range. So the masks are exactly the file's, and training can change them.

    Raises:
        ValueError: bits that are no mask of the model's, or a file with scores.
    """
    restored = dict(tensors)
    for name, factor in factors(model).items():
        shape, bits = factor.scores.shape, restored.pop(f"{name}.{BITS}", None)
        if f"{name}.{SCORES}" in restored:
            raise ValueError(f"{path} holds {name}.{SCORES}, where capavision.save writes bits; save it again")
        if bits is None:
            continue
        length = -(-shape.numel() // 8)
        if bits.dtype is not torch.uint8 or bits.shape != (length,):
            found = f"{tuple(bits.shape)} of {str(bits.dtype).removeprefix('torch.')}"
            raise ValueError(f"{path}: {name}.{BITS} is {found}, and the model's masks are ({length},) of uint8")
        mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).view(shape)
        ones = mask.flatten(1).sum(1).tolist()
        if ones != [factor.keep] * len(ones):
            raise ValueError(
                f"{path} is damaged: the masks in {name}.{BITS} keep {ones} entries, not {factor.keep} each; save it "
                "again"
            )
        density, reach = factor.keep / shape[1:].numel(), shape[-1] ** -0.5
        restored[f"{name}.{SCORES}"] = reach * (1 - density + mask.double()) / 2
    return restored
