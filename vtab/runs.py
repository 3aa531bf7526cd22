"""Run folders, read back: what finished, and what did not and why.

A run folder is whatever holds a result.json, or a config.json of ours. Nothing in one is trusted: it may be half
written, from another version, or not ours at all.
"""

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import capavision as cv
from vtab.config import Config
from vtab.evaluate import Accuracy
from vtab.lists import LENGTHS
from vtab.tasks import TASKS
from vtab.textfile import read, read_json

ELSEWHERE = {"task", "method", "seed", "out", "name", "device", "data_root", "split_file"}  # no setting of the training


@dataclass(frozen=True)
class Run:
    """A finished run.

    folder: where it lies
    result: result.json
    history: metrics.jsonl; empty where it is absent or damaged
    labels, predicted: predictions.npz; None where it is absent or damaged
    """

    folder: Path
    result: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    labels: np.ndarray | None = None
    predicted: np.ndarray | None = None

    @property
    def config(self) -> dict[str, Any]:
        return self.result["config"]

    @property
    def task(self) -> str:
        return self.result["task"]

    @property
    def seed(self) -> int:
        return self.result.get("seed", self.config.get("seed", 0))

    @property
    def accuracy(self) -> float:
        return self.result["accuracy"]

    @property
    def method(self) -> str:
        return self.result.get("method") or method_label(self.config)

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
    def base(self) -> dict[str, Any]:
        """model, weights, digest and img_size of the backbone; the digest is None in older records."""
        own = {key: self.config.get(key) for key in ("model", "weights", "img_size")}
        return {"digest": None} | own | (self.result.get("base") or {})

    def settings(self) -> dict[str, str]:
        """All that shaped the training, flat, as text; what an older record lacks is today's default."""
        usual = {f.name: f.default for f in dataclasses.fields(Config) if f.default is not dataclasses.MISSING}
        flat = {key: value for key, value in (usual | self.config).items() if key not in ELSEWHERE}
        flat |= {f"method.{key}": value for key, value in self.config["method"].items()}
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat.items()}


@dataclass(frozen=True)
class Problem:
    """A folder that gives no figure, or less than it should, and why."""

    folder: Path
    text: str


def method_label(config: dict[str, Any]) -> str:
    """A short name for records that have none: the method, then what differs from its defaults.

    >>> method_label({"method": {"name": "lora", "rank": 8, "branches": 2, "masks": "random"}, "targets": None})
    'capaboost-lora r8 x2'
    """
    method = config["method"]
    known, branches = cv.Method.known.get(method["name"]), method.get("branches", 1)
    shared = {"branches": branches} if "branches" in method else {}  # decides the default density
    try:
        defaults = dataclasses.asdict(known(**shared)) if known else {}  # type: ignore[call-overload]
    except (TypeError, ValueError):  # a record of another version
        defaults = {}
    words = [("capaboost-" if branches > 1 else "") + method["name"]]
    words += [f"r{method['rank']}"] if "rank" in method else []
    words += [f"x{branches}"] if branches > 1 else []
    said = {"name", "rank", "branches"}
    words += [f"{key}={value}" for key, value in method.items() if key not in said and value != defaults.get(key)]
    words += [f"{key}={config[key]}" for key in ("targets", "parts") if config.get(key)]
    return " ".join(words)


def read_all(roots: Sequence[Path]) -> tuple[list[Run], list[Problem]]:
    """Every run below the folders, each once, in the order of their paths; and what could not be used.

    Raises:
        ValueError: a folder that is not there, or none that holds a finished run.
    """
    for root in roots:
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; give the folder of your runs, such as runs/")
    runs, problems = [], []
    for folder in _folders(roots):
        try:
            run, remarks = _read(folder)
        except (ValueError, OSError) as error:
            problems.append(Problem(folder, " ".join(str(error).split())))
        else:
            runs.append(run)
            problems += remarks
    if not runs:
        unfit = "".join(f"; {p.folder.name}: {p.text}" for p in problems[:3])
        raise ValueError(f"no finished run in {', '.join(map(str, roots))}{unfit}")
    return runs, problems


