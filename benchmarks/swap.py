"""Changing the adapter of a model that has one, by capavision.load: python -m benchmarks.swap.

Two files are loaded in turn over each other; they differ in what their row says, and but for those of two seeds in
their number of classes (47 and 10). "Drawn anew": no mask is remembered from an earlier load. "From nothing" is
timm.create_model and a load, once. The first load over a model takes the norms of its weights, and is not counted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import capavision as cv
from benchmarks.tables import check_counts, table
from capavision.masks import packed
from vtab.cli import Parser, run
from vtab.setup import pick_device

CHANGES = {
    "LoRA, other head": (cv.LoRA(rank=8, branches=2), cv.LoRA(rank=8, branches=2)),
    "Adapter, other head": (cv.Adapter(rank=8, branches=2), cv.Adapter(rank=8, branches=2)),
    "Circulant, other head": (cv.Circulant(), cv.Circulant()),
    "BitFit, other head": (cv.BitFit(), cv.BitFit()),
    "LoRA and Adapter": (cv.LoRA(rank=8, branches=2), cv.Adapter(rank=8, branches=2)),
    "LoRA of two seeds": (cv.LoRA(rank=8, branches=2), cv.LoRA(rank=8, branches=2)),
    "LoRA of two seeds, drawn anew": (cv.LoRA(rank=8, branches=2), cv.LoRA(rank=8, branches=2)),
}


def write(path: Path, model: nn.Module, method: cv.Method, classes: int, seed: int) -> Path:
    """A file of `method` on the model's base, which is plain again afterwards."""
    model.reset_classifier(classes)  # type: ignore[operator]
    cv.inject(model, method, seed=seed)
    cv.save(model, path)
    cv.remove(model)
    return path


def fresh(options: argparse.Namespace, classes: int) -> nn.Module:
    """The same random base each time."""
    model = cv.Base(options.model, "random").build(1000).eval().to(options.device)
    model.reset_classifier(classes)  # type: ignore[operator]
    return model


def milliseconds(path: Path, model: nn.Module, anew: bool = False) -> float:
    """One load; `anew` has its masks drawn."""
    if anew:
        packed.cache_clear()
    start = time.perf_counter()
    cv.load(path, model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    """Print a row for each change of adapters."""
    parser = Parser(prog="python -m benchmarks.swap", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best this machine has)")
    options = check_counts(parser.parse_args(argv), "rounds")
    options.device = pick_device(options.device)
    model = fresh(options, 1000)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for change, methods in CHANGES.items():
            seeds = (0, 1) if "seeds" in change else (0, 0)
            classes = (47, 47) if "seeds" in change else (47, 10)
            files = [
                write(Path(folder) / f"{i}.safetensors", model, *each)
                for i, each in enumerate(zip(methods, classes, seeds, strict=True))
            ]
            model.reset_classifier(classes[0])
            milliseconds(files[0], model)
            loads = range(1, 2 * options.rounds + 1)
            times = sorted(milliseconds(files[i % 2], model, anew="anew" in change) for i in loads)
            cv.remove(model)
            size = sum(file.stat().st_size for file in files) / 2e3
            spread = f"{times[0]:.1f} … {times[-1]:.1f}"
            rows.append((change, f"{size:,.0f} KB", f"{statistics.median(times):.1f}", spread))
        start = time.perf_counter()
        milliseconds(files[0], fresh(options, classes[0]))
        rows.append(("from nothing", "", f"{1e3 * (time.perf_counter() - start):,.0f}", ""))
    print(table(("change", "file", "median, ms", "spread, ms"), rows))
    print(f"{options.model} on {options.device}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    run(main)
