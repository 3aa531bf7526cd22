"""Static masks, and the one factor that is seen through them.

A CapaBoost update sums `branches` copies of one trained matrix, each behind a fixed 0/1 mask:

    V ⊙ M_1, …, V ⊙ M_d        V trained once; M_i drawn once, never learned, never redrawn

Source: CapaBoost, arXiv 2407.01320. Summed branches equal one wider product, so a factor hands them out concatenated.
Differs from the authors' code: masks come from a keyed counter-based generator, hence they depend neither on the order
in which modules are made nor on a library's version, and 2:4 groups lie along the axis that sparse kernels reduce.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from capavision.checks import whole

Draw = Callable[[int, int], np.ndarray]  # (branch, count) -> count raw 64-bit words


def stream(key: str, count: int) -> np.ndarray:
    """`count` random 64-bit words that depend on `key` alone: raw Philox output, which numpy keeps stable for good."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def uniform(key: str, *shape: int) -> Tensor:
    """U(-1/√n, 1/√n) over the last axis of length n, float64, from `key` alone: nn.Linear's own start."""
    whole_numbers = (stream(key, math.prod(shape)) >> np.uint64(11)).astype(np.float64)  # below 2^53
    return torch.from_numpy(whole_numbers).mul_(2.0**-52).sub_(1).mul_(shape[-1] ** -0.5).view(shape)


