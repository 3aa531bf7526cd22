"""The table in a terminal: whole where it fits, else a group at a time."""

from collections.abc import Sequence
from typing import Any

from vtab.averages import AVERAGES, VTAB
from vtab.runs import Problem
from vtab.tables import MEANS, NOTES, Line, having
from vtab.tasks import GROUPS

SHORT = {  # headings of six letters, for terminals
    "cifar": "CIFAR", "caltech101": "Calt.", "dtd": "DTD", "oxford_flowers102": "Flow.", "oxford_iiit_pet": "Pets",
    "svhn": "SVHN", "sun397": "SUN", "patch_camelyon": "Cam.", "eurosat": "EuroS.", "resisc45": "Resisc",
    "diabetic_retinopathy": "Retin.", "clevr_count": "Cl-Cnt", "clevr_dist": "Cl-Dis", "dmlab": "DMLab",
    "kitti": "KITTI", "dsprites_loc": "dS-Loc", "dsprites_ori": "dS-Ori", "smallnorb_azi": "sN-Azi",
    "smallnorb_ele": "sN-Ele",
}  # fmt: skip


def show(table: Sequence[Line], more: Sequence[str], problems: Sequence[Problem]) -> None:
    """Print the table, what to know of its lines, and what was not counted."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for shown in blocks(table, more, console.width):
        console.print(shown)
    console.print(NOTES)
    for line in table if having(table, VTAB) else having(table, more):
        if line.remark:
            console.print(f"  {line.label}: {line.remark}")
    for problem in problems:
        console.print(f"not counted in full: {problem.folder}: {problem.text}", style="yellow")


def blocks(lines: Sequence[Line], more: Sequence[str], width: int) -> list[Any]:
    """What rich prints: one table if it fits the width, else one for each group, and one of the extra tasks."""
    inside, published = having(lines, VTAB), [line for line in lines if not line.ours]
    known = {column for line in inside for column in line.figures}
    table = [*inside, *published]
    whole = _rich("VTAB-1k", table, [*VTAB, *AVERAGES], True)
    if not inside:
        printed = []
    elif _needs(whole) <= width:
        printed = [whole]
    else:
        there = [group for group, tasks in GROUPS.items() if known & set(tasks)]
        printed = [_rich(group, table, [*GROUPS[group], group], False) for group in there]
        printed.append(_rich("both averages", table, ["groups", "all"], True))
    return printed + ([_rich("not part of VTAB-1k", having(lines, more), more, True)] if more else [])


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
