"""Atomic writes and the cache folder: a file or folder is either whole or not there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def cache_dir() -> Path:
    """Where converted weights live: $CAPAVISION_CACHE, else ~/.cache/capavision."""
    return Path(os.environ.get("CAPAVISION_CACHE") or Path.home() / ".cache" / "capavision")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; it takes the place of `path` when the block ends well, and vanishes when not.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was.

    >>> with replacing("result.json") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".part{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_existing(folder: Path) -> None:
    """Raise ValueError if something is there already."""
    if folder.exists():
        raise ValueError(f"{folder} exists; name another folder, or delete it first")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path`; it becomes `path` when the block ends well, and vanishes when not.

    Raises:
        ValueError: `path` exists.
        OSError: the disk is full or the parent cannot be written; nothing is left there.

    >>> with new_folder("package") as temporary:  # doctest: +SKIP
    ...     (temporary / "config.json").write_text("{}")
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes folders only their owner can enter
        refuse_existing(path)  # another process may have made it meanwhile
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file whole or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written; a file that was there stays.
    """
    with replacing(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error})") from error
