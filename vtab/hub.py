"""The zip in which VTAB-1k circulates, from the Hugging Face hub: goes on where it stopped, compared by its digest."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vtab.disk import FULL, require

REPO, FILE = "XiN0919/VTAB-1k", "vtab-1k.zip"
CHUNK = 32 << 20  # bytes of a request


def download(root: Path, share: float = 1.0) -> Path:
    """The archive from the hub, in `root`; what an earlier, interrupted call received is not asked for again.

    Args:
        root: where it goes.
        share: how much of it is going to be unpacked, for the look at the disk.

    Raises:
        ValueError: no connection, a full disk, or bytes that are not those the hub states.
    """
    commit, size, sha256 = describe()
    path = root / f"{Path(FILE).stem}-{sha256[:12]}.zip"
    part = path.with_suffix(".zip.part")
    if path.is_file() and path.stat().st_size == size:
        return path
    have = part.stat().st_size if part.is_file() else 0
    require(root, size - have + int(share * size), "the archive and what is unpacked from it")
    with part.open("ab") as file, tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=FILE) as bar:
        try:
            for piece in pieces(commit, have, size):
                file.write(piece)
                bar.update(len(piece))
        except (KeyboardInterrupt, OSError) as error:
            if isinstance(error, KeyboardInterrupt) or error.errno in FULL:
                raise
            raise _interrupted(part, file.tell(), size, error) from error
        except Exception as error:  # the hub's client raises errors of the HTTP library of the day
            raise _interrupted(part, file.tell(), size, error) from error
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise ValueError(
            f"the {FILE} received has sha256 {found[:12]}…, the hub states {sha256[:12]}…; it was deleted, so run the "
            "same command again"
        )
    return part.rename(path)


def _interrupted(part: Path, have: int, size: int, error: Exception) -> ValueError:
    return ValueError(
        f"the download stopped at {have:,} of {size:,} bytes ({error}); {part} keeps them and the same command goes on"
    )


def describe() -> tuple[str, int, str]:
    """(commit, bytes, sha256) of the archive, as the hub states them.

    Raises:
        ValueError: no connection, or the hub no longer has the file.
    """
    from huggingface_hub import HfApi

    try:
        about = HfApi().dataset_info(REPO, files_metadata=True)
        file = next((f for f in about.siblings or [] if f.rfilename == FILE), None)
        if file is None or not file.lfs or not about.sha:
            raise ValueError("it is not there any more, or without a digest")
        return about.sha, file.lfs["size"], file.lfs["sha256"]
    except Exception as error:  # of the hub's client, whatever its HTTP library is
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the hub does not tell about {REPO} {FILE} ({why}); try again, or pass --source with a copy you have"
        ) from error


def pieces(commit: str, start: int, stop: int) -> Iterator[bytes]:
    """The archive's bytes from `start` on, as the hub sends them.

    hf_hub_download would start at 0 in every process, so the bytes are asked for by range.
    """
    from huggingface_hub import HfFileSystem

    remote: Any = HfFileSystem().open(
        f"datasets/{REPO}/{FILE}", "rb", revision=commit, block_size=CHUNK, cache_type="none", size=stop
    )
    remote.seek(start)
    while start < stop:
        piece = remote.read(min(CHUNK, stop - start))
        if not piece or len(piece) > stop - start:
            raise OSError(f"the hub sent {len(piece):,} bytes instead of {stop - start:,}")
        start += len(piece)
        yield piece
