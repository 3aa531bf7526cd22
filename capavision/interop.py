"""Interchange with Hugging Face PEFT: a CapaBoost-LoRA is a plain LoRA of rank branches · rank.

    ours                                              PEFT
    [A⊙N_1; …; A⊙N_d]                  (d·r, n_in)    <host>.lora_A.weight, of a conv (d·r, c_in, *kernel)
    [B⊙M_1 … B⊙M_d]                    (n_out, d·r)   <host>.lora_B.weight, of a conv (c_out, d·r, 1, …)
    alpha / r                                         lora_alpha / (d·r), hence lora_alpha = d·alpha
    q and v of a fused qkv, each rank r               one LoRA of rank 2·d·r, B zero in the rows of k
    the classifier                                    modules_to_save

Source: the files that peft 0.21 writes, read as data; PEFT itself is not imported, and no pickle is read.
"""

import copy
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from capavision import host as hosting
from capavision.attention import classifier, is_weighted, weight_of
from capavision.channels import Example
from capavision.delta import Delta, WeightDelta
from capavision.files import refuse_existing
from capavision.inject import inject, injections
from capavision.methods.lora import LoRA
from capavision.peft_format import Layer, read, write
from capavision.rehearsal import refuse_inexact
from capavision.rollback import undone_on_error
from capavision.state import refuse_unsavable, trained
from capavision.targets import near, refuse_taken

WRAPPED = "timm_model"  # where the TimmWrapper models of transformers keep the timm model


def to_peft(model: nn.Module, path: str | os.PathLike[str], *, example: Example | None = None) -> None:
    """Write the model's LoRA as a PEFT adapter: a folder for `peft.PeftModel.from_pretrained(base, path)`.

    Outputs are equal, up to rounding. Masks are multiplied into dense factors, so the file grows by branches, and PEFT
    trains the result as the plain LoRA that it is. The classifier goes along whole; a delta on it is folded in.

    Args:
        model: an injected model whose deltas are all low-rank on dense Linears and convs.
        path: the folder to make.
        example: one input batch, or a mapping of them by name, needed only for a model that does not tell its input
            size: a copy of the model runs once with layers like PEFT's, see `capavision.rehearsal`.

    Raises:
        ValueError: `path` exists; a method without low-rank factors; other parameters were trained too; a host on
            which PEFT would compute something else: grouped, dilated and weight-standardised convs, projections whose
            weight their parent reads (beit, eva, swin_v2), shared modules. Nothing is written then.
        OSError: the disk is full or the parent folder cannot be written; nothing is left there.

    >>> import tempfile, timm
    >>> model = timm.create_model("test_vit", num_classes=3)
    >>> report = inject(model, LoRA(rank=4, branches=2), "qkv", "qv")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     to_peft(model, f"{folder}/adapter")
    ...     # theirs = peft.PeftModel.from_pretrained(timm.create_model("test_vit", num_classes=3), f"{folder}/adapter")
    ...     again = from_peft(f"{folder}/adapter", timm.create_model("test_vit", num_classes=3))
    >>> injections(again)[0].method.rank  # q and v, two branches, rank 4
    16
    """
    refuse_existing(Path(path))
    refuse_unsavable(model)
    layers = _low_rank_hosts(model)
    leaves = _classifier_leaves(model)
    saved = _modules_to_save(model, leaves, layers)
    refuse_inexact(model, layers, example)
    write(path, layers, saved, leaves)


def _low_rank_hosts(model: nn.Module) -> dict[str, Layer]:
    """The factors of every host outside the classifier, which is written whole."""
    head = tuple(f"{name}." for name in classifier(model))
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        delta = getattr(module, hosting.SLOT, None)
        if not isinstance(delta, Delta) or f"{name}.".startswith(head):
            continue
        factors = delta.factors() if isinstance(delta, WeightDelta) else None
        if factors is None:
            raise ValueError(
                f"{name} carries a {type(delta).__name__}, which is no product of two thin matrices; PEFT's LoRA has "
                "no place for it; keep the adapter in capavision's own file, capavision.save"
            )
        weight = weight_of(module)
        A = factors.down.reshape(-1, *weight.shape[1:])
        B = factors.up.reshape(*factors.up.shape, *(1,) * (weight.ndim - 2))
        layers[name] = Layer(A, B, factors.scale * len(A))
    ours = (*head, *(f"{name}.{hosting.SLOT}." for name in layers))
    others = [name for name in trained(model) if not name.startswith(ours)]
    if others:
        raise ValueError(
            f"{others[0]} was trained too, and PEFT's LoRA has no place for it; keep the adapter in capavision's own "
            "file, capavision.save"
        )
    if not layers:
        raise ValueError(
            "no layer outside the classifier carries a delta, and PEFT makes no adapter of a classifier alone; save "
            "its state_dict"
        )
    return layers


def _classifier_leaves(model: nn.Module) -> list[str]:
    """The innermost modules of the classifier with state of their own: where a module and its child have like names
    (head.head), PEFT could not wrap the outer one.
    """
    leaves: list[str] = []
    for name, head in classifier(model).items():
        for inner, module in _folded(head).named_modules():
            full = f"{name}.{inner}" if inner else name
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and not f"{full}.".startswith(tuple(f"{leaf}." for leaf in leaves)):
                leaves.append(full)
    return leaves


