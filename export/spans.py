"""Windows' logits as answers, in training and of a package alike; numpy alone.

A span's score is start logit + end logit, its best over the windows; the null score is that of the null position, its
least over the windows. In v2.0 the answer is "" where null score - best score > threshold.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.windows import Window


@dataclass(frozen=True)
class Span:
    """A stretch of the context, from character `start` to before `end`."""

    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Answer:
    """One of a question's answers: context[start:end], or "" at -1 where there is none.

    score: start logit + end logit
    probability: its share of a softmax over the scores of all that were kept
    """

    text: str
    start: int
    end: int
    score: float
    probability: float


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

    def ranked(self, threshold: float | None) -> list[Answer]:
        """All answers, the one that is given first: by score, and that there is none before the first span that it
        beats by more than the threshold; None leaves it out."""
        kept = list(self.spans)
        if threshold is not None:
            beaten = [self.null - span.score > threshold for span in kept]
            kept.insert(beaten.index(True) if any(beaten) else len(kept), Span(self.null, -1, -1, ""))
        scores = np.array([span.score for span in kept])
        shares = np.exp(scores - scores.max())
        return [
            Answer(span.text, span.start, span.end, span.score, float(share))
            for span, share in zip(kept, shares / shares.sum(), strict=True)
        ]


def best(
    start: NDArray[np.floating], end: NDArray[np.floating], longest: int, count: int
) -> list[tuple[float, int, int]]:
    """The `count` best (start[i] + end[j], i, j) with i ≤ j < i + longest, exactly; of equal ones the foremost.

    Args:
        start, end: logits by position, -inf where no span may start or end.
    """
    length, longest = len(start), min(longest, len(start))
    padded = np.pad(end.astype(np.float64), (0, longest - 1), constant_values=-np.inf)
    scores = (start[:, None].astype(np.float64) + np.lib.stride_tricks.sliding_window_view(padded, longest)).ravel()
    count = min(count, length * longest)
    chosen = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    chosen = chosen[np.isfinite(scores[chosen])]
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")][:count]
    return [(float(scores[at]), int(at // longest), int(at // longest + at % longest)) for at in chosen]


def decode(
    contexts: Sequence[str],
    windows: Iterable[Window],
    logits: Iterable[tuple[NDArray[np.floating], NDArray[np.floating]]],
    longest: int = 30,
    count: int = 20,
) -> list[Decoded]:
    """Every question's best spans, over all its windows.

    Args:
        contexts: each question's.
        windows: of all questions.
        logits: of each window, start and end; what stands beyond its tokens is padding.
        longest: most tokens of an answer.
        count: spans to keep of each question.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    nulls = [np.inf] * len(contexts)
    for window, (start, end) in zip(windows, logits, strict=True):
        inside, of = window.offsets[:, 1] > 0, window.question
        nulls[of] = min(nulls[of], float(start[window.null]) + float(end[window.null]))
        first, last = (np.where(inside, values[: len(inside)], -np.inf) for values in (start, end))
        for score, i, j in best(first, last, longest, count):
            place = (int(window.offsets[i, 0]), int(window.offsets[j, 1]))
            spans[of][place] = max(score, spans[of].get(place, -np.inf))
    return [
        Decoded(_best_of(context, found, count), null)
        for context, found, null in zip(contexts, spans, nulls, strict=True)
    ]


def _best_of(context: str, found: dict[tuple[int, int], float], count: int) -> list[Span]:
    order = sorted(found, key=lambda place: (-found[place], place))[:count]
    return [_span(context, found[place], *place) for place in order]


def _span(context: str, score: float, start: int, end: int) -> Span:
    """Without the white space that some tokenizers keep in a word's token."""
    text = context[start : _whole(context, end)]
    start += len(text) - len(text.lstrip())
    return Span(score, start, start + len(text.strip()), text.strip())


def _whole(context: str, end: int) -> int:
    """`end` behind the accents of the letter before it: tokenizers that strip combining marks leave them outside."""
    while end < len(context) and unicodedata.category(context[end]).startswith("M"):
        end += 1
    return end
