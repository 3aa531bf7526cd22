"""The folder layout in which VTAB-1k circulates: images and four list files.

<root>/<task>/images/…            any file names, any image format
<root>/<task>/train800.txt        one line an image: images/train800/000000.jpg 307
<root>/<task>/val200.txt, train800val200.txt, test.txt
<root>/<task>/origin.json         ours, where we know it: what these images are, for every record
"""

import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from capavision.files import new_folder
from vtab import tasks
from vtab.data import LOSSLESS, Data, file_split, inside, side_by_side
from vtab.tasks import Task
from vtab.textfile import read, read_json, write

LISTS = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
LENGTHS = {"train": 800, "val": 200, "trainval": 1000}
ORIGIN = "origin.json"
Rows = dict[str, list[tuple[str, int]]]


def find_folder(root: Path, name: str) -> Path | None:
    """The task's folder in `root`: by its name or an alias, under vtab-1k/ too, or `root` itself."""
    task = tasks.get(name)
    folders = [base / alias for base in (root, root / "vtab-1k") for alias in (task.names if task else (name,))]
    # dtd's own folder as the root is welcome, but not when another task is asked for
    itself = [] if task and tasks.get(root.resolve().name) not in (None, task) else [root]
    return next((f for f in [*folders, *itself] if any((f / file).is_file() for file in LISTS.values())), None)


def open_lists(folder: Path, name: str, partial: bool = False) -> Data:
    """The task in `folder`.

    Args:
        folder: holds the list files.
        name: a VTAB task, whose class count holds, or any name: then the labels of all lists tell the classes.
        partial: accept lists of other lengths than VTAB-1k's.

    Raises:
        ValueError: a list that is missing, empty in a line, of the wrong length; an image that is missing or lies
            outside the folder; a label out of range.
    """
    task = tasks.get(name)
    rows = {split: read_list(folder / file) for split, file in LISTS.items()}
    for fault in faults(folder, rows, task, partial):
        raise ValueError(fault)
    about = origin(folder)
    facts = {
        "generated": about.get("generated", False),
        "variant": variant(rows, about),
        "classes_from": "the VTAB-1k table" if task else "the largest label in the lists",
    }
    listed = f"lists in {folder.name}"
    return Data(
        task.id if task else name or folder.resolve().name,
        [str(k) for k in range(_classes(rows, task))],
        {split: file_split(folder, [p for p, _ in lines], [k for _, k in lines]) for split, lines in rows.items()},
        f"{about['source']}, {listed}" if "source" in about else listed,
        facts,
    )


