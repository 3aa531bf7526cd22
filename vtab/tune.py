"""--tune: learning rate and scale chosen on val200 by successive halving, before the final run on all 1,000 images.

Every point of the grid trains on train800 along the schedule of a full run. After a fifth of the epochs (twice the
warm-up, if that is longer) the best third goes on from where it stands, after half of them the best half, and the best
after the last epoch is chosen. Ties go to the smaller learning rate, then to the smaller scale. Source: successive
halving, Jamieson & Talwalkar, arXiv 1502.07943; the tie rule is that of KMnP/vpt, tune_vtab.py.

Nothing here knows the test split. tuning.json is what was done so far: a search that was killed goes on from it, and
from the checkpoint of the trial that was under way.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtab import checkpoint
from vtab.config import Config
from vtab.labels import scale_field
from vtab.textfile import read_json, write

Settings = dict[str, float]
Attempt = Callable[[Config, Path, int], list[dict[str, Any]]]  # trains a trial up to an epoch; one record an epoch
RULE = "successive halving by val200 accuracy; ties go to the smaller learning rate, then to the smaller scale"


def grid(config: Config) -> list[Settings]:
    """The points to try: all pairs of a learning rate and a scale, for methods without a scale the rates alone.

    Raises:
        ValueError: factors that are not positive numbers, fewer than two points.

    >>> from capavision import LinearProbe
    >>> grid(Config(task="dtd", method=LinearProbe(), lr=0.01))
    [{'lr': 0.003}, {'lr': 0.01}, {'lr': 0.03}]
    """
    axes = {"lr": _times(config.lr, factors("--tune-lr", config.tune_lr))}
    if scale := scale_field(config.method):
        own = getattr(config.method, scale)
        axes[scale] = _times(own, factors("--tune-scale", config.tune_scale))
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(points) < 2:
        raise ValueError(
            f"--tune has one point to choose from, {points[0]}; give --tune-lr or --tune-scale more factors"
        )
    return points


def factors(flag: str, text: str) -> list[float]:
    """ "0.3,1,3" as numbers, smallest first."""
    try:
        found = sorted({float(word) for word in text.split(",")})
        if not all(0 < factor < math.inf for factor in found):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{flag} {text!r} must be positive numbers with commas between them, such as 0.3,1,3"
        ) from None
    return found


def rungs(points: int, epochs: int, warmup: float) -> list[tuple[int, int]]:
    """(epochs to train, trials to keep) one after another; the last keeps one.

    >>> rungs(9, 100, 0.1)
    [(20, 3), (50, 2), (100, 1)]
    """
    first = min(1.0, max(0.2, 2 * warmup))
    plan, left = [], points
    for share, part in ((first, 3), (max(0.5, first), 2), (1.0, points)):
        keep = 1 if share == 1 else min(left, max(2, math.ceil(left / part)))
        if keep < left:
            plan.append((max(1, round(share * epochs)), keep))
            left = keep
    # Of two rungs that fall on one epoch the stricter is enough
    return [rung for i, rung in enumerate(plan) if i + 1 == len(plan) or plan[i + 1][0] > rung[0]]


def halve(
    points: list[Settings],
    plan: list[tuple[int, int]],
    measure: Callable[[Settings, int], float | None],
    drop: Callable[[Settings], None] = lambda point: None,
) -> Settings:
    """Run the plan; the point that is left.

    Args:
        measure: a point's accuracy after so many epochs; None if it cannot be trained.
        drop: told of each point that goes no further.

    Raises:
        ValueError: no point can be trained.
    """
    alive = list(points)
    for epochs, keep in plan:
        scores = {i: score for i, point in enumerate(alive) if (score := measure(point, epochs)) is not None}
        order = sorted(scores, key=lambda i: (-scores[i], *alive[i].values()))[:keep]
        if not order:
            raise ValueError(f"the loss of all {len(alive)} trials of --tune became infinite; lower --lr or --tune-lr")
        for i in set(range(len(alive))) - set(order):
            drop(alive[i])
        alive = [alive[i] for i in order]
    return alive[0]


def search(config: Config, folder: Path, attempt: Attempt, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Choose settings for `config`, going on where the search in `folder` stopped; returns tuning.json.

    Args:
        attempt: trains a trial, see `vtab.train.attempt`.
        known: another run's tuning, taken over as it is.

    Raises:
        ValueError: a grid with nothing to choose from, or in which nothing can be trained.
    """
    state = known or _begin(config, folder)
    if state["chosen"] is None:
        trials = {tuple(trial["settings"].values()): trial for trial in state["trials"]}

        def measure(point: Settings, epochs: int) -> float | None:
            trial = trials[tuple(point.values())]
            if str(epochs) not in trial["looks"] and not trial["diverged"]:
                _advance(trial, config, folder, attempt, epochs)
                _write(folder, state)
            found: float | None = trial["looks"].get(str(epochs))
            return found

        def drop(point: Settings) -> None:
            (_place(folder, point) / "checkpoint.safetensors").unlink(missing_ok=True)

        plan = [(epochs, keep) for epochs, keep in state["plan"]]
        best = halve([trial["settings"] for trial in state["trials"]], plan, measure, drop)
        state["chosen"] = best
        drop(best)
    _write(folder, state)
    print(f"--tune chose {_text(state['chosen'])} by val200; the final run has all 1,000 images")
    return state


