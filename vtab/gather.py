"""Run folders, read back: what finished, and what did not and why.

A run folder is whatever holds a result.json, or a config.json of ours. Nothing in one is trusted: it may be half
written, from another version, or not ours at all.
"""

import json
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vtab.evaluate import Accuracy
from vtab.runs import ACCURACY, Problem, Run, by_epoch, examples, metric, unit
from vtab.textfile import LIMIT, read, read_json

MOST_CLASSES = 5000  # of a confusion matrix
NEEDED: dict[str, Any] = {  # in result.json, and of what kind
    "task": str,
    "trained_parameters": int,
    "data": dict,
    "config": dict,
    "config.method": dict,
    "config.method.name": str,
}
OPTIONAL: dict[str, Any] = {  # what older records lack, or only some runs have
    "method": str,
    "metric": str,
    "text": dict,
    "text.max_length": int,
    "text.labels": list,
    "unit": str,
    "score_interval95": list,
    "seed": int,
    **dict.fromkeys(("examples_in_full_split", "images_in_full_split"), int),
    "recipe_differs": list,
    **dict.fromkeys(("base", "environment", "preprocessing", "selection", "tuning"), dict | None),
    "tuning.chosen": dict | None,
    "tuning.trials": list,
    **dict.fromkeys(("data.source", "data.digest", "data.test_digest"), str),
    "data.splits": dict | None,
    "config.task": str,
    "config.seed": int,
    "config.test_limit": int | None,
    "config.recipe": str | None,
    "config.method.branches": int,
    "config.method.rank": int,
}


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
            problems.append(Problem(folder, " ".join(str(error).replace(f"{folder}{os.sep}", "").split())))
        else:
            runs.append(run)
            problems += remarks
    if not runs:
        unfit = "".join(f"; {p.folder.name}: {p.text}" for p in problems[:3])
        raise ValueError(f"no finished run in {', '.join(map(str, roots))}{unfit}")
    return _told_apart(runs), problems


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Tasks of one name are two where their data differ, called by their files' folders where these tell them apart."""
    known: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        if run.digest:
            known[run.task][run.digest].add(run.file.parent.name)

    def apart(run: Run) -> str:
        if not run.digest or len(known[run.task]) < 2:
            return ""
        folders = [folder for some in known[run.task].values() for folder in some]
        clear = all(folders) and len(set(folders)) == len(folders) == len(known[run.task])
        return f" in {run.file.parent.name}" if clear else f", data {run.digest[:6]}"

    return [replace(run, apart=apart(run)) for run in runs]


def _folders(roots: Iterable[Path]) -> list[Path]:
    found = {}
    for root in roots:
        for path in filter(Path.is_file, (*root.rglob("result.json"), *root.rglob("config.json"))):
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
    ours = isinstance(config, dict) and isinstance(config.get("method"), dict)
    return ours and any(key in config for key in ("task", "data", "train"))


