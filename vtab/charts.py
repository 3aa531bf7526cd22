"""The figures of the report, as SVG: bars by task, learning curves, accuracy against parameters, confusion matrices.

Colours are Okabe and Ito's, which colour-blind readers tell apart; line styles and markers differ too. Legends stand
above the axes, never on data.
"""

import functools
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from vtab import plots
from vtab.averages import VTAB
from vtab.published import Published
from vtab.rows import Cell, Row
from vtab.runs import Run, by_epoch
from vtab.tables import GENERATED, judged_by, paper_name
from vtab.tasks import TASKS

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = "osD^vPXp"
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARK = {"linestyle": "none", "markersize": 7, "markeredgecolor": "white"}
GREY = "#BBBBBB"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "vtab",  # the same runs give the same bytes
    "svg.fonttype": "path",
    "text.parse_math": False,  # names may hold dollars
}
COLUMNS, WIDTH = 3, 12.4  # panels side by side; inches, the page's width
NAMES = 44  # letters beside a panel


def _styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """The function under our style, which other figures of this process do not get."""

    @functools.wraps(draw)
    def inner(*args: Any) -> Any:
        with mpl.rc_context(STYLE):
            return draw(*args)

    return inner


def style(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the row with this index, unlike those of its neighbours."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Every task that a row has, VTAB's first and in the table's order."""
    there = list(dict.fromkeys(task for row in rows for task in row.cells))
    return [task for task in VTAB if task in there] + [task for task in there if task not in VTAB]


@_styled
def bars(rows: Sequence[Row], beside: Sequence[Published]) -> bytes:
    """A panel a task: our rows in colour with their 95 % intervals, published ones in grey."""
    tasks = tasks_of(rows)
    beside = beside if set(tasks) & set(VTAB) else ()
    names = [row.label for row in rows] + [f"{row.method}, published" for row in beside]
    figure, panels = _panels(tasks, 0.24 * len(names) + 0.75, names)
    for axes, task in zip(panels, tasks, strict=True):
        for index, row in enumerate(rows):
            if task in row.cells:
                _bar(axes, index, row.cells[task], style(index)["color"])
        for index, one in enumerate(beside if task in VTAB else (), len(rows)):
            axes.barh(index, one.accuracies[task], color=GREY, height=0.7)
            axes.text(one.accuracies[task] + 1, index, f"{one.accuracies[task]:.1f}", va="center", fontsize=8)
        drawn = any(row.cells[task].generated for row in rows if task in row.cells)
        axes.set_title(f"{paper_name(task)}\nours: {GENERATED}" if drawn else paper_name(task))
        lowest = 25 * min(0, *(row.cells[task].mean // 25 for row in rows if task in row.cells))
        axes.set(yticks=range(len(names)), ylim=(len(names) - 0.4, -0.6), xlim=(lowest, 118))
        axes.set_xticks(np.arange(lowest, 101, 25))
        axes.tick_params(axis="y", length=0)
    return _svg(figure)


def _bar(axes: Any, index: int, cell: Cell, colour: str) -> None:
    axes.barh(index, cell.mean, color=colour, height=0.7)
    if cell.interval:
        axes.plot(cell.interval, [index, index], color="black", linewidth=1.2, solid_capstyle="butt")
        axes.plot(cell.interval, [index, index], "|", color="black", markersize=5)
    axes.text(max(0, cell.mean, *(cell.interval or ())) + 1.5, index, f"{cell.mean:.1f}", va="center", fontsize=8)


@_styled
def curves(rows: Sequence[Row]) -> bytes | None:
    """By epoch: accuracy in training (line), what judges the run on val or test where watched (thin), and what it came
    to (mark)."""
    tasks = [
        t for t in tasks_of(rows) if any(run.history for row in rows if t in row.cells for run in row.cells[t].runs)
    ]
    if not tasks:
        return None
    figure, panels = _panels(tasks, 2.3)
    for axes, task in zip(panels, tasks, strict=True):
        drawn = [(i, row.cells[task]) for i, row in enumerate(rows) if task in row.cells]
        last = max(_curve(axes, cell, style(i)) for i, cell in drawn)
        step = 0.15 * last / len(drawn)
        for place, (i, cell) in enumerate(drawn, 1):  # side by side, so that equal ones do not hide each other
            axes.plot(1.03 * last + place * step, cell.mean, **(style(i) | MARK))
        axes.set(ylim=(plots.lowest(axes), 103), xlim=(1 - 0.04 * last, 1.22 * last))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(paper_name(task))
    _labels(figure, "epoch", f"{judged_by(rows, tasks)} (%)")
    _legend(figure, list(enumerate(rows)))
    return _svg(figure)


def _curve(axes: Any, cell: Cell, look: dict[str, Any]) -> int:
    """Mean over seeds, its range as a band; returns the last epoch."""
    last = 0
    for key, width in zip(by_epoch(cell.runs[0].result), (1.6, 0.8, 0.8), strict=False):
        found: dict[int, list[float]] = defaultdict(list)
        for row in (row for run in cell.runs for row in run.history if key in row):
            found[row["epoch"]].append(row[key])
        epochs = sorted(found)
        if epochs:
            values = [found[epoch] for epoch in epochs]
            axes.plot(epochs, [np.mean(v) for v in values], linewidth=width, markersize=0, **look)
            axes.fill_between(
                epochs, *zip(*((min(v), max(v)) for v in values), strict=True), color=look["color"], alpha=0.15
            )
            last = max(last, epochs[-1])
    return last


@_styled
def against_parameters(rows: Sequence[Row], beside: Sequence[Published]) -> bytes:
    """Accuracy against trained parameters: the mean of the group means where rows are complete, else task by task."""
    means = [row.averages()["groups"] for row in rows]
    whole = [(i, row) for i, row in enumerate(rows) if means[i].count == means[i].of and not means[i].caveat]
    if whole:
        figure, panels = _panels(["groups"], 3.4, columns=1, width=7)
        known = [
            (row.parameters, row.averages["groups"].value, row.method) for row in beside if row.parameters is not None
        ]
        points = [(style(i), row.parameters()[1], means[i].value, means[i].std) for i, row in whole]
        _scatter(panels[0], points, known)
        panels[0].set_title("mean of the 3 group means; grey: published")
    else:
        tasks = tasks_of(rows)
        figure, panels = _panels(tasks, 2.4)
        for axes, task in zip(panels, tasks, strict=True):
            there = [
                (style(i), row.parameters()[1], row.cells[task]) for i, row in enumerate(rows) if task in row.cells
            ]
            _scatter(axes, [(look, count, cell.mean, cell.std) for look, count, cell in there], [])
            axes.set_title(paper_name(task))
    _labels(figure, "trained parameters, the head aside", f"{judged_by(rows, VTAB if whole else tasks_of(rows))} (%)")
    _legend(figure, whole or list(enumerate(rows)), linestyle="none")
    return _svg(figure)


def _scatter(axes: Any, points: Sequence[Any], known: Sequence[Any]) -> None:
    """x is logarithmic; none at all stands a decade left of the fewest."""
    counts = [count for _, count, *_ in points] + [count for count, *_ in known]
    fewest = min((c for c in counts if c), default=1)
    zero = 10 ** (np.floor(np.log10(fewest)) - 1)
    for count, value, name in known:
        axes.plot(count or zero, value, ".", color="#888888")
        axes.annotate(name, (count or zero, value), (4, -3), textcoords="offset points", fontsize=7, color="#666666")
    for look, count, value, std in points:
        axes.errorbar(count or zero, value, yerr=std, **(look | MARK), capsize=2, zorder=3)
    most = max(*counts, 10 * zero)
    axes.set_xscale("log")
    axes.set_xlim(zero / 2, most * 3)
    decades = [10.0**e for e in range(int(np.log10(zero)) + 1, int(np.floor(np.log10(most * 3))) + 1)]
    with_zero = [zero, *decades] if 0 in counts else decades
    axes.set_xticks(with_zero, ["0" if x == zero else _short(x) for x in with_zero])
    axes.minorticks_off()
    axes.margins(y=0.15)


def _short(count: float) -> str:
    """
    >>> _short(100_000.0), _short(1e6)
    ('100k', '1M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def confusions(run: Run) -> np.ndarray:
    """(true class, predicted class): percent of the true class's examples."""
    assert run.labels is not None
    assert run.predicted is not None
    task = TASKS.get(run.task)
    classes = max(
        task.num_classes if task else len(run.classes), int(run.labels.max()) + 1, int(run.predicted.max()) + 1
    )
    counts = np.zeros((classes, classes))
    np.add.at(counts, (run.labels, run.predicted), 1)
    return 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)


@_styled
def confusion(run: Run) -> bytes:
    """Which class was taken for which, as shares of the true class; needs the run's predictions."""
    shares = confusions(run)
    classes = len(shares)
    figure, axes = plt.subplots(figsize=(4.6, 3.9), layout="constrained")
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    if classes <= 20:
        axes.set(xticks=range(classes), yticks=range(classes))
        axes.tick_params(labelsize=8, length=0)
        if len(run.classes) == classes:
            names = [_cut(name, 16) for name in run.classes]
            axes.set_xticklabels(names, rotation=90 if sum(map(len, names)) > NAMES else 0)
            axes.set_yticklabels(names)
        for true, guess in zip(*np.nonzero(shares >= 0.5), strict=True):
            colour = "white" if shares[true, guess] < 60 else "black"
            axes.text(guess, true, f"{shares[true, guess]:.0f}", ha="center", va="center", color=colour, fontsize=6.5)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="% of the true class", shrink=0.85)
    return _svg(figure)


def _panels(
    tasks: Sequence[str], height: float, names: Sequence[str] = (), columns: int = COLUMNS, width: float = WIDTH
) -> Any:
    """A grid of axes, `columns` wide; `names` label the y axis of the leftmost ones."""
    columns = min(columns, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (width, height * lines + 0.5)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=bool(names))
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    if names:
        for axes in grid[:, 0]:
            axes.set_yticks(range(len(names)), [_cut(name, NAMES if columns > 1 else 2 * NAMES) for name in names])
    return figure, list(grid.flat[: len(tasks)])


def _cut(name: str, most: int) -> str:
    """
    >>> _cut("lora r8, judged on val200, lr 0.001", 20)
    'lora r8, j… lr 0.001'
    """
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[1 - half :]}"


def _labels(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=9)
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(y)


def _legend(figure: Figure, rows: Sequence[tuple[int, Row]], **look: Any) -> None:
    """Above all axes, which stay as high as they were."""
    handles = [plt.Line2D([], [], markersize=6, label=row.label, **(style(i) | look)) for i, row in rows]
    columns = 2 if len(rows) > 3 else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(rows) // columns))  # inches to a line
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return out.getvalue()
