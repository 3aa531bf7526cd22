"""python -m vtab.data fetch: get VTAB-1k, task by task; a task's folder is whole or not there.

--source hub          the zip that circulates, from the Hugging Face hub: the JPEG copy. It goes on where it stopped,
                      and is compared with the digest that the hub states for it.
--source tfds         the lossless copy, made with TensorFlow Datasets (vtab.lossless)
--source generated    the two dSprites tasks, drawn here and marked so
--source PATH         a zip, or a folder in the layout, that you have
"""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from capavision.files import new_folder
from vtab import archive, generated, hub, lists, tasks
from vtab.check import examine, examine_folder
from vtab.data import inside, open_task
from vtab.disk import require, saying_full
from vtab.tasks import Task

BLOCK = 4096  # bytes that a small file takes on most disks
Fill = Callable[[Path], None]


def fetch(root: Path, chosen: list[Task], source: str = "hub", *, allow_partial: bool = False) -> list[Path]:
    """Put the chosen tasks into `root`, except those that are there already; returns their folders.

    Raises:
        ValueError: a task that is there but damaged (it is left as it is), a source that lacks one, a full disk, an
            interrupted download; what was finished before stays, and the same command goes on.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(root / ".fetch.lock", blocking=False), saying_full(root):
            _sweep(root, chosen)
            missing, broken = _sort(root, chosen, allow_partial)
            if missing:
                with _fillers(root, missing, source, allow_partial) as fillers:
                    for task, fill in fillers:
                        _install(root, task, fill, allow_partial)
    except Timeout:
        raise ValueError(f"another process fetches into {root}; wait for it") from None
    if broken:
        raise ValueError(
            f"{', '.join(broken)} in {root} are there but damaged, and were left alone; python -m vtab.data check "
            f"--root {root} tells what is wrong; move them away and fetch again"
        )
    return [folder for task in chosen if (folder := lists.find_folder(root, task.id))]


def _sweep(root: Path, chosen: list[Task]) -> None:
    """Remove what a fetch left that was killed while it wrote; nobody else is writing, for the root is locked."""
    for task in chosen:
        for leftover in root.glob(f".{task.id}.????????"):
            shutil.rmtree(leftover, ignore_errors=True)


def _sort(root: Path, chosen: list[Task], allow_partial: bool) -> tuple[list[Task], list[str]]:
    """The tasks that are not there, and the names of those that are there with faults."""
    missing, broken = [], []
    for task in chosen:
        found = examine(root, task, quick=True, partial=allow_partial)
        if found.folder is None:
            missing.append(task)
        elif found.faults:
            broken.append(task.id)
            print(f"{task.id}: {found.faults[0]}")
        else:
            print(f"{found.folder}: there already, {found.variant}")
    return missing, broken


def _install(root: Path, task: Task, fill: Fill, allow_partial: bool) -> None:
    with new_folder(root / task.id) as folder:
        fill(folder)
        found = examine_folder(folder, task, quick=True, partial=allow_partial)
        if found.faults:
            raise ValueError(f"{task.id} is not whole in the source: {found.faults[0].replace(str(folder), task.id)}")
    licence = "" if found.variant == "generated" else f", licence: {task.licence}"
    print(f"{root / task.id}: {sum(found.images.values()):,} images, {found.variant}{licence}")


@contextlib.contextmanager
def _fillers(
    root: Path, missing: list[Task], source: str, allow_partial: bool
) -> Iterator[Iterator[tuple[Task, Fill]]]:
    """For each missing task, what writes its files into a folder."""
    if source == "hub":
        path = hub.download(root, sum(map(_images, missing)) / sum(map(_images, tasks.VTAB)))
        about = f"hub {hub.REPO} {hub.FILE}, sha256 {path.stem.rpartition('-')[2]}…"
        yield _from_zip(root, path, missing, about)
        if all(lists.find_folder(root, task.id) for task in tasks.VTAB):
            path.unlink()
        else:
            print(f"{path} stays for the tasks that are still to be fetched; delete it when you need none")
    elif source == "tfds":
        from vtab import lossless

        yield ((task, partial(lossless.fill, task=task)) for task in missing)
    elif source == "generated":
        for task in missing:
            if task.id not in generated.SOURCES:
                made = ", ".join(generated.SOURCES)
                raise ValueError(f"{task.id} cannot be generated; pass --task with some of {made}")
        require(root, sum(map(_images, missing)) * BLOCK, "drawing the images")
        yield ((task, partial(lists.fill, data=open_task(task.id))) for task in missing)
    elif Path(source).is_dir():
        yield _from_folder(root, Path(source), missing, allow_partial)
    elif Path(source).is_file():
        yield _from_zip(root, Path(source), missing, None)
    else:
        raise ValueError(f"--source {source} is neither hub, tfds, generated, nor a folder or zip file that is here")


def _from_zip(root: Path, path: Path, missing: list[Task], about: str | None) -> Iterator[tuple[Task, Fill]]:
    held = archive.contents(path)
    _refuse_absent([task for task in missing if task.id not in held], str(path), bool(held))
    require(root, sum(m.file_size for task in missing for m in held[task.id].values()), f"unpacking {path.name}")

    def fill(folder: Path, task: Task) -> None:
        with tqdm(total=len(held[task.id]), unit="file", desc=f"unpack {task.id}", mininterval=0.5) as bar:
            archive.unpack(path, held[task.id], folder, bar.update)
        if about and not (folder / lists.ORIGIN).is_file():
            lists.mark(folder, about, "jpeg")

    return ((task, partial(fill, task=task)) for task in missing)


def _from_folder(root: Path, source: Path, missing: list[Task], allow_partial: bool) -> Iterator[tuple[Task, Fill]]:
    folders = {task.id: lists.find_folder(source, task.id) for task in missing}
    _refuse_absent([task for task in missing if not folders[task.id]], str(source), any(folders.values()))

    def fill(folder: Path, task: Task) -> None:
        origin = folders[task.id]
        assert origin is not None
        faults = examine_folder(origin, task, quick=True, partial=allow_partial).faults
        if faults:
            raise ValueError(faults[0])
        rows = [row for file in lists.LISTS.values() for row in lists.read_list(origin / file)]
        names = [*lists.LISTS.values(), *dict.fromkeys(name for name, _ in rows)]
        names += [lists.ORIGIN] if (origin / lists.ORIGIN).is_file() else []
        known: set[Path] = set()
        paths = {name: inside(origin, name, known) for name in names}
        require(root, sum(path.stat().st_size for path in paths.values()), f"a copy of {origin}")
        for name, path in tqdm(paths.items(), unit="file", desc=f"copy {task.id}", mininterval=0.5):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)

    return ((task, partial(fill, task=task)) for task in missing)


def _refuse_absent(absent: list[Task], where: str, some: bool) -> None:
    if absent:
        names = ", ".join(task.id for task in absent)
        cure = "pass --task with those it has" if some else "it must hold folders such as cifar/ or vtab-1k/cifar/"
        raise ValueError(f"{where} lacks {names}; {cure}")


def _images(task: Task) -> int:
    return 2000 + task.test_images


def add_command(commands: Any) -> None:
    """The subcommand fetch."""
    parser = commands.add_parser("fetch", help="get tasks: from the hub, TensorFlow Datasets, or a copy you have")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="where the tasks' folders go")
    parser.add_argument(
        "--task", metavar="A,B", help="these alone (default: all nineteen; generated: the two dSprites)"
    )
    parser.add_argument(
        "--source", default="hub", metavar="WHAT", help="hub (default), tfds, generated, a folder, a zip"
    )
    parser.add_argument("--partial", action="store_true", help="accept lists of other lengths than VTAB-1k's")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> list[Path]:
    made = "dsprites_loc,dsprites_ori" if args.source == "generated" else None
    return fetch(args.root, tasks.several(args.task or made), args.source, allow_partial=args.partial)
