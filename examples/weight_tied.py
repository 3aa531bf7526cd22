"""Weight-tied models beside the untied one and their deep-equilibrium twin, trained from scratch on two small tasks.

    untied          z_{l+1} = f(z_l; W_l)            depth blocks
    tied            z_{l+1} = f(z_l; W)              capavision.tie(model)
    tied + masks    z_{l+1} = f(z_l; W ⊙ M_l)        capavision.tie(model, density=…), arXiv 2307.08013
    equilibrium     z* = norm(f(z* + x; W))          solved by torchdeq, arXiv 1909.01377

f is the block of a small ViT, x its first state. All see the same images in the same order for the same number of steps
of the same optimizer. Learning rates and density were chosen on the 200 validation images (--stage tune repeats that);
the default stage trains on all 1,000 images and looks at the test split once, after the last epoch.

    python examples/weight_tied.py    # about 10 minutes on one core; its tables are in docs/weight_tied.md
"""

import importlib.util
import itertools
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import capavision as cv
from vtab import cli
from vtab.config import Config
from vtab.data import Data, open_task
from vtab.evaluate import Accuracy, Preprocessing, accuracy, predict
from vtab.loop import Loop
from vtab.textfile import write

WIDTH, DEPTH, HEADS, PATCH, SIDE = 96, 6, 3, 16, 64
PREPROCESSING = Preprocessing(SIDE, mean=(0.5,) * 3, std=(0.5,) * 3)
SOLVER = {"f_solver": "anderson", "f_max_iter": 12, "f_tol": 1e-2, "f_stop_mode": "rel"}
IMPLICIT = {"ift": True, "b_solver": "anderson", "b_max_iter": 12, "b_tol": 1e-2, "b_stop_mode": "rel"}
ARMS = ("untied", "tied", "tied + masks", "equilibrium")
RATES, DENSITIES = (1e-3, 3e-3), (0.5, 0.9)
# By --stage tune --epochs 24 --seeds 1, as many steps on 800 images as 20 epochs are on 1,000; see docs/weight_tied.md.
CHOSEN: dict[str, dict[str, dict[str, float]]] = {
    "digits": {
        "untied": {"lr": 1e-3},
        "tied": {"lr": 1e-3},
        "tied + masks": {"lr": 1e-3, "density": 0.9},
        "equilibrium": {"lr": 3e-3},
    },
    "dsprites_loc": {
        "untied": {"lr": 3e-3},
        "tied": {"lr": 1e-3},
        "tied + masks": {"lr": 3e-3, "density": 0.9},
        "equilibrium": {"lr": 1e-3},
    },
}


@dataclass(frozen=True)
class Settings:
    """What to run.

    tasks: comma-separated, digits and dsprites_loc
    stage: final trains on all 1,000 images and tests once; tune tries the whole grid on 800 and shows val200
    epochs: passes over the training images
    seeds: runs of each arm, with the seeds 0, 1, …
    limit: the first N images of every split only, for a quick look
    test_limit: test on the first N images of the test split
    out: file for the tables, as Markdown
    """

    tasks: str = "digits,dsprites_loc"
    stage: str = "final"
    epochs: int = 20
    seeds: int = 2
    limit: int | None = None
    test_limit: int = 2000
    out: Path | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tasks.split(",") if name not in CHOSEN]:
            raise ValueError(f"--tasks {unknown[0]}: settings were chosen for {' and '.join(CHOSEN)} only")
        if self.stage not in ("final", "tune"):
            raise ValueError(f"--stage {self.stage!r} is unknown; choose final or tune")
        for flag in ("epochs", "seeds", "limit", "test_limit"):
            if (value := getattr(self, flag)) is not None and value < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least 1")


@dataclass(frozen=True)
class Run:
    """What one training came to."""

    parameters: int
    score: Accuracy
    seconds: float


class Equilibrium(nn.Module):
    """z* = norm(block(z* + x)), found by a solver; its gradient comes from the implicit function theorem.

    Without x in every step the fixed point would not depend on the image, without the norm there might be none.
    """

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.block, self.norm = block, nn.LayerNorm(width)
        self.solve = get_deq(**SOLVER, **IMPLICIT)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.solve(lambda z: self.norm(self.block(z + x)), torch.zeros_like(x))
        found: Tensor = states[-1]
        return found


