"""A plain folder of class folders, with a split that is drawn once and written down.

<root>/cat/….jpg  <root>/dog/….jpg     the folders' names are the classes
<root>/capavision_split.json           which image is in which split, so that it stays
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from vtab.data import IMAGES, Data, file_split, inside
from vtab.textfile import digest, read_json, write

FILE = "capavision_split.json"
SMALLEST = 5


def open_folder(root: Path, name: str = "", seed: int = 0, split_file: Path | None = None) -> Data:
    """The images of `root`: the written split if there is one, else a stratified draw of 64 / 16 / 20 %.

    Raises:
        ValueError: fewer than two classes, a class with fewer than 5 images, a split file that does not fit.
    """
    path = split_file or root / FILE
    classes, files = _scan(root)
    if not path.is_file():
        _write(path, {"seed": seed, "classes": classes, **_draw(files, seed)})
    split = _read(path, root, classes)
    split["trainval"] = split["train"] + split["val"]
    labels = {name: classes.index(name.split("/")[0]) for names in split.values() for name in names}
    splits = {name: file_split(root, names, [labels[n] for n in names]) for name, names in split.items()}
    unlisted = len(set(files) - labels.keys())
    if unlisted:
        print(
            f"{unlisted} images of {root} are not in {path.name}, which was drawn before them; delete it to draw anew"
        )
    sized = {part: [(name, (root / name).stat().st_size) for name in sorted(names)] for part, names in split.items()}
    facts = {
        "generated": False,
        "variant": "files",
        "split_file": path.name,
        "images_outside_split": unlisted,
        "digest": digest(sorted([*sized["trainval"], *sized["test"]])),
        "test_digest": digest(sized["test"]),
    }
    return Data(name or root.resolve().name, classes, splits, f"class folders in {root.resolve().name}", facts)


def _scan(root: Path) -> tuple[list[str], list[str]]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder")
    classes, files = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = sorted(p.relative_to(root).as_posix() for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
        if found:
            classes.append(folder.name)
            files += found
            if len(found) < SMALLEST:
                raise ValueError(f"class {folder.name!r} has {len(found)} images; a stratified split needs {SMALLEST}")
    if len(classes) < 2:
        raise ValueError(
            f"{root} holds {len(classes)} class folders with images; it must be a folder of class folders, or one in "
            "the VTAB-1k layout (train800.txt and the other lists)"
        )
    return classes, files


def _draw(files: Sequence[str], seed: int) -> dict[str, list[str]]:
    from sklearn.model_selection import train_test_split

    folder = [name.split("/")[0] for name in files]
    rest, test, rest_folder, _ = train_test_split(
        files, folder, test_size=_fifth(folder), stratify=folder, random_state=seed
    )
    train, val = train_test_split(rest, test_size=_fifth(rest_folder), stratify=rest_folder, random_state=seed)
    return {"train": train, "val": val, "test": test}


def _write(path: Path, drawn: dict[str, Any]) -> None:
    """Write a draw, unless another process with another seed was faster: all runs must have one split."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.is_file():
                write(path, json.dumps(drawn, indent=1))
    except OSError as error:
        raise ValueError(
            f"cannot write the split to {path} ({error.strerror}); name a place with --split-file"
        ) from error


def _fifth(labels: Sequence[str]) -> int:
    """20 % of the images, but one of each class at least."""
    return max(math.ceil(0.2 * len(labels)), len(set(labels)))


def _read(path: Path, root: Path, classes: list[str]) -> dict[str, list[str]]:
    try:
        written = read_json(path)
        split = {name: [str(n) for n in written[name]] for name in ("train", "val", "test")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no split file ({error!r}); delete it to draw the split again") from error
    if written.get("classes") != classes:
        raise ValueError(
            f"{path} was drawn for the classes {written.get('classes')}, the folder has {classes}; delete it"
        )
    everything = [n for names in split.values() for n in names]
    if len(set(everything)) < len(everything) or not all(split.values()):
        raise ValueError(f"{path} lists an image twice, or leaves a split empty; delete it to draw the split again")
    for name in everything:
        if not inside(root, name).is_file() or name.split("/")[0] not in classes:
            raise ValueError(
                f"{path} lists {name}, which is not in a class folder of {root}; delete the file to draw again"
            )
    return split
