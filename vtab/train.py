"""Fine-tune a timm backbone on one task: python -m vtab.train --task dsprites_loc --method lora --branches 2.

The protocol: choose settings with --stage tune (train on 800, watch val200), then one run with the default
--stage final (train on all 1,000), which looks at the test split once, after the last epoch. --tune does both;
--seeds 3 does it three times over.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import capavision as cv
from vtab import checkpoint, cli, protocol, record, seeds, tune
from vtab.compiled import forward_of
from vtab.config import Config
from vtab.evaluate import autocast
from vtab.schedule import Schedule, make_optimizer
from vtab.setup import Setup, prepare
from vtab.textfile import read_json

Clock = Callable[[str], AbstractContextManager[Any]]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as the command line says, or go on where the same command stopped; returns result.json, or with --seeds
    the mean and spread of several."""
    configs = seeds.commands(argv)
    return run(configs[0]) if len(configs) == 1 else seeds.run_all(configs, run)


def run(config: Config, tuning: dict[str, Any] | None = None) -> dict[str, Any]:
    """One run in its folder, as far as it is not done yet; returns result.json.

    Args:
        tuning: what an earlier run of --tune chose, to be taken instead of a search.
    """
    folder = config.folder()
    record.check(folder, config)
    with record.alone(folder):
        record.claim(folder, config)
        if (folder / "result.json").is_file():
            print(f"{folder} is finished already; --name another, or delete it to train again")
            done: dict[str, Any] = read_json(folder / "result.json")
            return done
        if config.tune:
            tuning = tune.search(config, folder, attempt, tuning)
            config = tune.chosen(config, tuning)
        return train(config, folder, tuning)


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
    return fit(setup.model, images, labels, setup.preprocessing.normalize, setup.config, folder, watch, until)


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalize: Callable[[Tensor], Tensor],
    config: Config,
    folder: Path,
    watch: Callable[[int], dict[str, float]] = lambda epoch: {},
    until: int | None = None,
    clock: Clock = nullcontext,
) -> list[dict[str, Any]]:
    """All epochs, from the checkpoint on if there is one; returns one record an epoch.

    Args:
        images, labels: all training images, uint8 (n, H, W, 3), and their classes, on the model's device.
        watch: more figures for an epoch's record, given its number.
        until: stop after this epoch of the schedule; None is the last.
        clock: stands around "data", "forward", "backward" and "optimizer" of each step, to measure them.

    Raises:
        DivergedError: the loss is not finite; the checkpoint of the last good epoch stays.
    """
    saved = folder / "checkpoint.safetensors"
    fused = images.device.type == "cuda"
    optimizer = make_optimizer(model, config, fused)
    schedule = Schedule(optimizer, config, config.steps(len(images)))
    history: list[dict[str, Any]] = []
    if saved.is_file():
        history = checkpoint.read(saved, model, optimizer)["history"]
        record.write_metrics(folder, history)
        print(f"resuming after epoch {len(history)} of {config.epochs}")
    forward = forward_of(model, config)
    last, seen = until or config.epochs, min(len(images), config.steps(len(images)) * config.batch_size)
    done, total = len(history) * seen, last * seen
    with tqdm(total=total, initial=done, unit="img", desc="train", mininterval=0.5) as bar:
        for epoch in range(len(history), last):
            row = run_epoch(model, forward, images, labels, normalize, optimizer, schedule, config, epoch, bar, clock)
            if row["step"] is not None:
                raise checkpoint.DivergedError(
                    f"loss or weights are not finite at step {row['step']} of epoch {epoch + 1}; {folder} keeps epoch "
                    f"{epoch}; a lower --lr than {config.lr} helps most, then --clip"
                )
            kept = ("epoch", "loss", "accuracy", "lr", "seconds")
            history.append({key: row[key] for key in kept} | watch(epoch + 1))
            checkpoint.write(saved, model, optimizer, {"history": history})
            record.write_metrics(folder, history)
    return history


def run_epoch(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    normalize: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    config: Config,
    epoch: int,
    bar: Any,
    clock: Clock = nullcontext,
) -> dict[str, Any]:
    """One pass over the training images; the losses stay on the device, so that a GPU is never waited for."""
    # Seeded by epoch, so that a resumed run draws what an uninterrupted one would have drawn.
    torch.manual_seed(config.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(images)).to(images.device).split(config.batch_size)[: config.steps(len(images))]
    losses = torch.zeros(len(batches), device=images.device)
    correct = torch.zeros((), device=images.device)
    trained = cv.parameters(model)
    start, seen = time.perf_counter(), 0
    model.train()
    for step, chosen in enumerate(batches):
        schedule.step_update(epoch * len(batches) + step)
        with clock("data"):
            x, y = normalize(images[chosen]), labels[chosen]
        with clock("forward"), autocast(images.device):
            logits = forward(x)
            loss = F.cross_entropy(logits, y)
        with clock("backward"):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with clock("optimizer"):
            if config.clip:
                nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
        losses[step] = loss.detach() * len(chosen)
        correct += (logits.detach().argmax(1) == y).sum()
        seen += len(chosen)
        # Reading a figure waits for a GPU, so that one is asked at the end alone.
        if step == len(batches) - 1 or (step % 8 == 7 and images.device.type == "cpu"):
            bar.set_postfix(loss=f"{losses.sum().item() / seen:.3f}", acc=f"{100 * correct.item() / seen:.1f} %")
        bar.update(len(chosen))
    finite = losses.isfinite()
    bad = None if finite.all() else 1 + int(finite.int().argmin())
    if bad is None and not torch.stack([p.isfinite().all() for p in trained]).all():
        bad = len(batches)
    return {
        "epoch": epoch + 1,
        "loss": losses.sum().item() / seen,
        "accuracy": 100 * correct.item() / seen,
        "lr": optimizer.param_groups[0]["lr"],
        "seconds": time.perf_counter() - start,
        "step": bad,
    }


if __name__ == "__main__":
    cli.run(main)
