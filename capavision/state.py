"""One .safetensors file per adapter: save, load.

The file holds the trained values (deltas, head, whatever else was trained; learned masks as bits) and, as JSON, all it
takes to use them on a fresh base: the injections, a checksum of their static masks (which follow from the seed), how to
build the base model, a fingerprint of its weights, class names, preprocessing. Nothing in it is code, and no pickle is
read.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from capavision import host as hosting
from capavision import learned, masks
from capavision.attention import classifier
from capavision.base import Base, differences, fingerprint
from capavision.delta import Delta
from capavision.ending import take_out
from capavision.files import write_tensors
from capavision.hub import fetched
from capavision.inject import Injection, apply, base_tensors, injections, own_tensors, refuse_stray
from capavision.metadata import FORMAT, check, damaged, from_json, naming, refuse_misplaced, to_json
from capavision.rollback import undone_on_error
from capavision.targets import refuse_taken
from capavision.tying import Tying, masks_of, stored, tie, tied
from capavision.wrappers import bare, refuse_meta, refuse_sharded, whole

_AS_IT_WAS = (
    "; create the model with the arguments it had then and pass it, load(path, model=…), or name them to save: "
    "base=Base(…, kwargs={…})"
)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base: Base | None = None,
    classes: list[str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write what was trained into one .safetensors file; atomic.

    A model under fully_shard is put together for it: every process must call, and each writes the same file.

    Args:
        model: an injected model, or a tied one, of which everything is written, each shared value once.
        path: the file to write or replace.
        base: how to build the model underneath; None derives it from a timm model with timm's own weights and usual
            arguments. Name it where timm.create_model was given others: Base(…, kwargs={"depth": 6}).
        classes: the class names, in the order of the logits.
        info: anything JSON can hold that a user of the file wants back: preprocessing, task, accuracy.

    Raises:
        ValueError: the model carries no injection or lost a host of it, and is not tied; `classes` does not fit its
            logits.
        TypeError: `classes` or `info` holds what JSON cannot.
        OSError: the disk is full or the folder cannot be written; a file that was there stays.

    >>> save(model, "dtd.safetensors", classes=["banded", "blotchy"])  # doctest: +SKIP
    """
    model = bare(model)
    refuse_meta(model)
    if not tied(model):
        refuse_unsavable(model)
    num_classes = getattr(model, "num_classes", None)
    for name, value in {"classes": classes, "info": info and dict(info)}.items():
        _check_json(name, value)
    if isinstance(classes, str):
        raise TypeError(f"classes={classes!r} is one string; pass a list of names")
    if classes is not None and num_classes not in (None, len(classes)):
        raise ValueError(f"{len(classes)} class names for a model with {num_classes} classes")
    base = base or _derived_base(model)
    if base and tied(model):  # the file holds every weight, so nothing has to be fetched to load it
        base = dataclasses.replace(base, weights="random", hint="")
    values = learned.packed(model, {name: whole(p) for name, p in trained(model).items()})
    metadata = {
        "format": FORMAT,
        "injections": [to_json(plan, model) for plan in _with_others(model)],
        "tyings": [plan.settings() for plan in tied(model)],
        "masks": _checksum(model),
        "base": dataclasses.asdict(base) if base else None,
        "fingerprint": {} if tied(model) else fingerprint(model, values),
        "num_classes": num_classes,
        "classes": classes,
        "info": dict(info or {}),
    }
    write_tensors(path, values, {"capavision": json.dumps(metadata)})


def _check_json(name: str, value: object) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} goes into the file as JSON: numbers, strings, bools, None, lists and dicts of them ({error}); a "
            "tensor or array has .tolist()"
        ) from error


def refuse_unsavable(model: nn.Module) -> None:
    """Raise ValueError if the model carries no injection, or one that a file could not bring back."""
    if not injections(model):
        raise ValueError("the model carries no injection, so there is nothing to save; call capavision.inject first")
    _check_replaced(model)


