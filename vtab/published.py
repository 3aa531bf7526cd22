"""Accuracies that papers print for VTAB-1k, task by task: published.csv, a row each with data, weights and selection.

Figures are the sources'; averages are always computed anew, since literature tables carry slips. They stand beside our
rows for orientation and are never averaged with them: images, weights and the rule that chose the epoch differ.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from capavision.targets import near
from vtab.averages import VTAB, Average, averages

SHOWN = (  # the ends of the scale, then pairs of one method under two selection rules
    "Full fine-tuning",
    "Linear",
    "LoRA-8 (NOAH)",
    "LoRA (OSU)",
    "Convpass",
    "Convpass (OSU)",
    "PACE",
)


@dataclass(frozen=True)
class Published:
    """One published row.

    parameters: average of trained ones, the head aside; None where the source gives none per row
    data: jpeg, lossless or unstated, which for CIFAR-100 are two benchmarks
    weights: orig or AugReg, two checkpoints that go by one name (ViT-B/16, ImageNet-21k)
    selection: what chose settings and epoch
    """

    method: str
    accuracies: dict[str, float]
    parameters: int | None
    data: str
    weights: str
    selection: str
    note: str
    source: str

    @property
    def averages(self) -> dict[str, Average]:
        return averages(self.accuracies)

    @property
    def remark(self) -> str:
        """What to know before comparing."""
        parts = [f"{self.data} images" if self.data != "unstated" else "images unstated"]
        parts += [f"{self.weights} weights"] if self.weights != "orig" else []
        parts += [f"selection {self.selection}" if self.selection == "unstated" else self.selection]
        return "; ".join([*parts, *([self.note] if self.note else [])])


@cache
def published() -> tuple[Published, ...]:
    """All rows.

    >>> next(row for row in published() if row.method == "LoRA-8 (NOAH)").accuracies["cifar"]
    67.1
    """
    text = (resources.files("vtab") / "published.csv").read_text(encoding="utf-8")
    rows = []
    for line in csv.DictReader(text.splitlines()):
        accuracies = {task: float(line.pop(task)) for task in VTAB}
        parameters = line.pop("parameters")
        rows.append(Published(accuracies=accuracies, parameters=int(parameters) if parameters else None, **line))
    return tuple(rows)


def choose(names: str | None = None) -> list[Published]:
    """The rows of these names, separated by commas; "all", "none", or None for the usual few.

    Raises:
        ValueError: a name that no row has.

    >>> [row.method for row in choose("PACE, linear")]
    ['PACE', 'Linear']
    """
    known = {row.method.casefold(): row for row in published()}
    if names in ("all", "none"):
        return list(known.values()) if names == "all" else []
    chosen = SHOWN if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name.casefold() not in known:
            choices = [row.method for row in published()]
            raise ValueError(f"--beside: no published row {name!r}; {near(name, choices)} (or all, or none)")
    return [known[name.casefold()] for name in chosen]
