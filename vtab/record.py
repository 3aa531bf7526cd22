"""A run's folder: claimed at the start, concluded at the end.

config.json          the settings, written first
checkpoint.safetensors, metrics.jsonl    after every epoch; the checkpoint goes when the run is finished
adapter.safetensors, curve.png, predictions.png, result.json    at the end, result.json last
"""

import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import capavision as cv
from capavision.files import replacing
from vtab import plots
from vtab.config import Config
from vtab.data import Data
from vtab.evaluate import Preprocessing, accuracy, predict

SHOWN = 16  # test images in predictions.png


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """One line an epoch."""
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def check(folder: Path, config: Config) -> None:
    """Is the folder free, or the same run's? A folder whose run finished no epoch counts as free.

    Raises:
        ValueError: the folder holds something else.
    """
    written, settings = folder / "config.json", json.loads(json.dumps(config.record()))
    if (folder / "checkpoint.safetensors").is_file() or (folder / "result.json").is_file():
        try:
            found = json.loads(written.read_text())
        except ValueError as error:
            raise ValueError(f"{written} is damaged ({error}); give this run another --name") from error
        shaping = (settings.keys() | found.keys()) - {"out", "cache"}
        changed = sorted(k for k in shaping if settings.get(k) != found.get(k))
        if changed:
            raise ValueError(
                f"{folder} holds a run with another {', '.join(changed)}; give this one another --name or --out"
            )
    elif folder.exists() and {p.name for p in folder.iterdir() if not p.name.startswith(".")} - {"config.json"}:
        raise ValueError(f"{folder} exists and is no run of ours; give another --name or --out")


def claim(folder: Path, config: Config) -> None:
    """Write the settings, and clear what a process left that was killed while writing; only under the run's lock."""
    for leftover in folder.glob(".*.part*"):
        leftover.unlink(missing_ok=True)
    if not (folder / "result.json").is_file():
        write(folder / "config.json", json.dumps(config.record(), indent=1))


def forget(folder: Path) -> None:
    """Remove the folder of a run that finished no epoch: a refused command leaves nothing behind."""
    ours = {"config.json", ".lock"}
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= ours:
        for name in ours:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def conclude(
    config: Config,
    folder: Path,
    data: Data,
    model: nn.Module,
    report: cv.Report,
    history: list[dict[str, Any]],
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """The run's only look at the split that judges it, and the files that say what came out."""
    judged = "val" if config.stage == "tune" else "test"
    split = data.splits[judged].head(config.test_limit if judged == "test" else None)
    start = time.perf_counter()
    probabilities = predict(model, split, preprocessing)
    seconds = time.perf_counter() - start
    score = accuracy(probabilities, split.labels)
    title = f"{data.task} ({data.source}), {config.model}, {config.method.name}"
    plots.curve(folder / "curve.png", history, (judged, score.percent), title)
    images = split.decode(160, 0, SHOWN)
    shown = f"{title}: the first {len(images)} of {score.total:,} {judged} images, {score.percent:.1f} % right in all"
    plots.predictions(folder / "predictions.png", images, split.labels, probabilities, data.classes, shown)
    result = {
        "task": data.task,
        "split": judged,
        "accuracy": score.percent,
        "interval95": score.interval,
        "images": score.total,
        "images_in_full_split": len(data.splits[judged]),
        "trained_parameters": report.trained,
        "stored_parameters": report.stored,
        "head_parameters": report.head,
        "base_parameters": report.total,
        "seconds_training": sum(row["seconds"] for row in history),
        "seconds_evaluation": seconds,
        "selection": {"settings": "the command line", "epoch": "the last", "looks_at_test": int(judged == "test")},
        "data": {"source": data.source, "splits": {k: len(s) for k, s in data.splits.items()}, **data.facts},
        "preprocessing": preprocessing.record(),
        "config": config.record(),
        "environment": environment(next(model.parameters()).device),
    }
    write(folder / "result.json", json.dumps(result, indent=1))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    print(f"{data.task} ({data.source}): {judged} top-1 {score}, {report.trained:,} trained values\n{folder}")
    return result


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit, for the record."""
    import timm

    git = ["git", "-C", str(Path(cv.__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "device": f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "capavision": cv.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
