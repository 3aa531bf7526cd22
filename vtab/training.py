"""The settings that every training run has, whatever it trains on."""

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import capavision as cv


@dataclass(frozen=True)
class Training(ABC):
    """How to train, test and name a run.

    targets: what to adapt, comma-separated names, globs or groups (default: the method's choice for the architecture)
    parts: rows of a fused projection to adapt: letters of q, k, v
    recipe: defaults of a published recipe, which other flags override
    stage: final trains on all training data and tests once, after the last epoch; tune trains on a part of it, watches
        the rest and never touches the test split
    test_limit: test on the first N of the test split only, recorded as such
    epochs: passes over the training data
    batch_size: examples a step
    drop_last: leave out the examples that fill no whole batch, others in every epoch
    optimizer: adamw, or sgd with momentum 0.9
    lr: peak learning rate
    mask_lr: peak learning rate of the scores of learned masks (default: 30 times lr)
    weight_decay: of the optimizer
    schedule: step changes the learning rate at every step; epoch only between epochs, and one epoch late, as the
        released code of most papers does
    warmup: share of the schedule over which the learning rate rises; from 2 on, the number of its steps
    decay: how the learning rate falls: cosine, or linear
    lr_start: learning rate at the start of the warm-up
    lr_min: learning rate at the end of the schedule
    clip: largest norm of the gradient; 0 does not clip
    precision: of the products, while parameters stay float32: float32, bfloat16, or auto: bfloat16 on a GPU that has it
    seed: of initial values, masks and data order
    device: cuda, mps or cpu (default: the best this machine has)
    out: folder of run folders
    name: the run folder's name (default: data, model, method and a digest of the settings)
    """

    protocol: ClassVar[str] = "honest"  # of runs that leave no choice
    tune: ClassVar[bool] = False

    method: cv.Method = dataclasses.field(default_factory=cv.LoRA)
    targets: str | None = None
    parts: str | None = None
    recipe: str | None = None
    stage: str = "final"
    test_limit: int | None = None
    epochs: int = 100
    batch_size: int = 64
    drop_last: bool = False
    optimizer: str = "adamw"
    lr: float = 1e-3
    mask_lr: float | None = None
    weight_decay: float = 1e-4
    schedule: str = "step"
    warmup: float = 0.1
    decay: str = "cosine"
    lr_start: float = 0.0
    lr_min: float = 0.0
    clip: float = 1.0
    precision: str = "auto"
    seed: int = 0
    device: str | None = None
    out: Path = Path("runs")
    name: str | None = None

    @property
    def patterns(self) -> list[str] | None:
        """The targets one by one; None leaves the choice to the method."""
        return [name.strip() for name in self.targets.split(",")] if self.targets else None

    def steps(self, examples: int) -> int:
        """Steps in an epoch over that many.

        Raises:
            ValueError: drop_last leaves none.
        """
        steps = examples // self.batch_size if self.drop_last else -(-examples // self.batch_size)
        if not steps:
            raise ValueError(
                f"--drop-last with --batch-size {self.batch_size} leaves no batch of {examples} examples; lower the "
                "batch, or pass --no-drop-last"
            )
        return steps

    def record(self) -> dict[str, Any]:
        """The settings as JSON; paths as text, the method with its name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        method = {"name": self.method.name, **dataclasses.asdict(self.method)}  # type: ignore[call-overload]
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()} | {"method": method}

    @classmethod
    def young(cls) -> dict[str, Any]:
        """Fields that the first runs did not have yet, with the defaults that leave names and records as they were."""
        return {}

    def digest(self) -> str:
        """Eight hex digits of all that shapes the numbers."""
        young = self.young()
        relevant = {k: v for k, v in self.record().items() if k not in ("out", "name", "cache")}
        relevant = {k: v for k, v in relevant.items() if k not in young or v != young[k]}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]

    @abstractmethod
    def title(self) -> str:
        """Data, model and method: what a run folder is called, before seed and digest."""

    def folder(self) -> Path:
        """The run's folder."""
        return self.out / (self.name or f"{self.title()}-s{self.seed}-{self.digest()}")
