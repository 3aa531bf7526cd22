"""Questions about paragraphs, as SQuAD publishes them: v1.1 (arXiv 1606.05250) and v2.0 (arXiv 1806.03822).

    {"version": "v2.0", "data": [{"title": …, "paragraphs": [{"context": …, "qas": [
        {"id": …, "question": …, "answers": [{"text": …, "answer_start": …}], "is_impossible": false}]}]}]}

An answer is context[answer_start : answer_start + len(text)], counted in code points. In v2.0 a question may be
impossible: is_impossible is true and answers is empty. Whatever else a file holds is not read.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from capavision.hub import asked_once
from capavision.targets import near
from examples.text.data import digest
from examples.text.questions import Answer, Question, Squad
from vtab.textfile import read_json

LIMIT = 1 << 30  # bytes of a file; SQuAD's largest has 42 million
_SURROGATE = re.compile("[\ud800-\udfff]")
HUB = {"squad": "rajpurkar/squad", "squad_v2": "rajpurkar/squad_v2"}


def read(path: Path) -> Squad:
    """A file in SQuAD's format.

    Raises:
        ValueError: no such file, no JSON, another structure, an answer that is not where it is said to be, an id twice,
            no question.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = read_json(path, LIMIT)
    except ValueError as error:
        raise ValueError(f"{path} is no file in SQuAD's format, which is JSON ({error.__cause__ or error})") from error
    said = str(content.get("version", "")) if isinstance(content, dict) else ""
    questions = _checked(_questions(content), str(path))
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
    questions = _checked(_of_rows(rows), source)
    return Squad(questions, version, source, digest(map(asdict, questions)))


def _questions(content: Any) -> Iterator[tuple[str, Question]]:
    for a, article in enumerate(_get(content, "data", list, "the file")):
        place = f"data[{a}]"
        for p, paragraph in enumerate(_get(article, "paragraphs", list, place)):
            context = _get(paragraph, "context", str, here := f"{place}.paragraphs[{p}]")
            for q, qa in enumerate(_get(paragraph, "qas", list, here)):
                yield f"{here}.qas[{q}]", _question(qa, context, f"{here}.qas[{q}]")


def _question(qa: Any, context: str, place: str) -> Question:
    key = str(_get(qa, "id", (str, int), place))
    said = _get(qa, "answers", list, place)
    answers = tuple(Answer(_get(a, "text", str, place), _get(a, "answer_start", int, place)) for a in said)
    impossible = _get({"is_impossible": False, **qa}, "is_impossible", bool, place)
    if impossible and answers:
        raise ValueError(f"question {key} ({place}) is_impossible and has answers; it can be one of the two")
    if not impossible and not answers:
        raise ValueError(f'question {key} ({place}) has no answers; SQuAD v2.0 marks such by "is_impossible": true')
    return Question(key, _get(qa, "question", str, place), context, answers)


def _of_rows(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Question]]:
    for number, row in enumerate(rows):
        place = f"row {number}"
        said = _get(row, "answers", dict, place)
        texts, starts = (_get(said, key, list, place) for key in ("text", "answer_start"))
        answers = tuple(Answer(text, start) for text, start in zip(texts, starts, strict=True))
        key, text, context = (_get(row, key, str, place) for key in ("id", "question", "context"))
        yield place, Question(key, text, context, answers)


def _get(record: Any, key: str, kind: Any, place: str) -> Any:
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


def _checked(found: Iterator[tuple[str, Question]], source: str) -> tuple[Question, ...]:
    """The questions, each in order.

    Raises:
        ValueError: one is not; the line starts with `source`.
    """
    seen: dict[str, Question] = {}
    try:
        for place, question in found:
            _check(question, place)
            if question.id in seen:
                raise ValueError(f"question {question.id} ({place}) has the id of another; ids must differ")
            seen[question.id] = question
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if not seen:
        raise ValueError(f"{source} has no question")
    return tuple(seen.values())


def _check(question: Question, place: str) -> None:
    name, context = f"question {question.id} ({place})", question.context
    for what, text in (("context", context), ("question", question.text)):
        if not text.strip():
            raise ValueError(f"{name} has an empty {what}; remove it, or fill it in")
        if _SURROGATE.search(text):
            raise ValueError(f"the {what} of {name} holds half a surrogate pair, which is no character; mend the text")
    for answer in question.answers:
        if not answer.text.strip():
            raise ValueError(f"{name} has an answer without text; remove it")
        there = context[answer.start : answer.end] if answer.start >= 0 else ""
        if there != answer.text:
            at = context.find(answer.text)
            cure = f"it stands at {at}" if at >= 0 else "the context does not hold it at all"
            said = f"not {answer.text[:40]!r}; {cure}"
            raise ValueError(f"{name}: at answer_start {answer.start} the context has {there[:40]!r}, {said}")
