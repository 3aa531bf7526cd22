"""The settings of question answering, beside those that every text run has."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from examples.text.qa_recipes import RECIPES
from examples.text.settings import TextTraining
from vtab.cli import flag
from vtab.recipes import Recipe

LEAST = {"stride": 0, "longest_answer": 1, "n_best": 1, "train_size": 1, "split_seed": 0}


@dataclass(frozen=True)
class QuestionAnswering(TextTraining):
    """What to train on questions about paragraphs, and how. The same settings and seed on one machine give the same
    numbers.

    train: your own file to train on, in the format of SQuAD v1.1 or v2.0
    dev: your own file to test on, in the same format
    data: squad or squad_v2 from the Hugging Face hub, instead of files
    max_length: tokens of a window: question, separators and as much of the context as fits
    stride: tokens of the context that neighbouring windows share
    longest_answer: most tokens of an answer
    n_best: how many answers to each question nbest_predictions.json keeps
    null_threshold: where questions may be impossible, no answer is given if it scores above the best one by more than
        this; --stage tune finds the best one on its questions
    train_size: train on so many questions, drawn by --split-seed (default: all)
    val_share: share of the training contexts that --stage tune watches
    split_seed: of the draw of training and watched questions, whatever --seed is
    recipe: defaults of a published recipe, which other flags override; python -m examples.text.recipes lists them
    stage: final trains on all training questions and tests once, after the last epoch; tune trains on a part of them,
        watches those about other contexts and never opens --dev
    test_limit: test on the first N questions only, recorded as such
    batch_size: windows a step
    seed: of initial values, masks, data order and dropout
    """

    known: ClassVar[Mapping[str, Recipe]] = RECIPES

    train: Path | None = None
    dev: Path | None = None
    data: str | None = None
    max_length: int = 384
    stride: int = 128
    longest_answer: int = 30
    n_best: int = 20
    null_threshold: float = 0.0
    train_size: int | None = None
    val_share: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        self.check()
        if self.data and (self.train or self.dev):
            raise ValueError(f"--data {self.data} brings its own questions; leave it out, or --train and --dev")
        if not self.data and not self.train:
            raise ValueError("name the questions: --train FILE --dev FILE in SQuAD's format, or --data squad, squad_v2")
        if self.train and not self.dev and self.stage == "final":
            raise ValueError("--dev FILE is missing, the questions to test on; --stage tune does without")
        for field, least in LEAST.items():
            if (value := getattr(self, field)) is not None and value < least:
                raise ValueError(f"{flag(field)} {value} must be at least {least}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"--val-share {self.val_share} must lie in (0, 1)")
        if not math.isfinite(self.null_threshold):
            raise ValueError(f"--null-threshold {self.null_threshold} must be a number")

    @property
    def task(self) -> str:
        """The training questions' name in records: of a file its own, without .json."""
        return self.data or (self.train.stem if self.train else "")

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(filter(None, (self.train, self.dev if self.stage == "final" else None)))

    def title(self) -> str:
        return f"{self.task.replace('.', '-')}-{Path(self.model).name}-{self.method.name}"
