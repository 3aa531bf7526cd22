"""Which split judges a run, and how often it is looked at.

honest    settings from the command line or from val200, trained on all 1,000, tested once after the last epoch
paper     tested every few epochs, the best reported: selection on the test split, as the released code of NOAH, FacT,
          Convpass, RepAdapter and others does. Only to reproduce their numbers: it is labelled wherever it appears.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import capavision as cv
from vtab.config import Config
from vtab.evaluate import accuracy
from vtab.setup import Setup


def label(config: Config) -> str:
    """What must stand beside every figure of a run under the paper protocol; nothing for an honest one."""
    if config.protocol != "paper":
        return ""
    return f"paper protocol: best of {config.looks} looks at the test split, not comparable with honest results"


def watcher(setup: Setup, folder: Path, at: int | None = None) -> Callable[[int], dict[str, float]]:
    """What to look at after an epoch, by its number: val200 in the tune stage (`at` one epoch only, or at all), test
    every few epochs under the paper protocol."""
    config = setup.config
    if config.protocol == "paper":
        return lambda epoch: _look(setup, folder, epoch) if epoch % config.between_looks == 0 else {}
    if config.stage != "tune":
        return lambda epoch: {}
    val = setup.data.splits["val"]

    def watch(epoch: int) -> dict[str, float]:
        if at not in (None, epoch):
            return {}
        return {"val_accuracy": accuracy(setup.predict(val), val.labels).percent}

    return watch


def _look(setup: Setup, folder: Path, epoch: int) -> dict[str, float]:
    """Test, and keep the adapter if it is the best so far. The file itself says what it reached, so that a run that is
    killed between the two and tests this epoch again comes to the same."""
    test, file = setup.judged, folder / "adapter.safetensors"
    found = accuracy(setup.predict(test), test.labels).percent
    best = cv.describe(file)["info"]["test_accuracy"] if file.is_file() else -1.0
    if found > best:
        save(setup, folder, {"protocol": label(setup.config), "epoch": epoch, "test_accuracy": found})
    return {"test_accuracy": found}


def save(setup: Setup, folder: Path, more: dict[str, Any] | None = None) -> None:
    """The adapter file, with all that whoever loads it must know."""
    config, data = setup.config, setup.data
    info = {"task": data.task, "source": data.source, "preprocessing": setup.preprocessing.record()}
    info |= {"stage": config.stage, **(more or {})}
    cv.save(setup.model, folder / "adapter.safetensors", base=setup.base, classes=data.classes, info=info)


def judged(history: list[dict[str, Any]]) -> int:
    """The epoch whose weights are judged: the first of the best looks at the test split, else the last."""
    looks = [row for row in history if "test_accuracy" in row]
    epoch: int = max(looks, key=lambda row: row["test_accuracy"])["epoch"] if looks else history[-1]["epoch"]
    return epoch


def selection(config: Config, history: list[dict[str, Any]], tuning: dict[str, Any] | None) -> dict[str, Any]:
    """Which split chose what, for the record."""
    settings = "the command line" if config.recipe is None else f"recipe {config.recipe} and the command line"
    if tuning is not None:
        settings = f"val200: {tuning['rule']}"
    epoch = "the last"
    if config.protocol == "paper":
        epoch = f"{judged(history)}, the best of {config.looks} looks at the test split"
    return {"settings": settings, "epoch": epoch, "looks_at_test": config.looks}
