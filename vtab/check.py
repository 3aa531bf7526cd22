"""python -m vtab.data check: does a folder hold VTAB-1k, whole and readable, and which VTAB-1k is it?

CIFAR-100 scores some ten points less on the JPEG copy that circulates than on lossless images (github.com/
ZhangYuanhan-AI/NOAH/issues/28), so the two are two benchmarks and the table says which one is there.
"""

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from vtab import lists, tasks
from vtab.data import UNREADABLE, inside, side_by_side
from vtab.tasks import Task

SHOWN = 5  # faults of a task that are printed
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF",
           ".tif": "TIFF", ".tiff": "TIFF"}  # fmt: skip


@dataclass
class Finding:
    """What is in a task's folder, and what is wrong with it."""

    task: Task
    folder: Path | None = None
    images: dict[str, int] = field(default_factory=dict)
    variant: str = ""
    source: str = ""
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        """The finding as a line of the table."""
        counts = "".join(f"{self.images.get(split, '–'):>9}" for split in lists.LISTS)
        state = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault" if self.faults else "ok"
        state = state if self.folder else "missing"
        return f"{self.task.id:<21}{counts}  {self.variant or '–':<10}{state:<10}{self.source}".rstrip()


def examine(root: Path, task: Task, *, quick: bool = False, partial: bool = False, bar: Any = None) -> Finding:
    """One task of `root`: lists, labels, files, and, unless `quick`, whether every image decodes."""
    halves = (base / name for base in (root, root / "vtab-1k") for name in task.names)
    folder = lists.find_folder(root, task.id) or next((half for half in halves if half.is_dir()), None)
    if folder is None:
        cure = f"python -m vtab.data fetch --root {root} --task {task.id}"
        return Finding(task, faults=[f"{root / task.id} is not there, nor under another name; {cure}"])
    return examine_folder(folder, task, quick=quick, partial=partial, bar=bar)


def examine_folder(folder: Path, task: Task, *, quick: bool, partial: bool, bar: Any = None) -> Finding:
    """The task in `folder`."""
    found = Finding(task, folder)
    rows: lists.Rows = {}
    about: dict[str, Any] = {}
    for split, file in lists.LISTS.items():
        try:
            rows[split] = lists.read_list(folder / file)
        except ValueError as error:
            found.faults.append(str(error))
    try:
        about = lists.origin(folder)
    except ValueError as error:
        found.faults.append(str(error))
    found.images = {split: len(lines) for split, lines in rows.items()}
    found.source = about.get("source", "")
    found.variant = lists.variant(rows, about) if rows else ""
    found.faults += lists.faults(folder, rows, task, partial)
    found.faults += _mixed(folder, rows)
    found.faults += _unreadable(folder, rows, quick, bar)
    return found


def _mixed(folder: Path, rows: lists.Rows) -> Iterator[str]:
    formats = Counter(FORMATS.get(Path(name).suffix.lower(), "?") for lines in rows.values() for name, _ in lines)
    if "JPEG" in formats and len(formats) > 1:
        counts = ", ".join(f"{n:,} {kind}" for kind, n in formats.items())
        yield f"{folder} mixes formats ({counts}), so it is neither the jpeg nor the lossless copy; fetch it anew"


def _unreadable(folder: Path, rows: lists.Rows, quick: bool, bar: Any) -> Iterator[str]:
    # an image in two lists, or listed twice, is looked at once
    names = dict.fromkeys(name for lines in rows.values() for name, _ in lines)
    known: set[Path] = set()
    there = []
    for name in names:
        with contextlib.suppress(ValueError):  # a name that leads out is a fault already, and is not opened
            there += [path for path in (inside(folder, name, known),) if path.is_file()]
    for fault in side_by_side(_empty if quick else _decode, there):
        if bar is not None:
            bar.update()
        if fault:
            yield fault


def _empty(path: Path) -> str | None:
    return None if path.stat().st_size else f"{path} is empty (a broken copy?); fetch the task anew"


def _decode(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            kind = image.format
    except UNREADABLE as error:
        return f"{path} does not decode ({' '.join(str(error).split())}); replace the image, or fetch the task anew"
    if kind != FORMATS.get(path.suffix.lower(), kind):
        return f"{path} is {kind} inside, which its name hides; name it so in the folder and in the list"
    return None


def check(root: Path, chosen: list[Task], *, quick: bool = False, partial: bool = False) -> list[Finding]:
    """Print the table and the faults of the chosen tasks.

    Raises:
        ValueError: something is wrong; all of it is printed before.
    """
    if not root.is_dir():
        raise ValueError(f"--root {root} is not a folder; name the one that holds cifar, dtd and the others")
    itself = tasks.get(root.resolve().name)
    if itself and not any(lists.find_folder(root, task.id) for task in chosen if task != itself) and len(chosen) > 1:
        raise ValueError(f"--root {root} is {itself.id}'s own folder; name its parent, or pass --task {itself.id}")
    print(f"{'task':<21}{''.join(f'{split:>9}' for split in lists.LISTS)}  {'variant':<10}{'state':<10}source")
    findings = []
    with tqdm(unit="img", desc="check", leave=False, mininterval=0.5) as bar:
        for task in chosen:
            findings.append(examine(root, task, quick=quick, partial=partial, bar=bar))
            tqdm.write(findings[-1].row())
    wrong = [found for found in findings if found.faults]
    for found in wrong:
        for fault in found.faults[:SHOWN]:
            print(f"{found.task.id}: {' '.join(fault.split())}")
        if len(found.faults) > SHOWN:
            print(f"{found.task.id}: … and {len(found.faults) - SHOWN:,} more")
    if wrong:
        raise ValueError(
            f"{sum(len(found.faults) for found in wrong):,} faults in {len(wrong)} of {len(findings)} tasks of {root}; "
            "each is named above with its cure"
        )
    looked = "every file is there" if quick else "every image decodes"
    print(f"{len(findings)} tasks, {sum(sum(f.images.values()) for f in findings):,} images: {looked}")
    return findings


def add_command(commands: Any) -> None:
    """The subcommand check."""
    parser = commands.add_parser("check", help="is a folder a whole, readable VTAB-1k, and which variant?")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="holds cifar, dtd and the others")
    parser.add_argument("--task", metavar="A,B", help="these alone (default: all nineteen)")
    parser.add_argument("--quick", action="store_true", help="lists and files, without decoding the images")
    parser.add_argument("--partial", action="store_true", help="accept lists of other lengths than VTAB-1k's")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> list[Finding]:
    return check(args.root, tasks.several(args.task), quick=args.quick, partial=args.partial)
