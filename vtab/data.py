"""What a task's data looks like to the trainer: labelled splits whose images are decoded and resized once.

Geometry: the whole image is resized to a square, bicubic, without a crop (the field's VTAB-1k convention), kept as
uint8. Normalisation happens later, on the device.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from export.images import upright_rgb

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
LOSSLESS = (".png", ".bmp", ".gif", ".tif", ".tiff")
# what Pillow's readers raise at damaged files
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error,
              zlib.error, Image.DecompressionBombError)  # fmt: skip
In, Out = TypeVar("In"), TypeVar("Out")


@dataclass(frozen=True)
class Split:
    """Labelled images. read(i) gives image i as a PIL image; names[i] says which it is.

    identity() is a digest of what the images are, where they are worth keeping decoded; stored(size) is then the file
    of decoded images (vtab.cache), or None.
    """

    labels: np.ndarray
    read: Callable[[int], Image.Image]
    names: Sequence[str]
    identity: Callable[[], str] | None = None
    stored: Callable[[int], Path | None] = lambda size: None

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, size: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Images start…stop as uint8 (n, size, size, 3), decoded side by side, or read where they are stored.

        Raises:
            ValueError: an image that does not decode, by name.
        """
        file = self.stored(size) if start == 0 and stop is None else None
        if file:
            return _piece(file, 0, len(self))
        indices = range(start, len(self) if stop is None else min(stop, len(self)))
        pixels = np.empty((len(indices), size, size, 3), np.uint8)
        for row, image in enumerate(side_by_side(lambda i: self._pixels(i, size), indices)):
            pixels[row] = image
        return pixels

    def batches(self, size: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images in pieces of `count`, so that a test split of any length fits in memory."""
        file = self.stored(size)
        for start in range(0, len(self), count):
            stop = min(start + count, len(self))
            yield _piece(file, start, stop) if file else self.decode(size, start, stop), self.labels[start:stop]

    def head(self, count: int | None) -> "Split":
        """The first `count` images; all of them for None."""
        if count is None or count >= len(self):
            return self
        return Split(self.labels[:count], self.read, self.names[:count])

    def _pixels(self, index: int, size: int) -> np.ndarray:
        try:
            image = upright_rgb(self.read(index), "it")  # as an exported package reads it
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        except UNREADABLE as error:
            raise ValueError(f"{self.names[index]} does not decode ({error}); replace the image") from error


@dataclass(frozen=True)
class Data:
    """A task's splits: train and val to choose settings, trainval (both) for the final run, test to look at once."""

    task: str
    classes: list[str]
    splits: dict[str, Split]
    source: str  # what these images are, for every record: "dSprites-like (procedural), …"
    facts: dict[str, Any] = field(default_factory=dict)


def side_by_side(function: Callable[[In], Out], items: Iterable[In], ahead: int = 256) -> Iterator[Out]:
    """map(), eight at a time, in order, never more than `ahead` results in memory.

    >>> list(side_by_side(abs, [-1, 2]))
    [1, 2]
    """
    rest = iter(items)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while piece := list(islice(rest, ahead)):
            yield from pool.map(function, piece)


def _piece(file: Path, start: int, stop: int) -> np.ndarray:
    """Some images of a stored split: mapped for the moment of the copy only, so that memory holds no more than that."""
    return np.array(np.load(file, mmap_mode="r", allow_pickle=False)[start:stop])


def file_split(root: Path, names: Sequence[str], labels: Sequence[int]) -> Split:
    """A split of image files: `names` are paths relative to `root`."""

    def identity() -> str:
        digest = hashlib.sha256(str(root.resolve()).encode())
        for name in names:
            about = (root / name).stat()
            digest.update(f"\n{name}\0{about.st_size}\0{about.st_mtime_ns}".encode())
        return digest.hexdigest()

    return Split(np.asarray(labels, dtype=np.int64), lambda i: Image.open(root / names[i]), list(names), identity)


def inside(root: Path, name: str, known: set[Path] | None = None) -> Path:
    """root / name, if that stays inside root.

    Args:
        root: where it has to stay.
        name: a relative path.
        known: folders found to lie inside already; more are added. For lists of many thousand names.

    Raises:
        ValueError: an absolute path, one with '..', or a link that leaves the root.
    """
    path = root / name
    known = set() if known is None else known
    unsure = [path] if path.is_symlink() else []
    if path.parent not in known:
        unsure.append(path.parent)
    away = Path(name).is_absolute() or ".." in Path(name).parts
    if away or any(not p.resolve().is_relative_to(root.resolve()) for p in unsure):
        raise ValueError(f"{name!r} leads out of {root}; list only files below it")
    known.add(path.parent)
    return path


def open_task(
    name: str, root: Path | None = None, *, seed: int = 0, partial: bool = False, split_file: Path | None = None
) -> Data:
    """The task's data: from `root` where one is given (VTAB-1k lists or class folders), else generated.

    Raises:
        ValueError: an unknown task, a root that holds neither layout, data that does not fit.
    """
    from vtab import folder, generated, lists, tasks

    if root is not None:
        listed = lists.find_folder(root, name)
        if listed:
            return lists.open_lists(listed, name, partial)
        if tasks.get(name):
            raise ValueError(
                f"task {name!r}: {root} holds no {tasks.find(name).id}/{lists.LISTS['train']} and is no such folder "
                f"itself; get it with python -m vtab.data fetch --root {root} --task {tasks.find(name).id} (for class "
                "folders of your own choose a --task name that is not VTAB's, or none)"
            )
        return folder.open_folder(root, name, seed, split_file)
    task = tasks.find(name)
    if task.id not in generated.SOURCES:
        raise ValueError(
            f"task {task.id!r} needs its images: --data-root FOLDER, as python -m vtab.data fetch --root FOLDER --task "
            f"{task.id} fills it; tasks that need none: {', '.join(generated.SOURCES)}"
        )
    return generated.SOURCES[task.id]()


def main(argv: list[str] | None = None) -> Any:
    """python -m vtab.data fetch | check | write: get tasks, look at them, make those that need no download."""
    from vtab import check, fetch, lists
    from vtab.cli import Parser

    parser = Parser(prog="python -m vtab.data", description="Tasks as files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fetch.add_command(commands)
    check.add_command(commands)
    write = commands.add_parser("write", help="write a task in the VTAB-1k layout")
    write.add_argument("--task", default="", help="dsprites_loc, dsprites_ori or digits")
    write.add_argument("--data-root", type=Path, metavar="PATH", help="a folder of your own instead")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="the task becomes a folder in there")
    write.add_argument("--test-limit", type=int, metavar="N", help="the first N test images only")
    args = parser.parse_args(argv)
    if args.command != "write":
        return args.run(args)
    data = open_task(args.task, args.data_root)
    folder: Path = args.out / data.task
    lists.write_lists(data, folder, args.test_limit)
    print(f"{folder}: {data.source}")
    return folder


if __name__ == "__main__":
    from vtab.cli import run

    run(main)
