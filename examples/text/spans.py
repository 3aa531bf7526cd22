"""Questions as windows of tokens, and windows' logits as answers.

A context that does not fit is cut into windows that overlap by `stride` tokens, each behind its question, as BERT's own
SQuAD code does (arXiv 1810.04805):

    [CLS] question [SEP] context[0 : room] [SEP],  [CLS] question [SEP] context[room - stride : …] [SEP],  …

A window that holds the whole answer is labelled with its first and last token, any other with its null position, the
[CLS]. A span's score is start logit + end logit, its best over the windows; the null score is that of the null
position, its least over the windows. In v2.0 the answer is "" where null score - best score > threshold.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.text.squad import Question, Squad

CHUNK = 256  # questions tokenized at once
OUTSIDE = (-1, -1)  # offsets of what is no token of the context


@dataclass(frozen=True)
class Window:
    """One row for the model, unpadded.

    ids, types: its tokens, and of models that tell question from context the number of the part
    question: index of its question
    offsets: (tokens, 2), the first character of each context token and the one after its last; OUTSIDE for others
    null: the position that stands for no answer
    label: first and last token of the answer; None where the tokenizer gives the answer no token at all
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32] | None
    question: int
    offsets: NDArray[np.int32]
    null: int
    label: tuple[int, int] | None


@dataclass(frozen=True)
class Span:
    """A stretch of the context, from character `start` to before `end`."""

    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Decoded:
    """A question's best spans, the best first; there is at least one."""

    spans: list[Span]
    null: float

    @property
    def odds(self) -> float:
        """By how much no answer scores above the best span."""
        return self.null - self.spans[0].score

    def answer(self, threshold: float | None) -> str:
        """The best span, or "" where the odds are above the threshold; None always answers."""
        return "" if threshold is not None and self.odds > threshold else self.spans[0].text


