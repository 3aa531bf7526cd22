"""The table of the field, ours above and published rows below: in the terminal, as CSV, as LaTeX."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtab.published import Published
from vtab.rows import AVERAGES, GROUPS, VTAB, Row
from vtab.tasks import TASKS

GENERATED = "generated, not dSprites"
SHORT = {  # headings of six letters, for terminals
    "cifar": "CIFAR", "caltech101": "Calt.", "dtd": "DTD", "oxford_flowers102": "Flow.", "oxford_iiit_pet": "Pets",
    "svhn": "SVHN", "sun397": "SUN", "patch_camelyon": "Cam.", "eurosat": "EuroS.", "resisc45": "Resisc",
    "diabetic_retinopathy": "Retin.", "clevr_count": "Cl-Cnt", "clevr_dist": "Cl-Dis", "dmlab": "DMLab",
    "kitti": "KITTI", "dsprites_loc": "dS-Loc", "dsprites_ori": "dS-Ori", "smallnorb_azi": "sN-Azi",
    "smallnorb_ele": "sN-Ele",
}  # fmt: skip
MEANS = {"natural": "Nat.", "specialized": "Spec.", "structured": "Struct.", "groups": "Groups", "all": "All 19"}
NOTES = (
    "± is the standard deviation over seeds. Groups: mean of the 3 group means; All 19: mean of the 19 tasks. "
    "k/n: partial, the mean of k tasks instead of n. g: generated images, not the data set's."
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
    return getattr(TASKS.get(task), "paper_name", None) or task


def extras(rows: Sequence[Row]) -> list[str]:
    """Tasks of ours outside VTAB-1k, which have a block of their own."""
    return list(dict.fromkeys(task for row in rows for task in row.cells if task not in VTAB))


def lines(rows: Sequence[Row], beside: Sequence[Published]) -> list[Line]:
    """Ours, then the published rows."""
    best = {column: _best(rows, column) for column in (*VTAB, *extras(rows), *AVERAGES)}
    return [_ours(row, best) for row in rows] + [_published(row) for row in beside]


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
    """The highest figure, rounded as shown, if all that could be highest were judged by the same images."""
    judged, values = set(), []
    for row in rows:
        if not row.comparable:
            continue
        if column in row.cells:
            cell = row.cells[column]
            judged.add((cell.images, cell.generated, cell.runs[0].variant))
            values.append(cell.mean)
        elif column in AVERAGES and (average := row.averages()[column]).value is not None:
            judged.add((frozenset(row.cells), average.caveat, row.facets.get("images"), row.facets["test"]))
            values.append(average.value)
    return round(max(values), 1) if len(judged) == 1 and len(values) > 1 else None


def terminal(table: Sequence[Line], more: Sequence[str], width: int) -> list[Any]:
    """What rich prints: one table if it fits the width, else one for each group, and one of the extra tasks."""
    ours = [line for line in table if line.ours]
    known = {column for line in ours for column in line.figures}
    whole = _rich("VTAB-1k", table, [*VTAB, *AVERAGES], True)
    if not known & set(VTAB):
        printed = []
    elif _needs(whole) <= width:
        printed = [whole]
    else:
        there = [group for group, tasks in GROUPS.items() if known & set(tasks)]
        printed = [_rich(group, table, [*GROUPS[group], group], False) for group in there]
        printed.append(_rich("both averages", table, ["groups", "all"], True))
    return printed + ([_rich("not part of VTAB-1k", ours, more, True)] if more else [])


def _needs(shown: Any) -> int:
    """Columns that a rich table needs with names of 24 letters to a line."""
    from rich.console import Console

    return 24 + sum(
        shown._measure_column(Console(width=10_000), Console(width=10_000).options, c).maximum
        for c in shown.columns[1:]
    )


def _rich(title: str, table: Sequence[Line], columns: Sequence[str], last: bool) -> Any:
    """last: with parameters and seeds."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    look = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": 0}
    shown = Table(title=f"\n{title}", title_justify="left", **look)
    shown.add_column("method", overflow="fold", min_width=14)
    for column in columns:
        shown.add_column((SHORT | MEANS).get(column, column), justify="right", no_wrap=True)
    for name in ("trained", "seeds") if last else ():
        shown.add_column(name, justify="right", no_wrap=True)
    previous = True
    for line in table:
        if previous and not line.ours:
            shown.add_section()
        previous = line.ours
        cells = []
        for column in columns:
            figure = line.figures.get(column)
            text = str(figure).replace(" ± ", "\n±").replace(" (", "\n(") if figure else "–"
            cells.append(Text(text, style="bold" if figure and figure.best else "" if line.ours else "dim"))
        name = line.label if line.ours else f"{line.label}, published"
        shown.add_row(Text(name), *cells, *([line.parameters or "–", line.seeds or "–"] if last else ()))
    return shown


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


def as_latex(table: Sequence[Line], more: Sequence[str], caption: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs, graphicx}. Our best of each column is bold."""
    parts = [_latex(table, [*VTAB, *AVERAGES], caption)]
    if more:
        parts.append(_latex([line for line in table if line.ours], more, "Tasks that are not part of VTAB-1k."))
    return "\n".join(["% needs \\usepackage{booktabs, graphicx}", *parts])


def _latex(table: Sequence[Line], columns: Sequence[str], caption: str) -> str:
    names = [f"\\rotatebox{{90}}{{{escape_latex(MEANS.get(c) or paper_name(c))}}}" for c in columns]
    groups, rules, start = [], [], 2
    for group, tasks in GROUPS.items():
        if tasks[0] in columns:
            groups.append(f"\\multicolumn{{{len(tasks)}}}{{c}}{{{group.capitalize()}}}")
            rules.append(f"\\cmidrule(lr){{{start}-{start + len(tasks) - 1}}}")
            start += len(tasks)
    over = [" & " + " & ".join(groups) + f" & \\multicolumn{{{len(AVERAGES)}}}{{c}}{{Means}} & \\\\", "".join(rules)]
    body = []
    for index, line in enumerate(table):
        if index and table[index - 1].ours and not line.ours:
            body.append(r"\midrule")
        cells = [_latex_figure(line.figures.get(column)) for column in columns]
        name = escape_latex(line.label if line.ours else f"{line.label}, published")
        body.append(" & ".join([name, *cells, escape_latex(line.parameters) or "--"]) + r" \\")
    return "\n".join(
        [
            r"\begin{table*}",
            f"\\caption{{{escape_latex(caption)}}}",
            r"\setlength{\tabcolsep}{2pt}\scriptsize\centering",
            rf"\begin{{tabular}}{{l{'c' * len(columns)}r}}",
            r"\toprule",
            *(over if groups else []),
            " & ".join(["Method", *names, r"\rotatebox{90}{Trained}"]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def _latex_figure(figure: Figure | None) -> str:
    if figure is None:
        return "--"
    value = f"\\textbf{{{figure.value:.1f}}}" if figure.best else f"{figure.value:.1f}"
    spread = "" if figure.std is None else f"\\,{{\\tiny$\\pm${figure.std:.1f}}}"
    marks = escape_latex(" ".join(part for part in (figure.mark, figure.caveat) if part))
    return value + (f"\\textsuperscript{{{marks}}}" if marks else "") + spread


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> print(escape_latex("50 % of a_b"))
    50 \\% of a\\_b
    """
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
    special |= {"^": r"\textasciicircum{}", "±": r"$\pm$", "≤": r"$\leq$", "×": r"$\times$", "–": "--", "…": r"\dots{}"}
    return "".join(special.get(c, c) for c in text)
