"""What to adapt: names, globs and groups resolved to hosts, parts resolved to rows of a fused projection."""

import difflib
import fnmatch
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from capavision import host as hosting
from capavision.attention import classifier, is_layer, is_weighted, parts_of, weight_of, weighted
from capavision.blocks import group
from capavision.delta import AttentionDelta, Delta, Method, OutputDelta, WeightDelta
from capavision.placement import PLACES

Targets = str | Sequence[str] | None
Parts = str | Sequence[slice] | None
Spans = dict[str, tuple[int, int]]
REPLACE = "put nn.Linears that compute the same in their places"
GROUPS = ("attention", "mlp", "linear", "conv", "all")


def near(name: str, choices: Iterable[str]) -> str:
    """The choices that read like `name`, for an error message; all of them if they are few."""
    choices = sorted(set(choices))
    close = alike(name, choices)
    close = close or (choices if len(choices) <= 12 else choices[:4])
    return "did you mean " + " or ".join(map(repr, close)) + "?" if close else "there is nothing to choose from"


def alike(name: str, choices: Iterable[str]) -> list[str]:
    """The choices that read like `name`, perhaps none."""
    return difflib.get_close_matches(name, sorted(set(choices)), n=4, cutoff=0.6)


def choose(model: nn.Module, method: Method, targets: Targets, parts: Parts) -> dict[str, Spans]:
    """The hosts and the rows of each: targets and parts resolved against `model`, nothing changed."""
    if method.placement is None:
        if targets is not None or parts is not None:
            raise ValueError(f"{type(method).__name__} adapts no module; leave targets and parts out")
        return {}
    if method.placement is not WeightDelta and parts is not None:
        raise ValueError(f"{type(method).__name__} acts on whole blocks, which have no rows; leave parts={parts!r} out")
    if targets is None:
        defaults = method.targets(model)
        if not defaults:
            raise ValueError(_hostless(model, method))
    else:
        names = _match(model, [targets] if isinstance(targets, str) else list(targets), method)
        defaults = dict.fromkeys(names)
    for name in defaults:
        refuse_taken(model, name)
    return {name: _rows(model, name, parts if parts is not None else default) for name, default in defaults.items()}


def starts(model: nn.Module, method: Method, hosts: Collection[str]) -> dict[str, str]:
    """Of those hosts whose delta reads another module's input: that module, which must carry none itself."""
    found = {name: start for name, start in method.starts(model).items() if name in hosts}
    for name, start in found.items():
        if start in hosts:
            raise ValueError(
                f"{start} and {name} are one MLP, beside which {name} takes the adapter; leave {start} out of targets"
            )
        refuse_taken(model, start)
    return found


def _hostless(model: nn.Module, method: Method) -> str:
    name, kind = type(model).__name__, type(method).__name__
    if method.placement is AttentionDelta:
        others = [known.__name__ for known in Method.known.values() if known.placement in (WeightDelta, OutputDelta)]
        return (
            f"{name} has no attention that {kind} could enter; use {', '.join(sorted(others))} (or name one whose "
            "projections are not called q, v, qkv or alike: targets)"
        )
    missing, where = f"{name} has no default host for {kind}", getattr(method, "where", "")
    places = [f"where={place!r}" for place, find in PLACES.items() if where in PLACES and find(model)]
    if places:
        why = ", for no MLP is found in it" if where == "parallel" else ""
        return f"{missing}(where={where!r}){why}; take {' or '.join(places)}, or name targets"
    if method.placement is WeightDelta and (strangers := _strangers(model)):
        return f"{missing}, only {', '.join(strangers)}; {REPLACE}, or use an adapter or a prefix"
    return f"{missing}; name targets"


def _strangers(model: nn.Module) -> list[str]:
    """The classes of layers outside the classifier that are neither Linear nor Conv: GPT-2's Conv1D."""
    layers = weighted(model, is_layer).values()
    return sorted({type(layer).__name__ for layer in layers if not is_weighted(layer)})


