"""What text tasks are judged by, in GLUE's way: where a task has two metrics, their mean counts (arXiv 1804.07461)."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]


def _accuracy(labels: Vector, predicted: Vector) -> float:
    return float((labels == predicted).mean())


def _f1(labels: Vector, predicted: Vector) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, pos_label=1, zero_division=0.0))


def _macro_f1(labels: Vector, predicted: Vector) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", zero_division=0.0))


def _matthews(labels: Vector, predicted: Vector) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _correlation(name: str, labels: Vector, predicted: Vector) -> float:
    """0 where one side is constant, as one number alone is: it tells nothing of the other."""
    from scipy import stats

    if min(np.ptp(labels), np.ptp(predicted)) == 0:
        return 0.0
    return float(getattr(stats, name)(labels, predicted).statistic)


def _pearson(labels: Vector, predicted: Vector) -> float:
    return _correlation("pearsonr", labels, predicted)


def _spearman(labels: Vector, predicted: Vector) -> float:
    return _correlation("spearmanr", labels, predicted)


METRICS: dict[str, dict[str, Callable[[Vector, Vector], float]]] = {
    "accuracy": {"accuracy": _accuracy},
    "f1+accuracy": {"f1": _f1, "accuracy": _accuracy},
    "macro-f1": {"macro_f1": _macro_f1},
    "matthews": {"matthews": _matthews},
    "pearson+spearman": {"pearson": _pearson, "spearman": _spearman},
}
OF_NUMBERS = {"pearson+spearman"}  # labels are numbers, not classes
OF_TWO = {"f1+accuracy"}  # F1 is that of the second class


def judge(metric: str, labels: Vector, predicted: Vector) -> dict[str, float]:
    """Each part of the metric in percent, and their mean as "score".

    >>> judge("f1+accuracy", np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))["score"]
    70.83333333333333
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes or numbers that are all the same
        parts = {name: 100 * part(labels, predicted) for name, part in METRICS[metric].items()}
    return {**parts, "score": sum(parts.values()) / len(parts)}
