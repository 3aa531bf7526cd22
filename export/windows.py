"""Questions as windows of tokens, cut alike where a model is trained and where its package runs; numpy alone.

A context that does not fit is cut into windows that overlap by `stride` tokens, each behind its question, as BERT's own
SQuAD code does (arXiv 1810.04805):

    [CLS] question [SEP] context[0 : room] [SEP],  [CLS] question [SEP] context[room - stride : …] [SEP],  …
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding

CHUNK = 256  # questions tokenized at once
OUTSIDE = (-1, -1)  # offsets of what is no token of the context
Pair = tuple[str, str]  # question, context


@dataclass(frozen=True)
class Window:
    """One row for the model, unpadded.

    ids, types: its tokens, and of each the number of the part it is of: question or context
    question: index of its question
    offsets: (tokens, 2), the first character of each context token and the one after its last; OUTSIDE for others
    null: the position that stands for no answer
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    question: int
    offsets: NDArray[np.int32]
    null: int


@dataclass(frozen=True)
class Asked:
    """A question and the whole of its context as tokens; `first` to before `last` are the context's.

    asked: how many are the question's
    """

    ids: NDArray[np.int32]
    types: NDArray[np.int32]
    offsets: NDArray[np.int32]
    first: int
    last: int
    asked: int

    @property
    def readable(self) -> bool:
        """Is there a token of the context that an answer can hold?"""
        return bool((self.offsets[:, 1] > 0).any())

    @property
    def around(self) -> int:
        """Tokens of every window that are not the context's."""
        return len(self.ids) - (self.last - self.first)

    def room(self, max_length: int) -> int:
        """Tokens of the context that a window of `max_length` holds; it must be more than windows share."""
        return max(max_length - self.around, 0)

    def windows(self, question: int, max_length: int, stride: int, null: int | None) -> list[Window]:
        """The context's windows, from its start; each takes a step forward.

        Args:
            question: index of the question.
            max_length: tokens of a window.
            stride: tokens of the context that two neighbouring windows share, fewer than `room`.
            null: the token whose position stands for no answer, [CLS]; where there is none the first position does.
        """
        room = self.room(max_length)
        starts = range(self.first, max(self.last - stride, self.first + 1), room - stride)
        return [self._window(question, start, min(start + room, self.last), null) for start in starts]

    def _window(self, question: int, start: int, end: int, null: int | None) -> Window:
        places = np.r_[: self.first, start:end, self.last : len(self.ids)]
        ids = self.ids[places]
        found = np.flatnonzero(ids == null)
        return Window(ids, self.types[places], question, self.offsets[places], int(found[0]) if len(found) else 0)


def encoded(encode: "Callable[[list[Pair]], Sequence[Encoding]]", questions: Sequence[Pair]) -> list[Asked]:
    """Questions as tokens, whole.

    Args:
        encode: a tokenizer's encode_batch, which neither cuts nor pads.
        questions: each with its context.
    """
    found = encode([(question.strip(), context) for question, context in questions])
    return [_asked(context, made) for (_, context), made in zip(questions, found, strict=True)]


def _asked(context: str, made: "Encoding") -> Asked:
    parts, offsets = made.sequence_ids, made.offsets
    inside = [place for place, part in enumerate(parts) if part == 1]
    first, last = (inside[0], inside[-1] + 1) if inside else (len(parts), len(parts))
    # White space alone would be an answer that is none.
    kept = [o if part == 1 and context[slice(*o)].strip() else OUTSIDE for o, part in zip(offsets, parts, strict=True)]
    ids, types = (np.array(each, np.int32) for each in (made.ids, made.type_ids))
    return Asked(ids, types, np.array(kept, np.int32).reshape(-1, 2), first, last, parts.count(0))
