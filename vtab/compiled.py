"""--compile: the backbone through torch.compile, once for all tasks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtab.config import Config


def forward_of(model: nn.Module, config: Config) -> Callable[[Tensor], Tensor]:
    """The model's forward; with --compile the backbone is compiled, for whole batches.

    The backbone in one graph: stochastic depth gives each block a constant of its own, so that blocks would be compiled
    one by one. Without the head: tasks that differ in classes then share what torch caches on disk. The smaller last
    batch of an epoch runs as it is, since it would be compiled for a second time.

    timm's models all compute forward_head(forward_features(x)), bit for bit in each of the 98 families.

    Raises:
        ValueError: from the forward, where the compiler fails.
    """
    if not config.compile:
        return model
    from torch._dynamo.exc import TorchDynamoException  # over a second to import

    whole: Any = model
    features = torch.compile(whole.forward_features, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        if len(x) != config.batch_size:
            return model(x)
        try:
            return whole.forward_head(features(x))
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
            raise ValueError(
                f"--compile: torch.compile cannot take {config.model} here, {reason}; leave it out"
            ) from error

    return forward
