"""Questions about paragraphs as SQuAD's files have them, v1.1 and v2.0 (arXiv 1606.05250, 1806.03822); no more than the
standard library.

    {"version": "v2.0", "data": [{"title": …, "paragraphs": [{"context": …, "qas": [{"id": …, "question": …, …}]}]}]}

What it takes to ask is read here; the answers, which only training and scores need, examples.text.squad reads.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

LIMIT = 1 << 30  # bytes of a file; SQuAD's largest has 42 million
_SURROGATE = re.compile("[\ud800-\udfff]")
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One question of a file.

    place: where it stands there
    record: all that is said of it
    """

    place: str
    id: str
    question: str
    context: str
    record: Any


def asked(path: Path) -> dict[str, tuple[str, str]]:
    """A file's questions by their ids, each with its context.

    Raises:
        ValueError: what `opened` and `checked` refuse.
    """
    return dict(checked(entries(opened(path)), str(path), lambda entry: (entry.id, (entry.question, entry.context))))


def opened(path: Path) -> Any:
    """What the file holds.

    Raises:
        ValueError: no such file, no JSON, one that is too large.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.stat().st_size > LIMIT:
        raise ValueError(f"{path} has more than {LIMIT:,} bytes, which makes no sense; replace it")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no file in SQuAD's format, which is JSON ({error})") from error


def entries(content: Any) -> Iterator[Entry]:
    """The questions, in order.

    Raises:
        ValueError: another structure.
    """
    for a, article in enumerate(field(content, "data", list, "the file")):
        place = f"data[{a}]"
        for p, paragraph in enumerate(field(article, "paragraphs", list, place)):
            context = field(paragraph, "context", str, here := f"{place}.paragraphs[{p}]")
            for q, record in enumerate(field(paragraph, "qas", list, here)):
                there = f"{here}.qas[{q}]"
                key = str(field(record, "id", (str, int), there))
                yield Entry(there, key, field(record, "question", str, there), context, record)


def field(record: Any, key: str, kind: Any, place: str) -> Any:
    """The field, of this kind.

    Raises:
        ValueError: it is absent, or of another kind.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):  # True is an int to Python
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = "nothing" if value is None else repr(value)[:40]
        raise ValueError(f'{place} must have "{key}" ({names}) and has {found}: not SQuAD\'s format')
    return value


def checked(found: Iterable[Entry], source: str, make: Callable[[Entry], T]) -> list[T]:
    """What `make` makes of each question.

    Raises:
        ValueError: no question, an id twice, a text that is none, or what `found` and `make` refuse; the line starts
            with `source`.
    """
    made: dict[str, T] = {}
    try:
        for entry in found:
            _check(entry)
            if entry.id in made:
                raise ValueError(f"question {entry.id} ({entry.place}) has the id of another; ids must differ")
            made[entry.id] = make(entry)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if not made:
        raise ValueError(f"{source} has no question")
    return list(made.values())


def _check(entry: Entry) -> None:
    name = f"question {entry.id} ({entry.place})"
    for what, text in (("id", entry.id), ("context", entry.context), ("question", entry.question)):
        if not text.strip() and what != "id":
            raise ValueError(f"{name} has an empty {what}; remove it, or fill it in")
        if _SURROGATE.search(text):
            raise ValueError(f"the {what} of {name} holds half a surrogate pair, which is no character; mend the text")
