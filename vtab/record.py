"""A run's folder: claimed at the start, concluded at the end.

config.json          the settings, written first
checkpoint.safetensors, metrics.jsonl    after every epoch; the checkpoint goes when the run is finished
adapter.safetensors, curve.png, predictions.png, predictions.npz, result.json    at the end, result.json last
tuning.json, trials/    with --tune: what was tried, and a run folder for each trial
"""

import contextlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

import capavision as cv
from capavision.files import replacing
from vtab import labels, plots, protocol, recipes
from vtab.evaluate import accuracy
from vtab.setup import Setup
from vtab.textfile import read_json, write
from vtab.training import Training

SHOWN = 16  # test images in predictions.png
TOLD = 600  # letters of a setting, which differs at the end where it is a path or two files' digests
BEGUN = ("checkpoint.safetensors", "adapter.safetensors", "result.json", "tuning.json")  # with config.json: a run's


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """One line an epoch."""
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def check(folder: Path, config: Training) -> None:
    """Is the folder free, or the same run's? A folder whose run finished no epoch counts as free.

    Raises:
        ValueError: the folder holds something else.
    """
    written, settings = folder / "config.json", json.loads(json.dumps(config.record()))
    if written.is_file() and any((folder / name).is_file() for name in BEGUN):
        found = read_json(written)
        if not isinstance(found, dict):
            raise ValueError(f"{written} holds no settings; give this run another --name")
        if told := _differing(config.young() | found, settings):
            raise ValueError(f"{folder} holds a run with {told}; give this one another --name or --out")
    elif folder.exists() and {p.name for p in folder.iterdir() if not p.name.startswith(".")} - {"config.json"}:
        raise ValueError(f"{folder} exists and is no run of ours; give another --name or --out")