def read_list(path: Path) -> list[tuple[str, int]]:
    """(image, label) of every line.

    Raises:
        ValueError: no such file, no text, a line of another form, no line at all.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; the VTAB-1k layout has {', '.join(LISTS.values())}")
    rows = []
    for number, line in enumerate(read(path).splitlines(), start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not (label.isascii() and label.isdecimal() and len(label) < 10):
            raise ValueError(f"{path}:{number}: {line!r} is not 'path label', such as 'images/test/000000.jpg 3'")
        rows.append((name, int(label)))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def faults(folder: Path, rows: Rows, task: Task | None, partial: bool = False) -> Iterator[str]:
    """What is wrong with lists that could be read: a line each, with file, line and cure."""
    num_classes = _classes(rows, task)
    images = sum(map(len, rows.values()))
    if num_classes > max(images, 1000):
        yield f"{folder}: the largest label is {num_classes - 1}, with {images} images in all; mend the lists"
        return
    known: set[Path] = set()
    for split, lines in rows.items():
        path = folder / LISTS[split]
        for number, (name, label) in enumerate(lines, start=1):
            where = f"{path}:{number}:"
            if label >= num_classes:
                classes = f"the {num_classes} classes are 0 … {num_classes - 1}"
                yield f"{where} label {label} is out of range; {classes}; mend the list, or fetch the task anew"
            try:
                if not inside(folder, name, known).is_file():
                    yield f"{where} the image {name} is missing in {folder}; restore it, or fetch the task anew"
            except ValueError as error:
                yield f"{where} {error}"
        leaks = _leaks(rows, split)
        if leaks:
            yield f"{path}: {leaks[0]} and {len(leaks) - 1} more of its images are trained on too; restore the lists"
        expected = _lengths(task, split)
        if not partial and expected and len(lines) not in expected:
            wanted = " or ".join(map(str, expected))
            yield f"{path} has {len(lines)} lines instead of {wanted}; restore the list, or pass --partial to use it so"
    both, together = (
        Counter(k for s in names for _, k in rows.get(s, [])) for names in (("train", "val"), ("trainval",))
    )
    if len(rows) == len(LISTS) and both != together:
        differ = sorted(k for k in both | together if both[k] != together[k])
        yield (
            f"{folder / LISTS['trainval']} does not hold the labels of train800.txt and val200.txt together (class "
            f"{differ[0]}: {together[differ[0]]} instead of {both[differ[0]]}); restore the three lists"
        )


def _leaks(rows: Rows, split: str) -> list[str]:
    """Images of a list that judges which a list that is trained on names too."""
    trained = {"val": ("train",), "test": ("train", "val", "trainval")}.get(split, ())
    seen = {posixpath.normpath(name) for other in trained for name, _ in rows.get(other, [])}
    return [name for name, _ in rows[split] if posixpath.normpath(name) in seen]


def origin(folder: Path) -> dict[str, Any]:
    """What origin.json says of the images; nothing where there is none.

    Raises:
        ValueError: a file of another form.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return {}
    about = read_json(path)
    if not isinstance(about, dict) or not isinstance(about.get("source", ""), str):
        raise ValueError(f"{path} is damaged (no object with a source); fetch the task anew, or delete the file")
    return {**about, "generated": about.get("generated") is True}


def variant(rows: Rows, about: dict[str, Any]) -> str:
    """jpeg or lossless, by the files' names, and generated if the origin says so: three different benchmarks.

    Images that were JPEG once stay damaged in whatever form they are kept, so the origin's word for jpeg counts too.
    """
    if about.get("generated"):
        return "generated"
    kept = all(name.lower().endswith(LOSSLESS) for lines in rows.values() for name, _ in lines)
    return "lossless" if kept and about.get("variant") != "jpeg" else "jpeg"


def _classes(rows: Rows, task: Task | None) -> int:
    return task.num_classes if task else 1 + max(label for lines in rows.values() for _, label in lines)


def _lengths(task: Task | None, split: str) -> tuple[int, ...]:
    if split in LENGTHS:
        return (LENGTHS[split],)
    return task.test_lengths if task else ()


def write_lists(data: Data, folder: Path, test_limit: int | None = None) -> None:
    """Write a task as PNG files and lists in the layout above, so that anything that reads VTAB-1k reads it.

    The folder appears when it is complete, or not at all.

    Raises:
        ValueError: `folder` exists.
    """
    with new_folder(folder) as temporary:
        fill(temporary, data, test_limit)


def fill(folder: Path, data: Data, test_limit: int | None = None) -> None:
    """The files of `write_lists`, in a folder that is there already."""
    chosen = {split: data.splits[split].head(test_limit if split == "test" else None) for split in LISTS}
    with tqdm(total=sum(map(len, chosen.values())), unit="img", desc=data.task, mininterval=0.5) as bar:
        for name, split in chosen.items():
            stem = Path(LISTS[name]).stem
            (folder / "images" / stem).mkdir(parents=True)

            def save(i: int, stem: str = stem, split: Any = split) -> str:
                image = f"images/{stem}/{i:06d}.png"
                split.read(i).save(folder / image)
                return f"{image} {split.labels[i]}\n"

            with (folder / LISTS[name]).open("w") as file:
                for line in side_by_side(save, range(len(split))):
                    file.write(line)
                    bar.update()
    mark(folder, data.source, data.facts.get("variant", "lossless"), bool(data.facts.get("generated")))


def mark(folder: Path, source: str, kind: str, generated: bool = False) -> None:
    """Write origin.json."""
    write(folder / ORIGIN, json.dumps({"source": source, "variant": kind, "generated": generated}, indent=1) + "\n")