def load(path: str | os.PathLike[str], model: nn.Module | None = None, *, check_base: bool = True) -> nn.Module:
    """The model that was saved: `model` (or the rebuilt timm model) with the file's deltas and head.

    A model that carries deltas already changes to the file's in place, in milliseconds: the deltas, the head (with the
    file's number of classes, where timm's reset_classifier can make it), and all else that was trained. Where both were
    made with the same settings and seed, their values alone are written, so that a compiled graph stays valid; else the
    parameters are new ones, which an optimizer made before does not know.

    Args:
        path: a file written by `save`, or "hf-hub:user/name", a repo on the Hugging Face hub (add @revision for one
            of its branches, tags or commits).
        model: the base, with as many classes as the file, or a model that carries deltas; None builds the base with
            timm as the file says.
        check_base: refuse a base whose weights are not those the deltas were trained on.

    Returns:
        The model, in eval mode where it was built here, untouched in mode where it was given.

    Raises:
        ValueError: not one of our files, truncated, of a newer format, or for another architecture, checkpoint or
            number of classes; no such repo. The given model is then as it was.
        OSError: the hub is out of reach.

    >>> model = load("dtd.safetensors")  # doctest: +SKIP
    """
    metadata, tensors = _read(path)
    try:
        plans = [from_json(plan, path) for plan in metadata["injections"]]
        tyings = [Tying.of(settings) for settings in metadata.get("tyings", [])]
        base = Base(**metadata["base"]) if metadata["base"] else None
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path, repr(error)) from error
    if model is None:
        if base is None:
            raise ValueError(f"{path} does not say how its base model was built; pass it: load(path, model=…)")
        with naming(path, base):
            model = base.build(metadata["num_classes"]).eval()
    inner = bare(model)
    refuse_meta(inner)
    refuse_sharded(inner, "load before fully_shard")
    own = base_tensors(inner)
    written = [*tensors, *(name for plan in injections(inner) for name in plan.trained)]
    written += [f"{name}.{learned.SCORES}" for name in learned.factors(inner)]  # the file holds their bits
    with naming(path, base, inner), undone_on_error(inner, [own[name] for name in written if name in own]):
        _make_way(inner, plans, metadata["num_classes"])
        pending = plans[len(injections(inner)) :]
        _check_fit(path, metadata, tensors, inner, pending, check_base)
        for tying in tyings[len(tied(inner)) :]:
            tie(inner, **tying.settings())
        for plan in pending:
            apply(inner, plan)
        _check_masks(path, metadata, inner)
        _restore(path, inner, tensors)
    return model


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The file's metadata without its tensors: injections, base, classes, info.

    Raises:
        ValueError: not one of our files, truncated, or of a newer format.
    """
    return _read(path)[0]


def _check_replaced(model: nn.Module) -> None:
    """Raise ValueError if a file could not bring the model back: a host or a frozen norm was replaced after inject."""
    for name, what in _lost(model).items():
        raise ValueError(
            f"{name} has lost its {what}: the module was replaced or taken out after inject, and the file would not "
            "load; do that first (reset_classifier, prune_intermediate_layers, reparameterize_model), then inject"
        )
    refuse_stray(model)
    moving = {name for plan in injections(model) for name in plan.trained}
    for name, module in model.named_modules():
        kept = hosting.is_swapped(module) or f"{name}.running_mean" in moving
        if hosting.is_batch_norm(module) and not kept:
            raise ValueError(
                f"{name} ({type(module).__name__}) came after inject and keeps statistics, which have no place in the "
                "file; do first what brought it (convert_sync_batchnorm, reset_classifier), then inject"
            )


def _lost(model: nn.Module) -> dict[str, str]:
    """The hosts that carry no delta any more, and where x no longer comes from there, the starts; each with what."""
    modules = dict(model.named_modules())
    hosts = [name for plan in injections(model) for name in plan.hosts]
    lost = {name: "delta" for name in hosts if not isinstance(getattr(modules.get(name), hosting.SLOT, None), Delta)}
    for name, start in [pair for plan in injections(model) for pair in plan.starts.items()]:
        if name not in lost and (start not in modules or not hosting.joined(modules[start], modules[name])):
            lost[start] = f"link to the adapter of {name}"
    return lost


def _factors(model: nn.Module) -> list[masks.Factor]:
    return [m for _, m in sorted(model.named_modules()) if isinstance(m, masks.Factor)]


def _checksum(model: nn.Module) -> str:
    return masks.digest(masks_of(model)) if tied(model) else masks.checksum(_factors(model))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Deltas, head and the base's trained tensors whatever their flags say now, and all else that is being trained."""
    if tied(model):  # a tied model is stored whole
        return stored(model)
    ours = _ours(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or name.startswith(ours)}
    return parameters | own_tensors(model, injections(model))


