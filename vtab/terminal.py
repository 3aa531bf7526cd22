"""The table in a terminal: whole where it fits, else some columns at a time, each time with the methods' names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.cli import printable
from vtab.runs import Problem
from vtab.tables import MEANS, Block, Line

LABEL = 18  # letters to a line of a method's name: what VTAB's widest group leaves of 80 columns
SHORT = {  # headings of six letters
    "cifar": "CIFAR", "caltech101": "Calt.", "dtd": "DTD", "oxford_flowers102": "Flow.", "oxford_iiit_pet": "Pets",
    "svhn": "SVHN", "sun397": "SUN", "patch_camelyon": "Cam.", "eurosat": "EuroS.", "resisc45": "Resisc",
    "diabetic_retinopathy": "Retin.", "clevr_count": "Cl-Cnt", "clevr_dist": "Cl-Dis", "dmlab": "DMLab",
    "kitti": "KITTI", "dsprites_loc": "dS-Loc", "dsprites_ori": "dS-Ori", "smallnorb_azi": "sN-Azi",
    "smallnorb_ele": "sN-Ele",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A heading, and what stands below it in each line; bold, dim or neither."""

    heading: str
    cells: Sequence[str]
    styles: Sequence[str]

    @property
    def width(self) -> int:
        """Letters, and the space before them."""
        return 1 + max(len(part) for text in (self.heading, *self.cells) for part in text.split("\n"))


def show(blocks: Sequence[Block], problems: Sequence[Problem]) -> None:
    """Print the tables, what to know of their lines, and what was not counted."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for block in blocks:
        for title, columns in pieces(block, console.width):
            console.print(f"\n{printable(title)}")
            console.print(_table(block.lines, columns, console.width))
    if notes := dict.fromkeys(note for block in blocks for note in block.notes):
        console.print(*notes)
    for label, remark in dict.fromkeys((line.label, line.remark) for block in blocks for line in block.lines):
        if remark:
            console.print(printable(f"  {label}: {remark}"))
    for problem in problems:
        told = printable(f"{problem.folder}: {problem.text}")
        console.print(f"not counted in full: {told}", style="yellow")


def pieces(block: Block, width: int) -> list[tuple[str, list[Column]]]:
    """Titles and columns of the tables that show the block: one where the width allows, else one for each group of
    tasks and one of the averages over all; and as many as it takes of what is wider still."""
    lines, columns = block.lines, {name: _figures(block.lines, name) for name in block.columns}
    costs = [
        Column("trained", [line.parameters or "–" for line in lines], [""] * len(lines)),
        Column("seeds", [line.seeds or "–" for line in lines], [""] * len(lines)),
    ]
    parts = [(block.heading, [*columns.values(), *costs])]
    if len(block.groups) > 1 and len(_split(lines, parts[0][1], width)) > 1:
        there = {name for line in lines if line.ours or not lines[0].ours for name in line.figures}
        of_all = [columns[name] for name in block.averages if name not in block.groups]
        parts = [
            (group, [columns[name] for name in (*tasks, group)])
            for group, tasks in block.groups.items()
            if there & set(tasks)
        ]
        parts.append(("averages", [*of_all, *costs]))
    found = []
    for title, together in parts:
        split = _split(lines, together, width)
        for number, some in enumerate(split, 1):
            found.append((title if len(split) == 1 else f"{title} ({number} of {len(split)})", some))
    return found


def _figures(lines: Sequence[Line], name: str) -> Column:
    """What stands beside a figure stands below it: its spread, a task's metric."""
    there = [line.figures.get(name) for line in lines]
    cells = [str(figure).replace(" ± ", "\n±").replace(" (", "\n(") if figure else "–" for figure in there]
    best = [
        "bold" if figure and figure.best else "" if line.ours else "dim"
        for figure, line in zip(there, lines, strict=True)
    ]
    heading = printable((SHORT | MEANS).get(name, name))
    return Column(heading.replace(", data ", ",\ndata ").replace(" (", "\n("), cells, best)


def _split(lines: Sequence[Line], columns: Sequence[Column], width: int) -> list[list[Column]]:
    """The columns in as few parts as fit beside the methods' names, and none much wider than another."""
    room = width - _label(lines, width)
    fewest = len(_filled(columns, room))
    return next(parts for limit in range(1, room + 1) if len(parts := _filled(columns, limit)) == fewest)


def _filled(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """The columns in order, each part as full as can be; one that is too wide is alone."""
    parts: list[list[Column]] = [[]]
    for column in columns:
        if parts[-1] and sum(other.width for other in parts[-1]) + column.width > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def _label(lines: Sequence[Line], width: int) -> int:
    """Letters to a line of a method's name, at least: no word is broken that half the width can hold."""
    names = [_name(line) for line in lines]
    word, longest = max((len(word) for name in names for word in name.split()), default=0), max(map(len, names))
    return min(max(word, min(longest, LABEL)), width // 2)


def _name(line: Line) -> str:
    return printable(line.label if line.ours else f"{line.label}, published")


def _table(lines: Sequence[Line], columns: Sequence[Column], width: int) -> Any:
    """What rich prints."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("method", overflow="fold", min_width=_label(lines, width))
    for column in columns:
        table.add_column(column.heading, justify="right", overflow="fold")
    for index, line in enumerate(lines):
        if index and lines[index - 1].ours and not line.ours:
            table.add_section()
        cells = [Text(column.cells[index], style=column.styles[index]) for column in columns]
        table.add_row(Text(_name(line)), *cells)
    return table
