"""What a package of questions takes: windows of tokens, each a question and as much of its context as fits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.tokens import MASK, Batch, Text, Tokens, check_words
from export.windows import Pair, Window, encoded


class Questions(Tokens):
    """Questions, each with its context, to the graph's inputs.

    Args:
        folder: the package, or the run.
        about: what the manifest says of the input: as of texts, and stride, null.

    Raises:
        ValueError: tokenizer.json is missing, damaged or of another model.
    """

    kind, unit = "question", "windows"
    outputs = ("start_logits", "end_logits")

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        super().__init__(folder, about)
        self.tokenizer.no_truncation()  # windows are cut here, and a question never

    def check(self, questions: Sequence[Text]) -> None:
        """Raise TypeError for what is no list of pairs of str; ValueError for an empty question or context."""
        if isinstance(questions, str):
            raise TypeError("answer takes a list of pairs, and this is one str: write [(question, context)]")
        for number, asked in enumerate(questions, 1):
            parts = tuple(asked) if isinstance(asked, (tuple, list)) else (asked,)
            if len(parts) != 2 or not all(isinstance(part, str) for part in parts):
                raise TypeError(
                    f"question {number} must be a pair of str, (question, context), not {str(asked)[:80]!r} "
                    f"({type(asked).__name__})"
                )
            for part, name in zip(parts, (f"question {number}", f"the context of question {number}"), strict=True):
                check_words(part, name)

    def windows(self, questions: Sequence[Pair], first: int = 0) -> list[Window]:
        """All windows of questions that `check` lets pass, in order.

        Args:
            questions: each with its context.
            first: the number of the first of them, where they are a part of more.

        Raises:
            ValueError: a question that leaves no room, a context without a token.
        """
        length, stride, found = self.length, int(self.about["stride"]), list[Window]()
        for number, asked in enumerate(encoded(self.encodings, questions)):
            name = f"question {first + number + 1}"
            if (room := asked.room(length)) <= stride:
                raise ValueError(
                    f"{name} has {asked.asked} tokens, which leaves {room} of the {length} of a window to the context, "
                    f"and windows share {stride}; shorten the question"
                )
            if not asked.readable:
                raise ValueError(f"the tokenizer finds no token in the context of {name}; leave it out")
            found += asked.windows(number, length, stride, self.about["null"])
        return found

    def prepare(self, questions: Sequence[Text]) -> Batch:
        """All windows of questions that `check` lets pass, as tokens padded to the longest.

        Raises:
            ValueError: what `windows` refuses.
        """
        return self.batch(self.windows([(asked[0], asked[1]) for asked in questions]))

    def batch(self, windows: Sequence[Window]) -> Batch:
        """Windows as the graph takes them, padded to the longest."""
        return self._padded([(window.ids.tolist(), window.types.tolist()) for window in windows])

    def joined(self, outputs: Sequence[np.ndarray], given: Batch) -> np.ndarray:
        """Start and end logits (n, 2, length); those of padding, which mean nothing, are 0."""
        return np.where(given[MASK][:, None] == 1, np.stack(outputs, 1), np.float32(0))