def smallest(words: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Where the `count` smallest 64-bit words are, a row for each count; of equal words the first ones are smaller.

    The top 16 bits, which numpy sorts by radix, decide for all but the few words that share those of the last one.

    >>> smallest(np.array([3, 1, 2, 1], dtype=np.uint64), [1, 3]).astype(int)
    array([[0, 1, 0, 0],
           [0, 1, 1, 1]])
    """
    tops = (words >> np.uint64(48)).astype(np.uint16)
    lasts = np.sort(tops, kind="stable")[np.subtract(counts, 1)]
    found: np.ndarray = tops < lasts[:, None]
    for row, count, last in zip(found, counts, lasts, strict=True):
        (alike,) = np.nonzero(tops == last)
        row[alike[np.argsort(words[alike], kind="stable")[: count - np.count_nonzero(row)]]] = True
    return found


def random(shape: tuple[int, int], branches: int, density: float, draw: Draw) -> np.ndarray:
    """Each branch keeps exactly round(density · size) entries, drawn without replacement (the paper's masks)."""
    size = shape[0] * shape[1]
    keep = round(density * size)
    if keep == 0:
        raise ValueError(f"density={density} keeps none of the {size} entries of a {shape} factor; raise density")
    return np.stack([smallest(draw(branch, size), [keep])[0] for branch in range(branches)]).reshape(branches, *shape)


def complementary(shape: tuple[int, int], branches: int, density: float, draw: Draw) -> np.ndarray:
    """The branches share the entries out among themselves: a partition, so no entry is dead and none is used twice."""
    size = shape[0] * shape[1]
    each, more = divmod(size, branches)
    ends = [branch * each + min(branch, more) for branch in range(1, branches + 1)]
    return np.diff(smallest(draw(0, size), ends), axis=0, prepend=False).reshape(branches, *shape)


_TWO_OF_FOUR = np.array([[c == "1" for c in p] for p in ("1100", "1010", "1001", "0110", "0101", "0011")])


def two_of_four(shape: tuple[int, int], branches: int, density: float, draw: Draw) -> np.ndarray:
    """Two of every four neighbours along the last axis, the one a product reduces; branches pair up as complements."""
    if shape[1] % 4:
        raise ValueError(
            f"2:4 masks need a reduction axis divisible by 4, and this factor is {shape}; choose a rank that is a "
            "multiple of 4 on a host whose inputs are too, or masks='complementary'"
        )
    masks = []
    for branch in range(0, branches, 2):
        pattern = (draw(branch, shape[0] * shape[1] // 4) % 6).astype(np.intp)
        first = _TWO_OF_FOUR[pattern].reshape(shape)
        masks += [first, ~first]
    return np.stack(masks[:branches])


KINDS = {"random": random, "complementary": complementary, "2:4": two_of_four}


SMALL = 2**17  # entries of all branches: 16 KiB as bits, so that what is remembered stays below 32 MiB


def draw_masks(kind: str, shape: tuple[int, int], branches: int, density: float, key: str) -> np.ndarray:
    """One factor's masks, (branches, *shape), from their key; small ones from memory where they were drawn before.

    Who changes adapters in turn asks for the same masks again: those of a LoRA on q and v of a ViT-B take 74 KB.
    """
    size = branches * math.prod(shape)
    if size > SMALL:
        return _draw(kind, shape, branches, density, key)
    bits = np.unpackbits(packed(kind, shape, branches, density, key), count=size)
    return bits.view(bool).reshape(branches, *shape)


@functools.lru_cache(maxsize=2048)
def packed(kind: str, shape: tuple[int, int], branches: int, density: float, key: str) -> np.ndarray:
    """The bits of one factor's masks; `packed.cache_clear()` forgets those of all."""
    return np.packbits(_draw(kind, shape, branches, density, key))


def _draw(kind: str, shape: tuple[int, int], branches: int, density: float, key: str) -> np.ndarray:
    return KINDS[kind](shape, branches, density, lambda branch, count: stream(f"{key}/{branch}", count))


class Factor(nn.Module):
    """A trained matrix seen through static masks, the branches concatenated along `dim`.

    forward() gives V itself without masks, else [V ⊙ M_1, …, V ⊙ M_d]: shape (d·rows, cols) for dim=0,
    (rows, d·cols) for dim=1. Masks are a buffer that is never saved: the seed rebuilds them.

    How it works: `(value.unsqueeze(dim) * mask).flatten(dim, dim + 1)`; autograd sums the branches' gradients.
    """

    mask: Tensor | None

    def __init__(self, value: Tensor, masks: np.ndarray | None, dim: int) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.dim = dim
        mask = None if masks is None else torch.from_numpy(np.moveaxis(masks, 0, dim).copy()).to(value.device)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self) -> Tensor:
        if self.mask is None:
            return self.value
        return (self.value.unsqueeze(self.dim) * self.mask).flatten(self.dim, self.dim + 1)

    def extra_repr(self) -> str:
        branches = "" if self.mask is None else f", branches={self.mask.shape[self.dim]}"
        return f"{tuple(self.value.shape)}{branches}"


def checksum(factors: Iterable[Factor]) -> str:
    """sha256 of all masks in order: a loaded file proves with it that its masks were rebuilt bit for bit."""
    return digest(factor.mask.movedim(factor.dim, 0) for factor in factors if factor.mask is not None)


def digest(masks: Iterable[Tensor]) -> str:
    """sha256 of the masks' bits, in order."""
    found = hashlib.sha256()
    for mask in masks:
        found.update(np.packbits(mask.cpu().numpy()).tobytes())
    return found.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a method's factors are stored: the fields that every CapaBoost-able method inherits.

    branches: how many masked views of each factor are summed; 1 is the plain method.
    density:  share of ones in each mask, in (0, 1]; None means 1/branches where the masks are complementary, 1 for one
              branch of random masks, else 0.5 (the authors' setting).
    masks:    "random" (exact count, the paper's), "complementary" (a partition: no dead entries), "2:4"; or "learned",
              ProPETL's: all hosts share one set of values, each sees it through masks it learns, see
              `capavision.learned` and `capavision.parameter_groups`.

    Raises:
        ValueError: branches below 1, a density outside (0, 1] or at odds with the masks, an unknown kind of mask.
    """

    branches: int = 1
    density: float | None = None
    masks: str = "random"

    def __post_init__(self) -> None:
        if self.masks not in (*KINDS, "learned"):
            raise ValueError(f"masks={self.masks!r} is unknown; choose one of {', '.join(KINDS)}, learned")
        whole("branches", self.branches, " (1 is the plain method)")
        if self.density is None:
            only = 1 / self.branches if self.masks == "complementary" else 0.5
            object.__setattr__(
                self, "density", 1.0 if self.branches == 1 and self.masks not in ("2:4", "learned") else only
            )
        self._check_density()

    def _check_density(self) -> None:
        density, branches = self.density, self.branches
        assert density is not None
        if not (isinstance(density, (int, float)) and 0 < density <= 1):
            raise ValueError(f"density={density!r} must lie in (0, 1]: it is the share of entries each mask keeps")
        if self.masks == "complementary" and abs(density * branches - 1) > 1e-6:
            raise ValueError(
                f"complementary masks share the entries out among {branches} branches, so density is {1 / branches:g}, "
                f"not {density}; leave density out, or choose masks='random'"
            )
        if self.masks == "complementary" and branches == 1:
            raise ValueError(
                "complementary masks share the entries out among branches, so branches is at least 2, not 1"
            )
        if self.masks == "2:4" and density != 0.5:
            raise ValueError(f"2:4 masks keep half of every four entries: density is 0.5, not {density}; leave it out")
        if self.masks == "2:4" and branches > 1 and branches % 2:
            raise ValueError(
                f"2:4 masks pair up as complements, so branches is 1 or even, not {branches}; masks='random' serves any"
            )
        if self.masks == "learned" and density == 1:
            raise ValueError(
                "masks='learned' with density=1 keeps every entry, so there is nothing to learn; choose a density "
                "below 1, or masks='random' with branches=1 for the plain method"
            )
        if self.masks == "random" and branches > 1 and density == 1:
            raise ValueError(
                f"density=1 makes the {branches} branches equal, so that the rank does not grow; "
                "choose a density below 1, or branches=1"
            )

    def factor(self, value: Tensor, key: str, dim: int) -> Factor:
        """`value` (rows, cols) behind this setting's masks, drawn from `key` (seed, module and factor in one string).

        Learned masks start from the key; `inject` then lets all hosts share the first one's values.

        >>> Sharing(branches=2, masks="complementary").factor(torch.ones(2, 4), "0/qkv/A", dim=0)().sum().item()
        8.0
        """
        assert self.density is not None
        if self.masks == "learned":
            from capavision.learned import learned  # which imports Factor

            return learned(value, self.branches, self.density, key, dim)
        masks = None
        if self.density != 1:
            masks = draw_masks(self.masks, (value.shape[0], value.shape[1]), self.branches, self.density, key)
        return Factor(value, masks, dim)
