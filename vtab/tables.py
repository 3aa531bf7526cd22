"""The table of the field, ours above and published rows below, and its form as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from vtab.averages import AVERAGES, VTAB
from vtab.published import Published
from vtab.rows import Row
from vtab.tasks import GROUPS, TASKS

GENERATED = "generated, not dSprites"
MEANS = {"natural": "Nat.", "specialized": "Spec.", "structured": "Struct.", "groups": "Groups", "all": "All 19"}
NOTES = (
    "± is the standard deviation over seeds. Groups: mean of the 3 group means; All 19: mean of the 19 tasks. "
    f"k/n: partial, the mean of k tasks instead of n. g: {GENERATED}."
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


def paper_name(task: str) -> str:
    """The heading of a task's column.

    >>> paper_name("photos of mine")
    'photos of mine'
    """
    return TASKS[task].paper_name if task in TASKS else task


def extras(rows: Sequence[Row]) -> list[str]:
    """Tasks of ours outside VTAB-1k, which have a block of their own."""
    return list(dict.fromkeys(task for row in rows for task in row.cells if task not in VTAB))


def lines(rows: Sequence[Row], beside: Sequence[Published]) -> list[Line]:
    """Ours, then the published rows."""
    best = {column: _best(rows, column) for column in (*VTAB, *extras(rows), *AVERAGES)}
    return [_ours(row, best) for row in rows] + [_published(row) for row in beside]


def having(table: Sequence[Line], columns: Sequence[str]) -> list[Line]:
    """Our lines that have a figure in any of the columns."""
    return [line for line in table if line.ours and any(column in line.figures for column in columns)]


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
    return Line(row.label, True, figures, _span(row.parameters()), _span(row.seeds()), _remark(row))


def _published(row: Published) -> Line:
    figures = {task: Figure(value) for task, value in row.accuracies.items()}
    figures |= {name: Figure(a.value) for name, a in row.averages.items() if a.value is not None}
    return Line(row.method, False, figures, f"{row.parameters:,}" if row.parameters is not None else "", "", row.remark)


def _remark(row: Row) -> str:
    generated = [task for task, cell in row.cells.items() if cell.generated]
    images = [row.facets["images"]] if "images" in row.facets and row.facets["images"] not in row.label else []
    return "; ".join([*row.remarks, *images, *([f"{', '.join(generated)} {GENERATED}"] if generated else [])])


def _span(ends: tuple[int, int]) -> str:
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _best(rows: Sequence[Row], column: str) -> float | None:
    """The highest figure, rounded as shown, if all that could be highest had the same images and seeds."""
    judged, values = set(), []
    for row in (row for row in rows if row.comparable):
        tasks = GROUPS.get(column, VTAB) if column in AVERAGES else [column]
        there = {task: row.cells[task] for task in tasks if task in row.cells}
        if there:
            values.append(row.averages()[column].value if column in AVERAGES else there[column].mean)
            judged.add(frozenset((task, cell.judged) for task, cell in there.items()))
    return round(max(values), 1) if len(judged) == 1 and len(values) > 1 else None


def as_csv(table: Sequence[Line], more: Sequence[str]) -> str:
    """Plain numbers, a line a row; empty where there is none."""
    columns = [*VTAB, *more]
    head = ["method", "origin"]
    head += [f"{task}{part}" for task in columns for part in ("", "_std", "_low95", "_high95")]
    head += [f"{name}{part}" for name in AVERAGES for part in ("", "_std", "_complete")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, "trained_parameters", "seeds", "remark"])
    for line in table:
        written: list[object] = [line.label, "ours" if line.ours else "published"]
        for task in columns:
            figure = line.figures.get(task)
            low, high = figure.interval if figure and figure.interval else (None, None)
            written += [_number(v) for v in (figure and figure.value, figure and figure.std, low, high)]
        for name in AVERAGES:
            figure = line.figures.get(name)
            complete = "" if figure is None else "no" if figure.mark or figure.caveat else "yes"
            written += [_number(figure and figure.value), _number(figure and figure.std), complete]
        writer.writerow([*written, line.parameters.replace(",", ""), line.seeds, line.remark])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
