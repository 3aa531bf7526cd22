"""The head alone: a frozen backbone under a trained linear classifier.

    logits = W_head · features(x) + b_head

Source: the "Linear" row of every PEFT table; VTAB, arXiv 1910.04867.
Shapes: W_head (num_classes, num_features), b_head (num_classes).
Cost:   the head, which every method here trains and no table counts.
Start:  the head as the model has it.
"""

from dataclasses import dataclass

from capavision.delta import Method


@dataclass(frozen=True)
class LinearProbe(Method):
    """Train the classifier and nothing else.

    >>> LinearProbe().name
    'linear_probe'
    """

    placement = None
