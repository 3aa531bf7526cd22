"""Tasks × methods × seeds: python -m vtab.sweep --tasks all --methods lora,capaboost-lora --seeds 0,1,2 --out runs/.

A sweep is a list of vtab.train command lines. Each becomes a process of its own with a log of its own; what has a
result is skipped, so the same command goes on wherever it was stopped. One GPU, many machines, Slurm: docs/sweep.md.
"""

import argparse
import dataclasses
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import capavision as cv
from capavision.targets import near
from vtab import backbones, cli, setup
from vtab.config import Config, parse
from vtab.grid import GROUPS, OURS, SETTINGS, expand_methods, expand_tasks
from vtab.ledger import Ledger, Run
from vtab.seeds import parse as parse_seeds
from vtab.work import Place, work


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run what the command line says and is not done yet; returns what sweep.json holds."""
    args, rest = parser().parse_known_args(argv)
    runs, configs = plan(args, rest)
    check_models(configs)
    if args.dry_run:
        for run in runs:
            print(f"{'# done: ' if run.look() else ''}{run.command()}")
        return {"runs": [run.record() for run in runs]}
    for run in runs:
        run.look()
    check_data([config for config, run in zip(configs, runs, strict=True) if run.state == "waiting"])
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.out, runs, partial(print, flush=True))
    try:
        with FileLock(args.out / ".sweep.lock", blocking=False):
            done = sum(run.state == "done" for run in runs)
            ledger.say(f"{len(runs)} runs in {args.out}, {done} of them done already")
            if done < len(runs):
                work(runs, place(args, runs, configs[0]), ledger)
            return conclude(ledger)
    except Timeout:
        raise ValueError(f"another sweep works in {args.out}; wait for it, or give this one another --out") from None


def parser() -> cli.Parser:
    """The sweep's own flags; all others are vtab.train's."""
    made = cli.Parser(
        prog="python -m vtab.sweep",
        description="Run vtab.train over tasks, methods and seeds. Flags not listed here go to every vtab.train.",
    )
    named = ", ".join(f"{name} = {setting}" for name, setting in SETTINGS.items())
    made.add_argument("--tasks", default="", help=f"names, or groups of them: {', '.join(GROUPS)}")
    made.add_argument("--methods", default="lora", help=f"names, with settings if any, lora:rank=4,branches=2; {named}")
    made.add_argument(
        "--seeds", default="1", metavar="N|LIST", help="a count, 3, or a list, 0,1,2 (default: 1, seed 0)"
    )
    made.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="run folders and sweep.json")
    made.add_argument("--data-root", type=Path, metavar="DIR", help="folder of images, as for vtab.train")
    made.add_argument(
        "--jobs", metavar="N", help="runs at a time; auto: as many as the GPU's memory holds (default: 1)"
    )
    made.add_argument("--ray", nargs="?", const="auto", metavar="ADDRESS", help="on the Ray cluster there, or here")
    made.add_argument("--gpus-per-run", type=float, metavar="X", help="with --ray; fractions share a GPU (default: 1)")
    made.add_argument("--cpus-per-run", type=float, default=1.0, metavar="N", help="with --ray (default: 1)")
    made.add_argument(
        "--slurm", nargs="?", const="", metavar="KEY=VALUE,…", help="as Slurm jobs, set up as submitit has it"
    )
    made.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    return made


def plan(args: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Run], list[Config]]:
    """Every run and its settings, seeds outermost, so that an unfinished sweep has whole tables for the first seeds.

    Raises:
        ValueError: an unknown task, method, setting or flag; a flag that the sweep sets itself.
    """
    taken = [flag for flag in OURS if any(re.match(rf"--{flag}(=|$)", token) for token in rest)]
    if taken:
        raise ValueError(f"--{taken[0]} is the sweep's to set; it has --tasks, --methods, --seeds and --out")
    _check_counts(args)
    args.out = args.out.resolve()
    root = ["--data-root", str(args.data_root.resolve())] if args.data_root else []
    tasks, rows, seeds = (
        expand_tasks(args.tasks, args.data_root),
        expand_methods(args.methods),
        parse_seeds(args.seeds),
    )
    runs: dict[Path, tuple[Run, Config]] = {}
    for seed in seeds:
        for task in tasks:
            for label, (method, flags) in rows.items():
                line = [*(["--task", task] if task else []), *root, "--method", method, *rest, *flags]
                line += ["--seed", str(seed), "--out", str(args.out)]
                config = _parse(label, line)
                shown = task or config.folder().name.partition(f"-{config.model}-")[0]
                run = Run(f"{shown} {label} seed {seed}", tuple(line), config.folder())
                runs.setdefault(run.folder, (run, config))  # lora and lora:rank=8 are one run
    return [run for run, _ in runs.values()], [config for _, config in runs.values()]


def _parse(label: str, line: list[str]) -> Config:
    try:
        return parse(line)
    except ValueError as error:
        typed = re.match(r"unrecognized arguments: (--[\w-]+).* did you mean", str(error))
        own = [flag for action in parser()._actions for flag in action.option_strings]
        close = typed and near(typed[1], own)
        also = f" or, of the sweep: {close}" if close and len(close) < 40 else ""
        raise ValueError(f"method {label}: {error}{also}") from error


def _check_counts(args: argparse.Namespace) -> None:
    if args.jobs not in (None, "auto") and not (args.jobs.isdecimal() and int(args.jobs) > 0):
        raise ValueError(f"--jobs {args.jobs} must be a number of at least 1, or auto")
    if args.ray and args.slurm is not None:
        raise ValueError("--ray and --slurm are two ways to the same end; choose one")
    if args.ray and args.jobs:
        raise ValueError(
            "--jobs has no use with --ray, which runs as many as fit; --gpus-per-run 0.25 puts four on a GPU"
        )
    if args.slurm is not None and args.jobs == "auto":
        raise ValueError("--jobs auto looks at this machine's GPU; with --slurm give a number, or leave it out")
    if not args.ray and args.gpus_per_run is not None:
        raise ValueError("--gpus-per-run has no use without --ray")
    if args.cpus_per_run <= 0 or (args.gpus_per_run or 0) < 0:
        raise ValueError("--cpus-per-run must be above 0, --gpus-per-run at least 0")


def check_models(configs: Iterable[Config]) -> None:
    """Does each method fit the model? Asked without any weights, so that it takes no time.

    Raises:
        ValueError: an unknown model or tag, targets that are not there, a setting that the hosts do not take.
    """
    seen = set()
    for config in configs:
        key = (config.model, config.img_size, config.drop_path, config.method, config.targets, config.parts)
        if key in seen:
            continue
        seen.add(key)
        base = backbones.resolve(config.model, config.weights, config.img_size, config.seed)
        try:
            with torch.device("meta"):
                model = setup.build(dataclasses.replace(base, weights="random"), 10, config)
                cv.inject(model, config.method, config.patterns, config.parts)
        except (RuntimeError, NotImplementedError):  # what the meta device cannot do says nothing about the run
            continue


def check_data(configs: Iterable[Config]) -> None:
    """Open every task once.

    Raises:
        ValueError: tasks that cannot be opened, all of them in one message, those of one cause together.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    checked = set()
    for config in configs:
        if config.task in checked:
            continue
        checked.add(config.task)
        try:
            setup.open_data(config)
        except (ValueError, OSError) as error:
            problems[str(error).replace(config.task, "TASK") if config.task else str(error)].append(config.task)
    if problems:
        told = "; ".join(
            f"{', '.join(names)}: {cause}" if len(names) > 1 else cause.replace("TASK", names[0])
            for cause, names in problems.items()
        )
        count = sum(map(len, problems.values()))
        raise ValueError(f"{count} of {len(checked)} tasks cannot be opened, nothing was started: {told}")


