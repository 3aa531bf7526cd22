"""Checks of a method's fields: each raises a ValueError that names the field, its value and what it must be."""

import math
from collections.abc import Collection


def whole(field: str, value: int, note: str = "") -> None:
    """A count: a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field}={value!r} must be a whole number of at least 1{note}")


def nonzero(field: str, value: float, delta: str) -> None:
    """A factor on `delta`, which 0 would silence."""
    # numpy's numbers but float64 are no floats, and no file could hold them
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value):
        raise ValueError(
            f"{field}={value!r} must be a finite int or float other than 0, which would leave {delta} at 0"
        )


def one_of(field: str, value: str, known: Collection[str]) -> None:
    """One of a few names."""
    if value not in known:
        raise ValueError(f"{field}={value!r} is unknown; choose one of {', '.join(known)}")
