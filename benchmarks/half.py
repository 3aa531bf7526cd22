"""What rounding W + ΔW to bfloat16 costs in accuracy: python -m benchmarks.half --seeds 5

Whole runs of `vtab.train`, test split included, three ways: in float32; in bfloat16 with W + ΔW summed in float32 and
rounded once, as capavision trains; in bfloat16 with ΔW acting on its own, beside a rounded W. A seed's data, masks and
initial values are the same in all three, so differences are taken seed by seed.
"""

import argparse
import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import capavision as cv
from benchmarks.tables import check_counts, table
from capavision import merged
from vtab import cli, train
from vtab.config import Config
from vtab.record import environment


def apart() -> AbstractContextManager[Any]:
    """No Linear merges."""
    return mock.patch.object(merged, "linear_pays", return_value=False)


WAYS = {
    "float32": ("float32", nullcontext),
    "bfloat16, W + ΔW rounded": ("bfloat16", nullcontext),
    "bfloat16, ΔW apart": ("bfloat16", apart),
}


def accuracy(way: str, seed: int, folder: Path, options: argparse.Namespace) -> float:
    """Of one run, in percent."""
    precision, context = WAYS[way]
    config = Config(
        task=options.task,
        method=cv.LoRA(rank=8, alpha=options.alpha, branches=2),
        targets=options.targets,
        test_limit=options.test_limit,
        epochs=options.epochs,
        batch_size=32,
        lr=options.lr,
        drop_path=0.0,
        precision=precision,
        seed=seed,
        device=options.device,
        out=folder / way,
    )
    with context():
        return float(train.run(config)["accuracy"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.half", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="dsprites_loc")
    parser.add_argument("--targets", default="linear", help="what to adapt (default: every Linear)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--test-limit", type=int, default=2000)
    parser.add_argument("--device", default=None)
    return check_counts(parser.parse_args(argv), "seeds", "epochs", "test_limit")


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Print a row for each way; returns its accuracies, one a seed."""
    options = parse(argv)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for way, scores in found.items():
                scores.append(accuracy(way, seed, Path(folder), options))
    apart = found["bfloat16, ΔW apart"]
    rows = []
    for way, scores in found.items():
        gains = [score - other for score, other in zip(scores, apart, strict=True)]
        rows.append((way, _spread(scores), "" if scores is apart else _spread(gains)))
    print(table(("products in", "accuracy, %: mean ± std", "over ΔW apart, seed by seed"), rows))
    env = environment(torch.device(options.device or "cpu"))
    print(
        f"{options.task}, {options.targets}, {options.seeds} seeds, {options.epochs} epochs, lr {options.lr:g}, "
        f"alpha {options.alpha:g}, {options.test_limit:,} test images; {env['device']}, torch {env['torch']}, "
        f"commit {env['commit']}"
    )
    return found


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


if __name__ == "__main__":
    cli.run(main)