def _modules_to_save(model: nn.Module, leaves: list[str], layers: Collection[str]) -> dict[str, Tensor]:
    """What PEFT looks for in the file: the state of every module whose name ends in one of the classifier's."""
    wrapped = [name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(tuple(leaves))]
    clashes = [(host, name) for host in layers for name in wrapped if f"{host}.".startswith(f"{name}.")]
    if clashes:
        host, name = clashes[0]
        raise ValueError(
            f"{host} lies in {name}, whose name ends like the classifier's, {', '.join(leaves)}, so PEFT would take it "
            "for the classifier; leave it out, or keep the adapter in capavision's own file"
        )
    states = {name: _folded(model.get_submodule(name)).state_dict() for name in wrapped}
    return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _folded(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for part in list(module.modules()):
        if isinstance(getattr(part, hosting.SLOT, None), Delta):
            hosting.fold(part)
    return module


def from_peft(path: str | os.PathLike[str], model: nn.Module, *, example: Example | None = None) -> nn.Module:
    """Put a PEFT LoRA checkpoint that was trained on a timm model into `model`, in place, as plain LoRA.

    The result is an injected model like any other: train it further, `save`, `fold` or export it.

    Args:
        path: a folder with adapter_config.json and adapter_model.safetensors, as `save_pretrained` writes it.
        model: the model it was trained on, with as many classes, freshly made.
        example: one input batch, needed only for a model that does not tell its input size, see `to_peft`.

    Returns:
        The model; its mode is left alone.

    Raises:
        ValueError: no such checkpoint, or weights in a pickle; another PEFT method than LoRA, or a variant of it (DoRA,
            trained biases, PiSSA …); modules that the model lacks or whose shapes differ; layers on which PEFT computes
            something else than capavision. The model is then as it was.

    >>> model = from_peft("peft-adapter", timm.create_model("vit_tiny_patch16_224", num_classes=10))  # doctest: +SKIP
    """
    if injections(model):
        raise ValueError(f"the model carries deltas already; capavision.remove(model) first, then load {path}")
    layers, rest = read(path)
    if not hasattr(model, WRAPPED):
        layers = {name.removeprefix(f"{WRAPPED}."): layer for name, layer in layers.items()}
        rest = {name.removeprefix(f"{WRAPPED}."): tensor for name, tensor in rest.items()}
    head = _head_values(path, model, rest)
    for name, layer in layers.items():
        _check_layer(path, model, name, layer)
    refuse_inexact(model, layers, example)
    own = dict(model.named_parameters())
    with undone_on_error(model, [own[name] for name in head]), torch.no_grad():
        _inject(model, layers)
        for name, value in head.items():
            own[name].copy_(value)
    return model


@torch.no_grad()
def _inject(model: nn.Module, layers: dict[str, Layer]) -> None:
    groups: dict[tuple[int, float], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault((layer.rank, layer.alpha), []).append(name)
    for (rank, alpha), names in groups.items():
        inject(model, LoRA(rank=rank, alpha=alpha), names)
        for name in names:
            delta = getattr(model.get_submodule(name), hosting.SLOT)
            delta.A.value.copy_(layers[name].A.flatten(1))
            delta.B.value.copy_(layers[name].B.flatten(1))


def _head_values(path: str | os.PathLike[str], model: nn.Module, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """The classifier's tensors by their names in the model; the other copies that PEFT makes must equal the model's."""
    parameters = dict(model.named_parameters())
    own = parameters | dict(model.named_buffers())
    heads = tuple(f"{name}." for name in classifier(model))
    found: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        name = re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", key)
        if name not in own:
            raise ValueError(f"{path} holds {key}, which {type(model).__name__} lacks; {near(name, own)}")
        if tensor.shape != own[name].shape:
            cure = f"create it with num_classes={tensor.shape[0]}" if name.startswith(heads) else "take the same model"
            raise ValueError(
                f"{path}: {name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}; {cure}"
            )
        if name.startswith(heads) and name in parameters:
            found[name] = tensor
        elif not torch.equal(tensor.to(own[name]), own[name]):
            raise ValueError(
                f"{path} trained {name} too, outside layers and classifier; only these can be taken over: merge it in "
                "PEFT, and use the merged model"
            )
    return found


def _check_layer(path: str | os.PathLike[str], model: nn.Module, name: str, layer: Layer) -> None:
    modules = dict(model.named_modules())
    if name not in modules or not is_weighted(modules[name]):
        what = f"has as a {type(modules[name]).__name__}" if name in modules else "lacks"
        raise ValueError(
            f"{path} adapts {name!r}, which {type(model).__name__} {what}; it was trained on another model; "
            f"{near(name, [n for n, m in modules.items() if is_weighted(m)])}"
        )
    refuse_taken(model, name)
    weight = weight_of(modules[name])
    expected = [(layer.rank, *weight.shape[1:]), (weight.shape[0], layer.rank, *(1,) * (weight.ndim - 2))]
    if [tuple(layer.A.shape), tuple(layer.B.shape)] != expected:
        raise ValueError(
            f"{path}: the factors of {name} are {tuple(layer.A.shape)} and {tuple(layer.B.shape)}, but its weight "
            f"{tuple(weight.shape)} asks for {expected[0]} and {expected[1]}; take the model it was trained on"
        )
