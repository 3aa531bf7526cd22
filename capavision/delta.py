"""What a method builds: a Delta, the trained addition to one host.

Three placements. A WeightDelta is added to a weight, y = (W + ΔW) x, and folds into it. An OutputDelta is added to
what a block returns, y + Δ(x, y); an AttentionDelta is more keys and values inside an attention. These two fold into a
dense module of their own, without masks or sharing.
"""

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capavision.masks import uniform
from capavision.merged import Block, Contraction, as_they_are

InRows = TypeVar("InRows", Block, Contraction)


@dataclass(frozen=True)
class Site:
    """Where a delta will act, as far as a method needs to know.

    name:  the host's qualified name, followed by ":part" where the delta serves some rows of it only.
    n_out, n_in: rows and columns of ΔW (a conv's kernel counts as columns); for a block the channels of y and of x,
           0 for an x that does not match y place by place; for an attention the widths of v and k, all heads'.
    axis:  the channel axis of a block's output, 1 or -1.
    heads: of an attention's keys.
    like:  a tensor with the device and dtype to build on.
    """

    name: str
    n_out: int
    n_in: int
    seed: int
    like: Tensor
    axis: int = -1
    heads: int = 1

    def key(self, factor: str) -> str:
        """The key of this site's random draws for one factor; independent of every other site."""
        return f"{self.seed}/{self.name}/{factor}"

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.like.device, dtype=self.like.dtype)

    def uniform(self, factor: str, *shape: int) -> Tensor:
        """U(-1/√n, 1/√n) over the last axis of length n: nn.Linear's own start, and loralib's for A.

        From the site's key, hence the same on every machine and version, and free to be rebuilt instead of saved.
        """
        return uniform(f"{self.key(factor)}/init", *shape).to(self.like)


class Delta(nn.Module):
    """Base of all placements; `model.modules()` filtered by it finds every delta."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in the dtype they have, where autocast would round both factors to half precision first."""
    if not isinstance(left, Tensor):  # torch.fx's stand-in, whose graph holds no context
        return left @ right
    with as_they_are(left):
        return left @ right


class Factors(NamedTuple):
    """ΔW = scale · up @ down, for up (n_out, r) and down (r, n_in)."""

    up: Tensor
    down: Tensor
    scale: float


class WeightDelta(Delta, ABC):
    """ΔW of shape (n_out, n_in), added to a host's weight.

    A method whose forward(x) is cheaper than a dense ΔW overrides it and sets `factored`; else a Linear runs W + ΔW.
    """

    factored: bool = False

    @abstractmethod
    def weight(self) -> Tensor:
        """ΔW, dense, (n_out, n_in)."""

    def factors(self) -> Factors | None:
        """ΔW as a plain LoRA, masks multiplied in; None where it is no product of two thin matrices."""
        return None

    def blocks(self) -> list[Block] | None:
        """ΔW as low-rank row blocks, for `capavision.merged`; None where it is no product of two thin matrices."""
        factors = self.factors()
        return None if factors is None else [Block(0, len(factors.up), *factors)]

    def contractions(self) -> list[Contraction] | None:
        """The gradients of what ΔW is made of without the dense one, by row blocks; None where there is no such way."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """x ΔWᵀ, (…, n_in) to (…, n_out)."""
        return F.linear(x, self.weight().to(x.dtype))


class Rows(WeightDelta):
    """Deltas on some row blocks of a fused weight, zero elsewhere: q and v of a qkv projection.

    >>> # y[..., start:stop] += parts[name](x) for each (start, stop)
    """

    def __init__(self, n_out: int, parts: dict[str, tuple[tuple[int, int], WeightDelta]]) -> None:
        super().__init__()
        self.n_out = n_out
        self.factored = all(part.factored for _, part in parts.values())
        self.rows = {name: rows for name, (rows, _) in sorted(parts.items(), key=lambda item: item[1][0])}
        self.parts = nn.ModuleDict({name: parts[name][1] for name in self.rows})

    def _part(self, name: str) -> WeightDelta:
        part = self.parts[name]
        assert isinstance(part, WeightDelta)
        return part

    def _assemble(self, blocks: dict[str, Tensor], dim: int) -> Tensor:
        pieces: list[Tensor] = []
        at = 0
        some = next(iter(blocks.values()))
        for name, (start, stop) in [*self.rows.items(), ("", (self.n_out, self.n_out))]:
            if start > at:
                shape = list(some.shape)
                shape[dim] = start - at
                pieces.append(some.new_zeros(shape))
            if name:
                pieces.append(blocks[name])
            at = stop
        return torch.cat(pieces, dim)

    def weight(self) -> Tensor:
        return self._assemble({name: self._part(name).weight() for name in self.rows}, 0)

    def factors(self) -> Factors | None:
        parts = [part for name in self.rows if (part := self._part(name).factors()) is not None]
        if len(parts) < len(self.rows):
            return None
        scale, down = parts[0].scale, torch.cat([part.down for part in parts])
        up = down.new_zeros(self.n_out, len(down))
        at = 0
        for (start, stop), part in zip(self.rows.values(), parts, strict=True):
            # Each part has columns of its own, so that rows do not mix: [[B_q, 0], [0, 0], [0, B_v]].
            up[start:stop, at : at + len(part.down)] = part.up * (part.scale / scale)
            at += len(part.down)
        return Factors(up, down, scale)

    def blocks(self) -> list[Block] | None:
        return self._of_all(lambda part: part.blocks())

    def contractions(self) -> list[Contraction] | None:
        return self._of_all(lambda part: part.contractions())

    def _of_all(self, ask: Callable[[WeightDelta], list[InRows] | None]) -> list[InRows] | None:
        """What the parts answer, moved to their rows; None if one of them has no answer."""
        found: list[InRows] = []
        for name, (start, _) in self.rows.items():
            answer = ask(self._part(name))
            if answer is None:
                return None
            found += [each._replace(start=start + each.start, stop=start + each.stop) for each in answer]
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self._assemble({name: self._part(name)(x) for name in self.rows}, -1)


class OutputDelta(Delta, ABC):
    """An addition to a block's output."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to y, the block's output for input x."""

    @abstractmethod
    def folded(self) -> "OutputDelta":
        """The same function without masks or sharing: dense factors only."""


def input_name(block: type) -> str:
    """What the first input of the class's forward is called: hidden_states, where a parent passes it by that name."""
    parameters = inspect.signature(block.forward).parameters  # type: ignore[attr-defined]
    return next(itertools.islice(parameters, 1, None), "")


