"""Full fine-tuning: every parameter of the model, the bar that the others are measured against.

    W ← W + ΔW,    ΔW free

Source: the "Full" row of every PEFT table.
Shapes: the model's own.
Cost:   the whole model, in the file too; the originals are kept in main memory, for `remove`.
Start:  the model as it is. Batch norms keep their running statistics unless inject is told freeze_norm=False.
"""

from dataclasses import dataclass

from torch import nn

from capavision.attention import outside_head
from capavision.delta import Method


@dataclass(frozen=True)
class Full(Method):
    """Train everything.

    >>> Full().name
    'full'
    """

    def trains(self, model: nn.Module) -> list[str]:
        return list(outside_head(model))
