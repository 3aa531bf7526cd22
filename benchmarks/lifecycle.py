"""What happens around training, and what it costs: python -m benchmarks.lifecycle.

A delta on every Linear of a model: inject, save, load onto a plain base, fold, remove; and the size of the file beside
its trained values. Each is timed on a fresh copy in every round; medians and spread.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import capavision as cv
from benchmarks.tables import check_counts, machine, table
from capavision.masks import packed
from vtab.cli import Parser, run
from vtab.setup import pick_device

METHODS: dict[str, tuple[cv.Method, str | None]] = {
    "LoRA": (cv.LoRA(rank=16), "linear"),
    "CapaBoost-LoRA": (cv.LoRA(rank=8, branches=2), "linear"),
    "Adapter": (cv.Adapter(rank=8, branches=2), None),
    "Circulant": (cv.Circulant(), "linear"),
}
STEPS = ("inject", "save", "load", "fold", "remove")


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, to the device's end; no mask is remembered from an earlier one."""
    packed.cache_clear()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def once(base: nn.Module, method: cv.Method, targets: str | None, file: Path) -> tuple[dict[str, float], int]:
    """Milliseconds of each step, and the bytes of the trained values."""
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    found = {"inject": milliseconds(lambda: cv.inject(model, method, targets))}
    found["save"] = milliseconds(lambda: cv.save(model, file))
    found["load"] = milliseconds(lambda: cv.load(file, other))
    found["fold"] = milliseconds(lambda: cv.fold(other))
    size = sum(p.numel() * p.element_size() for p in cv.parameters(model))
    found["remove"] = milliseconds(lambda: cv.remove(model))
    return found, size


def main(argv: list[str] | None = None) -> None:
    """Print a row for each method."""
    parser = Parser(prog="python -m benchmarks.lifecycle", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best this machine has)")
    options: argparse.Namespace = check_counts(parser.parse_args(argv), "rounds")
    device = pick_device(options.device)
    base = cv.Base(options.model, "random").build(100).to(device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (method, targets) in METHODS.items():
            times, file = defaultdict(list), Path(folder) / "it.safetensors"
            for _ in range(options.rounds):
                found, size = once(base, method, targets, file)
                for step in STEPS:
                    times[step].append(found[step])
            spread = [
                f"{statistics.median(times[step]):.0f} ({min(times[step]):.0f} … {max(times[step]):.0f})"
                for step in STEPS
            ]
            kilobytes = (file.stat().st_size - size) / 1024
            rows.append((name, *spread, f"{size / 1024:,.0f} + {kilobytes:.0f} KB"))
    print(table(("method", *(f"{step}, ms" for step in STEPS), "file: values + the rest"), rows))
    print(f"{options.model}, {options.rounds} rounds; {machine(device)}")


if __name__ == "__main__":
    run(main)
