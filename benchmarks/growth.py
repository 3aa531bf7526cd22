"""How a host's step grows with rank, branches, tokens and width: python -m benchmarks.growth --out growth.png

One square Linear with a CapaBoost-LoRA, forward and backward to x and to the factors, merged and factored
(`capavision.merged`), over the frozen Linear's own forward and backward to x. Dotted: where the rule in
`capavision.merged` expects the two to cross. Rounds are interleaved; a point is the median of a round's ratios.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import capavision as cv
from benchmarks.tables import check_counts, table
from capavision import merged
from export.bench import interleaved
from vtab import cli, setup
from vtab.record import environment

MIDDLE = {"rank": 8, "branches": 2, "tokens": 1576, "width": 384}  # 1576: 8 images of 197 tokens
AXES: dict[str, tuple[int, ...]] = {
    "rank": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "branches": (1, 2, 4, 8, 16),
    "tokens": (24, 48, 96, 192, 384, 768, 1536, 3072, 6144),
    "width": (96, 192, 384, 768, 1536, 3072),
}
WAYS = ("merged", "factored")


def adapted(rank: int, branches: int, width: int, device: torch.device) -> nn.Module:
    """A host of that width; its delta's values do not matter to the time."""
    net = nn.Sequential(nn.Linear(width, width)).to(device)
    cv.inject(net, cv.LoRA(rank=rank, branches=branches), "0")
    return net


def step(net: nn.Module, x: torch.Tensor, way: str) -> Callable[[], None]:
    """Forward and backward, in one of `WAYS`; "" is the frozen host alone."""

    def call() -> None:
        usual, merged.linear_pays = merged.linear_pays, lambda *_: way == "merged"
        try:
            net(x).backward(x)
        finally:
            merged.linear_pays = usual
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return call


def ratios(size: dict[str, int], options: argparse.Namespace) -> dict[str, float]:
    """Of each way to the floor."""
    x = torch.randn(size["tokens"], size["width"], device=options.device, requires_grad=True)
    net = adapted(size["rank"], size["branches"], size["width"], options.device)
    plain = nn.Linear(size["width"], size["width"], device=options.device).requires_grad_(False)
    times = interleaved({"": step(plain, x, ""), **{way: step(net, x, way) for way in WAYS}}, options.rounds)
    return {way: float(np.median(times[way] / times[""])) for way in WAYS}


def crossing(points: Iterable[int], found: list[dict[str, float]]) -> float | None:
    """Where the two ways meet, between points, on a logarithmic axis; None where they do not."""
    x = np.log(list(points))
    difference = [each["merged"] - each["factored"] for each in found]
    for i in range(len(x) - 1):
        if difference[i] * difference[i + 1] < 0:
            share = difference[i] / (difference[i] - difference[i + 1])
            return float(np.exp(x[i] + share * (x[i + 1] - x[i])))
    return None


def expected(axis: str) -> float | None:
    """Where `capavision.merged` expects them to: N = n_in n_out / (n_in + n_out)."""
    return {"tokens": MIDDLE["width"] / 2, "width": MIDDLE["tokens"] * 2}.get(axis)


def draw(found: dict[str, list[dict[str, float]]], title: str, path: Path) -> None:
    """A panel for each axis."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 3.2), sharey=True, layout="constrained")
    for panel, (axis, values) in zip(panels, found.items(), strict=True):
        for way, style in zip(WAYS, ("o-", "s--"), strict=True):
            panel.plot(AXES[axis], [each[way] for each in values], style, ms=4, label=way)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(AXES[axis], list(map(str, AXES[axis])), rotation=60, fontsize=7)
        panel.minorticks_off()
        ticks = (1, 1.2, 1.5, 2, 3, 5, 8)
        panel.set_yticks(ticks, list(map(str, ticks)))
        panel.axhline(1, color="0.8", lw=1, zorder=0)
        if (where := expected(axis)) is not None:
            panel.axvline(where, color="0.5", ls=":", lw=1)
    panels[0].set_ylabel("step ÷ frozen Linear's")
    panels[0].legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a picture (.png, .svg, .pdf)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", default=None)
    return check_counts(parser.parse_args(argv), "rounds", "threads")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print a table for each axis and draw the picture; returns the ratios."""
    options = parse(argv)
    options.device = setup.pick_device(options.device)
    torch.set_num_threads(options.threads)
    found = {axis: [ratios({**MIDDLE, axis: value}, options) for value in points] for axis, points in AXES.items()}
    for axis, points in AXES.items():
        print(table((axis, *points), [(way, *(f"{each[way]:.2f}" for each in found[axis])) for way in WAYS]))
        if (where := expected(axis)) is not None:
            measured = crossing(points, found[axis])
            print(f"they cross at {axis} {'nowhere' if measured is None else round(measured)}, expected {where:.0f}\n")
    env = environment(options.device)
    middle = ", ".join(f"{name} {value}" for name, value in MIDDLE.items())
    title = f"elsewhere {middle}; {env['device']}, {options.threads} thread, torch {env['torch']}"
    print(f"{title}, {options.rounds} rounds, commit {env['commit']}")
    if options.out:
        draw(found, title, options.out)
    return found


if __name__ == "__main__":
    cli.run(main)