def _folders(roots: Iterable[Path]) -> list[Path]:
    found = {}
    for root in roots:
        for path in (*root.rglob("result.json"), *root.rglob("config.json")):
            trial = path.parent.parent  # of --tune, inside the run that it is part of
            if trial.name == "trials" and (trial.parent / "config.json").is_file():
                continue
            if path.name == "result.json" or _ours(path):
                found.setdefault(path.parent.resolve(), path.parent)
    return sorted(found.values())


def _ours(path: Path) -> bool:
    """Is this config.json a run's? One that cannot be read counts if metrics or a checkpoint lie beside it."""
    try:
        config = read_json(path)
    except ValueError:
        return any((path.parent / name).exists() for name in ("metrics.jsonl", "checkpoint.safetensors", ".lock"))
    return isinstance(config, dict) and isinstance(config.get("method"), dict) and "task" in config


def _read(folder: Path) -> tuple[Run, list[Problem]]:
    if not (folder / "result.json").is_file():
        done = _lines(folder / "metrics.jsonl")
        raise ValueError(f"unfinished, {done} epochs done; the command that began it goes on")
    result = read_json(folder / "result.json")
    _check(result)
    remarks = []
    history, labels, predicted = [], None, None
    try:
        history = _history(folder / "metrics.jsonl")
    except (ValueError, OSError) as error:
        remarks.append(Problem(folder, f"metrics.jsonl is damaged ({error}): no learning curve"))
    if (folder / "predictions.npz").exists():
        try:
            labels, predicted = _predictions(folder / "predictions.npz", result)
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            remarks.append(Problem(folder, f"predictions.npz is damaged ({error}): no confusion matrix"))
    return Run(folder, result, history, labels, predicted), remarks


def _check(result: Any) -> None:
    """Raise ValueError unless result.json has what the table needs, of the right kinds."""
    if not isinstance(result, dict):
        raise ValueError("result.json is no record of a run")
    if "method" in result and not isinstance(result["method"], str):
        raise ValueError(f"result.json has no valid 'method': {result['method']!r}")
    kinds = {"task": str, "accuracy": (int, float), "images": int, "trained_parameters": int, "data": dict}
    kinds |= {"config": dict}
    for name, kind in kinds.items():
        if not isinstance(result.get(name), kind) or isinstance(result[name], bool):
            raise ValueError(f"result.json has no valid {name!r}: {result.get(name)!r}")
    method = result["config"].get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str) or not _count(method.get("branches", 1)):
        raise ValueError(f"result.json names no method: {method!r}")
    if not isinstance(result.get("seed", result["config"].get("seed", 0)), int):
        raise ValueError("result.json has a seed that is no whole number")
    for name in ("base", "environment", "preprocessing", "selection", "tuning"):
        if not isinstance(result.get(name) or {}, dict):
            raise ValueError(f"result.json has no valid {name!r}: {result[name]!r}")
    percent, images = result["accuracy"], result["images"]
    if images < 1 or not 0 <= percent <= 100 or not math.isfinite(percent):
        raise ValueError(f"result.json has an accuracy of {percent} % over {images} images")
    correct = percent * images / 100
    if abs(correct - round(correct)) > 1e-3:
        raise ValueError(f"result.json: {percent} % of {images} images is no whole number of images")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _lines(path: Path) -> int:
    return len(read(path).splitlines()) if path.is_file() else 0


def _history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in read(path).splitlines() if line.strip()]
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(k), int | float) for k in ("epoch", "accuracy")):
            raise ValueError(f"no epoch and accuracy in {json.dumps(row)[:60]}")
    return rows


def _predictions(path: Path, result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        labels, predicted = file["labels"], file["predicted"]
    if labels.ndim != 1 or labels.shape != predicted.shape or {labels.dtype.kind, predicted.dtype.kind} - set("iu"):
        raise ValueError(f"labels {labels.dtype}{labels.shape} and predicted {predicted.dtype}{predicted.shape}")
    own = Accuracy(int((labels == predicted).sum()), len(labels))
    judged = result.get("protocol", "honest") == "honest"  # the paper protocol's accuracy is of another epoch
    if len(labels) != result["images"] or (judged and abs(own.percent - result["accuracy"]) > 1e-3):
        raise ValueError(f"it holds {own}, result.json says {result['accuracy']:.1f} % of {result['images']:,}")
    return labels.astype(int), predicted.astype(int)
