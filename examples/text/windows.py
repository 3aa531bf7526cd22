"""Questions as windows of tokens.

A context that does not fit is cut into windows that overlap by `stride` tokens, each behind its question, as BERT's own
SQuAD code does (arXiv 1810.04805):

    [CLS] question [SEP] context[0 : room] [SEP],  [CLS] question [SEP] context[room - stride : …] [SEP],  …

A window that holds the whole answer is labelled with its first and last token, any other with its null position, the
[CLS].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.text.questions import Question, Squad

CHUNK = 256  # questions tokenized at once
OUTSIDE = (-1, -1)  # offsets of what is no token of the context


@dataclass(frozen=True)
class Window:
    """One row for the model, unpadded.

    ids, types: its tokens, and of models that tell question from context the number of the part
    question: index of its question
    offsets: (tokens, 2), the first character of each context token and the one after its last; OUTSIDE for others
    null: the position that stands for no answer
    label: first and last token of the answer; None where no window of the question holds the whole of it, so that
        nothing could be learned but an error
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32] | None
    question: int
    offsets: NDArray[np.int32]
    null: int
    label: tuple[int, int] | None


def cut(squad: Squad, tokenizer: Any, max_length: int, stride: int) -> list[Window]:
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
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # a long one is refused here
    for question, ids in zip(questions, found, strict=True):
        if (room := max(max_length - len(ids) - marks, 0)) <= stride:
            other = f"--stride {room // 2}" if room > 1 else "shorten the question"
            raise ValueError(
                f"question {question.id} has {len(ids)} tokens, which leaves {room} of --max-length {max_length} to "
                f"the context, and windows that share --stride {stride} need more; pass --max-length "
                f"{len(ids) + marks + 2 * stride + 1} or so, or {other}"
            )


def _of_question(question: Question, number: int, batch: Any, rows: list[int], tokenizer: Any) -> Iterator[Window]:
    offsets = [_offsets(question.context, batch["offset_mapping"][row], batch.sequence_ids(row)) for row in rows]
    if not any((o[:, 1] > 0).any() for o in offsets):
        raise ValueError(f"the tokenizer makes no token of the context of question {question.id}; remove the question")
    typed = "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in batch
    places = _places(question, offsets)
    known = any(places) or not question.answers
    for row, window, place in zip(rows, offsets, places, strict=True):
        ids = np.array(batch["input_ids"][row], np.int32)
        types = np.array(batch["token_type_ids"][row], np.int32) if typed else None
        null = _null(ids, tokenizer)
        yield Window(ids, types, number, window, null, (place or (null, null)) if known else None)


def _offsets(context: str, mapping: list[tuple[int, int]], sequences: list[int | None]) -> NDArray[np.int32]:
    """Of context tokens that stand for more than white space, which alone would be an answer that is none."""
    kept = [o if s == 1 and context[slice(*o)].strip() else OUTSIDE for o, s in zip(mapping, sequences, strict=True)]
    return np.array(kept, np.int32)


def _null(ids: NDArray[np.int32], tokenizer: Any) -> int:
    found = np.flatnonzero(ids == tokenizer.cls_token_id)  # nowhere where the tokenizer has none
    return int(found[0]) if len(found) else 0


def _places(question: Question, offsets: list[NDArray[np.int32]]) -> list[tuple[int, int] | None]:
    """The first and the last token of the answer in each window that holds the whole of it. All windows are asked for
    its tokens, since one alone cannot tell an answer that ends with it from one that goes on; of several answers the
    first counts."""
    if not question.answers:
        return [None] * len(offsets)
    answer = question.answers[0]
    every = np.concatenate(offsets)
    touched = sorted(map(tuple, every[(every[:, 0] < answer.end) & (every[:, 1] > answer.start)].tolist()))
    return [_place(window, touched[0], touched[-1]) if touched else None for window in offsets]


def _place(window: NDArray[np.int32], first: Any, last: Any) -> tuple[int, int] | None:
    starts, ends = (np.flatnonzero((window == token).all(1)) for token in (first, last))
    return (int(starts[0]), int(ends[-1])) if len(starts) and len(ends) else None
