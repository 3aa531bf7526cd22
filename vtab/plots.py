"""Two pictures a run leaves behind: its learning curve, and what it sees in test images."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from capavision.files import replacing

mpl.use("Agg")
import matplotlib.pyplot as plt


def curve(path: Path, history: list[dict[str, Any]], judged: tuple[str, int, float], title: str) -> None:
    """Loss and accuracy by epoch, and the one accuracy that judges the run: of what, after which epoch, in percent."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(epochs, [row["loss"] for row in history], "o-", color="tab:blue", markersize=3)
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    right.plot(epochs, [row["accuracy"] for row in history], "o-", color="tab:blue", markersize=3, label="training")
    for key, color, name in (("val_accuracy", "tab:orange", "val200"), ("test_accuracy", "tab:red", "test")):
        watched = [(row["epoch"], row[key]) for row in history if key in row]
        if watched:
            right.plot(*zip(*watched, strict=True), "o-", color=color, markersize=3, label=name)
    what, epoch, percent = judged
    right.plot(epoch, percent, "*", color="tab:red", markersize=10, label=f"{what}: {percent:.1f} %")
    right.set(xlabel="epoch", ylabel="top-1 accuracy (%)", ylim=(0, 103))
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


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
        axes.set_title(text, fontsize=8, color="black" if guess == label else "tab:red")
    figure.suptitle(title, fontsize=10)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
