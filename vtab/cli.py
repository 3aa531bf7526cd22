"""Command lines from dataclasses: a field is a flag; a user's mistake is one line and exit code 2."""

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_args, get_type_hints

import export.cli as commands
from capavision.targets import near


class Parser(commands.Parser):
    """The parser of every command here: unknown flags get near names."""

    elsewhere: Mapping[str, str] = {}  # flags that other methods have: a sentence that says so

    def error(self, message: str) -> NoReturn:
        """One sentence."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if not unknown:
            super().error(message)
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        raise ValueError(f"{message}; {self.elsewhere.get(unknown[1]) or near(unknown[1], flags)}")


run = partial(commands.run, stopped="the same command goes on, a training run from its last finished epoch")


def field_docs(config: type) -> dict[str, str]:
    """What the dataclass's docstring, and its bases', say of each field: lines of the form "name: text"."""
    docs: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(config)}
    for cls in reversed(config.__mro__):
        current = None
        for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
            start = re.match(r"(\w+):\s+(.*)", line)
            if start and start[1] in names:
                current, docs[start[1]] = start[1], start[2]
            elif current and line.startswith("  "):
                docs[current] += " " + line.strip()
            else:
                current = None
    return docs


def flag(field: str) -> str:
    """
    >>> flag("mask_lr")
    '--mask-lr'
    """
    return f"--{field.replace('_', '-')}"


def add_fields(parser: Any, config: type, choices: Mapping[str, Iterable[str]] = MappingProxyType({})) -> None:
    """One flag for each field of the dataclass `config` that its docstring explains, its bases' fields last.

    Args:
        parser: gets the flags.
        config: the dataclass.
        choices: the values that a field may have, for the help; the dataclass itself refuses others.
    """
    hints, docs = get_type_hints(config), field_docs(config)
    explained = {field.name: field for field in dataclasses.fields(config) if field.name in docs}
    own = {name: explained[name] for name in inspect.get_annotations(config) if name in explained}
    for field in (own | explained).values():
        kind, default = _plain(hints[field.name]), field.default
        told = default not in (None, "", dataclasses.MISSING) and default is not False
        shown = f" (default: {default})" if told else ""
        text = docs[field.name].rstrip(".").replace("%", "%%") + shown
        keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction  # what a recipe sets can be unset
        else:
            names = choices.get(field.name)
            keywords |= {"type": kind, "metavar": f"{{{','.join(names)}}}" if names else kind.__name__.upper()}
        parser.add_argument(flag(field.name), **keywords)


def collect(config: type, values: argparse.Namespace, **more: Any) -> Any:
    """An instance of `config` from parsed flags; absent flags take the field's default."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{k: v for k, v in vars(values).items() if k in names and k not in more}, **more)


def _plain(hint: Any) -> type:
    """`float | None` -> float."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    assert hint in (int, float, str, bool, Path), hint
    kind: type = hint
    return kind