def _match(model: nn.Module, patterns: list[str], method: Method) -> list[str]:
    modules = {name: module for name, module in model.named_modules() if name}
    weights = method.placement is WeightDelta
    head = [part for name in classifier(model) for part in (name, *_below(name, modules))]
    found: dict[str, None] = {}
    if not patterns:
        raise ValueError("targets is an empty list; leave it out for the method's own choice, or name modules")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"targets are names of modules, not {type(pattern).__name__}: {pattern!r}")
        named = None if pattern in modules else group(model, pattern, method.placement or Delta)
        if named is None:
            named = _names(pattern, list(modules))
            if not named:
                raise ValueError(
                    f"no module matches {pattern!r}; {_suggest(pattern, modules)}; groups: {', '.join(GROUPS)}"
                )
        hosts = [name for name in named if not weights or is_weighted(modules[name])]
        # A wildcard may run over the classifier; only its own name adapts it.
        hosts = [name for name in hosts if name == pattern or name not in head]
        if not hosts:
            strangers = _strangers(model) if weights else []
            kinds = sorted({type(modules[name]).__name__ for name in named}) or strangers
            what = "Linear or Conv with a weight of its own" if weights else "block"
            cure = REPLACE if set(kinds).intersection(strangers) else "name its inner modules"
            raise ValueError(f"{pattern!r} matches no {what}, only {', '.join(kinds) or 'nothing'}; {cure}")
        found.update(dict.fromkeys(hosts))
    return list(found)


def _names(pattern: str, names: list[str]) -> list[str]:
    if pattern in names:
        return [pattern]
    if any(c in pattern for c in "*?["):
        return fnmatch.filter(names, pattern)
    return [] if "." in pattern else [name for name in names if name.rpartition(".")[2] == pattern]


def _below(name: str, modules: Iterable[str]) -> list[str]:
    return [other for other in modules if other.startswith(f"{name}.")]


def _suggest(pattern: str, modules: dict[str, nn.Module]) -> str:
    last = {name.rpartition(".")[2] for name in modules}
    return near(pattern, modules if "." in pattern else {name for name in last if not name.isdigit()})


def refuse_taken(model: nn.Module, name: str) -> None:
    """Raise ValueError if the module `name` cannot take a delta: one of its own, an attribute of that name, a list."""
    host = model.get_submodule(name)
    if (span := hosting.spanned(host)) and span.start == name:
        raise ValueError(
            f"{name} gives its input to the adapter of {span.end} and takes no delta besides; capavision.remove(model) "
            "takes the deltas out"
        )
    if hosting.is_swapped(host):
        raise ValueError(
            f"{name} already carries a delta; capavision.remove(model) takes the deltas out, capavision.fold(model) "
            "writes them into the weights"
        )
    if isinstance(host, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"{name} ({type(host).__name__}) is a list of modules and would take a delta for one of them; name the "
            "modules in it, or the one around it"
        )
    if hasattr(host, hosting.SLOT):
        raise ValueError(f"{name} ({type(host).__name__}) has an attribute named {hosting.SLOT!r} of its own")


def _rows(model: nn.Module, name: str, parts: Parts) -> Spans:
    if parts is None:
        return {}
    n_out = weight_of(model.get_submodule(name)).shape[0]
    if isinstance(parts, str):
        known = parts_of(model, name)
        missing = [letter for letter in parts if letter not in known]
        if missing or not parts:
            raise ValueError(
                f"{name}: parts={parts!r}, but its {n_out} rows are not known to hold "
                f"{' and '.join(missing) or 'no part at all'} ({', '.join(known) or 'nothing'} known); give row slices "
                f"such as parts=[slice(0, {n_out // 3})], or leave parts out to adapt all rows"
            )
        return {letter: known[letter] for letter in known if letter in parts}
    pieces: list[Any] = list(parts) if isinstance(parts, (list, tuple)) else [None]
    if not all(isinstance(piece, slice) for piece in pieces):
        raise TypeError(f"parts={parts!r} must be letters of 'q', 'k', 'v', or a list of slices: [slice(0, {n_out})]")
    spans = sorted(piece.indices(n_out)[:2] for piece in pieces)
    steps = {piece.step for piece in pieces} - {None, 1}
    overlap = any(a[1] > b[0] for a, b in itertools.pairwise(spans))
    if steps or overlap or not spans or any(start >= stop for start, stop in spans):
        raise ValueError(f"{name}: parts={pieces} are not disjoint, non-empty row slices of its {n_out} rows")
    return {f"rows{start}_{stop}": (start, stop) for start, stop in spans}
