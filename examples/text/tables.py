"""Rows of a .csv or .tsv file, with file and line in every complaint; and tables for others to read.

A .csv is quoted as spreadsheets quote; in a .tsv every character stands for itself, quotation marks too, as in GLUE's
files.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from capavision.files import replacing

LONGEST = 1 << 30  # characters of a field; csv's own limit is 131,072


def read(path: Path, columns: list[str]) -> list[list[str]]:
    """The fields of the named columns in each row, spaces around them removed.

    Raises:
        ValueError: no such file, no text, no such column or two of that name, quotation marks that do not close, a row
            of more fields than the header, an empty field.
    """
    if not path.is_file():
        raise ValueError(f"{path} is a folder; name a file in it" if path.is_dir() else f"there is no file {path}")
    csv.field_size_limit(LONGEST)
    plain = path.suffix.lower() == ".tsv"
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        form = {"dialect": "excel-tab", "quoting": csv.QUOTE_NONE} if plain else {"dialect": "excel"}
        reader = csv.reader(file, strict=True, **form)  # else an open quotation mark would swallow the rows behind it
        try:
            header = next(reader, [])
            places = _places(path, header, columns)
            for fields in filter(None, reader):
                _check_width(path, reader.line_num, fields, len(header))
                rows.append([_field(path, reader.line_num, fields, place, places) for place in places])
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text with rows and columns ({error}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(
                f"{path}:{reader.line_num}: quotation marks that do not fit ({error}); write one inside a field twice"
            ) from error
    if not rows:
        raise ValueError(f"{path} has no rows below its header")
    return rows


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a .csv file whole or not at all. Texts stand in it as they are, each between quotation marks: a line may
    break in one in more ways than csv looks for."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(header)
        writer.writerows(rows)


def _places(path: Path, header: list[str], columns: list[str]) -> dict[int, str]:
    """The wanted columns' places, in the order wanted."""
    names = [name.strip() for name in header]
    for column in columns:
        if column not in names:
            if not any(names):
                raise ValueError(f"{path} has an empty first line; it must name the columns")
            raise ValueError(
                f"{path} has no column {column!r}, its first line names {', '.join(map(repr, names))}; --text-column "
                "and --label-column say which to take, and columns stand apart by commas, in a .tsv by tabs"
            )
        if names.count(column) > 1:
            raise ValueError(f"{path} has the column {column!r} {names.count(column)} times; rename all but one")
    return {names.index(column): column for column in columns}


def _check_width(path: Path, line: int, fields: list[str], width: int) -> None:
    if any(field.strip() for field in fields[width:]):  # else a text with a comma would lose its end, and its label
        raise ValueError(
            f"{path}:{line}: {len(fields)} fields, and the header has {width}; a text that holds the separator must "
            "stand between quotation marks, in a .csv"
        )


def _field(path: Path, line: int, fields: list[str], place: int, places: dict[int, str]) -> str:
    found = fields[place].strip() if place < len(fields) else ""
    if not found:
        raise ValueError(f"{path}:{line}: the column {places[place]!r} is empty; fill it, or remove the row")
    return found
