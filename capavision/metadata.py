"""What a file says of itself. It may come from anyone, so every entry is checked before anything is built from it."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from capavision.attention import weight_of
from capavision.base import Base
from capavision.delta import AttentionDelta, Method, OutputDelta, WeightDelta
from capavision.inject import Injection, whole_head
from capavision.targets import Spans, near

FORMAT = 1
_NEEDED: dict[str, Any] = {
    "format": int,
    "injections": list,
    "masks": str,
    "base": dict | None,
    "fingerprint": dict,
    "num_classes": int | None,
}
_OPTIONAL: dict[str, Any] = {"tyings": list, "classes": list | None, "info": dict}


def damaged(path: str | os.PathLike[str], what: object) -> ValueError:
    """The error for metadata that `save` does not write."""
    return ValueError(f"{path}: its metadata is damaged ({what}); save it again")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], base: Base | None, model: nn.Module | None = None) -> Iterator[None]:
    """A refusal in it names the file, and the architectures of file and model where these differ."""
    try:
        yield
    except ValueError as error:
        said = str(error) if str(path) in str(error) else f"{path}: {error}"
        made_for = base.model.partition(".")[0] if base else None
        given = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
        if made_for and given and made_for != given:
            said += f"; the file is of {made_for}, the model a {given}"
        raise ValueError(said) from error


def check(path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
    """Raise ValueError unless every entry is there and of its kind, and the format is one that this version reads."""
    if lost := _NEEDED.keys() - metadata.keys():
        raise damaged(path, f"no {', '.join(sorted(lost))}")
    for name, kind in (_NEEDED | _OPTIONAL).items():
        if name in metadata and not isinstance(metadata[name], kind):
            raise damaged(path, f"{name} is a {type(metadata[name]).__name__}")
    if metadata["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {metadata['format']}, this capavision reads up to {FORMAT}; upgrade capavision"
        )
    if not all(isinstance(norm, (int, float)) for norm in metadata["fingerprint"].values()):
        raise damaged(path, "fingerprint holds something else than numbers")


def to_json(plan: Injection, model: nn.Module) -> dict[str, Any]:
    """An injection as a file has it."""
    plan = dataclasses.replace(plan, head=whole_head(model, plan.hosts))  # reset_classifier may have changed it
    left_out = {"frozen", "originals"} | (set() if plan.starts else {"starts"})
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in left_out}
    return {**fields, "method": {"name": plan.method.name, **dataclasses.asdict(plan.method)}}  # type: ignore[call-overload]


def from_json(plan: dict[str, Any], path: str | os.PathLike[str]) -> Injection:
    """The injection that `to_json` wrote.

    Raises:
        ValueError: an unknown method, or settings that it refuses.
        KeyError, TypeError, AttributeError: anything else that `to_json` would not write.
    """
    name = plan["method"]["name"]
    if name not in Method.known:
        raise ValueError(
            f"{path} holds the method {name!r}, which is not known here; {near(name, Method.known)} (one "
            "of your own: import its module first)"
        )
    try:
        method = Method.known[name](**{k: v for k, v in plan["method"].items() if k != "name"})
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    hosts = {host: {part: _whole(span, 2) for part, span in parts.items()} for host, parts in plan["hosts"].items()}
    axes = {host: _whole(sizes, 3) for host, sizes in plan["axes"].items()}
    head, trained = _names(plan["head"]), _names(plan.get("trained", []))
    (seed,) = _whole([plan["seed"]], 1)
    starts = dict(zip(plan.get("starts", {}), _names([*plan.get("starts", {}).values()]), strict=True))
    return Injection(method, seed, hosts, axes, head, trained, freeze_norm=bool(plan["freeze_norm"]), starts=starts)


def _whole(values: Any, count: int) -> Any:
    if not isinstance(values, list) or [type(value) for value in values] != [int] * count:
        raise TypeError(f"{values!r} in the place of {count} whole numbers")
    return tuple(values)


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} in the place of names")
    return tuple(values)


def refuse_misplaced(path: str | os.PathLike[str], model: nn.Module, plans: list[Injection]) -> None:
    """Raise ValueError if the hosts of `plans`, modules of `model`, cannot take what the plans put there."""
    taken: set[str] = set()
    for plan in plans:
        for name, parts in plan.hosts.items():
            host, placement = model.get_submodule(name), plan.method.placement
            if name in taken:
                raise damaged(path, f"{name} is given two deltas")
            taken.add(name)
            if placement is WeightDelta and host._parameters.get("weight") is not None:
                _check_rows(path, name, parts, len(weight_of(host)))
            elif placement not in (OutputDelta, AttentionDelta) or parts or not _fits(plan, name):
                raise damaged(path, f"{plan.method.name} has no place at {name}, a {type(host).__name__}")
    for plan in plans:
        for name, start in plan.starts.items():
            if name not in plan.hosts or plan.method.placement is not OutputDelta or start in taken:
                raise damaged(path, f"{start} cannot be where the x of {name} comes from")
            taken.add(start)


def _fits(plan: Injection, name: str) -> bool:
    n_out, n_in, last = plan.axes.get(name, (0, 0, 0))
    if plan.method.placement is OutputDelta:
        return n_out > 0 and n_in >= 0 and last in (1, -1)
    return n_out > 0 and n_in > 0 and last > 0 and n_out % last == n_in % last == 0


def _check_rows(path: str | os.PathLike[str], name: str, parts: Spans, n_out: int) -> None:
    edges = [0, *(edge for span in sorted(parts.values()) for edge in span), n_out]
    if parts and (any(a > b for a, b in pairwise(edges)) or any(start == stop for start, stop in parts.values())):
        raise damaged(path, f"{list(parts.values())} are not disjoint rows of {name}, which has {n_out}")
    for part in parts:
        if not part.isidentifier() or hasattr(nn.ModuleDict(), part):
            raise damaged(path, f"{part!r} names rows of {name}")
