"""The two averages of the field, for all figures, ours and published:

groups = (mean of the 7 natural + mean of the 4 specialized + mean of the 8 structured tasks) / 3
all    = mean of the 19 tasks
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from vtab.tasks import GROUPS

VTAB = [task for tasks in GROUPS.values() for task in tasks]
AVERAGES = {
    "natural": "natural",
    "specialized": "specialized",
    "structured": "structured",
    "groups": "mean of the 3 group means",
    "all": "mean of the 19 tasks",
}


@dataclass(frozen=True)
class Average:
    """A mean over `count` of the `of` tasks it is meant for; None where there is none of them.

    std: over seeds, where every task has the same two or more
    generated: how many of the tasks are drawn, not VTAB's own images
    """

    value: float | None
    count: int
    of: int
    std: float | None = None
    generated: int = 0

    @property
    def caveat(self) -> str:
        """What keeps it from being the benchmark's figure; empty if nothing does.

        >>> Average(70.0, 3, 7).caveat
        'partial, 3 of 7'
        """
        parts = [f"partial, {self.count} of {self.of}"] if self.count < self.of else []
        parts += [f"{self.generated} generated"] if self.generated else []
        return "; ".join(parts) if self.count else ""


def averages(values: Mapping[str, float]) -> dict[str, Average]:
    """Group means and both averages of accuracies by task id.

    A partial mean of group means is that of the groups that have any task.

    >>> averages({"cifar": 60.0, "dtd": 70.0, "kitti": 80.0})["groups"]
    Average(value=72.5, count=3, of=19, std=None, generated=0)
    """
    there = {group: [values[task] for task in tasks if task in values] for group, tasks in GROUPS.items()}
    result = {
        group: Average(fmean(found) if found else None, len(found), len(GROUPS[group]))
        for group, found in there.items()
    }
    everything = [value for found in there.values() for value in found]
    of_groups = [fmean(found) for found in there.values() if found]
    for name, parts in (("groups", of_groups), ("all", everything)):
        result[name] = Average(fmean(parts) if parts else None, len(everything), len(VTAB))
    return result
