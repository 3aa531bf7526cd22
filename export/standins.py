"""Help without the packages: while `python -m … --help` starts, stand-ins take the place of torch and its like.

A command's flags are dataclasses. The files that define them import torch, timm, scipy, … at their top, as they should,
for code that help never runs: seconds of waiting for a page of text. So in a process that was asked for help these
packages are not looked for. Classes that do nothing stand in, as Sphinx mocks imports: files can inherit from them,
call them, decorate with them, write them into annotations and dicts, which is what files do while they are imported.

Whatever else is asked of a stand-in fails, and once the command itself runs every call does. The same command then
starts again with the packages. So a stand-in never does work, and the worst of it is help as slow as without.
"""

import os
import subprocess
import sys
import types
from abc import ABCMeta
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from itertools import takewhile
from typing import Any, NoReturn

WHOLE = "CAPAVISION_WHOLE_HELP"  # in the environment: no stand-ins


class Meta(ABCMeta):
    """What a stand-in, a class, does. It is an ABCMeta so that files may write class Delta(nn.Module, ABC)."""

    sealed = False  # the command runs

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, made := stand_in(f"{cls.__name__}.{name}"))
        return made

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A decorator gives back what it decorates, any other call the stand-in itself."""
        if Meta.sealed:
            cls._refuse()
        return args[0] if len(args) == 1 and isinstance(args[0], (types.FunctionType, type)) else cls

    def _refuse(cls, *_: object) -> NoReturn:
        raise RuntimeError(f"{cls.__qualname__} was to do work, and a stand-in was there")

    __bool__ = __repr__ = __instancecheck__ = __subclasscheck__ = _refuse  # any answer might be wrong


class Importer:
    """Finds a stand-in for each module of these packages; modules are stand-ins like the rest."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        known = name.partition(".")[0] in self.packages
        return ModuleSpec(name, self, is_package=True) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> Any:
        return stand_in(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def stand_in(name: str) -> Meta:
    """A class that does nothing.

    >>> class Layer(stand_in("nn.Module")):
    ...     pass
    >>> hint = Layer | stand_in("nn.Linear")[int] | None
    """
    return Meta(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})


def serve(argv: list[str]) -> bool:
    """Whether a command with these arguments prints help and no more, so that stand-ins will do.

    >>> serve(["--method", "lora", "--help"]), serve(["photo.jpg", "--", "--help"])
    (True, False)
    """
    asked = not {"-h", "--help"}.isdisjoint(takewhile(lambda arg: arg != "--", argv))
    return asked and WHOLE not in os.environ


def install(packages: Iterable[str]) -> None:
    """From now on imports of these packages give stand-ins, and an uncaught error starts the command again without."""

    def again(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        if not issubclass(kind, Exception):
            return sys.__excepthook__(kind, error, trace)
        if os.environ.get("CAPAVISION_TRACEBACK"):
            sys.__excepthook__(kind, error, trace)
        sys.exit(subprocess.call([sys.executable, *sys.orig_argv[1:]], env={**os.environ, WHOLE: "1"}))

    sys.meta_path.insert(0, Importer(packages))  # type: ignore[arg-type]
    sys.excepthook = again


def seal() -> None:
    """From now on the command runs, and no stand-in is called."""
    Meta.sealed = True
