"""Short names of methods, as the rows of tables have them."""

import dataclasses
from typing import Any

import capavision as cv
from vtab.recipes import RECIPES
from vtab.training import Training

SIZES = {"rank": "r", "length": "l"}
SCALES = ("alpha", "scale")


def scale_field(method: cv.Method) -> str | None:
    """The field that scales the method's delta: what --tune searches beside the learning rate."""
    return next((name for name in SCALES if hasattr(method, name)), None)


def method(config: Training) -> str:
    """The run's method: "lora r8", "capaboost-lora r8 x2", then what differs from its defaults.

    What --tune chooses and what a recipe sets by task is left out: it differs between the runs of one table row.

    >>> from capavision import LoRA
    >>> from vtab.config import Config
    >>> method(Config(task="dtd", method=LoRA(branches=2, density=0.25)))
    'capaboost-lora r8 x2 density=0.25'
    """
    return recorded(config.record())


def recorded(config: dict[str, Any]) -> str:
    """`method` of settings as config.json has them, of whatever version."""
    own = dict(config["method"])
    name, branches = own.pop("name"), own.get("branches", 1)
    by_task = _by_task(config)
    usual = _defaults(name, own) | by_task
    if config.get("tune"):
        usual |= {scale: own[scale] for scale in SCALES if scale in own}
    words = [f"capaboost-{name}" if branches > 1 else name]
    words += [f"{sign}{own[size]}" for size, sign in SIZES.items() if size in own and own[size] != by_task.get(size)]
    words += [f"x{branches}"] if branches > 1 else []
    for field, value in own.items():
        if field not in (*SIZES, "branches") and value != usual.get(field):
            words.append(f"{field}={value:g}" if isinstance(value, float) else f"{field}={value}")
    words += [f"{field}={config[field]}" for field in ("targets", "parts") if config.get(field)]
    return " ".join(words)


def _defaults(name: str, own: dict[str, Any]) -> dict[str, Any]:
    """The method's defaults, with the density that its branches and masks have by default."""
    shared = {field: own[field] for field in ("branches", "masks") if field in own}
    try:
        resolved: Any = cv.Method.known[name](**shared)
    except (KeyError, TypeError, ValueError):  # of another version
        return {}
    return {f.name: resolved.density if f.name == "density" else f.default for f in dataclasses.fields(resolved)}


def _by_task(config: dict[str, Any]) -> dict[str, Any]:
    """The method's fields that the run's recipe sets by task."""
    recipe = RECIPES.get(config.get("recipe") or "")
    if recipe is None:
        return {}
    values = recipe.values(config.get("task", ""), {"rank": config["method"].get("rank")})[1]
    return {name: value for name, value in values.items() if name in recipe.by_task}
