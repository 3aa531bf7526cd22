"""The command line of a training: its general flags, those of the method that it names, a recipe, several seeds."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import capavision as cv
from capavision.targets import near
from vtab import cli, grid, recipes
from vtab.recipes import Recipe
from vtab.training import Training


@dataclass(frozen=True)
class Command:
    """A command that trains.

    prog, description: as the help has them
    config: the dataclass of its settings, a Training
    choices: the values that its fields may have, for the help
    recipes: those that --recipe knows, by name
    """

    prog: str
    description: str
    config: type[Training]
    choices: Mapping[str, Iterable[str]]
    recipes: Mapping[str, Recipe]

    def parser(self, argv: list[str] | None) -> tuple[cli.Parser, type[cv.Method], Recipe | None]:
        """The parser of this command line: general flags, and those of the method that it or its recipe names.

        Raises:
            ValueError: an unknown method or recipe, a recipe of another method.
        """
        first = cli.Parser(add_help=False)
        for flag in ("--method", "--recipe"):
            first.add_argument(flag)
        early = first.parse_known_args(argv)[0]
        recipe = recipes.find(early.recipe, self.recipes) if early.recipe else None
        name = (early.method or (recipe and recipe.method) or "lora").replace("-", "_")
        if early.method in grid.SETTINGS:
            ((method, flags),) = grid.expand_methods(early.method).values()
            raise ValueError(f"{early.method} is --method {method} {' '.join(flags)}")
        if name not in cv.Method.known:
            raise ValueError(f"unknown method {name!r}; {near(name, cv.Method.known)}")
        if recipe and recipe.method not in (None, name):
            fitting = ", ".join(r.name for r in self.recipes.values() if r.method in (None, name)) or "none"
            raise ValueError(
                f"--recipe {recipe.name} is one of {recipe.method}, not of {name}; those that fit: {fitting}"
            )
        parser = cli.Parser(
            prog=self.prog,
            description=self.description,
            epilog=f"Methods: {', '.join(sorted(cv.Method.known))}; each has flags of its own: --method NAME --help.",
        )
        cli.add_fields(parser.add_argument_group("run"), self.config, self.choices)
        chosen = parser.add_argument_group(f"method {name}")
        chosen.add_argument("--method", default="lora", metavar="NAME", help="(default: lora, or the recipe's)")
        cli.add_fields(chosen, cv.Method.known[name])
        parser.elsewhere = _of_other_methods(name)
        return parser, cv.Method.known[name], recipe

    def configure(self, values: argparse.Namespace, method: type[cv.Method], recipe: Recipe | None) -> Any:
        """The settings from parsed flags over the recipe's values over the defaults."""
        given = vars(values)
        settings, of_method = recipe.values(given.get("task", ""), given) if recipe else ({}, {})
        merged, own = (argparse.Namespace(**(defaults | given)) for defaults in (settings, of_method))
        return cli.collect(self.config, merged, method=cli.collect(method, own))

    def parse(self, argv: list[str] | None = None) -> Any:
        """The command line as settings: general flags, and those of the chosen method.

        Raises:
            ValueError: an unknown method, or values that do not fit each other.
        """
        parser, method, recipe = self.parser(argv)
        return self.configure(parser.parse_args(argv), method, recipe)


def _of_other_methods(name: str) -> dict[str, str]:
    """Of each flag that other methods have and `name` lacks, the sentence that says so."""
    flags = {known: [cli.flag(field) for field in cli.field_docs(method)] for known, method in cv.Method.known.items()}
    own = f"{name} has {', '.join(flags[name]) or 'no flags of its own'}"
    owners: dict[str, list[str]] = {}
    for known in sorted(flags):
        for flag in flags[known]:
            owners.setdefault(flag, []).append(known)
    return {flag: f"{own}; {flag} is of {', '.join(owners[flag])}" for flag in owners if flag not in flags[name]}
