"""Labelled texts and their splits: train, val (the texts that --stage tune watches), trainval and test.

Texts that come in one piece are deduplicated and split once, by --split-seed alone, so that all seeds and methods have
the same test texts.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtab.textfile import digest

VAL = 200  # as VTAB-1k: 800 to train on, 200 to choose by
USUAL = 1000
SMALLEST = 5  # texts of a class
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Texts:
    """Texts, or pairs of them, with their labels.

    first, second: each text; the second ones of pairs
    labels: classes as int64, or numbers as float32
    """

    first: Sequence[str]
    second: Sequence[str] | None
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: Sequence[int] | NDArray[Any]) -> "Texts":
        """Those at `indices`, in that order."""
        second = None if self.second is None else [self.second[i] for i in indices]
        return Texts([self.first[i] for i in indices], second, self.labels[np.asarray(indices, dtype=int)])

    def head(self, count: int | None) -> "Texts":
        """The first `count`; all for None."""
        return self if count is None else self.take(range(min(count, len(self))))

    def digest(self, labels: list[str] | None) -> str:
        """What tells these texts, whose classes have these names, from others."""
        return digest([labels, list(self.first), self.second and list(self.second), self.labels.tolist()])

    def keys(self) -> list[Hashable]:
        """What makes a text another one: neither case, which many encoders do not read, nor white space."""
        seconds = self.second if self.second is not None else [""] * len(self)
        return [(plain(one), plain(two)) for one, two in zip(self.first, seconds, strict=True)]


@dataclass(frozen=True)
class TextData:
    """A task.

    task: its name
    labels: the classes' names, in the order of their numbers; None where the label is a number itself
    splits: train, val, trainval and test; more that are tested beside it (MNLI's test_mismatched)
    metric: what it is judged by
    source, facts: where the texts come from, for the record
    """

    task: str
    labels: list[str] | None
    splits: Mapping[str, Texts]
    metric: str
    source: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def pair(self) -> bool:
        """Does a label belong to two texts?"""
        return self.splits["test"].second is not None


def plain(text: str) -> str:
    """
    >>> plain("A  warm\\tFilm ")
    'a warm film'
    """
    return " ".join(text.split()).casefold()


def unique(texts: Texts, besides: Sequence[Texts] = ()) -> tuple[Texts, dict[str, int]]:
    """`texts` without those that came before, and without those of `besides`; and how many these were.

    Raises:
        ValueError: none is left.
    """
    known = {key for others in besides for key in others.keys()}  # noqa: SIM118 (no mapping)
    first, contradicting = dict[Hashable, int](), 0
    for i, key in enumerate(texts.keys()):
        if key not in known:
            earlier = first.setdefault(key, i)
            contradicting += bool(texts.labels[earlier] != texts.labels[i])
    if not first:
        raise ValueError(f"all {len(texts)} texts to train on are among those to test on; take others")
    kept = texts.take(list(first.values()))
    return kept, {"repeated": len(texts) - len(kept), "repeated_with_another_label": contradicting}


def split(texts: Texts, test: Texts | None, size: int | None, seed: int, labels: list[str] | None) -> dict[str, Texts]:
    """train, val, trainval and test.

    Args:
        texts: all, or, with `test`, those to train on.
        test: those to test on, where they come apart.
        size: of trainval; None is 1,000, or 80 % of fewer than 1,250 texts, with `test` all of them.
        seed: of the draw.
        labels: the classes, of which every part gets its share; None draws without regard to the label.

    Raises:
        ValueError: too few texts, or too few of a class.
    """
    if labels is not None:
        _check_classes(texts, labels)
    size = size or (len(texts) if test else USUAL if len(texts) >= 1.25 * USUAL else round(0.8 * len(texts)))
    if size > len(texts) or (not test and size == len(texts)):
        raise ValueError(
            f"--train-size {size} leaves nothing to test of {len(texts)} texts; lower it, or name --test-data FILE"
            if not test
            else f"--train-size {size} is more than the {len(texts)} texts to train on; lower it"
        )
    rest = range(len(texts))
    both, other = _draw(texts, rest, size, seed, labels)
    train, val = _draw(texts, both, size - min(VAL, max(size // 5, 1)), seed, labels)
    parts = {"train": texts.take(train), "val": texts.take(val), "trainval": texts.take([*train, *val])}
    return parts | {"test": test or texts.take(other)}


def _draw(
    texts: Texts, indices: Sequence[int], size: int, seed: int, labels: list[str] | None
) -> tuple[list[int], list[int]]:
    """`size` of the indices, and the others; by class in the same shares."""
    from sklearn.model_selection import train_test_split

    if size == len(indices):
        return list(np.random.default_rng(seed).permutation(indices)), []
    least = min(size, len(indices) - size)
    if labels is not None and least < len(labels):
        raise ValueError(
            f"a part of {least} texts cannot have one of each of the {len(labels)} classes; raise --train-size, or "
            "give more texts"
        )
    by = None if labels is None else texts.labels[np.asarray(indices)]
    chosen, others = train_test_split(list(indices), train_size=size, stratify=by, random_state=seed)
    return chosen, others


def _check_classes(texts: Texts, labels: list[str]) -> None:
    counts = np.bincount(texts.labels, minlength=len(labels))
    if (counts > 0).sum() < 2:
        raise ValueError(f"all {len(texts)} texts have one label, {labels[int(counts.argmax())]!r}; two are needed")
    if counts.min() < SMALLEST:
        rare = int(counts.argmin())
        numbers = all(label.replace(".", "").lstrip("-").isdecimal() for label in labels)
        cure = (
            "if it is a number, pass --metric pearson+spearman" if numbers else "does --label-column name the labels?"
        )
        raise ValueError(
            f"a split by class needs {SMALLEST} different texts of each of the {len(labels)} classes, and "
            f"{labels[rare]!r} has {counts[rare]}; give more of them, or leave its rows out; {cure}"
        )
