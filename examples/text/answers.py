"""Is an answer right? Exact match and F1 as SQuAD's official scripts have them, evaluate-v1.1.py and evaluate-v2.0.py.

    words(s)  = s in lower case, without ASCII punctuation, without the words a, an, the, split at white space
    EM(s, g)  = 1 if words(s) = words(g), else 0
    F1(s, g)  = 2 |common| / (|words(s)| + |words(g)|),    common: words of both, each as often as in both

A question's score is the best over its gold answers; the file's the mean over questions, in percent. Where a side has
no words left, v2.0 sets F1 = EM, and v1.1 F1 = 0; v2.0 passes over gold answers without words, and an impossible
question's gold answer is "".
"""

import re
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.text.questions import Question, Squad
from vtab.evaluate import Accuracy

RESAMPLES = 2000  # of the bootstrap of F1
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words(text: str) -> list[str]:
    """
    >>> words("The  Duke's (first) horse, an Arab!")
    ['dukes', 'first', 'horse', 'arab']
    """
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(said: str, gold: str) -> bool:
    """
    >>> exact_match("the Normans.", "Normans")
    True
    """
    return words(said) == words(gold)


def f1(said: str, gold: str, version: str = "2.0") -> float:
    """
    >>> f1("in the 10th century", "10th and 11th centuries")  # one common word of 3 and 4
    0.2857142857142857
    """
    one, two = words(said), words(gold)
    if not one or not two:
        return float(version == "2.0" and one == two)
    return 2 * (Counter(one) & Counter(two)).total() / (len(one) + len(two))


def golds(question: Question, version: str) -> list[str]:
    """What an answer is compared with."""
    texts = [answer.text for answer in question.answers]
    return texts if version == "1.1" else [text for text in texts if words(text)] or [""]


@dataclass(frozen=True)
class Scores:
    """Of each question: exact match, F1, and whether it has an answer."""

    exact: NDArray[np.bool_]
    f1: NDArray[np.float64]
    answerable: NDArray[np.bool_]

    def record(self, version: str) -> dict[str, Any]:
        """In percent, by the names of the official script: for v2.0 also over questions with and without answer."""
        found = _means("", self.exact, self.f1)
        if version == "2.0":
            for prefix, chosen in (("HasAns_", self.answerable), ("NoAns_", ~self.answerable)):
                found |= _means(prefix, self.exact[chosen], self.f1[chosen]) if chosen.any() else {}
        return found

    @property
    def matches(self) -> Accuracy:
        """Exact matches, with their 95 % Wilson interval."""
        return Accuracy(int(self.exact.sum()), len(self.exact))

    def f1_interval(self) -> tuple[float, float]:
        """95 % of bootstrapped means, in percent. Questions count as independent, though those of a paragraph are
        alike, so that the true one is somewhat wider; so it is with Wilson's, which stands where all are right, or all
        wrong: no resample of these says anything else."""
        rng, n = np.random.default_rng(0), len(self.f1)
        if np.ptp(self.f1) == 0:
            return Accuracy(round(n * float(self.f1[0])), n).interval
        means = [self.f1[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
        low, high = np.percentile(means, [2.5, 97.5])
        return 100 * float(low), 100 * float(high)


def _means(prefix: str, exact: NDArray[np.bool_], f1: NDArray[np.float64]) -> dict[str, Any]:
    means = {"exact": 100 * float(exact.mean()), "f1": 100 * float(f1.mean()), "total": len(exact)}
    return {prefix + name: value for name, value in means.items()}


def score(squad: Squad, predictions: Mapping[str, str]) -> Scores:
    """Every question's scores.

    Args:
        predictions: an answer for each id, "" for none; an id without one scores 0.
    """
    exact, f1s = np.zeros(len(squad), bool), np.zeros(len(squad))
    for number, question in enumerate(squad.questions):
        if (said := predictions.get(question.id)) is not None:
            exact[number] = any(exact_match(said, gold) for gold in golds(question, squad.version))
            f1s[number] = max(f1(said, gold, squad.version) for gold in golds(question, squad.version))
    return Scores(exact, f1s, np.array([bool(question.answers) for question in squad.questions]))


def best_threshold(scores: Scores, odds: NDArray[np.float64], which: str) -> tuple[float, float]:
    """The best mean of "exact" or "f1" that a null threshold can reach on these very questions, in percent, and that
    threshold: one whose odds are above it is answered "".

    Args:
        scores: of the best answers that are not "".
        odds: null score minus the best other score, of each question.
    """
    # Lowest odds are answered first: an answer gains its score, or loses the 1 that "" had.
    gains = np.where(scores.answerable, getattr(scores, which).astype(float), -1.0)
    order = np.argsort(odds, kind="stable")
    totals = (~scores.answerable).sum() + np.concatenate([[0.0], gains[order].cumsum()])
    thresholds = np.concatenate([[odds.min() - 1], odds[order]])
    reachable = np.append(thresholds[1:] != thresholds[:-1], True)  # equal odds are answered together
    best = int(np.where(reachable, totals, -1).argmax())
    return 100 * float(totals[best]) / len(odds), float(thresholds[best])
