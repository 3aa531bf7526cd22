"""vtab's training loop over windows of questions, and the logits of a file's windows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from examples.text.encode import Encoded, padded
from examples.text.loop import NOT_FINITE, TextLoop
from examples.text.windows import Window
from vtab.evaluate import autocast

EVALUATED = 64  # windows a batch


def encode(windows: Sequence[Window], tokenizer: Any, device: torch.device) -> tuple[Encoded, Tensor]:
    """The windows on `device`, and the places of their answers, int64 (n, 2); of no answer the null position."""
    sizes = torch.tensor([len(window.ids) for window in windows])
    ids = padded([window.ids for window in windows], tokenizer.pad_token_id, device)
    typed = "token_type_ids" in tokenizer.model_input_names
    types = padded([window.types for window in windows], tokenizer.pad_token_type_id, device) if typed else None
    labels = torch.tensor([window.label or (window.null,) * 2 for window in windows], device=device)
    return Encoded(ids, types, sizes.to(device), sizes), labels


def span_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Start and end logits, float32 (B, 2, tokens); padding has -inf, so that a window's loss and answers do not depend
    on what it is batched with."""
    found = model(**inputs)
    both = torch.stack([found.start_logits, found.end_logits], 1).float()
    return both.masked_fill(inputs["attention_mask"][:, None] == 0, -torch.inf)


@dataclass
class SpanLoop(TextLoop):
    """Epochs over windows.

    labels: int64 (n, 2), the first and the last token of each window's answer
    """

    unit: ClassVar[str] = "window"

    def passes(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], AbstractContextManager[Any]]]:
        return lambda inputs: span_logits(self.model, inputs), nullcontext

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean of the cross entropies of start and end."""
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How many windows have both ends right."""
        return (outputs.argmax(-1) == labels).all(1).sum()


@torch.inference_mode()
def predict(
    model: nn.Module, windows: Encoded, precision: str = "auto"
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Start and end logits of each window, in order, without padding; windows of like length go together.

    Raises:
        ValueError: some are not finite, of which no answer can be made.
    """
    model.eval()
    order = windows.sizes.argsort(descending=True, stable=True)  # the longest first: memory fails at once or not at all
    found: list[Any] = [None] * len(windows)
    for batch, places in zip(windows.batches(order, EVALUATED), order.split(EVALUATED), strict=True):
        with autocast(windows.device, precision):
            logits = span_logits(model, windows.inputs(batch)).cpu().numpy()
        if not (logits < np.inf).all():  # NaN is not either; -inf stands at padding
            raise ValueError(NOT_FINITE)
        for place, (start, end) in zip(places.tolist(), logits, strict=True):
            size = int(windows.sizes[place])
            found[place] = (start[:size], end[:size])
    return found