def place(args: argparse.Namespace, runs: Sequence[Run], config: Config) -> Place:
    """Where the runs are worked on."""
    if args.ray:
        from vtab.on_ray import OnRay

        return OnRay(args.ray, args.gpus_per_run, args.cpus_per_run, args.out)
    if args.slurm is not None:
        from vtab.on_slurm import OnSlurm

        pairs = [pair.partition("=") for pair in args.slurm.split(",") if pair]
        settings = {key.strip(): int(value) if value.isdecimal() else value for key, _, value in pairs}
        return OnSlurm(settings, args.out, int(args.jobs or len(runs)))
    from vtab.local import Local

    return Local(None if args.jobs == "auto" else int(args.jobs or 1), runs, config.device)


def conclude(ledger: Ledger) -> dict[str, Any]:
    """The summary, and what failed with the last lines of its log."""
    summary = ledger.write()
    failed = [run for run in ledger.runs if run.state == "failed"]
    for run in failed:
        lines = "".join(f"\n    {line}" for line in run.last_lines)
        ledger.say(
            f"\n{run.label} failed {run.attempts} times ({run.reason}); {run.log} ends with{lines or ' nothing'}"
        )
    ledger.say(f"{summary['counts']['done']} of {len(ledger.runs)} runs are done, {len(failed)} failed: {ledger.path}")
    if failed:
        ledger.say(f"the same command tries these again: {', '.join(run.label for run in failed)}")
    return summary


if __name__ == "__main__":
    cli.run(lambda: sys.exit(int(any(run["state"] == "failed" for run in main()["runs"]))))
