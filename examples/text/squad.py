"""Questions with their answers, as SQuAD publishes them: v1.1 (arXiv 1606.05250) and v2.0 (arXiv 1806.03822).

    {"version": "v2.0", "data": [{"title": …, "paragraphs": [{"context": …, "qas": [
        {"id": …, "question": …, "answers": [{"text": …, "answer_start": …}], "is_impossible": false}]}]}]}

An answer is context[answer_start : answer_start + len(text)], counted in code points. In v2.0 a question may be
impossible: is_impossible is true and answers is empty. Whatever else a file holds is not read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capavision.hub import asked_once
from capavision.targets import near
from examples.text.questions import Answer, Question, Squad
from export.squad import Entry, checked, entries, field, opened
from vtab.textfile import digest

HUB = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}


def read(path: Path) -> Squad:
    """A file in SQuAD's format.

    Raises:
        ValueError: no such file, no JSON, another structure, an answer that is not where it is said to be, an id twice,
            no question.
    """
    content = opened(path)
    questions = tuple(checked(entries(content), str(path), _question))
    said = str(content.get("version", ""))
    newer = said.lstrip("vV").startswith("2") or any(not question.answers for question in questions)
    return Squad(questions, "2.0" if newer else "1.1", path.name, digest(map(asdict, questions)))


def fetch(name: str) -> tuple[Squad, Squad]:
    """SQuAD's training and development questions from the Hugging Face hub, through the package datasets.

    Raises:
        ValueError: no such set, the hub out of reach, rows of another structure.
    """
    if name not in HUB:
        raise ValueError(f"unknown data {name!r}; {near(name, HUB)} Or your own files: --train FILE --dev FILE")
    import datasets

    try:
        with asked_once():
            found = datasets.load_dataset(HUB[name])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{HUB[name]} is not on this machine, and the Hugging Face hub did not give it ({error}); run once where "
            "the hub is in reach and copy ~/.cache/huggingface, or pass SQuAD's files: --train FILE --dev FILE"
        ) from error
    version = "2.0" if name == "squad_v2" else "1.1"
    train, dev = (from_rows(found[part], version, f"{HUB[name]} {part}") for part in ("train", "validation"))
    return train, dev


def from_rows(rows: Iterable[dict[str, Any]], version: str, source: str) -> Squad:
    """What the package `datasets` makes of SQuAD: a row a question, answers as {"text": […], "answer_start": […]}.

    Raises:
        ValueError: rows of another structure, an answer that is not where it is said to be, an id twice, no question.
    """
    questions = tuple(checked(_of_rows(rows), source, _of_row))
    return Squad(questions, version, source, digest(map(asdict, questions)))


def _question(entry: Entry) -> Question:
    place, name = entry.place, f"question {entry.id} ({entry.place})"
    said = field(entry.record, "answers", list, place)
    answers = [Answer(field(a, "text", str, place), field(a, "answer_start", int, place)) for a in said]
    impossible = field({"is_impossible": False, **entry.record}, "is_impossible", bool, place)
    if impossible and answers:
        raise ValueError(f"{name} is_impossible and has answers; it can be one of the two")
    if not impossible and not answers:
        raise ValueError(f'{name} has no answers; SQuAD v2.0 marks such by "is_impossible": true')
    return _answered(entry, answers)


def _of_rows(rows: Iterable[dict[str, Any]]) -> Iterator[Entry]:
    for number, row in enumerate(rows):
        place = f"row {number}"
        key, text, context = (field(row, key, str, place) for key in ("id", "question", "context"))
        yield Entry(place, key, text, context, field(row, "answers", dict, place))


def _of_row(entry: Entry) -> Question:
    texts, starts = (field(entry.record, key, list, entry.place) for key in ("text", "answer_start"))
    return _answered(entry, [Answer(text, start) for text, start in zip(texts, starts, strict=True)])


def _answered(entry: Entry, answers: list[Answer]) -> Question:
    """Raise ValueError for an answer that is not where it is said to be."""
    name, context = f"question {entry.id} ({entry.place})", entry.context
    for answer in answers:
        if not answer.text.strip():
            raise ValueError(f"{name} has an answer without text; remove it")
        there = context[answer.start : answer.end] if answer.start >= 0 else ""
        if there != answer.text:
            at = context.find(answer.text)
            cure = f"it stands at {at}" if at >= 0 else "the context does not hold it at all"
            said = f"not {answer.text[:40]!r}; {cure}"
            raise ValueError(f"{name}: at answer_start {answer.start} the context has {there[:40]!r}, {said}")
    return Question(entry.id, entry.question, context, tuple(answers))
