"""Fine-tune a timm backbone on one task: python -m vtab.train --task dsprites_loc --method lora --branches 2.

The protocol: choose settings with --stage tune (train on 800, watch val200), then one run with the default
--stage final (train on all 1,000), which looks at the test split once, after the last epoch.
"""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

import capavision as cv
from vtab import backbones, checkpoint, cli, record
from vtab.config import Config, parse
from vtab.data import open_task
from vtab.evaluate import Preprocessing, accuracy, autocast, predict

Clock = Callable[[str], AbstractContextManager[Any]]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as the command line says, or go on where the same command stopped; returns result.json."""
    config = parse(argv)
    folder = config.folder()
    record.check(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            record.claim(folder, config)
            if (folder / "result.json").is_file():
                print(f"{folder} is finished already; --name another, or delete it to train again")
                done: dict[str, Any] = json.loads((folder / "result.json").read_text())
                return done
            return train(config, folder)
    except Timeout:
        raise ValueError(f"another process trains in {folder}; wait for it, or give this run another --name") from None
    finally:
        record.forget(folder)


def train(config: Config, folder: Path) -> dict[str, Any]:
    """The whole run in `folder`: data, model, epochs, one evaluation, the files that record them."""
    device = pick_device(config.device)
    data = open_task(
        config.task, config.data_root, seed=config.seed, partial=config.partial, split_file=config.split_file
    )
    base = backbones.resolve(config.model, config.weights, config.img_size, config.seed)
    model = build(base, len(data.classes), config)
    preprocessing = Preprocessing.of(model, base)
    targets = [name.strip() for name in config.targets.split(",")] if config.targets else None
    example = torch.zeros(1, 3, preprocessing.size, preprocessing.size)
    try_size(model, example, config.model)
    report = cv.inject(model, config.method, targets, config.parts, seed=config.seed, example=example)
    print(f"{report}\n{data.source}; {config.stage} run on {device}")
    model.to(device)

    training = data.splits["train" if config.stage == "tune" else "trainval"]
    images = torch.from_numpy(training.decode(preprocessing.size)).to(device)
    labels = torch.from_numpy(training.labels).to(device)
    val = data.splits["val"] if config.stage == "tune" else None

    def watch() -> dict[str, float]:
        return {"val_accuracy": accuracy(predict(model, val, preprocessing), val.labels).percent} if val else {}

    history = fit(model, images, labels, preprocessing.normalize, config, folder, watch)
    info = {"task": data.task, "source": data.source, "preprocessing": preprocessing.record(), "stage": config.stage}
    cv.save(model, folder / "adapter.safetensors", base=base, classes=data.classes, info=info)
    cv.fold(model)  # judged as it will run: the plain model, at its speed
    return record.conclude(config, folder, data, model, report, history, preprocessing)


def build(base: cv.Base, num_classes: int, config: Config) -> nn.Module:
    """The backbone with the run's stochastic depth."""
    try:
        return base.build(num_classes, **({"drop_path_rate": config.drop_path} if config.drop_path else {}))
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(f"{config.model} has no stochastic depth; pass --drop-path 0") from error


def try_size(model: nn.Module, example: Tensor, name: str) -> None:
    """One forward pass before anything is written.

    Raises:
        ValueError: the architecture cannot take images of this size.
    """
    try:
        with torch.inference_mode():
            model.eval()(example)
    except (RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{name} cannot take images of {example.shape[-1]} pixels; choose another --img-size"
        ) from error


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    normalize: Callable[[Tensor], Tensor],
    config: Config,
    folder: Path,
    watch: Callable[[], dict[str, float]] = dict,
    clock: Clock = nullcontext,
) -> list[dict[str, Any]]:
    """All epochs, from the checkpoint on if there is one; returns one record an epoch.

    Args:
        images, labels: all training images, uint8 (n, H, W, 3), and their classes, on the model's device.
        watch: more figures for an epoch's record.
        clock: stands around "data", "forward", "backward" and "optimizer" of each step, to measure them.

    Raises:
        ValueError: the loss is not finite; the checkpoint of the last good epoch stays.
    """
    saved = folder / "checkpoint.safetensors"
    fused = images.device.type == "cuda"
    groups = cv.parameter_groups(model, config.lr, mask_lr=config.mask_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)
    schedule = warmup_cosine(optimizer, config, -(-len(images) // config.batch_size))
    history: list[dict[str, Any]] = []
    if saved.is_file():
        history = checkpoint.read(saved, model, optimizer)["history"]
        record.write_metrics(folder, history)
        print(f"resuming after epoch {len(history)} of {config.epochs}")
    done, total = len(history) * len(images), config.epochs * len(images)
    with tqdm(total=total, initial=done, unit="img", desc="train", mininterval=0.5) as bar:
        for epoch in range(len(history), config.epochs):
            row = run_epoch(model, images, labels, normalize, optimizer, schedule, config, epoch, bar, clock)
            if row["step"] is not None:
                raise ValueError(
                    f"loss or weights are not finite at step {row['step']} of epoch {epoch + 1}; {folder} keeps epoch "
                    f"{epoch}; a lower --lr than {config.lr} helps most, then --clip"
                )
            kept = ("epoch", "loss", "accuracy", "lr", "seconds")
            history.append({key: row[key] for key in kept} | watch())
            checkpoint.write(saved, model, optimizer, {"history": history})
            record.write_metrics(folder, history)
    return history


def run_epoch(
    model: nn.Module,
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
    batches = torch.randperm(len(images)).to(images.device).split(config.batch_size)
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
            logits = model(x)
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
        if seen == len(images) or (step % 8 == 7 and images.device.type == "cpu"):  # reading a figure waits for a GPU
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


def warmup_cosine(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> Any:
    """timm's schedule by step: up from 0 over the warm-up's share of all steps, then a cosine down to 0."""
    from timm.scheduler import CosineLRScheduler

    total = config.epochs * steps
    rising = round(config.warmup * total)
    return CosineLRScheduler(optimizer, t_initial=total, warmup_t=rising, warmup_lr_init=0.0, t_in_epochs=False)


def pick_device(name: str | None) -> torch.device:
    """The named device, else CUDA, Apple's GPU or the CPU, whichever is there.

    Raises:
        ValueError: a device that this machine does not have.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, found in there.items() if found]
    if name is None:
        return torch.device(here[0])
    try:
        if name.partition(":")[0] not in here:
            raise RuntimeError
        device = torch.device(name)
        torch.empty(0, device=device)
    except RuntimeError:
        raise ValueError(f"--device {name} is not on this machine; here: {', '.join(here)}") from None
    return device


if __name__ == "__main__":
    cli.run(main)
