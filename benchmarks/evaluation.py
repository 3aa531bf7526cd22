"""A forward pass of an adapted model beside the plain one's: python -m benchmarks.evaluation

Every round takes one batch through each case, in random order, in eval and inference mode; a ratio is of a round's two
times. A folded delta on weights leaves the plain model's own modules; a folded adapter is one dense bottleneck.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import capavision as cv
from benchmarks import step
from benchmarks.tables import add_timed, check_counts, check_names, machine, table
from export.bench import interleaved
from vtab import cli, setup


def plain(model: nn.Module) -> nn.Module:
    """As timm makes it."""
    return model


def folded(case: str) -> Callable[[nn.Module], nn.Module]:
    """A case of benchmarks.step with its deltas folded into the weights."""

    def fold(model: nn.Module) -> nn.Module:
        cv.fold(step.CASES[case](model))
        return model

    return fold


def merged(model: nn.Module) -> nn.Module:
    """HF PEFT's LoRA, merged by it."""
    return step.CASES["peft linear"](model).merge_and_unload()  # type: ignore[operator]


ADAPTED = ("capaboost linear", "peft linear", "circulant linear", "adapter", "prefix")
CASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    **{case: step.CASES[case] for case in ADAPTED},
    **{f"{case}, folded": folded(case) for case in ADAPTED if case not in ("peft linear", "prefix")},
    "peft linear, merged": merged,
}


def forward(case: str, options: argparse.Namespace) -> Callable[[], None]:
    """One batch through the case's model, on a GPU to its end."""
    torch.manual_seed(0)
    base = cv.Base(options.model, "random", options.img_size).build(100)
    size = options.img_size or base.pretrained_cfg["input_size"][-1]  # type: ignore[union-attr,index]
    model = CASES[case](base).to(options.device).eval()
    x = torch.randn(options.batch, 3, size, size, device=options.device)

    @torch.inference_mode()
    def run() -> None:
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    return run


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    add_timed(parser, cases="with semicolons (default: all)")
    options = check_counts(parser.parse_args(argv), "batch", "rounds", "threads")
    options.cases = options.cases.split(";") if options.cases else list(CASES)
    check_names("--cases", options.cases, CASES)
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print a row for each case; returns their ratios to the plain model."""
    options = parse(argv)
    device = options.device = setup.pick_device(options.device)
    torch.set_num_threads(options.threads)
    runs = {case: forward(case, options) for case in dict.fromkeys(("plain", *options.cases))}
    times = interleaved(runs, options.rounds)
    rows, ratios = [], {}
    for case in runs:
        low, ratios[case], high = np.percentile(times[case] / times["plain"], [25, 50, 75])
        rows.append((case, f"{np.median(times[case]):.1f}", f"{ratios[case]:.3f} ({low:.3f} … {high:.3f})"))
    print(table(("case", "batch, ms", "of the plain model (quartiles)"), rows))
    print(f"{options.model}, batch {options.batch}, {options.rounds} rounds; {machine(device, 'peft')}")
    return ratios


if __name__ == "__main__":
    cli.run(main)
