"""Fine-tune a timm backbone on one task: python -m vtab.train --task dsprites_loc --method lora --branches 2.

The protocol: choose settings with --stage tune (train on 800, watch val200), then one run with the default
--stage final (train on all 1,000), which looks at the test split once, after the last epoch. --tune does both;
--seeds 3 does it three times over.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import capavision as cv
from vtab import cli, protocol, record, seeds, tune
from vtab.config import TRAIN, Config
from vtab.loop import Loop
from vtab.setup import Setup, prepare


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as the command line says, or go on where the same command stopped; returns result.json, or with --seeds
    the mean and spread of several."""
    return seeds.train(TRAIN, argv, run)


def run(config: Config, tuning: dict[str, Any] | None = None) -> dict[str, Any]:
    """One run in its folder, as far as it is not done yet; returns result.json.

    Args:
        tuning: what an earlier run of --tune chose, to be taken instead of a search.
    """

    def work(folder: Path) -> dict[str, Any]:
        if not config.tune:
            return train(config, folder, tuning)
        found = tune.search(config, folder, attempt, tuning)
        return train(tune.chosen(config, found), folder, found)

    return record.once(config, work)


def train(config: Config, folder: Path, tuning: dict[str, Any] | None = None) -> dict[str, Any]:
    """The run itself: set-up, epochs, the evaluation that judges it, the files that record it."""
    setup = prepare(config)
    print(f"{setup.report}\n{setup.data.source}; {config.stage} run on {setup.device}")
    if label := protocol.label(config):
        print(label)
    if config.stage == "final":
        setup.judged.stored(setup.preprocessing.size)  # a damaged image is found now, not after training
    history = learn(setup, folder, protocol.watcher(setup, folder))
    if config.protocol == "paper":
        cv.load(folder / "adapter.safetensors", setup.model)  # that of the best look
    else:
        protocol.save(setup, folder)
        cv.fold(setup.model)  # judged as it will run: the plain model, at its speed
    return record.conclude(setup, folder, history, tuning)


def attempt(config: Config, folder: Path, epochs: int) -> list[dict[str, Any]]:
    """A trial of --tune in `folder`, from where it stands to `epochs` of its schedule; returns one record an epoch.

    Raises:
        DivergedError: the loss is not finite.
    """
    record.check(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        record.claim(folder, config)
        setup = prepare(config)
        return learn(setup, folder, protocol.watcher(setup, folder, at=epochs), epochs)
    finally:
        record.forget(folder)


def learn(
    setup: Setup, folder: Path, watch: Callable[[int], dict[str, float]], until: int | None = None
) -> list[dict[str, Any]]:
    """Train on the split that the stage names."""
    training = setup.data.splits["train" if setup.config.stage == "tune" else "trainval"]
    images = torch.from_numpy(training.decode(setup.preprocessing.size)).to(setup.device)
    labels = torch.from_numpy(training.labels).to(setup.device)
    loop = Loop(setup.model, images, labels, setup.preprocessing.normalize, setup.config)
    return loop.fit(folder, watch, until)


if __name__ == "__main__":
    cli.run(main)