def _ours(model: nn.Module) -> tuple[str, ...]:
    """How the names of all parameters of deltas and heads begin."""
    modules = [name for name, m in model.named_modules() if isinstance(m, Delta)]
    modules += [name for plan in injections(model) for name in plan.head] + list(classifier(model))
    return tuple(f"{name}." for name in modules)


def _with_others(model: nn.Module) -> list[Injection]:
    """The injections, with what the user let train beside them in the last one: load and remove then know of it."""
    plans = injections(model)
    if not plans:
        return []
    ours, known = _ours(model), {name for plan in plans for name in plan.trained}
    others = [name for name in trained(model) if name not in known and not name.startswith(ours)]
    return [*plans[:-1], dataclasses.replace(plans[-1], trained=(*plans[-1].trained, *others))]


def _derived_base(model: nn.Module) -> Base | None:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("architecture"):
        return None
    name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]
    size = tuple(getattr(getattr(model, "patch_embed", None), "img_size", None) or ())
    if not size or size == tuple(cfg["input_size"][-2:]):
        return Base(name)
    return Base(name, img_size=size[0]) if size[0] == size[1] else Base(name, kwargs={"img_size": size})


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file_path = fetched(path)
    if not Path(file_path).is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with safe_open(file_path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("capavision", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); save it again") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is a safetensors file, but not one that capavision.save wrote")
    check(path, metadata)
    return metadata, tensors


def _make_way(model: nn.Module, plans: list[Injection], num_classes: int | None) -> None:
    """Take out what the model carries, unless the file's plans are the same; a trained head gets the file's classes."""
    if not injections(model):
        return
    own_head = classifier(model).keys() <= {name for plan in injections(model) for name in plan.head}
    own_plans = [dataclasses.replace(plan, frozen=()) for plan in injections(model)]
    orders = [[list(plan.hosts) for plan in each] for each in (own_plans, plans)]  # first hosts own learned values
    if own_plans != plans or orders[0] != orders[1] or _lost(model):
        take_out(model)
    if own_head and num_classes is not None and num_classes != getattr(model, "num_classes", None):
        _reset_classes(model, num_classes)


def _reset_classes(model: nn.Module, num_classes: int) -> None:
    """A new head by timm's reset_classifier, where the old one was; its values come from the file.

    The statistics of a norm in it (levit's) are the base's, which no file holds: the new one takes them over.
    """
    if not callable(reset := getattr(model, "reset_classifier", None)):
        return
    like = next(p for p in model.parameters() if p.is_floating_point())
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = base_tensors(model).keys()
    with torch.random.fork_rng(devices=[]):
        reset(num_classes)
    if num_classes and (lost := sorted(before - base_tensors(model).keys())):
        raise ValueError(
            f"{type(model).__name__}.reset_classifier({num_classes}) makes a head without {lost[0]}; create the model "
            f"with num_classes={num_classes}, then load"
        )
    for name, head in classifier(model).items():
        head.to(like.device, like.dtype).train(model.training)  # timm 1.0.20: float32, on the CPU, in train mode
        for inner, buffer in head.named_buffers(prefix=name):
            buffer.copy_(statistics.get(inner, buffer))
    if any(plan.freeze_norm for plan in injections(model)):
        hosting.freeze_batch_norm(model)


