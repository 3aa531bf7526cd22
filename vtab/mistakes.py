"""What a run got wrong, from the table that it left.

predictions.csv      of each text what was predicted, and of a class how probable it seemed
wrong_answers.csv    of questions, the worst first
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from vtab.textfile import LIMIT, read

SHOWN = 8
LONGEST = 300  # letters of a cell


@dataclass(frozen=True)
class Mistakes:
    """Rows of such a table, the worst first.

    file: its name
    total: how many mistakes it holds, of which these are some
    """

    file: str
    header: list[str]
    rows: list[list[str]]
    total: int


def of(folder: Path) -> Mistakes | None:
    """The worst mistakes of the run in `folder`; None where it left no table of them, or a damaged one."""
    for name in ("predictions.csv", "wrong_answers.csv"):
        try:
            header, rows = _table(folder / name)
            wrong = _worst(header, rows) if "predicted" in header else rows
        except (OSError, ValueError, csv.Error):
            continue
        shown = [[cell if len(cell) <= LONGEST else f"{cell[:LONGEST]} …" for cell in row] for row in wrong[:SHOWN]]
        return Mistakes(name, header, shown, len(wrong))
    return None


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Its first line, and the others.

    Raises:
        OSError, ValueError, csv.Error: no such file, no text, no table.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(path)
    csv.field_size_limit(LIMIT)
    header, *rows = csv.reader(io.StringIO(read(path), newline=""), strict=True)
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"rows of {path} are not as wide as its header")
    return header, rows


def _worst(header: list[str], rows: list[list[str]]) -> list[list[str]]:
    """Wrong classes, the most probable first; numbers, the farthest off first.

    Raises:
        ValueError: no such columns, or what should be a number is none.
    """
    label, predicted = header.index("label"), header.index("predicted")
    wrong = [row for row in rows if row[label] != row[predicted]]
    if "probability" in header:
        place = header.index("probability")
        return sorted(wrong, key=lambda row: -float(row[place]))
    return sorted(wrong, key=lambda row: -abs(float(row[label]) - float(row[predicted])))
