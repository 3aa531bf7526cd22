"""The table of the field, ours above and published rows below: as blocks that stand apart, and as one CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vtab.averages import AVERAGES, VTAB
from vtab.published import Published
from vtab.rows import Row
from vtab.runs import ACCURACY, metric
from vtab.tasks import GROUPS, TASKS

GENERATED = "generated, not dSprites"
MEANS = {"natural": "Nat.", "specialized": "Spec.", "structured": "Struct.", "groups": "Groups", "all": "All 19"}
SCORE = "score"
SCORES = "Score: accuracy, or the metric in the task's name."
SPREAD = "± is the standard deviation over seeds."
OF_VTAB = (
    "Groups: mean of the 3 group means; All 19: mean of the 19 tasks. k/n: partial, the mean of k tasks instead of n. "
    f"g: {GENERATED}."
)


@dataclass(frozen=True)
class Figure:
    """One figure of the table.

    mark: g where images are generated
    best: the column's highest among rows that compare
    caveat: k/n where it is the mean of k tasks instead of n
    """

    value: float
    std: float | None = None
    interval: tuple[float, float] | None = None
    mark: str = ""
    best: bool = False
    caveat: str = ""

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.value:.1f}{self.mark}{spread}" + (f" ({self.caveat})" if self.caveat else "")


@dataclass(frozen=True)
class Line:
    """A line of the table, ours or published: figures by task id and by name of average."""

    label: str
    ours: bool
    figures: dict[str, Figure]
    parameters: str
    seeds: str
    remark: str
    unit: str = "images"

    @property
    def in_words(self) -> str:
        """The remark, and what the figures' marks say: for files of bare numbers."""
        generated = [task for task, figure in self.figures.items() if figure.mark and task not in AVERAGES]
        return "; ".join(filter(None, [self.remark, f"{', '.join(generated)} {GENERATED}" if generated else ""]))


@dataclass(frozen=True)
class Block:
    """A table of its own: tasks, their averages, and the lines that have a figure there.

    title: what the tasks have in common
    judged: what their figures are, all in percent
    unit: what their examples are
    groups: the tasks by the heading above them
    averages: of these tasks, and what each is
    """

    title: str
    judged: str
    unit: str
    groups: Mapping[str, Sequence[str]]
    averages: Mapping[str, str]
    lines: Sequence[Line]

    @property
    def tasks(self) -> list[str]:
        return [task for tasks in self.groups.values() for task in tasks]

    @property
    def columns(self) -> list[str]:
        """Tasks, then averages."""
        return [*self.tasks, *self.averages]

    @property
    def notes(self) -> list[str]:
        """What its signs mean."""
        spread = any(figure.std is not None for line in self.lines for figure in line.figures.values())
        told = {SPREAD: spread, OF_VTAB: bool(self.averages), SCORES: self.judged == SCORE}
        return [note for note, needed in told.items() if needed]

    @property
    def upright(self) -> bool:
        """Are the columns so many that their headings must stand upright?"""
        return len(self.columns) > 6

    @property
    def firsts(self) -> list[str]:
        """The columns that begin a group."""
        return [*(tasks[0] for tasks in self.groups.values()), *list(self.averages)[:1]]

    @property
    def intervals(self) -> bool:
        """Does any figure have one?"""
        return any(figure.interval for line in self.lines for figure in line.figures.values())

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.judged} in percent"


def paper_name(task: str) -> str:
    """The heading of a task's column.

    >>> paper_name("photos of mine")
    'photos of mine'
    """
    return TASKS[task].paper_name if task in TASKS else task


def blocks(rows: Sequence[Row], beside: Sequence[Published]) -> list[Block]:
    """VTAB-1k where any of our rows, or of others', has a task of it; then what else there is, by its examples: no
    model of images has a figure for texts."""
    table, runs = lines(rows, beside), [run for row in rows for run in row.runs]
    found, known = [], bool(beside) or any(run.task in VTAB for run in runs)
    if known:
        found.append(Block("VTAB-1k", "top-1 accuracy", "images", GROUPS, AVERAGES, having(table, VTAB)))
    for unit in dict.fromkeys(row.unit for row in rows):
        tasks = list(dict.fromkeys(run.task for run in runs if run.unit == unit and run.task not in VTAB))
        title = unit.capitalize() + (" outside VTAB-1k" if known and unit == "images" else "")
        if tasks:
            found.append(Block(title, judged_by(rows, tasks), unit, {"": tasks}, {}, having(table, tasks)))
    return found


