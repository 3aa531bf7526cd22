"""Rows of a .csv or .tsv file, with file and line in every complaint.

A .csv is quoted as spreadsheets quote; in a .tsv every character stands for itself, quotation marks too, as in GLUE's
files.
"""

import csv
from pathlib import Path

from capavision.targets import near

LONGEST = 1 << 30  # characters of a field; csv's own limit is 131,072


def read(path: Path, columns: list[str]) -> list[list[str]]:
    """The fields of the named columns in each row, spaces around them removed.

    Raises:
        ValueError: no such file, no text, no such column, a row without one of them, an empty field.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    csv.field_size_limit(LONGEST)
    plain = path.suffix.lower() == ".tsv"
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, "excel-tab" if plain else "excel", quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        )
        try:
            places = _places(path, next(reader, []), columns)
            for fields in filter(None, reader):
                rows.append([_field(path, reader.line_num, fields, place, places) for place in places])
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no UTF-8 text with rows and columns ({error}); save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{path} has no rows below its header")
    return rows


def _places(path: Path, header: list[str], columns: list[str]) -> dict[int, str]:
    """The wanted columns' places, in the order wanted."""
    names = [name.strip() for name in header]
    for column in columns:
        if column not in names:
            raise ValueError(f"{path} has no column {column!r} in its first line; {near(column, filter(None, names))}")
    return {names.index(column): column for column in columns}


def _field(path: Path, line: int, fields: list[str], place: int, places: dict[int, str]) -> str:
    found = fields[place].strip() if place < len(fields) else ""
    if not found:
        raise ValueError(f"{path}:{line}: the column {places[place]!r} is empty; fill it, or remove the row")
    return found
