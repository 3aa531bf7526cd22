"""Places in a base model that stand open, and what a run puts there.

    a weight    W + ΔW, ΔWᵀ = down @ up           down (n_in, rank), up (rank, n_out)
    a block     y + σ(h @ D + b_D) @ U + b_U      D (c_in, width), b_D (width), U (width, c_out), b_U (c_out)
    attention   its softmax over [keys; k]        keys, values (heads, length, head width)

Rank, width and length are free, and 0 leaves the base as it is. Factors lie as a product reads them, since a graph
cannot transpose once and for all what a run may replace. A scale is multiplied in.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import capavision as cv
from capavision.methods.adapter import Bottleneck
from capavision.methods.prefix import KeysValues
from capavision.placement import ACTIVATIONS

EXAMPLE = 3  # the free axes' length while the graph is traced; 0 and 1 would be baked in


class Product(cv.WeightDelta):
    """ΔW as two thin matrices."""

    free: ClassVar[Mapping[str, int]] = {"down": 1, "up": 0}
    settings: tuple[Any, ...] = ()
    factored = True

    def __init__(self, factors: cv.Factors) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(factors.down.mT), nn.Parameter(factors.scale * factors.up.mT)

    def weight(self) -> Tensor:
        return self.up.mT @ self.down.mT

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down @ self.up


class Beside(cv.OutputDelta):
    """A dense bottleneck."""

    free: ClassVar[Mapping[str, int]] = {"D": 1, "b_D": 0, "U": 0}

    def __init__(self, dense: Bottleneck) -> None:
        super().__init__()
        config = dense.config
        self.settings = (f"activation={config.activation!r}", f"where={config.where!r}")
        self.act, self.parallel, self.axis = ACTIVATIONS[config.activation], config.where == "parallel", dense.axis
        self.D, self.b_D = nn.Parameter(dense.D().mT), nn.Parameter(dense.b_D)
        self.U, self.b_U = nn.Parameter(config.scale * dense.U().mT), nn.Parameter(config.scale * dense.b_U)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = (x if self.parallel else y).movedim(self.axis, -1)
        return (self.act(h @ self.D + self.b_D) @ self.U + self.b_U).movedim(-1, self.axis)

    def folded(self) -> "Beside":
        return self


class Ahead(cv.AttentionDelta):
    """Dense keys and values."""

    free: ClassVar[Mapping[str, int]] = {"keys": 1, "values": 1}
    settings: tuple[Any, ...] = ()

    def __init__(self, dense: KeysValues) -> None:
        super().__init__()
        keys, values = dense()
        self.keys, self.values = nn.Parameter(keys.contiguous()), nn.Parameter(values.contiguous())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def folded(self) -> "Ahead":
        return self


Slot = Product | Beside | Ahead


@torch.no_grad()
def opened(delta: cv.Delta) -> Slot | None:
    """The slot that holds what `delta` does, masks multiplied in; None where no slot can."""
    if isinstance(delta, cv.WeightDelta):
        factors = delta.factors()
        return None if factors is None else Product(factors)
    dense = delta.folded() if isinstance(delta, (cv.OutputDelta, cv.AttentionDelta)) else None
    if isinstance(dense, Bottleneck):
        return Beside(dense)
    return Ahead(dense) if isinstance(dense, KeysValues) else None


def free_axes(slot: Slot) -> dict[str, int | None]:
    """Of each of the slot's tensors the axis of free length, None where all are fixed."""
    return {name: slot.free.get(name) for name, _ in slot.named_parameters()}