def _read(folder: Path) -> tuple[Run, list[Problem]]:
    if not (folder / "result.json").is_file():
        done = _lines(folder / "metrics.jsonl")
        raise ValueError(f"unfinished, {done} epochs done; the command that began it goes on")
    result = read_json(folder / "result.json")
    _check(result)
    remarks = []
    history, labels, predicted = [], None, None
    try:
        history = _history(folder / "metrics.jsonl", result)
    except (ValueError, OSError, RecursionError) as error:
        remarks.append(Problem(folder, f"metrics.jsonl is damaged ({error}): no learning curve"))
    if (folder / "predictions.npz").is_file():
        try:
            labels, predicted = _predictions(folder / "predictions.npz", result)
        except (ValueError, OSError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            remarks.append(Problem(folder, f"predictions.npz is damaged ({error}): no confusion matrix"))
    return Run(folder, result, history, labels, predicted), remarks


def _check(result: Any) -> None:
    """Raise ValueError unless result.json has what table and page need, of the right kinds."""
    if not isinstance(result, dict):
        raise ValueError("result.json is no record of a run")
    written = json.dumps(result, ensure_ascii=False)
    if re.search(r"\\u00[01]|[\x7f-\x9f]", written):
        raise ValueError("result.json holds control characters, which would steer the terminal")
    if re.search("[\ud800-\udfff]", written):
        raise ValueError("result.json holds half a surrogate pair, which is no character")
    judged_by = metric(result)
    figure = "accuracy" if judged_by == ACCURACY else "score"
    count = "images" if "images" in result and "examples" not in result else "examples"
    for name, kind in (NEEDED | {figure: int | float, count: int} | OPTIONAL).items():
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            place = place.get(parent) or {}
        absent = last not in place and name in OPTIONAL
        if not absent and (not isinstance(place.get(last), kind) or isinstance(place[last], bool)):
            raise ValueError(f"result.json has no valid {name!r}: {place.get(last)!r}")
    trials = (result.get("tuning") or {}).get("trials", [])
    if not all(isinstance(trial, dict) and isinstance(trial.get("settings"), dict) for trial in trials):
        raise ValueError("result.json has trials of --tune without settings")
    if result["trained_parameters"] < 0:
        raise ValueError(f"result.json has {result['trained_parameters']} trained parameters")
    percent, total, what = result[figure], examples(result), unit(result)
    if total < 1 or not _lowest(figure) <= percent <= 100:
        raise ValueError(f"result.json has {judged_by} {percent} % over {total} {what}")
    correct = percent * total / 100
    if judged_by == ACCURACY and abs(correct - round(correct)) > 1e-3:
        raise ValueError(f"result.json: {percent} % of {total} {what} is no whole number of {what}")
    interval = result.get("score_interval95") or (0, 0)
    if len(interval) != 2 or not all(isinstance(end, int | float) and abs(end) <= 100 for end in interval):
        raise ValueError(f"result.json has no valid 'score_interval95': {interval}")
    if not all(isinstance(label, str) for label in (result.get("text") or {}).get("labels", [])):
        raise ValueError("result.json has labels that are no text")


def _lowest(figure: str) -> int:
    """Accuracies start at 0; correlations, which are scores, may be negative."""
    return -100 if figure.endswith("score") else 0


def _lines(path: Path) -> int:
    return len(read(path).splitlines()) if path.is_file() else 0


def _history(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """A record an epoch; none where nothing but the loss was watched."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in read(path).splitlines() if line.strip()]
    of_accuracy, figures = metric(result) == ACCURACY, by_epoch(result)
    for row in rows:
        known = isinstance(row, dict) and isinstance(row.get("epoch"), int)
        if not known or (of_accuracy and "accuracy" not in row):
            raise ValueError(f"no epoch and accuracy in {json.dumps(row)[:60]}")
        fit = all(isinstance(row[k], int | float) and _lowest(k) <= row[k] <= 100 for k in figures if k in row)
        if not 0 < row["epoch"] < 10**6 or not fit:
            raise ValueError(f"an epoch or accuracy out of range in {json.dumps(row)[:60]}")
    return rows if any(key in row for row in rows for key in figures) else []


def _predictions(path: Path, result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        size = sum(member.file_size for member in file.zip.infolist())
        if size > LIMIT:
            raise ValueError(f"it unpacks to {size:,} bytes")
        labels, predicted = file["labels"], file["predicted"]
    if labels.ndim != 1 or labels.shape != predicted.shape or {labels.dtype.kind, predicted.dtype.kind} - set("iu"):
        raise ValueError(f"labels {labels.dtype}{labels.shape} and predicted {predicted.dtype}{predicted.shape}")
    named = len((result.get("text") or {}).get("labels", []))
    most = max(labels.max(initial=0), predicted.max(initial=0), named - 1)
    if most >= MOST_CLASSES or min(labels.min(initial=0), predicted.min(initial=0)) < 0:
        raise ValueError(f"classes are 0 … {MOST_CLASSES - 1} at most")
    own = Accuracy(int((labels == predicted).sum()), len(labels))
    if len(labels) != examples(result) or abs(own.percent - result["accuracy"]) > 1e-3:
        raise ValueError(f"it holds {own}, result.json says {result['accuracy']:.1f} % of {examples(result):,}")
    return labels.astype(int), predicted.astype(int)
