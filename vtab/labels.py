"""Short names of methods, as the rows of tables have them."""

import dataclasses
from typing import Any

from capavision import Method
from vtab import recipes
from vtab.config import Config

SIZES = {"rank": "r", "length": "l"}


def scale_field(method: Method) -> str | None:
    """The field that scales the method's delta: what --tune searches beside the learning rate."""
    return next((name for name in ("alpha", "scale") if hasattr(method, name)), None)


def method(config: Config) -> str:
    """The run's method: "lora r8", "capaboost-lora r8 x2", then what differs from its defaults.

    What --tune chooses and what a recipe sets by task is left out: it differs between the runs of one table row.

    >>> from capavision import LoRA
    >>> method(Config(task="dtd", method=LoRA(branches=2, density=0.25)))
    'capaboost-lora r8 x2 density=0.25'
    """
    chosen: Any = config.method
    usual = {f.name: f.default for f in dataclasses.fields(chosen)}
    if "density" in usual:
        usual["density"] = dataclasses.replace(chosen, density=None).density
    by_task = _by_task(config)
    usual |= by_task
    if config.tune and (scale := scale_field(chosen)):
        usual[scale] = getattr(chosen, scale)
    branches = getattr(chosen, "branches", 1)
    words = [f"capaboost-{chosen.name}" if branches > 1 else chosen.name]
    words += [
        f"{sign}{getattr(chosen, size)}"
        for size, sign in SIZES.items()
        if hasattr(chosen, size) and size not in by_task
    ]
    words += [f"x{branches}"] if branches > 1 else []
    for name, default in usual.items():
        value = getattr(chosen, name)
        if value != default and name not in (*SIZES, "branches"):
            words.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    words += [f"{name}={value}" for name in ("targets", "parts") if (value := getattr(config, name))]
    return " ".join(words)


def _by_task(config: Config) -> dict[str, Any]:
    """The method's fields that the run's recipe sets by task."""
    if config.recipe is None:
        return {}
    recipe = recipes.find(config.recipe)
    values = recipe.values(config.task, {"rank": getattr(config.method, "rank", None)})[1]
    return {name: value for name, value in values.items() if name in recipe.by_task}
