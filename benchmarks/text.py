"""CapaBoost on text beside plain LoRA and full fine-tuning: python -m benchmarks.text.

MiniLM-L6 (22.7 M parameters) on Rotten Tomatoes, from Python packages, without network: 1,000 training sentences, 5
seeds. Each method's learning rate is the one of its GRID that is best on val200 after the last epoch of a run on the
other 800 (--stage tune, seed 0); the final runs train on all 1,000 and are tested once, on a fixed part of what
remains, the same for all. LoRA's scale alpha / rank is 4 throughout: written as one LoRA of rank 4, two branches of
rank 2 have it too.

Every run has its folder under --out: the same command goes on where it stopped. Flags that are not listed go to every
python -m examples.text_classification.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.tables import check_counts, check_names, table
from examples import text_classification
from vtab.cli import Parser, run
from vtab.evaluate import Accuracy
from vtab.runs import examples

TASK = ["--data", "rotten_tomatoes", "--model", "demo", "--max-length", "64", "--batch-size", "16"]
ARMS: dict[str, list[str]] = {
    "head": ["--method", "linear_probe"],
    "lora-r2": ["--rank", "2", "--alpha", "8"],
    "capaboost-r2-random": ["--rank", "2", "--alpha", "8", "--branches", "2", "--masks", "random"],
    "capaboost-r2-complementary": ["--rank", "2", "--alpha", "8", "--branches", "2", "--masks", "complementary"],
    "lora-r4": ["--rank", "4", "--alpha", "16"],
    "full": ["--method", "full"],
}
GRID = dict.fromkeys(ARMS, (3e-4, 1e-3, 3e-3)) | {"head": (1e-3, 3e-3, 1e-2), "full": (3e-5, 1e-4, 3e-4)}


def train(name: str, options: argparse.Namespace, flags: Sequence[str]) -> dict[str, Any]:
    """One run, or what it came to before."""
    # The arm's own flags last: no other may change what is compared, or --stage tune
    argv = [*TASK, "--epochs", str(options.epochs), *options.rest, *flags, "--out", str(options.out), "--name", name]
    return text_classification.main(argv)


def chosen(arm: str, options: argparse.Namespace) -> float:
    """The learning rate that is best on val200; the smallest of equal ones."""
    found = {}
    for lr in GRID[arm]:
        flags = [*ARMS[arm], "--lr", str(lr), "--stage", "tune"]
        found[lr] = train(f"tune-{arm}-lr{lr:g}", options, flags)["score"]
    return max(found, key=lambda lr: found[lr])


def row(arm: str, options: argparse.Namespace) -> tuple[str, ...]:
    """A line of the table: the arm's runs over the seeds."""
    lr = chosen(arm, options)
    flags = [*ARMS[arm], "--lr", str(lr), "--test-limit", str(options.test)]
    runs = [train(f"{arm}-s{seed}", options, [*flags, "--seed", str(seed)]) for seed in range(options.seeds)]
    scores, count = [result["score"] for result in runs], examples(runs[0])
    low, high = Accuracy(round(fmean(scores) * count / 100), count).interval
    return (
        arm,
        f"{runs[0]['trained_parameters']:,}",
        f"{lr:g}",
        f"{fmean(scores):.1f}" + (f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""),
        f"{low:.1f} … {high:.1f}",
        ", ".join(f"{score:.1f}" for score in scores),
        f"{fmean(result['seconds_training'] for result in runs):.0f}",
    )


def main(argv: list[str] | None = None) -> str:
    """Train every arm; print the table, and return it."""
    parser = Parser(
        prog="python -m benchmarks.text",
        description=" ".join((__doc__ or "").split("\n\n")[1].split()),
        epilog="Flags not listed here go to every python -m examples.text_classification.",
    )
    parser.add_argument("--arms", default=",".join(ARMS), metavar="NAMES", help="with commas (default: all)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="final runs of each arm (default: 5)")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="of every run (default: 10)")
    parser.add_argument("--test", type=int, default=2000, metavar="N", help="sentences to test on (default: 2,000)")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), metavar="DIR", help="(default: runs/text)")
    options, options.rest = parser.parse_known_args(argv)
    check_counts(options, "seeds", "epochs", "test")
    check_names("--arms", options.arms, ARMS)
    head = ("method", "trained values", "lr", "test accuracy", "95 % interval of the mean", "by seed", "training s")
    found = table(head, [row(arm, options) for arm in options.arms.split(",")])
    print(found)
    return found


if __name__ == "__main__":
    run(main)
