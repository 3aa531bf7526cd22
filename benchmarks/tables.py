"""What the sweeps share: the choice of methods, markdown tables, where and when they were measured."""

import argparse
import datetime
from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec

import torch

import capavision as cv
from capavision.targets import near
from vtab.cli import flag
from vtab.record import environment

METHODS = ("lora", "adapter", "circulant")  # one of each kind: low rank, on blocks, structured


def row(cells: Iterable[object]) -> str:
    """One line of a table; a bar inside a cell is escaped."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """
    >>> print(table(("family", "hosts"), [("beit", 12)]))
    | family | hosts |
    | --- | --- |
    | beit | 12 |
    """
    return "\n".join([row(columns), row(["---"] * len(columns)), *map(row, rows)])


def measured(command: str, seconds: float, packages: Sequence[str] = ("timm",)) -> str:
    """Date, machine, versions, those of `packages` too, and the command that does it again."""
    env = environment(torch.device("cpu"))
    numbers = {name: env[name] for name in ("python", "torch")} | {name: version(name) for name in packages}
    versions = ", ".join(f"{name} {number}" for name, number in {**numbers, "capavision": env["capavision"]}.items())
    return (
        f"`{command}`, {datetime.date.today():%d %B %Y}: {seconds / 60:.0f} minutes on {env['threads']} thread of a "
        f"{env['device']}; {versions}, commit {env['commit']}."
    )


def machine(device: torch.device, *packages: str) -> str:
    """Device, threads, versions of torch, timm and `packages`, and the commit, on one line."""
    env = environment(device)
    others = "".join(f", {name} {version(name) if find_spec(name) else 'absent'}" for name in packages)
    versions = f"torch {env['torch']}, timm {env['timm']}{others}"
    return f"{env['device']}, {env['threads']} threads, {versions}, commit {env['commit']}"


def add_timed(parser: argparse.ArgumentParser, cases: str) -> None:
    """The flags of a model's cases that are timed in rounds: --cases, whose help `cases` is, and what each runs on."""
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cases", help=cases)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", default=None)


def add_methods(parser: argparse.ArgumentParser) -> None:
    """--methods, a list with commas."""
    default = ",".join(name for name in METHODS if name in cv.Method.known)
    parser.add_argument("--methods", default=default, metavar="A,B", help=f"which of them (default: {default})")


def check_methods(args: argparse.Namespace) -> argparse.Namespace:
    """The same arguments, their methods known and with hosts.

    Raises:
        ValueError: a method that is not known, or puts no delta on weights or blocks.
    """
    placements = (cv.WeightDelta, cv.OutputDelta)
    hosted = [name for name, method in cv.Method.known.items() if method().placement in placements]
    check_names("--methods", args.methods, hosted)
    return args


def check_counts(args: argparse.Namespace, *names: str) -> argparse.Namespace:
    """The same arguments; raises ValueError for one of `names` below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} {getattr(args, name)} must be at least 1")
    return args


def check_names(option: str, given: str | Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for a name in `given`, a list or one with commas, that is not known."""
    for name in given.split(",") if isinstance(given, str) else given:
        if name not in known:
            raise ValueError(f"{option}: {name!r} is unknown; {near(name, known)}")
