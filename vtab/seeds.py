"""--seeds: the same run several times over, from different seeds, and how far apart they come out."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from vtab import protocol
from vtab.command import Command
from vtab.runs import ACCURACY, examples, metric, score
from vtab.training import Training

MOST = 100


def commands(command: Command, argv: list[str] | None = None) -> list[Any]:
    """The command line as settings, one for each seed: one alone without --seeds.

    Raises:
        ValueError: seeds that are no count and no list, --seed beside --seeds; else as `Command.parse`.
    """
    parser, method, recipe = command.parser(argv)
    parser.add_argument(
        "--seeds", metavar="N|LIST", help="run several seeds one after another: 3 is 0,1,2; prints mean and spread"
    )
    values = parser.parse_args(argv)
    text = vars(values).pop("seeds")
    if text is None:
        return [command.configure(values, method, recipe)]
    if "seed" in values:
        raise ValueError("--seeds says which seeds there are; leave --seed out")
    config, seeds = command.configure(values, method, recipe), parse(text)
    if config.tune and config.tune_seed is None:
        config = dataclasses.replace(config, tune_seed=seeds[0])
    return [dataclasses.replace(config, seed=seed, name=config.name and f"{config.name}-s{seed}") for seed in seeds]


def parse(text: str) -> list[int]:
    """A count, or a list with commas.

    >>> parse("3"), parse("18,45,25"), parse("7,")
    ([0, 1, 2], [18, 45, 25], [7])
    """
    try:
        words = text.removesuffix(",").split(",") if "," in text else range(min(int(text), MOST + 1))
        found = [int(word) for word in words]
    except ValueError:
        raise ValueError(f"--seeds {text!r} must be a count, such as 3, or a list, such as 0,1,2") from None
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"--seeds {text} must name 1 to {MOST} seeds")
    if len(set(found)) < len(found):
        raise ValueError(f"--seeds {text} names a seed twice")
    return found


def train(command: Command, argv: list[str] | None, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What a training command does: the run of its one seed, or with --seeds all of them.

    Returns:
        result.json, or what `run_all` says of several.
    """
    configs = commands(command, argv)
    return run(configs[0]) if len(configs) == 1 else run_all(configs, run)


def run_all(configs: list[Any], run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """All runs one after another; with --tune the search happens once, in the first one's folder.

    Returns:
        The scores by seed, their mean and sample standard deviation (None for one seed), and each result.
    """
    results: list[dict[str, Any]] = []
    for config in configs:
        known = [results[0]["tuning"]] if results and config.tune else []
        results.append(run(config, *known))
    summary = summarise(results)
    print(told(configs[0], summary))
    return summary


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of the accuracy, or of what else the task is judged by."""
    found = [score(result) for result in results]
    return {
        "task": results[0]["task"],
        "method": results[0]["method"],
        "protocol": results[0]["protocol"],
        "seeds": [result["seed"] for result in results],
        "accuracies": found,
        "mean": statistics.fmean(found),
        "std": statistics.stdev(found) if len(found) > 1 else None,
        "runs": results,
    }


def told(config: Training, summary: dict[str, Any]) -> str:
    """The summary as text: mean and spread, then each seed's accuracy with the interval that so many examples allow."""
    lines = []
    for result in summary["runs"]:
        count = f"n = {examples(result):,}"
        if metric(result) == ACCURACY:
            low, high = result["interval95"]
            said = f"{result['accuracy']:.1f} % ({low:.1f} … {high:.1f}, {count})"
        else:
            said = f"{metric(result)} {score(result):.1f} ({count})"
        lines.append(f"  seed {result['seed']}: {result['split']} {said}")
    spread = "one seed has no spread" if summary["std"] is None else f"± {summary['std']:.2f}"
    count = len(summary["seeds"])
    judged = summary["runs"][0]
    unit = " %" if metric(judged) == ACCURACY else ""
    mean = f"{summary['task']}, {summary['method']}: {metric(judged)} {summary['mean']:.2f}{unit} {spread}"
    mean += f", mean and standard deviation of {count} seed{'s' if count > 1 else ''}"
    if config.tune:
        mean += f"; tuned once, with seed {config.tune_seed}"
    return "\n".join(filter(None, (mean, protocol.label(config), *lines)))