def _differing(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """The settings of a folder's run that are not those asked for: "epochs 5 instead of 3, branches 1 instead of 2"."""
    methods = [one.get("method") if isinstance(one.get("method"), dict) else {} for one in (found, asked)]
    before, now = ({**one, "method": method.get("name")} for one, method in zip((found, asked), methods, strict=True))
    if before["method"] == now["method"]:
        before, now = ({**method, **one} for one, method in zip((before, now), methods, strict=True))
    changed = sorted(k for k in (before.keys() | now.keys()) - {"out", "cache"} if before.get(k) != now.get(k))
    return ", ".join(f"{k} {str(before.get(k))[:TOLD]} instead of {str(now.get(k))[:TOLD]}" for k in changed)


def claim(folder: Path, config: Training) -> None:
    """Write the settings, and clear what a process left that was killed while writing; only under the run's lock."""
    for leftover in folder.glob(".*.part*"):
        leftover.unlink(missing_ok=True)
    if not (folder / "result.json").is_file():
        write(folder / "config.json", json.dumps(config.record(), indent=1))


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process only; gone afterwards if no epoch was finished in it.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process trains in {folder}; wait for it, or give this run another --name") from None
    try:
        yield
    finally:
        forget(folder)  # under the lock: a folder with nothing but settings may be another's first epoch
        lock.release()


def once(config: Training, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """result.json of a run: what `work` makes in its folder, which is this process's meanwhile, or what an earlier call
    made there.

    Raises:
        ValueError: the folder holds something else, or another process has it.
    """
    folder = config.folder()
    check(folder, config)
    with alone(folder):
        claim(folder, config)
        if (folder / "result.json").is_file():
            print(f"{folder} is finished already; --name another, or delete it to train again")
            done: dict[str, Any] = read_json(folder / "result.json")
            return done
        return work(folder)


def forget(folder: Path) -> None:
    """Remove the folder of a run that finished no epoch: a refused command leaves nothing behind."""
    ours = {"config.json", ".lock"}
    if (folder / "trials").is_dir() and not any((folder / "trials").iterdir()):
        (folder / "trials").rmdir()
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= ours:
        with contextlib.suppress(PermissionError):  # Windows keeps the file of a lock that is held
            for name in ours:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def conclude(
    setup: Setup, folder: Path, history: list[dict[str, Any]], tuning: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The look at the split that judges the run, and the files that say what came out."""
    config, data = setup.config, setup.data
    split = setup.judged
    start = time.perf_counter()
    probabilities = setup.predict(split)
    seconds = time.perf_counter() - start
    score = accuracy(probabilities, split.labels)
    write_predictions(folder / "predictions.npz", split.labels, probabilities)
    pictures(setup, folder, history, probabilities)
    result = {
        "task": data.task,
        "split": setup.judge,
        "stage": config.stage,
        "protocol": config.protocol,
        "protocol_label": protocol.label(config) or None,
        "accuracy": score.percent,
        "interval95": score.interval,
        "examples": score.total,
        "examples_in_full_split": len(data.splits[setup.judge]),
        "unit": "images",
        "recipe_differs": recipes.find(config.recipe).unlike(data.task) if config.recipe else [],
        "tuning": tuning,
        **costs(config, setup.report, history, seconds),
        "selection": protocol.selection(config, history, tuning),
        "data": {"source": data.source, "splits": {k: len(s) for k, s in data.splits.items()}, **data.facts},
        "normalization": config.norm,
        "preprocessing": setup.preprocessing.record(),
        "base": setup.checkpoint,
        "environment": environment(setup.device),
    }
    write(folder / "result.json", json.dumps(result, indent=1))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    said = f"{data.task} ({data.source}): {setup.judge} top-1 {score}, {setup.report.trained:,} trained values"
    print("\n".join(filter(None, (said, protocol.label(config), str(folder)))))
    return result


def costs(config: Training, report: cv.Report, history: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Of a result: the settings, and what they cost.

    Args:
        config: the settings.
        report: of the injection.
        history: a record an epoch.
        seconds: of the last look.
    """
    return {
        "method": labels.method(config),
        "recipe": config.recipe,
        "seed": config.seed,
        "trained_parameters": report.trained,
        "stored_parameters": report.stored,
        "head_parameters": report.head,
        "base_parameters": report.total,
        "seconds_training": sum(row["seconds"] for row in history),
        "seconds_evaluation": seconds,
        "config": config.record(),
    }


def pictures(setup: Setup, folder: Path, history: list[dict[str, Any]], probabilities: np.ndarray) -> None:
    """curve.png and predictions.png."""
    config, data, judged, split = setup.config, setup.data, setup.judge, setup.judged
    percent, label = accuracy(probabilities, split.labels).percent, protocol.label(config)
    title = f"{data.task} ({data.source}), {config.model}, {labels.method(config)}" + (f"\n{label}" if label else "")
    what = f"{judged}, best of {config.looks} looks" if label else f"{judged}, looked at once"
    plots.curve(folder / "curve.png", history, (what, protocol.judged(history), percent), title)
    images = split.decode(160, 0, SHOWN)
    shown = f"{title}: the first {len(images)} of {len(split):,} {judged} images, {percent:.1f} % right in all"
    plots.predictions(folder / "predictions.png", images, split.labels, probabilities, data.classes, shown)


def write_predictions(path: Path, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """True and predicted classes in the split's order, uint16."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        predicted = probabilities.argmax(1).astype(np.uint16)
        np.savez_compressed(file, labels=labels.astype(np.uint16), predicted=predicted)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit, for the record."""
    import timm

    return {
        "commit": commit(Path(cv.__file__).resolve()),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "peak_memory_mb": peak_memory(device),
        "device": f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "capavision": cv.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }


def commit(file: Path) -> str | None:
    """The commit that holds `file`, with -dirty if the checkout differs from it; None where git tells of none."""

    def git(*argv: str) -> str:
        command = ["git", "-C", str(file.parent), *argv]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # installed below another project, it would name that one's
        return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):  # no git on this machine; no checkout
        return None


def peak_memory(device: torch.device) -> float | None:
    """MiB: of the GPU since its run began, else of the whole process; None where neither can be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