def _check_fit(
    path: str | os.PathLike[str],
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module,
    plans: list[Injection],
    check_base: bool,
) -> None:
    if plans and metadata.get("tyings"):
        raise damaged(path, "deltas in a tied model")
    if tied(model) and [plan.settings() for plan in tied(model)] != metadata.get("tyings"):
        raise ValueError(f"the model is tied already, and not as in {path}; create a fresh one, then load it")
    classes = getattr(model, "num_classes", None)
    if metadata["num_classes"] != classes:
        raise ValueError(
            f"{path} was trained with {metadata['num_classes']} classes and the model has {classes}; "
            f"create it with num_classes={metadata['num_classes']}"
        )
    modules = dict(model.named_modules())
    values = base_tensors(model) if any(plan.trained for plan in plans) else {}
    missing = [
        name for plan in plans for name in [*plan.hosts, *plan.starts.values(), *plan.head] if name not in modules
    ]
    missing += [name for plan in plans for name in plan.trained if name not in values]
    if missing:
        base = metadata["base"]["model"] if metadata["base"] else "another model"
        raise ValueError(
            f"{path} adapts {missing[0]!r}, which {type(model).__name__} lacks; it was made for {base}{_AS_IT_WAS}"
        )
    for name in [name for plan in plans for name in [*plan.hosts, *plan.starts.values()]]:
        refuse_taken(model, name)
    if check_base and not metadata.get("tyings"):
        _check_base(path, metadata["fingerprint"], fingerprint(model, tensors), type(model).__name__)
    refuse_misplaced(path, model, plans)


def _check_base(
    path: str | os.PathLike[str], trained_on: dict[str, float], found: dict[str, float], model: str
) -> None:
    if lost := sorted(trained_on.keys() ^ found.keys()):
        owner = "the file's base" if lost[0] in trained_on else f"this {model}"
        raise ValueError(
            f"{path} was trained on a base of {len(trained_on)} tensors and the model has {len(found)}: only {owner} "
            f"has {lost[0]}{_AS_IT_WAS}"
        )
    if changed := differences(trained_on, found):
        raise ValueError(
            f"{path} was trained on other base weights: {len(changed)} of {len(trained_on)} tensors differ, first "
            f"{changed[0]}; load the same checkpoint into a model created with the same arguments, or pass "
            "check_base=False if you know better"
        )


def _check_masks(path: str | os.PathLike[str], metadata: dict[str, Any], model: nn.Module) -> None:
    if _checksum(model) != metadata["masks"]:
        raise ValueError(f"{path}: its masks could not be rebuilt from the seed, so its deltas would be wrong here")


@torch.no_grad()
def _restore(path: str | os.PathLike[str], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    tensors = learned.unpacked(path, model, tensors)
    needed = trained(model)
    own = needed if tied(model) else dict(model.named_parameters()) | needed
    missing = sorted(needed.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - own.keys())
    if missing or foreign:
        raise ValueError(f"{path} does not fit the model: missing {missing[:3]}, not in the model {foreign[:3]}")
    wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if wrong:
        name = wrong[0]
        raise ValueError(f"{path}: {name} is {tuple(tensors[name].shape)}, the model's is {tuple(own[name].shape)}")
    if cast := [name for name, tensor in tensors.items() if _kind(tensor) != _kind(own[name])]:
        name = cast[0]
        found, expected = (str(t.dtype).removeprefix("torch.") for t in (tensors[name], own[name]))
        raise ValueError(f"{path}: {name} is of {found}, the model's of {expected}; save it again")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """float16 may become float32, but neither a whole nor a complex number a float."""
    return tensor.is_floating_point(), tensor.is_complex()
