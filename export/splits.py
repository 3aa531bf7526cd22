"""The only door from exports to tasks: the data of the run that a package is made of, or of a task by its name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from export.images import upright_rgb
from export.runtime import read_json

if TYPE_CHECKING:
    from vtab.data import Data, Split
    from vtab.evaluate import Accuracy

# Images a call where accuracy is measured: dynamic int8 takes its scales from a whole batch, so that an image's logits
# would depend on its neighbours.
BATCH = 1


def settings(adapter: Path) -> dict[str, Any]:
    """config.json of the run folder that an adapter file lies in; empty for a bare file."""
    path = adapter.parent / "config.json"
    found = read_json(path) if adapter.name == "adapter.safetensors" and path.is_file() else {}
    return found if isinstance(found, dict) else {}


def open_data(run: dict[str, Any], task: str, root: Path | None, labels: Sequence[str] | None = None) -> "Data":
    """The task's splits, the same that the run had.

    Args:
        run: the run's settings, or nothing.
        task: the task's name, where the settings name none.
        root: folder of images, in place of the run's own.
        labels: classes of the package, to be compared; None compares nothing.

    Raises:
        ValueError: no such task or data, or data with other classes.
    """
    from vtab.data import open_task

    root = root or (Path(run["data_root"]) if run.get("data_root") else None)
    split_file = Path(run["split_file"]) if run.get("split_file") else None
    data = open_task(
        run["task"] if run else task,
        root,
        seed=run.get("seed", 0),
        partial=run.get("partial", False),
        split_file=split_file,
    )
    if labels is not None and data.classes != list(labels):
        raise ValueError(f"{data.task} has the classes {_some(data.classes)}, the package {_some(labels)}")
    return data


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" … ({len(names)})" if len(names) > 3 else "")


def score(correct: int, total: int) -> "Accuracy":
    """Top-1 with its 95 % interval."""
    from vtab.evaluate import Accuracy

    return Accuracy(correct, total)


def upright(split: "Split", index: int) -> Image.Image:
    """One image of a split as it is, upright and RGB."""
    return upright_rgb(split.read(index), split.names[index])
