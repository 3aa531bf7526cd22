"""The words of a sweep's --tasks, --methods and --seeds, and what each stands for."""

from pathlib import Path

import capavision as cv
from capavision.targets import near
from vtab import lists, tasks
from vtab.generated import SOURCES
from vtab.tasks import NAMES, find, pieces

# Settings under a name of their own; every method's name is one too. More can follow: capaboost-lora:rank=4.
SETTINGS = {
    "capaboost-lora": "lora:branches=2,masks=complementary",
    "capaboost-adapter": "adapter:branches=2,masks=complementary",
    "capaboost-prefix": "prefix:branches=2,masks=complementary",
    "propetl-lora": "lora:masks=learned,rank=32,alpha=48,density=0.1",
    "propetl-adapter": "adapter:masks=learned,rank=64",
}
GROUPS = {"all": [task.id for task in tasks.VTAB], "builtin": list(SOURCES), **tasks.GROUPS}
OURS = ("task", "method", "seed", "name", "out", "data-root")  # flags of vtab.train that a sweep sets itself


def expand_tasks(text: str, root: Path | None = None) -> list[str]:
    """Task ids, in the order given, each once.

    Raises:
        ValueError: a name that is no task, no group and no folder of lists in `root`; or no name at all, and no root.

    >>> expand_tasks("structured,pets")[-2:]
    ['smallnorb_ele', 'oxford_iiit_pet']
    """
    names = pieces(text)
    if not names and root is None:
        raise ValueError("name the tasks: --tasks all, say, or --tasks builtin, which needs no download")
    found: list[str] = []
    for name in names:
        try:
            found += GROUPS.get(name) or [find(name).id]
        except ValueError:
            if root is None or not (root / name / lists.LISTS["train"]).is_file():
                raise ValueError(f"unknown task {name!r}; {near(name, [*NAMES, *GROUPS])}") from None
            found.append(name)
    return list(dict.fromkeys(found)) or [""]


def expand_methods(text: str) -> dict[str, tuple[str, list[str]]]:
    """What each method of the list stands for: its name for vtab.train, and flags.

    Raises:
        ValueError: an unknown name, a setting without a method, one that the sweep sets itself.

    >>> expand_methods("capaboost-lora:rank=4,bitfit")["capaboost-lora:rank=4"]
    ('lora', ['--branches', '2', '--masks', 'complementary', '--rank', '4'])
    """
    labels: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if "=" in piece and ":" not in piece and labels:  # a setting of the method before it
            labels[-1] += f",{piece}"
        elif piece:
            labels.append(piece)
    if not labels:
        raise ValueError("name the methods: --methods lora,capaboost-lora, say")
    return {label: _method(label) for label in labels}


def _method(label: str) -> tuple[str, list[str]]:
    name, _, settings = label.partition(":")
    if name in SETTINGS:
        method, flags = _method(SETTINGS[name])
    else:
        method, flags = name.replace("-", "_"), []
        if method not in cv.Method.known:
            raise ValueError(f"unknown method {name!r}; {near(name, [*cv.Method.known, *SETTINGS])}")
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        flag = f"--{key.strip().replace('_', '-')}"
        if flag[2:] in OURS:
            raise ValueError(f"{label}: {key} is the sweep's to set; it has --tasks, --methods, --seeds and --out")
        flags += [flag] if value in ("", "true") else [flag, value]
    return method, flags
