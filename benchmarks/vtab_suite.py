"""The whole of VTAB-1k against the clock, on random images of the true numbers: python -m benchmarks.vtab_suite.

Every task of the 19 trains on its 1,000 images and is tested once on its full test split, by the loop that
`python -m vtab.train` runs; images are uint8 at the model's size, as its cache has them, so nothing is decoded.

    floor = (training images · epochs · 2 F + test images · F) / R

F the model's forward, in floating-point operations counted by torch; a frozen backbone's backward, to the activations
alone, costs another F. R is what one large matrix product reaches here, in the same precision.

--share measures that share of the epochs and test images (of each task) and scales up, as the table then says: on a CPU
the suite would take days.
"""

import argparse
import contextlib
import dataclasses
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import capavision as cv
from benchmarks.tables import check_counts, check_names, table
from vtab import cli, setup
from vtab import config as configs
from vtab.data import Split
from vtab.evaluate import Preprocessing, autocast, predict
from vtab.loop import Loop
from vtab.tasks import TASKS, Task

PARTS = ("model", "compile", "training", "save and fold", "evaluation")
TRAINING = 1000
POOL = 2048  # distinct random images; a split of 73,728 would be 11 GB of them


@dataclasses.dataclass(frozen=True)
class Pool(Split):
    """A split of random images, ready as uint8."""

    images: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def decode(self, size: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Images start…stop of the pool, over and over."""
        indices = np.arange(start, len(self) if stop is None else min(stop, len(self)))
        return np.asarray(self.images[indices % len(self.images)])


class Clock:
    """Seconds by phase. Each phase waits for the device before and after, so that it counts its own work alone."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, Counter[str]()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[phase] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def split(images: np.ndarray, count: int, classes: int) -> Pool:
    """`count` images with labels."""
    return Pool(np.arange(count) % classes, lambda _: None, range(count), images=images)  # type: ignore[arg-type,return-value]


def forward_flops(model: nn.Module, x: Tensor) -> int:
    """Of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large product, the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    best = math.inf
    clock = Clock(device)
    for _ in range(5):
        with autocast(device), clock("product"):
            a @ b
        best = min(best, clock.seconds.pop("product"))
    return 2 * n**3 / best


def run(
    task: Task, options: argparse.Namespace, images: np.ndarray, clock: Any, device: torch.device
) -> dict[str, Any]:
    """One task from a fresh model to its test accuracy; the seconds of its parts, and what they were a share of."""
    start = time.perf_counter()
    model = cv.Base(options.model, "random").build(task.num_classes, drop_path_rate=0.1).to(device)
    cv.inject(model, cv.LoRA(rank=options.rank, branches=options.branches))
    config = configs.Config(
        task=task.id, epochs=options.epochs_run, batch_size=options.batch_size, compile=options.compile
    )
    training = split(images, TRAINING, task.num_classes)
    pixels = torch.from_numpy(training.decode(images.shape[1])).to(device)
    labels = torch.from_numpy(training.labels).to(device)
    preprocessing = Preprocessing(images.shape[1], (0.5,) * 3, (0.5,) * 3)
    loop = Loop(model, pixels, labels, preprocessing.normalize, config, clock)
    seconds = {"model": time.perf_counter() - start, "compile": 0.0}
    if options.compile:
        model.train()
        with autocast(device):
            logits = loop.forward(preprocessing.normalize(pixels[: options.batch_size]))
        logits.float().sum().backward()
        seconds["compile"] = time.perf_counter() - start - seconds["model"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        loop.fit(Path(folder))
        seconds["training"] = time.perf_counter() - start
        start = time.perf_counter()
        cv.save(model, Path(folder) / "adapter.safetensors")
    cv.fold(model)
    seconds["save and fold"] = time.perf_counter() - start
    count = max(1, round(options.share * task.test_images))
    start = time.perf_counter()
    predict(model, split(images, count, task.num_classes), preprocessing, options.test_batch)
    seconds["evaluation"] = time.perf_counter() - start
    return {"task": task, "seconds": seconds, "epochs": config.epochs, "tested": count}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.vtab_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--branches", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--test-batch", type=int, default=256)
    parser.add_argument("--tasks", default="all", help="ids, comma-separated")
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs and test images to run")
    parser.add_argument("--compile", action="store_true", help="as vtab.train's")
    parser.add_argument("--device", default=None)
    options = check_counts(parser.parse_args(argv), "epochs", "batch_size", "test_batch")
    if options.tasks != "all":
        check_names("--tasks", options.tasks, TASKS)
    if not 0 < options.share <= 1:
        raise ValueError(f"--share {options.share} must lie in (0, 1]")
    options.epochs_run = max(1, round(options.share * options.epochs))
    return options


def main(argv: list[str] | None = None) -> None:
    """Print where the time goes, task by task and phase by phase."""
    options = parse(argv)
    device = setup.pick_device(options.device)
    vtab = [task for task in TASKS.values() if task.group != "extra"]
    tasks = vtab if options.tasks == "all" else [TASKS[name] for name in options.tasks.split(",")]
    model = cv.Base(options.model, "random").build(0).to(device)
    size = model.pretrained_cfg["input_size"][-1]
    images = np.random.default_rng(0).integers(0, 256, (POOL, size, size, 3), np.uint8)
    flops = forward_flops(model, torch.zeros(1, 3, size, size, device=device))
    rate = matmul_rate(device)
    del model
    runs = [run(task, options, images, contextlib.nullcontext, device) for task in tasks]
    clock = Clock(device)  # in an epoch of its own: waiting for the device at every phase slows the loop
    run(tasks[0], argparse.Namespace(**{**vars(options), "epochs_run": 1, "share": 0.0}), images, clock, device)
    report(options, runs, clock, flops, rate, device)


def row(name: str, seconds: Counter[str], floor: float) -> tuple[str, ...]:
    """A line of the table."""
    everything = sum(seconds.values())
    parts = (f"{seconds[part]:,.1f}" for part in PARTS)
    return name, *parts, f"{everything:,.1f}", f"{floor:,.1f}", f"{100 * floor / everything:.0f} %"


def report(
    options: argparse.Namespace, runs: list[dict[str, Any]], clock: Clock, flops: int, rate: float, device: torch.device
) -> None:
    """The tables."""
    rows, total, floor = [], Counter[str](), 0.0
    for each in runs:
        task, seconds = each["task"], Counter[str](each["seconds"])
        seconds["training"] *= options.epochs / each["epochs"]
        seconds["evaluation"] *= task.test_images / each["tested"]
        least = flops * (2 * TRAINING * options.epochs + task.test_images) / rate
        rows.append(row(task.id, seconds, least))
        total, floor = total + seconds, floor + least
    rows.append(row(f"{len(runs)} tasks", total, floor))
    print(table(("task", *(f"{part}, s" for part in PARTS), "all, s", "floor, s", "floor / all"), rows))
    steps = sum(clock.seconds.values())
    print(table(("phase of a step", "share"), [(k, f"{100 * v / steps:.1f} %") for k, v in clock.seconds.items()]))
    print(f"{options}\n{device}, {torch.get_num_threads()} threads, {rate / 1e12:.2f} TFLOP/s, {flops / 1e9:.1f} GFLOP")


if __name__ == "__main__":
    cli.run(main)