def chosen(config: Config, tuning: dict[str, Any]) -> Config:
    """`config` with the settings that the search chose."""
    return _with(config, tuning["chosen"])


def _begin(config: Config, folder: Path) -> dict[str, Any]:
    file = folder / "tuning.json"
    if file.is_file():
        begun: dict[str, Any] = read_json(file)
        return begun
    points = grid(config)
    for point in points:
        _with(config, point)  # refuses what cannot be trained, before anything is
    fresh = {"epochs": 0, "val_accuracy": None, "seconds": 0.0, "diverged": None}
    return {
        "rule": RULE,
        "trained_on": "train800",
        "seed": _seed(config),
        "plan": [list(rung) for rung in rungs(len(points), config.epochs, config.warmup)],
        "epochs_of_the_whole_grid": len(points) * config.epochs,
        "chosen": None,
        "trials": [{"settings": point, **fresh, "looks": {}} for point in points],
    }


def _advance(trial: dict[str, Any], config: Config, folder: Path, attempt: Attempt, epochs: int) -> None:
    """Train one trial on, and note what came out."""
    place = _place(folder, trial["settings"])
    settings = _with(config, trial["settings"])
    settings = dataclasses.replace(
        settings, stage="tune", protocol="honest", test_every=None, test_limit=None, tune=False, tune_seed=None,
        seed=_seed(config), out=place.parent, name=place.name,
    )  # fmt: skip
    try:
        history = attempt(settings, place, epochs)
    except checkpoint.DivergedError as error:
        trial["diverged"] = str(error)
        print(f"trial {_text(trial['settings'])}: the loss became infinite")
        return
    found = history[epochs - 1]["val_accuracy"]
    trial["looks"][str(epochs)] = found
    trial |= {"epochs": epochs, "val_accuracy": found, "seconds": sum(row["seconds"] for row in history)}
    print(f"trial {_text(trial['settings'])}: {found:.1f} % of val200 after {epochs} of {config.epochs} epochs")


def _with(config: Config, settings: Settings) -> Config:
    method: Any = config.method
    of_method = {name: value for name, value in settings.items() if name != "lr"}
    return dataclasses.replace(config, lr=settings["lr"], method=dataclasses.replace(method, **of_method))


def _seed(config: Config) -> int:
    return config.seed if config.tune_seed is None else config.tune_seed


def _place(folder: Path, settings: Settings) -> Path:
    return folder / "trials" / "-".join(f"{name}{value:g}" for name, value in settings.items())


def _text(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _write(folder: Path, state: dict[str, Any]) -> None:
    state["epochs_trained"] = sum(trial["epochs"] for trial in state["trials"])
    write(folder / "tuning.json", json.dumps(state, indent=1))


def _times(value: float, factors: list[float]) -> list[float]:
    return list(dict.fromkeys(float(f"{value * factor:.6g}") for factor in factors))  # 0.3 · 1e-3 is 0.0003
