"""What every command does: a user's mistake is one line on stderr, exit code 2, no traceback; figures are kept whole.

Standard library only: vtab.cli builds on it, and a machine that only runs packages has no torch.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from export import standins

OURS = ("benchmarks", "examples", "export", "vtab")  # the packages with commands
STOPPED = 130  # what shells report for Ctrl-C
EXTRAS = {  # of capavision: what each brings, by the name that is imported; "" is capavision itself
    "export": ("onnx", "onnxruntime", "onnxscript", "PIL"),
    "vtab": ("sklearn", "scipy", "matplotlib", "tqdm", "filelock", "rich", "jinja2"),
    "text": ("transformers", "datasets", "tokenizers", "sentencepiece"),
    "tfds": ("tensorflow_datasets", "tensorflow", "importlib_resources"),
    "ray": ("ray",),
    "slurm": ("submitit",),
    "": ("torch", "torchvision", "timm", "numpy", "safetensors", "huggingface_hub"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, through `run`, and that takes no shortened flags."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """One sentence that says where help is."""
        raise ValueError(f"{message}; see {self.prog} --help")


def at_least(least: int, args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for a flag that has a number, or a list with one, below `least`; None is no number."""
    for name in names:
        given = getattr(args, name)
        numbers = given if isinstance(given, list) else [given]
        if any(number is not None and number < least for number in numbers):
            raise ValueError(f"--{name.replace('_', '-')} {','.join(map(str, numbers))} must be at least {least}")


def numbers(text: str) -> list[int]:
    """A flag's list of whole numbers.

    >>> numbers("1,8")
    [1, 8]
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between them, as 1,8") from None


def write_json(path: Path, content: Any) -> None:
    """Write figures, whole or not at all; the folder is made.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def run(main: Callable[[], Any], stopped: str = "nothing was written") -> None:
    """Call `main`; turn what a user can mend into one line on stderr and exit code 2, without a traceback.

    A package that is not installed counts too, if an extra of ours brings it. CAPAVISION_TRACEBACK=1 shows the
    traceback all the same. After Ctrl-C `stopped` says what there is.
    """
    standins.seal()
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if not (told := _told(error)):
            raise
        _refuse(told)


def _told(error: BaseException) -> str:
    """The line; nothing where the traceback is to be seen."""
    if os.environ.get("CAPAVISION_TRACEBACK"):
        return ""
    return absent(error) if isinstance(error, ModuleNotFoundError) else printable(" ".join(str(error).split()))


@contextlib.contextmanager
def narrated() -> Iterator[None]:
    """Within it the exporter's log is told at a terminal, a line a stage: it takes half a minute and more."""
    if not sys.stderr.isatty():
        yield
        return
    log, handler = logging.getLogger("export"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s …"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # ONNX Runtime's quantizer gives the root a handler, which would say all again
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def printable(text: str) -> str:
    r"""The text without characters that steer a terminal, as those of a stranger's file may: they stand as escapes.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _refuse(told: str) -> NoReturn:
    print(f"error: {told}", file=sys.stderr)
    sys.exit(2)


def absent(error: ImportError) -> str:
    """Which package is missing, and what brings it; nothing where that is no package of ours.

    >>> absent(ModuleNotFoundError(name="onnx"))
    "onnx is not installed; pip install 'capavision[export]'"
    """
    extra = next((extra for extra, names in EXTRAS.items() if error.name in names), None)
    brings = f"'capavision[{extra}]'" if extra else "capavision"
    return "" if extra is None else f"{error.name} is not installed; pip install {brings}"


@functools.cache  # each package calls it
def guard_imports() -> None:
    """In python -m …, tell as `run` does what a command's module lacks to be imported, which is before `run`.

    Help of our own commands needs no package: stand-ins serve it. Who imports us may do work whatever the flags say.
    """
    if sys.argv[:1] != ["-m"]:  # as it is while Python looks for the module
        return
    if _command().partition(".")[0] in OURS and standins.serve(sys.argv[1:]):
        return standins.install([*(name for names in EXTRAS.values() for name in names), "google"])  # of protobuf

    def told(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError) and (said := _told(error)):
            _refuse(said)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = told


def _command() -> str:
    """What follows -m, which stands before the arguments: python -I -m vtab.train …, python -Imvtab.train …"""
    word = sys.orig_argv[-len(sys.argv)]
    return word.partition("m")[2] if word.startswith("-") else word


def first_line(error: BaseException) -> str:
    """Of what an error says; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
