"""Two pictures a run leaves behind: its learning curve, and what it sees in test images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from capavision.files import replacing

mpl.use("Agg")
import matplotlib.pyplot as plt

LINES = {"accuracy": "training", "val_accuracy": "val200", "test_accuracy": "test"}  # of an epoch's record, in percent
COLOURS = ("tab:blue", "tab:orange", "tab:red")


def curve(
    path: Path,
    history: list[dict[str, Any]],
    judged: tuple[str, int, float],
    title: str,
    metric: str = "top-1 accuracy",
    loss: str = "cross-entropy",
    lines: Mapping[str, str] = LINES,
) -> None:
    """Loss and what else is known by epoch, and the one figure that judges the run.

    Args:
        path: of the picture.
        history: a record an epoch.
        judged: the figure: of what, after which epoch, in percent.
        title: of the picture.
        metric: what the figure is.
        loss: what is minimised.
        lines: what of a record is drawn beside the loss, and its names.
    """
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(epochs, [row["loss"] for row in history], "o-", color="tab:blue", markersize=3)
    left.set(xlabel="epoch", ylabel=f"training loss ({loss})")
    for (key, name), color in zip(lines.items(), COLOURS, strict=False):
        watched = [(row["epoch"], row[key]) for row in history if key in row]
        if watched:
            right.plot(*zip(*watched, strict=True), "o-", color=color, markersize=3, label=name)
    what, epoch, percent = judged
    right.plot(epoch, percent, "*", color="tab:red", markersize=10, label=f"{what}: {percent:.1f} %")
    right.set(xlabel="epoch", ylabel=f"{metric} (%)", ylim=(lowest(right), 103))
    right.set_xlim(left.get_xlim())
    right.legend(frameon=False, loc="best")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10, parse_math=False)  # names may hold dollars
    _write(figure, path)


def lowest(axes: Any) -> float:
    """Where an axis of percents begins: at 0, or below what is negative."""
    least: float = axes.dataLim.y0
    return least - 5 if least < 0 else 0


def predictions(
    path: Path, images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, classes: list[str], title: str
) -> None:
    """A grid of images (n, H, W, 3), each under its predicted class; a wrong one is red and tells the true class."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.85 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, label, p in zip(grid.flat, images, labels, probabilities, strict=False):
        guess = int(p.argmax())
        text = f"{classes[guess]}\n{100 * p[guess]:.0f} %"
        if guess != label:
            text += f", is {classes[label]}"
        axes.imshow(image)
        axes.set_title(text, fontsize=8, color="black" if guess == label else "tab:red", parse_math=False)
    figure.suptitle(title, fontsize=10, parse_math=False)  # names may hold dollars
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
