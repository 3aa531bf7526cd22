"""The settings of text runs, beside those that every training has."""

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from capavision.targets import near
from examples.text.metrics import METRICS
from examples.text.recipes import RECIPES
from vtab import limits, recipes
from vtab.cli import flag
from vtab.recipes import Recipe
from vtab.training import Training


@dataclass(frozen=True)
class TextTraining(Training):
    """What every text run has.

    model: demo (MiniLM, from a Python package), a name on the Hugging Face hub, or a folder that save_pretrained wrote
    max_length: tokens of a text, the special ones included; what is longer is cut
    """

    known: ClassVar[Mapping[str, Recipe]] = RECIPES

    model: str = "demo"
    max_length: int = 128
    epochs: int = 10
    batch_size: int = 32
    weight_decay: float = 0.01
    decay: str = "linear"

    @property
    def judge(self) -> str:
        """The split that judges the run."""
        return "val" if self.stage == "tune" else "test"

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """One's own files with the data."""

    @functools.cached_property
    def contents(self) -> str | None:
        """What the files hold, in short: a run is another one where they changed. None without files."""
        there = [file for file in self.files if file.is_file()]
        digests = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in there]
        return ", ".join(digests) or None

    def record(self) -> dict[str, Any]:
        return super().record() | {"contents": self.contents}

    @classmethod
    def young(cls) -> dict[str, Any]:
        return super().young() | {"contents": None}

    def check(self) -> None:
        """Raise ValueError, with the cure, for the first setting that cannot be."""
        limits.check_training(self)
        if self.recipe is not None:
            recipes.find(self.recipe, self.known)
        if self.max_length < 1:
            raise ValueError(f"--max-length {self.max_length} must be at least 1")


@dataclass(frozen=True)
class Classification(TextTraining):
    """What to train on texts with a label, and how. The same settings and seed on one machine give the same numbers.

    data: rotten_tomatoes (from a Python package), glue/sst2 and the other GLUE tasks, or your own .csv or .tsv file
    text_column: of your own file: the column with the text
    text_pair_column: the column with the second text, where a label belongs to a pair
    label_column: the column with the label
    test_data: your own file with the test texts, of the same columns (default: drawn from --data)
    metric: what the run is judged by (default: the GLUE task's own, else accuracy); pearson+spearman is for labels that
        are numbers
    train_size: texts to train on, of which 200, or a fifth if that is less, are kept for --stage tune (default: 1,000
        and the rest to test; 80 % of a smaller file; all where the test texts come apart)
    split_seed: of the draw of training, validation and test texts, whatever --seed is
    recipe: defaults of a published recipe, which other flags override; python -m examples.text.recipes lists them
    stage: final trains on all training texts and tests once, after the last epoch; tune trains on those that are not
        kept for it, watches the kept ones and never touches the test split
    seed: of initial values, masks, data order and dropout
    """

    data: str = ""
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    test_data: Path | None = None
    metric: str | None = None
    train_size: int | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        self.check()
        if not self.data:
            raise ValueError("name the data: --data rotten_tomatoes, glue/sst2, or your own file: --data reviews.csv")
        if self.metric is not None and self.metric not in METRICS:
            raise ValueError(f"--metric {self.metric!r} is unknown; {near(self.metric, METRICS)}")
        for field in ("test_data", "text_pair_column"):
            if getattr(self, field) is not None and not self.is_file:
                raise ValueError(f"{flag(field)} is for a file of your own, and --data is {self.data}; leave it out")
        columns = [self.text_column, *filter(None, [self.text_pair_column]), self.label_column]
        if len(set(columns)) < len(columns):
            raise ValueError(f"the columns {', '.join(columns)} of text and label must differ; name another")
        for field, least in (("train_size", 10), ("split_seed", 0)):
            if (value := getattr(self, field)) is not None and value < least:
                raise ValueError(f"{flag(field)} {value} must be at least {least}")

    @property
    def task(self) -> str:
        """The data's name in records: of a file its own."""
        return Path(self.data).name if self.is_file else self.data

    @property
    def is_file(self) -> bool:
        """Is the data a file of one's own?"""
        return Path(self.data).suffix.lower() in (".csv", ".tsv")

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.data), *filter(None, [self.test_data])) if self.is_file else ()

    def title(self) -> str:
        return f"{self.task.replace('/', '-').replace('.', '-')}-{Path(self.model).name}-{self.method.name}"