def judged_by(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """What the figures of the tasks are: one metric, or scores of several."""
    runs = [run for row in rows for task in tasks if task in row.cells for run in row.cells[task].runs]
    metrics = {metric(run.result) for run in runs}
    if metrics <= {ACCURACY}:
        return "top-1 accuracy" if {run.unit for run in runs} <= {"images"} else ACCURACY
    return metrics.pop() if len(metrics) == 1 else SCORE


def lines(rows: Sequence[Row], beside: Sequence[Published]) -> list[Line]:
    """Ours, then the published rows."""
    tasks = dict.fromkeys(task for row in rows for task in row.cells)
    best = {column: _best(rows, column) for column in (*tasks, *AVERAGES)}
    return [_ours(row, best) for row in rows] + [_published(row) for row in beside]


def having(table: Sequence[Line], columns: Sequence[str]) -> list[Line]:
    """The lines that have a figure in any of the columns."""
    return [line for line in table if any(column in line.figures for column in columns)]


def _ours(row: Row, best: dict[str, float | None]) -> Line:
    figures = {}
    for task, cell in row.cells.items():
        mark = "g" if cell.generated else ""
        top = row.comparable and round(cell.mean, 1) == best[task]
        figures[task] = Figure(cell.mean, cell.std, cell.interval, mark, top)
    for name, average in row.averages().items():
        if average.value is not None:
            top = row.comparable and round(average.value, 1) == best[name]
            mark = "g" if average.generated else ""
            caveat = f"{average.count}/{average.of}" if average.count < average.of else ""
            figures[name] = Figure(average.value, average.std, None, mark, top, caveat)
    return Line(row.label, True, figures, _span(row.parameters()), _span(row.seeds()), _remark(row), row.unit)


def _published(row: Published) -> Line:
    figures = {task: Figure(value) for task, value in row.accuracies.items()}
    figures |= {name: Figure(a.value) for name, a in row.averages.items() if a.value is not None}
    return Line(row.method, False, figures, f"{row.parameters:,}" if row.parameters is not None else "", "", row.remark)


def _remark(row: Row) -> str:
    images = [row.facets["images"]] if "images" in row.facets and row.facets["images"] not in row.label else []
    return "; ".join([*row.remarks, *images])


def _span(ends: tuple[int, int]) -> str:
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _best(rows: Sequence[Row], column: str) -> float | None:
    """The highest figure, rounded as shown, if all that could be highest had the same examples and seeds."""
    judged, values = set(), []
    for row in (row for row in rows if row.comparable):
        tasks = GROUPS.get(column, VTAB) if column in AVERAGES else [column]
        there = {task: row.cells[task] for task in tasks if task in row.cells}
        if there:
            values.append(row.averages()[column].value if column in AVERAGES else there[column].mean)
            judged.add(frozenset((task, cell.judged) for task, cell in there.items()))
    return round(max(values), 1) if len(judged) == 1 and len(values) > 1 else None


def as_csv(table: Sequence[Line], blocks: Sequence[Block]) -> str:
    """Plain numbers, a line a row; empty where there is none."""
    tasks = [task for block in blocks for task in block.tasks]
    averages = [name for block in blocks for name in block.averages]
    head = ["method", "origin"]
    head += [f"{task}{part}" for task in tasks for part in ("", "_std", "_low95", "_high95")]
    head += [f"{name}{part}" for name in averages for part in ("", "_std", "_complete")]
    head += ["trained_parameters", "seeds", "remark", "judged_on"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for line in table:
        written: list[object] = [line.label, "ours" if line.ours else "published"]
        for task in tasks:
            figure = line.figures.get(task)
            low, high = figure.interval if figure and figure.interval else (None, None)
            written += [_number(v) for v in (figure and figure.value, figure and figure.std, low, high)]
        for name in averages:
            figure = line.figures.get(name)
            complete = "" if figure is None else "no" if figure.mark or figure.caveat else "yes"
            written += [_number(figure and figure.value), _number(figure and figure.std), complete]
        writer.writerow([*written, line.parameters.replace(",", ""), line.seeds, line.in_words, line.unit])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
