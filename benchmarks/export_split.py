"""A split package beside merged ones: python -m benchmarks.export_split

The same runs are exported both ways: CapaBoost-LoRA on q and v, random weights, a task with 10 classes and others with
more. One thread, the CPU. Latency: rounds of one call of each graph in random order; a ratio is of a round's two times.
Switching: what a call costs more if the one before it was for another task, in processor time. Memory: the proportional
set size that a fresh process gains by loading N tasks and running an image through each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import capavision as cv
from benchmarks.tables import check_counts, measured, table
from capavision.files import cache_dir
from export import package, split
from export.package import Source
from export.runtime import Classifier, random_pixels
from vtab.cli import Parser, run

COUNTS = (1, 2, 4)
PROCESSES = 5
INFO = {"preprocessing": {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}}
GAIN = """
import json, sys
from pathlib import Path
import numpy, onnxruntime
from PIL import Image
from export.runtime import Classifier, random_pixels
def pss():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
form, count, *folders = json.loads(sys.argv[1])
before = pss()
if form == "split":
    one = Classifier(folders[0], threads=1)
    calls = [(one, task) for task in one.tasks[:count]]
else:
    calls = [(Classifier(folder, threads=1), None) for folder in folders[:count]]
pixels = random_pixels(0, 1, 224)
for classifier, task in calls:
    classifier.logits(pixels, task)
print((pss() - before) / 1024)
"""


def trained(folder: Path, options: argparse.Namespace) -> dict[str, Source]:
    """Runs of as many tasks on one base, with random values where training would have put others than 0."""
    weights = cache_dir() / f"{options.model}.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(cv.Base(options.model, "random").build(10).state_dict(), weights)
    base = cv.Base(options.model, weights.name)
    found = {}
    for seed in range(max(COUNTS)):
        classes, rng = 10 + 9 * seed, torch.Generator().manual_seed(seed)
        model = base.build(classes)
        cv.inject(model, cv.LoRA(rank=options.rank, branches=options.branches), seed=seed)
        for p in cv.parameters(model):
            p.data.add_(torch.randn(p.shape, generator=rng), alpha=0.02)
        path = folder / f"task{seed}.safetensors"
        cv.save(model, path, base=base, classes=[str(i) for i in range(classes)], info=INFO)
        found[path.stem] = Source.open(path)
    return found


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of processor time of each call in each round: one thread, so that other processes do not count."""
    times = {name: np.zeros(rounds + 3) for name in calls}
    names = list(calls)
    for turn in range(rounds + 3):
        for i in np.random.default_rng(turn).permutation(len(names)):
            start = time.process_time()
            calls[names[i]]()
            times[names[i]][turn] = 1e3 * (time.process_time() - start)
    return {name: values[3:] for name, values in times.items()}


def switching(classifier: Classifier, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of a `switch`, and of processor time that a call takes longer if it is for another task: median, ±.

    Which of the two a call is, is drawn, so that both follow the same kinds of calls.
    """
    pixels, (one, other) = random_pixels(0, 1, 224), classifier.tasks[:2]
    times: dict[bool, list[float]] = {True: [], False: []}
    switches, rng = [], np.random.default_rng(0)
    for turn in range(4 * rounds + 10):
        change = bool(rng.integers(2))
        task = (other if classifier.task == one else one) if change else classifier.task
        start = time.perf_counter()
        classifier.switch(task)
        switches.append(1e3 * (time.perf_counter() - start))
        start = time.process_time()  # one thread; other processes do not count
        classifier.logits(pixels)
        if turn >= 10:
            times[change].append(1e3 * (time.process_time() - start))
    medians = [[np.median(rng.choice(times[kind], len(times[kind]))) for kind in (True, False)] for _ in range(1000)]
    low, middle, high = np.percentile([changed - same for changed, same in medians], [2.5, 50, 97.5])
    return float(np.median(switches)), float(middle), float(high - low) / 2


def gained(form: str, count: int, folders: list[Path]) -> str:
    """MB that fresh processes gain by `count` tasks, of which an allocator may keep some or not: median and spread."""
    argv = [sys.executable, "-c", GAIN, json.dumps([form, count, *map(str, folders)])]
    runs = [subprocess.run(argv, capture_output=True, text=True, check=True).stdout for _ in range(PROCESSES)]
    least, *_, most = values = sorted(map(float, runs))
    return f"{np.median(values):.0f} ({least:.0f} … {most:.0f})"


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = Parser(prog="python -m benchmarks.export_split", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    options = check_counts(parser.parse_args(argv), "rank", "branches", "rounds", "batch")
    start = time.perf_counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["CAPAVISION_CACHE"] = name
        sources = trained(folder, options)
        began = time.perf_counter()
        manifest = split.build(sources, folder / "split")
        seconds = time.perf_counter() - began
        merged = [folder / f"merged{i}" for i in range(len(sources))]
        for path, source in zip(merged, sources.values(), strict=True):
            package.build(source, path)
        report(options, manifest, folder / "split", merged, seconds)
    settings = " ".join(f"--{name} {value}" for name, value in vars(options).items())
    print(measured(f"python -m benchmarks.export_split {settings}", time.perf_counter() - start))


def report(
    options: argparse.Namespace, manifest: dict[str, object], folder: Path, merged: list[Path], seconds: float
) -> None:
    """Measure and print."""
    files: dict[str, dict[str, int]] = manifest["files"]  # type: ignore[assignment]
    sizes = [each["bytes"] / 1e6 for name, each in files.items() if name.startswith("adapters")]
    classifier = Classifier(folder, threads=1)
    switch, longer, about = switching(classifier, options.rounds)
    rows = [
        ("switch", f"{switch:.4f} ms"),
        ("a call after it takes longer by", f"{longer:.2f} ± {about:.2f} ms"),
    ]
    rows += [
        ("a base graph", f"{files['model.onnx']['bytes'] / 1e6:.1f} MB"),
        ("an adapter file", f"{max(sizes):.2f} MB"),
    ]
    print(table((f"{options.model}, {len(sizes)} tasks", ""), [*rows, ("to export", f"{seconds:.0f} s")]))
    plain = Classifier(merged[0], threads=1)
    rows = []
    pixels = random_pixels(0, options.batch, 224)
    feed = {"pixel_values": classifier.normalize(pixels)}
    calls: dict[str, Callable[[], object]] = {
        "merged": lambda: plain.session.run(None, feed),
        "split, a task": lambda: classifier.logits(pixels, classifier.tasks[0]),
        "split, no adapter": lambda: classifier.session.run(None, feed),
        "merged, from pixels": lambda: plain.logits(pixels),
    }
    times = timed(calls, options.rounds)
    for call in ("split, a task", "split, no adapter"):
        like = times["merged, from pixels" if "task" in call else "merged"]
        low, middle, high = np.percentile(times[call] / like, [25, 50, 75])
        rows.append((call, f"{np.median(times[call]):.1f}", f"{middle:.2f} ({low:.2f} … {high:.2f})"))
    print(table((f"batch {options.batch}", "ms of processor time", "of merged (quartiles)"), rows))
    gains = {
        form: [gained(form, count, [folder] if form == "split" else merged) for count in COUNTS]
        for form in ("split", "merged")
    }
    columns = ("PSS gained, MB", *(f"{count} tasks" for count in COUNTS))
    print(table(columns, [(form, *values) for form, values in gains.items()]))


if __name__ == "__main__":
    run(main)