def build(arm: str, num_classes: int, seed: int, density: float | None = None) -> nn.Module:
    """The arm's model; all arms of a seed start from the same values."""
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        class_token=False,
        global_pool="avg",
        num_classes=num_classes,
    )
    if arm.startswith("tied"):
        cv.tie(model, density=density, seed=seed)
        return model
    if arm == "equilibrium":
        model.blocks = nn.Sequential(Equilibrium(model.blocks[0], WIDTH))
    cv.inject(model, cv.Full())
    return model


def train(arm: str, data: Data, seed: int, settings: Settings, lr: float, **options: float) -> Run:
    """One model from scratch to its one evaluation."""
    training, judging = ("train", "val") if settings.stage == "tune" else ("trainval", "test")
    seen = data.splits[training].head(settings.limit)
    judged = data.splits[judging].head(settings.limit or (settings.test_limit if judging == "test" else None))
    model = build(arm, len(data.classes), seed, **options)
    config = Config(
        task=data.task, epochs=settings.epochs, batch_size=50, lr=lr, weight_decay=0.05, drop_path=0.0, seed=seed
    )
    images, labels = torch.from_numpy(seen.decode(SIDE)), torch.from_numpy(seen.labels)
    with tempfile.TemporaryDirectory() as folder:
        history = Loop(model, images, labels, PREPROCESSING.normalize, config).fit(Path(folder))
    score = accuracy(predict(model, judged, PREPROCESSING), judged.labels)
    return Run(sum(p.numel() for p in model.parameters()), score, sum(row["seconds"] for row in history))


def rows(data: Data, settings: Settings, arms: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One row an arm, or in the tune stage an arm and setting: mean over the seeds."""
    found = []
    for arm in arms:
        grid = [{"lr": lr} for lr in RATES]
        if arm == "tied + masks":
            grid = [{**point, "density": density} for point, density in itertools.product(grid, DENSITIES)]
        for point in grid if settings.stage == "tune" else [CHOSEN[data.task][arm]]:
            runs = [train(arm, data, seed, settings, **point) for seed in range(settings.seeds)]
            options = ", ".join(f"{name} {value:g}" for name, value in point.items())
            found.append((arm, options, *summary(runs)))
            print("  ".join(found[-1]), flush=True)
    return found


def summary(runs: list[Run]) -> tuple[str, ...]:
    """Parameters, mean accuracy with the interval that the number of images allows, each seed's, seconds."""
    images = runs[0].score.total
    mean = Accuracy(round(sum(run.score.correct for run in runs) / len(runs)), images)
    low, high = mean.interval
    each = ", ".join(f"{run.score.percent:.1f}" for run in runs)
    seconds = sum(run.seconds for run in runs) / len(runs)
    return f"{runs[0].parameters:,}", f"{mean.percent:.1f} % ({low:.1f} … {high:.1f})", each, f"{seconds:.0f}"


def table(rows: list[tuple[str, ...]]) -> str:
    """As Markdown, columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def main(argv: list[str] | None = None) -> str:
    """Train every arm on every task; the tables, which --out also writes."""
    parser = cli.Parser(prog="python examples/weight_tied.py", description="Weight-tied models side by side.")
    cli.add_fields(parser, Settings)
    settings: Settings = cli.collect(Settings, parser.parse_args(argv))
    arms, start, text = ARMS, time.perf_counter(), ""
    if importlib.util.find_spec("torchdeq") is None:
        arms = ARMS[:-1]
        text += "No equilibrium arm: it takes torchdeq, which `pip install torchdeq` brings.\n\n"
    for task in settings.tasks.split(","):
        data = open_task(task)
        judged = "val200" if settings.stage == "tune" else "test"
        head = (f"{task} ({data.source})", "settings", "parameters", f"{judged} accuracy", "by seed", "training s")
        text += table([head, *rows(data, settings, arms)]) + "\n\n"
    text += (
        f"{settings.epochs} epochs, {settings.seeds} seeds; {time.perf_counter() - start:.0f} s in all on "
        f"{torch.get_num_threads()} CPU threads ({platform.machine()}), torch {torch.__version__}.\n"
    )
    if settings.out:
        write(settings.out, text)
    print(f"\n{text}")
    return text


if __name__ == "__main__":
    cli.run(main)
