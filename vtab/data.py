"""What a task's data looks like to the trainer: labelled splits whose images are decoded and resized once.

Geometry: the whole image is resized to a square, bicubic, without a crop (the field's VTAB-1k convention), kept as
uint8. Normalisation happens later, on the device.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Split:
    """Labelled images. read(i) gives image i as a PIL image; names[i] says which it is."""

    labels: np.ndarray
    read: Callable[[int], Image.Image]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, size: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Images start…stop as uint8 (n, size, size, 3), decoded side by side.

        Raises:
            ValueError: an image that does not decode, by name.
        """
        indices = range(start, len(self) if stop is None else min(stop, len(self)))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pixels = list(pool.map(lambda i: self._pixels(i, size), indices))
        return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)

    def batches(self, size: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images in pieces of `count`, so that a test split of any length fits in memory."""
        for start in range(0, len(self), count):
            yield self.decode(size, start, start + count), self.labels[start : start + count]

    def head(self, count: int | None) -> "Split":
        """The first `count` images; all of them for None."""
        return self if count is None else Split(self.labels[:count], self.read, self.names[:count])

    def _pixels(self, index: int, size: int) -> np.ndarray:
        try:
            image = ImageOps.exif_transpose(self.read(index)).convert("RGB")
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.names[index]} does not decode ({error}); replace the image") from error


@dataclass(frozen=True)
class Data:
    """A task's splits: train and val to choose settings, trainval (both) for the final run, test to look at once."""

    task: str
    classes: list[str]
    splits: dict[str, Split]
    source: str  # what these images are, for every record: "dSprites-like (procedural), …"
    facts: dict[str, Any] = field(default_factory=dict)


def file_split(root: Path, names: Sequence[str], labels: Sequence[int]) -> Split:
    """A split of image files: `names` are paths relative to `root`."""
    return Split(np.asarray(labels, dtype=np.int64), lambda i: Image.open(root / names[i]), list(names))


def inside(root: Path, name: str) -> Path:
    """root / name, if that stays inside root.

    Raises:
        ValueError: an absolute path, one with '..', or a link that leaves the root.
    """
    path = root / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of {root}; list only files below it")
    return path


def open_task(
    name: str, root: Path | None = None, *, seed: int = 0, partial: bool = False, split_file: Path | None = None
) -> Data:
    """The task's data: from `root` where one is given (VTAB-1k lists or class folders), else generated.

    Raises:
        ValueError: an unknown task, a root that holds neither layout, data that does not fit.
    """
    from vtab import folder, generated, lists
    from vtab.tasks import NAMES, find

    if root is not None:
        listed = lists.find_folder(root, name)
        if listed:
            return lists.open_lists(listed, name, partial)
        if name in NAMES:
            raise ValueError(
                f"task {name!r}: {root} holds no {name}/{lists.LISTS['train']} and is no such folder itself; for class "
                "folders of your own choose a --task name that is not VTAB's, or none"
            )
        return folder.open_folder(root, name, seed, split_file)
    task = find(name)
    if task.id not in generated.SOURCES:
        raise ValueError(
            f"task {task.id!r} needs its images: --data-root FOLDER that holds {task.id}/train800.txt and the other "
            f"lists; tasks that need none: {', '.join(generated.SOURCES)}"
        )
    return generated.SOURCES[task.id]()


def main(argv: list[str] | None = None) -> Path:
    """python -m vtab.data write: a task that needs no download, as files in the VTAB-1k layout."""
    from vtab import lists
    from vtab.cli import Parser

    parser = Parser(prog="python -m vtab.data", description="Tasks as files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    write = commands.add_parser("write", help="write a task in the VTAB-1k layout")
    write.add_argument("--task", default="", help="dsprites_loc, dsprites_ori or digits")
    write.add_argument("--data-root", type=Path, metavar="PATH", help="a folder of your own instead")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="the task becomes a folder in there")
    write.add_argument("--test-limit", type=int, metavar="N", help="the first N test images only")
    args = parser.parse_args(argv)
    data = open_task(args.task, args.data_root)
    folder: Path = args.out / data.task
    lists.write_lists(data, folder, args.test_limit)
    print(f"{folder}: {data.source}")
    return folder


if __name__ == "__main__":
    from vtab.cli import run

    run(main)