def first_input(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module is called with first, by place or as `name`."""
    return args[0] if args else kwargs.get(name)


def chosen(x: Any, outputs: Sequence[Any]) -> int:
    """Which of a block's outputs is adapted: the first, but not an input that is only passed on (coat's x1)."""
    return next((i for i, y in enumerate(outputs) if y is not x), 0)


def adapted(x: Any, output: Any, delta: Callable[[Tensor], Tensor]) -> Any:
    """A block's output, y + delta(y); of several outputs the `chosen` one, in a tuple or list of the same type."""
    if not isinstance(output, (tuple, list)):
        return output + delta(output)
    at = chosen(x, output)
    parts = [*output[:at], output[at] + delta(output[at]), *output[at + 1 :]]
    return getattr(type(output), "_make", type(output))(parts)


class AttentionDelta(Delta, ABC):
    """Keys and values that an attention has besides its own."""

    @abstractmethod
    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys (heads, length, key width) and values (heads, length, value width)."""

    @abstractmethod
    def folded(self) -> "AttentionDelta":
        """The same function without masks or sharing: dense factors only."""


class Method:
    """Base of the frozen dataclasses that configure a method. Its name is its file's name; its fields are its flags.

    A subclass names its placement and builds a Delta for a Site; targets() may choose default hosts.
    """

    name: ClassVar[str]
    placement: ClassVar[type[Delta] | None] = None  # None for a method without hosts
    known: ClassVar[dict[str, type["Method"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__module__.rpartition(".")[2]
        other = cls.known.get(cls.name)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TypeError(
                f"{other.__qualname__} and {cls.__qualname__} would both be the method {cls.name!r}; keep each in a "
                "file of its own, or give the class a `name`"
            )
        cls.known[cls.name] = cls

    def targets(self, model: nn.Module) -> dict[str, str | None]:
        """Default hosts of this method in `model`: qualified name -> parts to adapt, None for all of it."""
        return {}

    def starts(self, model: nn.Module) -> dict[str, str]:
        """Of an OutputDelta's possible hosts in `model` those whose x is another module's input: that module."""
        return {}

    def trains(self, model: nn.Module) -> list[str]:
        """The parameters of the base itself that this method trains, by name; `remove` puts their values back."""
        return []

    def build(self, site: Site) -> Delta:
        raise TypeError(f"{type(self).__name__} has no hosts, so it builds no delta")
