"""A host of two modules: x is what the first is given, y what the second returns.

    f(x) + Δ(x),    f(x) = second(σ(first(x)))        BERT's intermediate.dense and output.dense, BART's fc1 and fc2

The first leaves x in a Span that both hold, the second takes it from there. Each thread has a place of its own, so that
models may be shared by threads. A layer that runs often (ALBERT's) or by chunks passes the two in turn, and gradient
checkpointing passes both again. Nothing stays behind a forward, but for an x whose forward failed between the two: the
next one replaces it.
"""

import threading
from typing import Any


class Span:
    """The way of x from the module called `start` to the one called `end`, within one forward.

    >>> span = Span("fc1", "fc2")
    >>> span.put("x")
    >>> span.take()
    'x'
    """

    def __init__(self, start: str, end: str) -> None:
        self.start, self.end = start, end
        self._here = threading.local()

    def __reduce__(self) -> Any:  # a copy, for both modules of a copied model, begins empty
        return Span, (self.start, self.end)

    @property
    def holds(self) -> bool:
        """Whether an x is on its way in this thread."""
        return getattr(self._here, "x", None) is not None

    def put(self, x: Any) -> None:
        """Leave x for the end; one that no end took is forgotten."""
        self._here.x = x

    def take(self) -> Any:
        """The x that the start left.

        Raises:
            ValueError: it left none.
        """
        if not self.holds:
            raise ValueError(
                f"{self.end} ran, and {self.start}, whose input its adapter reads, not before it in this thread; run "
                "both, as the model does"
            )
        x = self._here.x
        self._here.x = None
        return x