def windows(squad: Squad, tokenizer: Any, max_length: int, stride: int) -> list[Window]:
    """Every question's windows, in the questions' order.

    Args:
        tokenizer: a fast one of transformers: only these tell where in the text a token stands.
        max_length: tokens of a window, question and separators included.
        stride: tokens of the context that two neighbouring windows share.

    Raises:
        ValueError: a question that leaves no room, a context without tokens.
    """
    found: list[Window] = []
    for first in range(0, len(squad), CHUNK):
        chunk = squad.questions[first : first + CHUNK]
        _require_room(chunk, tokenizer, max_length, stride)
        batch = tokenizer(
            [question.text.strip() for question in chunk],
            [question.context for question in chunk],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            padding=False,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows: list[list[int]] = [[] for _ in chunk]
        for row, owner in enumerate(batch["overflow_to_sample_mapping"]):
            rows[owner].append(row)
        for number, question in enumerate(chunk):
            found += _of_question(question, first + number, batch, rows[number], tokenizer)
    return found


def _require_room(questions: Sequence[Question], tokenizer: Any, max_length: int, stride: int) -> None:
    marks = tokenizer.num_special_tokens_to_add(pair=True)
    texts = [question.text.strip() for question in questions]
    for question, ids in zip(questions, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        if (room := max_length - len(ids) - marks) <= stride:
            raise ValueError(
                f"question {question.id} has {len(ids)} tokens, which leaves {max(room, 0)} of --max-length "
                f"{max_length} to the context, and windows that share --stride {stride} need more; pass --max-length "
                f"{len(ids) + marks + 2 * stride + 1} or so, or a smaller --stride"
            )


def _of_question(question: Question, number: int, batch: Any, rows: list[int], tokenizer: Any) -> Iterator[Window]:
    offsets = [_offsets(question.context, batch["offset_mapping"][row], batch.sequence_ids(row)) for row in rows]
    if not any((o[:, 1] > 0).any() for o in offsets):
        raise ValueError(f"the tokenizer makes no token of the context of question {question.id}; remove the question")
    typed = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in batch
    whole = _tokens_of(question, offsets)
    for row, window in zip(rows, offsets, strict=True):
        ids = np.array(batch["input_ids"][row], np.int32)
        types = np.array(batch["token_type_ids"][row], np.int32) if typed else None
        null = _null(ids, tokenizer)
        label = None if question.answers and not whole else (whole and _label(window, whole)) or (null, null)
        yield Window(ids, types, number, window, null, label)


def _offsets(context: str, mapping: list[tuple[int, int]], sequences: list[int | None]) -> NDArray[np.int32]:
    """Of context tokens that stand for more than white space, which alone would be an answer that is none."""
    kept = [o if s == 1 and context[slice(*o)].strip() else OUTSIDE for o, s in zip(mapping, sequences, strict=True)]
    return np.array(kept, np.int32)


def _null(ids: NDArray[np.int32], tokenizer: Any) -> int:
    found = np.flatnonzero(ids == tokenizer.cls_token_id)  # nowhere where the tokenizer has none
    return int(found[0]) if len(found) else 0


def _tokens_of(question: Question, offsets: list[NDArray[np.int32]]) -> tuple[Any, Any] | None:
    """The first and the last token of the answer, by their offsets. All windows are asked, since one alone cannot tell
    an answer that ends with it from one that goes on; of several answers the first counts."""
    if not question.answers:
        return None
    answer = question.answers[0]
    every = np.concatenate(offsets)
    touched = sorted(map(tuple, every[(every[:, 0] < answer.end) & (every[:, 1] > answer.start)].tolist()))
    return (touched[0], touched[-1]) if touched else None


def _label(window: NDArray[np.int32], whole: tuple[Any, Any]) -> tuple[int, int] | None:
    starts, ends = (np.flatnonzero((window == token).all(1)) for token in whole)
    return (int(starts[0]), int(ends[-1])) if len(starts) and len(ends) else None


def best(
    start: NDArray[np.floating], end: NDArray[np.floating], longest: int, count: int
) -> list[tuple[float, int, int]]:
    """The `count` best (start[i] + end[j], i, j) with i ≤ j < i + longest, exactly; of equal ones the foremost.

    Args:
        start, end: logits by position, -inf where no span may start or end.
    """
    length = len(start)
    padded = np.pad(end.astype(np.float64), (0, longest - 1), constant_values=-np.inf)
    scores = (start[:, None].astype(np.float64) + np.lib.stride_tricks.sliding_window_view(padded, longest)).ravel()
    count = min(count, length * longest)
    chosen = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    chosen = chosen[np.isfinite(scores[chosen])]
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:count]
    return [(float(scores[at]), int(at // longest), int(at // longest + at % longest)) for at in chosen]


def decode(
    squad: Squad,
    windows: Iterable[Window],
    logits: Iterable[tuple[NDArray[np.floating], NDArray[np.floating]]],
    longest: int = 30,
    count: int = 20,
) -> list[Decoded]:
    """Every question's best spans, over all its windows.

    Args:
        windows: of all questions.
        logits: of each window, start and end; what stands beyond its tokens is padding.
        longest: most tokens of an answer.
        count: spans to keep of each question.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in range(len(squad))]
    nulls = [np.inf] * len(squad)
    for window, (start, end) in zip(windows, logits, strict=True):
        inside, of = window.offsets[:, 1] > 0, window.question
        nulls[of] = min(nulls[of], float(start[window.null]) + float(end[window.null]))
        first, last = (np.where(inside, values[: len(inside)], -np.inf) for values in (start, end))
        for score, i, j in best(first, last, longest, count):
            place = (int(window.offsets[i, 0]), int(window.offsets[j, 1]))
            spans[of][place] = max(score, spans[of].get(place, -np.inf))
    return [
        Decoded(_ranked(question, found, count), null)
        for question, found, null in zip(squad.questions, spans, nulls, strict=True)
    ]


def _ranked(question: Question, found: dict[tuple[int, int], float], count: int) -> list[Span]:
    order = sorted(found, key=lambda place: (-found[place], place))[:count]
    places = [(start, _whole(question.context, end)) for start, end in order]
    return [
        Span(found[key], start, end, question.context[start:end].strip())
        for key, (start, end) in zip(order, places, strict=True)
    ]


def _whole(context: str, end: int) -> int:
    """`end` behind the accents of the letter before it: tokenizers that strip combining marks leave them outside."""
    while end < len(context) and unicodedata.category(context[end]).startswith("M"):
        end += 1
    return end
