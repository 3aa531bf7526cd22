"""Questions as windows of tokens, as `export.windows` cuts them, with what a model is to learn of each.

A window that holds the whole answer is labelled with its first and last token, any other with its null position, the
[CLS].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.text.questions import Question, Squad
from export import windows
from export.windows import CHUNK, Asked


@dataclass(frozen=True)
class Window(windows.Window):
    """One row to train on, or to judge by.

    label: first and last token of the answer; None where no window of the question holds the whole of it, so that
        nothing could be learned but an error
    """

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
    encode = _plain(tokenizer).encode_batch
    for first in range(0, len(squad), CHUNK):
        chunk = squad.questions[first : first + CHUNK]
        made = windows.encoded(encode, [(question.text, question.context) for question in chunk])
        for number, (question, asked) in enumerate(zip(chunk, made, strict=True), first):
            _check(question, asked, max_length, stride)
            found += _labelled(question, asked.windows(number, max_length, stride, tokenizer.cls_token_id))
    return found


def _plain(tokenizer: Any) -> Any:
    """What save_pretrained writes, which a package runs by: without transformers, neither cutting nor padding."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _check(question: Question, asked: Asked, max_length: int, stride: int) -> None:
    if (room := asked.room(max_length)) <= stride:
        other = f"--stride {room // 2}" if room > 1 else "shorten the question"
        raise ValueError(
            f"question {question.id} has {asked.asked} tokens, which leaves {room} of --max-length {max_length} to "
            f"the context, and windows that share --stride {stride} need more; pass --max-length "
            f"{asked.around + 2 * stride + 1} or so, or {other}"
        )
    if not asked.readable:
        raise ValueError(f"the tokenizer makes no token of the context of question {question.id}; remove the question")


def _labelled(question: Question, rows: list[windows.Window]) -> Iterator[Window]:
    places = _places(question, [row.offsets for row in rows])
    known = any(places) or not question.answers
    for row, place in zip(rows, places, strict=True):
        yield Window(**vars(row), label=(place or (row.null, row.null)) if known else None)


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
