"""Decode once: a split's images, resized, as one uint8 file in the cache folder that later runs map into memory.

<cache>/images/<task>-<split>-<size>-<key>.npy    (n, size, size, 3)

The key is made of the images' names, sizes and times of change (or, of drawn images, of what is drawn), the folder,
the size, the way of resizing and Pillow's version; whatever changes one of them gets another file. At 224 pixels an
image costs 150,528 bytes: 1,000 training images 144 MiB, the 19 tasks' training images 2.7 GiB, the largest test
split (73,728 images) 10.3 GiB, all test splits 54.4 GiB. So training images are kept by default, and test splits that
are small, which a run decodes before it trains: a damaged image is found then. Files are only ever added; deleting
<cache>/images is safe.
"""

import errno
import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock
from tqdm import tqdm

from capavision.files import cache_dir, replacing
from vtab.data import Data, Split
from vtab.disk import lack

VERSION = 2  # of the file and of what Split.decode does to an image; change it with either
RESIZE = "upright by EXIF, RGB, squash, bicubic"
KEEP = ("none", "train", "all")
SMALL = 5000  # test images that are kept by default: 0.7 GiB at 224 pixels
PIECE = 256  # images in memory at a time


def attach(data: Data, keep: str = "train") -> Data:
    """The same task, whose splits are decoded once when they are read as a whole.

    Args:
        data: the task.
        keep: none; train for the splits that are trained on or watched, and a small test split; all for any.

    Raises:
        ValueError: another `keep`.
    """
    if keep not in KEEP:
        raise ValueError(f"--cache {keep!r} is unknown; choose {', '.join(KEEP)}")

    def wanted(name: str, split: Split) -> bool:
        small = name != "test" or len(split) <= SMALL
        return split.identity is not None and keep != "none" and (small or keep == "all")

    return replace(
        data,
        splits={
            name: replace(split, stored=partial(stored, split, f"{data.task}-{name}")) if wanted(name, split) else split
            for name, split in data.splits.items()
        },
    )


def stored(split: Split, name: str, size: int) -> Path | None:
    """The file of this split's decoded images, made now if it is not there; None, and a line, where the disk is full.

    Raises:
        ValueError: an image that does not decode, by name; no file is left.
    """
    assert split.identity is not None
    key = json.dumps([VERSION, RESIZE, PIL.__version__, size, split.identity()])
    name = f"{name.replace('/', '_')}-{size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    path = cache_dir() / "images" / name
    shape = (len(split), size, size, 3)
    if _whole(path, shape):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not _whole(path, shape):  # else another run made it while this one waited
                missing = lack(path.parent, int(np.prod(shape)))
                if missing:
                    raise OSError(errno.ENOSPC, f"{path.name} {missing}; CAPAVISION_CACHE names another folder")
                _write(path, split, size, shape)
    except OSError as error:
        print(f"decoded images are not kept ({error}); they are decoded at every use instead", file=sys.stderr)
        return None
    return path


def _whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == np.uint8


def _write(path: Path, split: Split, size: int, shape: tuple[int, ...]) -> None:
    """Piece by piece through a plain file: pages of a mapped one would count as this process's memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        with tqdm(total=len(split), unit="img", desc=f"decode {path.name.rsplit('-', 1)[0]}", leave=False) as bar:
            for start in range(0, len(split), PIECE):
                stop = min(start + PIECE, len(split))
                file.write(split.decode(size, start, stop).data)
                bar.update(stop - start)
