"""VTAB-1k in small: the true layout, the true list format, a few images of noise for each list."""

from pathlib import Path

import numpy as np
from PIL import Image

from vtab.lists import LISTS
from vtab.tasks import VTAB, Task

COUNTS = {"train": 4, "val": 2, "test": 3}


def write_task(folder: Path, task: Task, suffix: str = ".jpg", seed: int = 0) -> None:
    """The 1,000 have files of their own, as in the archive; the largest label is always there."""
    rng = np.random.default_rng([seed, *task.id.encode()])
    drawn = {split: [_noise(rng) for _ in range(n)] for split, n in COUNTS.items()}
    labels = {split: rng.integers(task.num_classes, size=n).tolist() for split, n in COUNTS.items()}
    labels["train"][0] = task.num_classes - 1
    for both in (drawn, labels):
        both["trainval"] = both["train"] + both["val"]
    for split, file in LISTS.items():
        stem = file.removesuffix(".txt")
        (folder / "images" / stem).mkdir(parents=True)
        lines = []
        for i, (image, label) in enumerate(zip(drawn[split], labels[split], strict=True)):
            image.save(folder / f"images/{stem}/{i:06d}{suffix}")
            lines.append(f"images/{stem}/{i:06d}{suffix} {label}\n")
        (folder / file).write_text("".join(lines))


def _noise(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(256, size=(9, 12, 3), dtype=np.uint8))


def write_all(root: Path, spelling: int = 0, suffix: str = ".jpg") -> Path:
    """All nineteen tasks, each folder by its name number `spelling`, as far as it has so many."""
    for task in VTAB:
        write_task(root / task.names[spelling % len(task.names)], task, suffix)
    return root
