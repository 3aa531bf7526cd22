"""Questions about paragraphs, and their division into those to train on and those to watch."""

from dataclasses import dataclass, replace

import numpy as np

from examples.text.data import plain


@dataclass(frozen=True)
class Answer:
    """Characters of the context, from `start` on."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True)
class Question:
    """One question; no answers means that the context holds none."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Squad:
    """The questions of one file.

    version: "2.0" where questions may be impossible, else "1.1"; the two are scored by different scripts
    digest: of the whole file, whichever part of its questions these are
    """

    questions: tuple[Question, ...]
    version: str
    source: str
    digest: str = ""

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def answerable(self) -> int:
        return sum(bool(question.answers) for question in self.questions)

    @property
    def contexts(self) -> list[str]:
        """Each context once, as `plain` has it."""
        return list(dict.fromkeys(plain(question.context) for question in self.questions))

    def head(self, count: int | None) -> "Squad":
        """The first `count` questions; None is all."""
        return replace(self, questions=self.questions[:count])

    def drawn(self, count: int | None, seed: int) -> "Squad":
        """`count` of the questions in their order; None is all.

        Raises:
            ValueError: there are fewer.
        """
        if count is None:
            return self
        if count > len(self):
            raise ValueError(f"--train-size {count} is more than the {len(self)} questions of {self.source}; lower it")
        kept = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return replace(self, questions=tuple(self.questions[i] for i in kept))

    def split(self, share: float, seed: int) -> tuple["Squad", "Squad"]:
        """The questions in two parts, the second of `share` of the contexts: none is in both.

        Raises:
            ValueError: there is only one context.
        """
        contexts = self.contexts
        if len(contexts) < 2:
            raise ValueError(
                f"{self.source} has one context, and --stage tune needs some to train on and others to watch"
            )
        count = min(max(round(share * len(contexts)), 1), len(contexts) - 1)
        kept = {contexts[i] for i in np.random.default_rng(seed).permutation(len(contexts))[:count]}
        parts = ([q for q in self.questions if (plain(q.context) in kept) == chosen] for chosen in (False, True))
        first, second = (replace(self, questions=tuple(part)) for part in parts)
        return first, second
