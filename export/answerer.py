"""Answers to questions about paragraphs from an exported package: numpy, onnxruntime and tokenizers, never torch."""

from collections.abc import Sequence

import numpy as np

from export.questions import Questions
from export.runtime import Runtime
from export.spans import Answer, Decoded, decode
from export.windows import CHUNK, Pair, Window

BATCH = 16  # windows a run; each may be of full length


class Answerer(Runtime):
    """A package of questions: a question and its context in, the stretch of the context that answers it out. Opened as
    any `Runtime` is.

    >>> answerer = Answerer("package")  # doctest: +SKIP
    >>> context = "On day 7 the key was left in the shed, and nobody saw it."
    >>> [[answer]] = answerer.answer([("Where was the key left?", context)])  # doctest: +SKIP
    >>> answer  # doctest: +SKIP
    Answer(text='the shed', start=29, end=37, score=11.6, probability=0.98)
    >>> context[29:37]
    'the shed'
    """

    kinds = ("question",)

    @property
    def null_threshold(self) -> float | None:
        """By how much "no answer" must score above the best one to be given; None where there always is an answer."""
        found: float | None = self.manifest["input"]["null_threshold"]
        return found

    def answer(
        self, questions: Sequence[Pair], top: int = 1, null_threshold: float | None = None
    ) -> list[list[Answer]]:
        """The `top` best answers to each question, the one that is given first.

        A long context is read in windows, and the best span over all of them wins, as in training. Where questions may
        have no answer, that is one of the answers: Answer("", -1, -1, …).

        Args:
            questions: each a pair (question, context).
            top: answers to each question; the run's n_best, and that there is none, at the most.
            null_threshold: another than the run's: the higher it is, the fewer questions get no answer.

        Raises:
            ValueError: an empty question or context, a question too long for a window, a `top` below 1, a threshold
                that is no number, or where there always is an answer; logits that are not finite.
            TypeError: one pair instead of a list, or no pair.
        """
        self._taken().check(questions)
        if top < 1:
            raise ValueError(f"top={top} must be at least 1")
        if null_threshold is not None and not np.isfinite(null_threshold):
            raise ValueError(f"null_threshold={null_threshold} must be a number")
        if null_threshold is not None and self.null_threshold is None:
            raise ValueError(
                f"{self.folder} is of a run whose questions all have an answer, and null_threshold={null_threshold:g} "
                "has no use; leave it out"
            )
        threshold = self.null_threshold if null_threshold is None else null_threshold
        starts = range(0, len(questions), CHUNK)
        found = [told for start in starts for told in self._decoded(questions[start : start + CHUNK], start)]
        return [told.ranked(threshold)[:top] for told in found]

    def _taken(self) -> Questions:
        return self.input  # type: ignore[return-value]  # `kinds` saw to it

    def _decoded(self, questions: Sequence[Pair], first: int) -> list[Decoded]:
        about, windows = self.manifest["input"], self._taken().windows(questions, first)
        contexts = [context for _, context in questions]
        return decode(contexts, windows, self._logits(windows), about["longest_answer"], about["n_best"])

    def _logits(self, windows: Sequence[Window]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Start and end logits of each window; of like length go together, with dynamic int8, whose scales are of a
        whole batch, each by itself."""
        count = 1 if self.variant == "int8" else BATCH
        order = sorted(range(len(windows)), key=lambda place: -len(windows[place].ids))
        found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for start in range(0, len(order), count):
            places = order[start : start + count]
            logits = self.logits(self._taken().batch([windows[place] for place in places]))
            if not np.isfinite(logits).all():
                raise ValueError(f"{self.folder}: {self.variant} gives logits that are not finite; export again")
            found |= {place: (pair[0], pair[1]) for place, pair in zip(places, logits, strict=True)}
        return [found[place] for place in range(len(windows))]
