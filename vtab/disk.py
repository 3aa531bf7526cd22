"""The disk: is there room before something large is written, and a sentence when it fills up all the same."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

SPARE = 256 << 20  # bytes that stay free
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def lack(folder: Path, needed: int) -> str | None:
    """What is missing for `needed` bytes in `folder`, in words; None where they fit."""
    free = shutil.disk_usage(folder).free
    if needed + SPARE <= free:
        return None
    return f"needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in {folder}"


def require(folder: Path, needed: int, what: str) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        ValueError: less than `needed` bytes, and some to spare, are free.
    """
    missing = lack(folder, needed)
    if missing:
        raise ValueError(f"{what} {missing}; free some space, fewer --task, or another --root")


@contextlib.contextmanager
def saying_full(root: Path) -> Iterator[None]:
    """Turn the kernel's refusal to write any more into a sentence.

    Raises:
        ValueError: the disk is full, the quota is used up, or a file got too large.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ValueError(
            f"the disk of {root} is full ({error.strerror}); the unfinished task was removed, all else stays; free some"
            " space and run the same command again"
        ) from error
