"""vtab's training loop over texts, and predictions for a split."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.text.encode import Batch, Encoded
from vtab.evaluate import autocast
from vtab.loop import Loop

EVALUATED = 128  # texts a batch
POOL = 8  # batches
NOT_FINITE = "the model's logits are not finite; a lower --lr helps most, then --precision float32"


@dataclass
class TextLoop(Loop):
    """Epochs over encoded texts; a batch is as wide as its longest text.

    inputs: Encoded
    labels: classes as int64, or numbers as float32, on the same device
    """

    unit: ClassVar[str] = "text"
    normalize: Any = field(init=False, default=None)  # texts are encoded once, before training

    def passes(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], AbstractContextManager[Any]]]:
        return lambda inputs: self.model(**inputs).logits, nullcontext

    def draw(self) -> list[Batch]:
        """Texts of like length meet in a batch, eight batches at a time, so that little of it is padding."""
        size = self.config.batch_size
        order = torch.randperm(len(self.inputs))[: self.steps * size]  # with drop_last the last ones are left out
        pools = [pool[self.inputs.sizes[pool].argsort(stable=True)] for pool in order.split(POOL * size)]
        batches = self.inputs.batches(torch.cat(pools), size)
        return [batches[i] for i in torch.randperm(len(batches))]

    def batch(self, chosen: Batch) -> tuple[dict[str, Tensor], Tensor]:
        return self.inputs.inputs(chosen), self.labels[chosen.indices]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of classes, the mean squared error of numbers."""
        return (
            F.mse_loss(outputs.squeeze(-1).float(), labels)
            if labels.is_floating_point()
            else super().loss(outputs, labels)
        )

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        return None if labels.is_floating_point() else super().right(outputs, labels)


@torch.inference_mode()
def predict(model: nn.Module, texts: Encoded, precision: str = "auto") -> Tensor:
    """The logits (n, classes) in float32, in the texts' order and on their device; texts of like length go together.

    Raises:
        ValueError: some are not finite, which would pass for a class.
    """
    model.eval()
    order = texts.sizes.argsort(descending=True, stable=True)  # the longest first: memory fails at once or not at all
    parts = []
    for batch in texts.batches(order, EVALUATED):
        with autocast(texts.device, precision):
            parts.append(model(**texts.inputs(batch)).logits.float())
    logits = torch.cat(parts)[order.argsort().to(texts.device)]
    if not logits.isfinite().all():
        raise ValueError(NOT_FINITE)
    return logits
