"""The folder layout in which VTAB-1k circulates: images and four list files.

<root>/<task>/images/…            any file names, any image format
<root>/<task>/train800.txt        one line an image: images/train800/000000.jpg 307
<root>/<task>/val200.txt, train800val200.txt, test.txt
"""

from pathlib import Path

from vtab.data import Data, file_split, inside
from vtab.tasks import NAMES, Task

LISTS = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
LENGTHS = {"train": 800, "val": 200, "trainval": 1000}


def find_folder(root: Path, name: str) -> Path | None:
    """The task's folder in `root`: by its name or an alias, under vtab-1k/ too, or `root` itself."""
    task = NAMES.get(name)
    names = (task.id, *task.aliases) if task else (name,)
    folders = [base / alias for base in (root, root / "vtab-1k") for alias in names]
    return next((folder for folder in [*folders, root] if (folder / LISTS["train"]).is_file()), None)


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
    task = NAMES.get(name)
    rows = {split: _read(folder, file) for split, file in LISTS.items()}
    labels = [label for lines in rows.values() for _, label in lines]
    num_classes = task.num_classes if task else 1 + max(labels)
    if num_classes > max(len(labels), 1000):
        raise ValueError(
            f"{folder}: the largest label is {max(labels)}, with {len(labels)} images in all; mend the lists"
        )
    for split, lines in rows.items():
        _check(folder / LISTS[split], lines, num_classes)
        if not partial:
            _check_length(folder / LISTS[split], len(lines), _expected(task, split))
    both = sorted(label for split in ("train", "val") for _, label in rows[split])
    if both != sorted(label for _, label in rows["trainval"]):
        raise ValueError(
            f"{folder / LISTS['trainval']} does not hold the labels of train800.txt and val200.txt together"
        )
    splits = {split: file_split(folder, [p for p, _ in lines], [k for _, k in lines]) for split, lines in rows.items()}
    facts = {"generated": False, "classes_from": "the VTAB-1k table" if task else "the largest label in the lists"}
    return Data(
        task.id if task else name or folder.resolve().name,
        [str(k) for k in range(num_classes)],
        splits,
        f"lists in {folder.name}",
        facts,
    )


def _read(folder: Path, file: str) -> list[tuple[str, int]]:
    path = folder / file
    if not path.is_file():
        raise ValueError(f"{path} is missing; the VTAB-1k layout has {', '.join(LISTS.values())}")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file ({error})") from error
    for number, line in enumerate(lines, start=1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ValueError(f"{path}:{number}: {line!r} is not 'path label', such as 'images/test/000000.jpg 3'")
        rows.append((name, int(label)))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _check(path: Path, rows: list[tuple[str, int]], num_classes: int) -> None:
    for number, (name, label) in enumerate(rows, start=1):
        if label >= num_classes:
            raise ValueError(
                f"{path}:{number}: label {label} is out of range; the {num_classes} classes are 0 … {num_classes - 1}"
            )
        try:
            found = inside(path.parent, name).is_file()
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not found:
            raise ValueError(f"{path}:{number}: the image {name} is missing in {path.parent}")


def _expected(task: Task | None, split: str) -> int | None:
    return LENGTHS.get(split) or (task.test_images if task else None)


def _check_length(path: Path, found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f"{path} has {found} lines instead of {expected}; restore the list, or pass --partial to use it so"
        )


def write_lists(data: Data, folder: Path, test_limit: int | None = None) -> None:
    """Write a task as PNG files and lists in the layout above, so that anything that reads VTAB-1k reads it.

    Raises:
        ValueError: `folder` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; name another folder, or delete it first")
    for split, file in LISTS.items():
        chosen = data.splits[split].head(test_limit if split == "test" else None)
        stem = file.removesuffix(".txt")
        (folder / "images" / stem).mkdir(parents=True)
        lines = []
        for i, label in enumerate(chosen.labels):
            name = f"images/{stem}/{i:06d}.png"
            chosen.read(i).save(folder / name)
            lines.append(f"{name} {label}\n")
        (folder / file).write_text("".join(lines))
