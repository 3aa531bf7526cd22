"""Small text files: read within bounds, with the file's name in every complaint; written whole or not at all."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capavision.files import replacing

LIMIT = 64 << 20  # bytes: a list of a million images


def read(path: Path, limit: int = LIMIT) -> str:
    """The text of a file that anyone may have written.

    Raises:
        ValueError: more than `limit` bytes, or no text.
        OSError: no such file, or none that can be read.
    """
    with path.open("rb") as file:
        found = file.read(limit + 1)
    if len(found) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which makes no sense; replace it")
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file ({error})") from error


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """The JSON of a file that anyone may have written.

    Raises:
        ValueError: no JSON, more than `limit` bytes, nested too deeply.
        OSError: no such file, or none that can be read.
    """
    text = read(path, limit)
    try:
        return json.loads(text, parse_int=_int)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete it") from error


def _int(digits: str) -> int:
    if len(digits) > 18:  # more would end in OverflowError wherever it meets a float
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def digest(rows: Iterable[object]) -> str:
    """16 hex digits that tell the rows, which JSON can write, from others.

    >>> digest([("a warm film", 1)])
    '2317b9f0063cb309'
    """
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()[:16]


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
