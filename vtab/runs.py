"""A finished run, as its folder tells of it: what the report needs to know to compare it with others."""

import dataclasses
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtab.averages import AVERAGES
from vtab.config import Config
from vtab.labels import recorded
from vtab.lists import LENGTHS
from vtab.tasks import TASKS

ACCURACY = "accuracy"
FILES = {"data", "train", "dev", "test_data", "contents"}  # where data lay, and what lay there
ELSEWHERE = {"task", "method", "seed", "out", "name", "device", "data_root", "split_file"}  # no setting of the training


def metric(result: dict[str, Any]) -> str:
    """What judges a run: top-1 accuracy, as in all of VTAB-1k, or what its result names."""
    return str(result.get("metric", ACCURACY))


def score(result: dict[str, Any]) -> float:
    """That metric in percent."""
    found: float = result["accuracy"] if metric(result) == ACCURACY else result["score"]
    return found


def unit(result: dict[str, Any]) -> str:
    """What it was judged on: images, texts, questions. Older records name it by their kind alone."""
    return str(result.get("unit", "texts" if result.get("text") else "images"))


def examples(result: dict[str, Any]) -> int:
    """How many of these; older records count images, whatever they are."""
    count: int = result["examples"] if "examples" in result else result["images"]
    return count


def in_full_split(result: dict[str, Any]) -> int | None:
    """How many there were to judge it on; None where it is not recorded."""
    count: int | None = result.get("examples_in_full_split", result.get("images_in_full_split"))
    return count


def by_epoch(result: dict[str, Any]) -> tuple[str, ...]:
    """An epoch's figures in percent: accuracy in training first, then what was watched."""
    return (ACCURACY, "val_accuracy", "test_accuracy") if metric(result) == ACCURACY else (ACCURACY, "val_score")


@dataclass(frozen=True)
class Run:
    """A finished run.

    folder: where it lies
    result: result.json
    history: metrics.jsonl; empty where it is absent or damaged
    labels, predicted: predictions.npz; None where it is absent or damaged
    apart: what tells its data from others of the same name
    """

    folder: Path
    result: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    labels: np.ndarray | None = None
    predicted: np.ndarray | None = None
    apart: str = ""

    @property
    def config(self) -> dict[str, Any]:
        return self.result["config"]

    @property
    def task(self) -> str:
        """With what it is judged by, unless that is top-1 accuracy: figures of two metrics never share a column. Nor do
        those of two files of one name, nor a folder of one's own and a mean."""
        name, judged_by = self.result["task"] + self.apart, metric(self.result)
        name += f" ({self.unit})" if name in AVERAGES else ""
        return name if judged_by == ACCURACY else f"{name} ({judged_by})"

    @property
    def digest(self) -> str | None:
        """Of the data that the task is named after; None where it is not recorded."""
        return self.result["data"].get("digest")

    @property
    def file(self) -> Path:
        """File or folder that holds that data, as the command gave it."""
        return Path(next((str(named) for key in ("train", "data", "data_root") if (named := self.config.get(key))), ""))

    @property
    def seed(self) -> int:
        return self.result.get("seed", self.config.get("seed", 0))

    @property
    def accuracy(self) -> float:
        """What judges it, in percent."""
        return score(self.result)

    @property
    def method(self) -> str:
        return self.result.get("method") or recorded(self.config)

    @property
    def honest(self) -> bool:
        return self.result.get("protocol", "honest") == "honest"

    @property
    def tuning(self) -> bool:
        """Judged by val200, by a run that never looked at the test split?"""
        return self.result.get("split") == "val" or self.result.get("stage") == "tune"

    @property
    def generated(self) -> bool:
        """Are the images our own drawings, under a VTAB task's name?"""
        data = self.result["data"]
        return self.task in TASKS and bool(data.get("generated", "dSprites-like" in data.get("source", "")))

    @property
    def variant(self) -> str | None:
        """jpeg or lossless; None where the task is no VTAB task or is generated."""
        if self.generated or self.task not in TASKS or TASKS[self.task].group == "extra":
            return None
        return str(self.result["data"].get("variant", "unknown"))

    @property
    def test_limit(self) -> int | None:
        return None if self.tuning else self.config.get("test_limit")

    @property
    def partial(self) -> bool:
        """Lists of other lengths than VTAB-1k's?"""
        sizes, task = self.result["data"].get("splits") or {}, TASKS.get(self.task)
        if not sizes or task is None or task.group == "extra":
            return bool(self.config.get("partial"))
        full = {split: (length,) for split, length in LENGTHS.items()} | {"test": task.test_lengths}
        return any(sizes.get(split, lengths[0]) not in lengths for split, lengths in full.items())

    @property
    def text(self) -> dict[str, Any]:
        """What a text run says of its texts; empty for images."""
        return self.result.get("text") or {}

    @property
    def classes(self) -> list[str]:
        """Their names, where they are recorded."""
        return self.text.get("labels") or []

    @property
    def unit(self) -> str:
        """As `unit` of its result."""
        return unit(self.result)

    @property
    def watched(self) -> str:
        """The split that settings are chosen by."""
        return "val200" if self.unit == "images" else "val"

    @property
    def base(self) -> dict[str, Any]:
        """model, weights, digest and img_size of the backbone; the digest is None in older records."""
        own = {key: self.config.get(key) for key in ("model", "weights", "img_size")}
        return {"digest": None} | own | (self.result.get("base") or {})

    def settings(self) -> dict[str, str]:
        """All that shaped the training, flat, as text; what an older record lacks is today's default."""
        usual = {f.name: f.default for f in dataclasses.fields(Config) if f.default is not dataclasses.MISSING}
        flat = {key: value for key, value in (usual | self.config).items() if key not in ELSEWHERE}
        flat |= {f"method.{key}": value for key, value in self.config["method"].items()}
        if self.digest:  # says more than where the data lay
            flat = {key: value for key, value in flat.items() if key not in FILES}
            flat["test data"] = str(self.result["data"].get("test_digest"))[:6]
        tried: dict[str, set[str]] = defaultdict(set)
        for trial in (self.result.get("tuning") or {}).get("trials", []):  # each run may have chosen another of these
            for key, value in trial["settings"].items():
                tried[key if key in flat else f"method.{key}"].add(json.dumps(value))
        flat |= {key: f"one of {', '.join(sorted(values))}" for key, values in tried.items()}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


@dataclass(frozen=True)
class Problem:
    """A folder that gives no figure, or less than it should, and why."""

    folder: Path
    text: str
