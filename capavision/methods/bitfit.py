"""BitFit: train the biases the model has, and nothing new.

    y = W x + (b + Δb)

Source: BitFit, arXiv 2106.10199.
Shapes: every 1-dimensional parameter called bias or …_bias outside the classifier: of Linears, convs and norms, and the
        q_bias and v_bias of beit, eva and swin_v2. Position biases are tables, not biases.
Cost:   102,912 values of a ViT-B/16; nothing at run time. The originals are kept in main memory, for `remove`.
Start:  the model's own biases, so the model is unchanged.
"""

from dataclasses import dataclass

from torch import nn

from capavision.attention import outside_head
from capavision.delta import Method


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias.

    Raises:
        ValueError: (by inject) the model has no bias.

    >>> BitFit().name
    'bitfit'
    """

    def trains(self, model: nn.Module) -> list[str]:
        biases = [n for n, p in outside_head(model).items() if p.ndim == 1 and n.rpartition(".")[2].endswith("bias")]
        if not biases:
            raise ValueError(f"{type(model).__name__} has no bias to train; choose another method")
        return biases
