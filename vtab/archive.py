"""Tasks out of a zip file that nobody vouches for: only lists and images, only below the task's folder.

Nothing is written before the whole table of contents has been read. One member that leads out of the folder, is a
link or a device, is encrypted, or declares more bytes than such an archive can hold, and the archive is refused.
"""

import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from vtab.data import IMAGES
from vtab.lists import LISTS, ORIGIN
from vtab.tasks import find, get
from vtab.textfile import LIMIT

IMAGE_LIMIT = 64 << 20  # bytes of one file
RATIO, SLACK = 20, 64 << 20  # images do not shrink in a zip: all files together, against the archive
Members = dict[str, zipfile.ZipInfo]


def contents(path: Path) -> dict[str, Members]:
    """What the archive holds of each task, by task: {file name inside the task's folder: member}.

    Raises:
        ValueError: no zip file, half a zip file, or one that is not safe to unpack.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is no whole zip file ({error}); get it again") from error
    for member in members:
        _refuse_unsafe(path, member)
    total, most = sum(member.file_size for member in members), RATIO * path.stat().st_size + SLACK
    if total > most:
        raise ValueError(f"{path} would unpack to {total:,} bytes, {most:,} at most make sense; nothing was unpacked")
    folders: dict[str, Members] = {}
    for member in members:
        folder, name = _place(member)
        if folder:
            _refuse_odd(path, member, name, folders.setdefault(folder, {}))
            folders[folder][name] = member
    found: dict[str, Members] = {}
    for folder, held in folders.items():
        task, own = find(PurePosixPath(folder).name).id, PurePosixPath(folder).name
        if task not in found or own == task:  # the canonical name before an alias
            found[task] = held
    return found


def _place(member: zipfile.ZipInfo) -> tuple[str, str]:
    """(the task's folder, the file's name in it) for what is to be unpacked; ("", "") for all else.

    The task's folder may lie below one of the archive's own, such as vtab-1k/.
    """
    parts = PurePosixPath(member.filename).parts
    depth = next((i for i, part in enumerate(parts[:3], start=1) if get(part)), 0)
    if not depth or member.is_dir() or not _wanted(parts[depth:]):
        return "", ""
    return "/".join(parts[:depth]), "/".join(parts[depth:])


def _wanted(parts: tuple[str, ...]) -> bool:
    if len(parts) == 1:
        return parts[0] in (*LISTS.values(), ORIGIN)
    return len(parts) > 1 and parts[0] == "images" and parts[-1].lower().endswith(IMAGES)


def _refuse_unsafe(path: Path, member: zipfile.ZipInfo) -> None:
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        raise ValueError(f"{path} holds {name!r}, which leads out of the folder; nothing was unpacked")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{path} holds {name!r}, a link or a device; nothing was unpacked")
    if member.flag_bits & 1:
        raise ValueError(f"{path} holds {name!r}, which is encrypted; unpack it yourself and pass the folder")


def _refuse_odd(path: Path, member: zipfile.ZipInfo, name: str, held: Members) -> None:
    most = IMAGE_LIMIT if name.startswith("images/") else LIMIT
    if member.file_size > most:
        size = f"{member.file_size:,} bytes, {most:,} at most make sense"
        raise ValueError(f"{path} holds {member.filename!r} of {size}; nothing was unpacked")
    if name in held:
        raise ValueError(f"{path} holds {member.filename} twice; nothing was unpacked")


def unpack(path: Path, members: Members, folder: Path, step: Callable[[], object]) -> None:
    """Write a task's members into `folder`, calling `step` after each.

    Raises:
        ValueError: a member whose bytes are damaged.
    """
    with zipfile.ZipFile(path) as archive:
        for name, member in members.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(member) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise ValueError(f"{path} is damaged at {member.filename} ({error}); get it again") from error
            step()
