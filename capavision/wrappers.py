"""Wrappers around a model: torch.compile's is looked through, every other one is refused with its cure.

A wrapper that renames what it holds would put its prefix into the saved file, one that lists parameters when it is
built would never see those of a delta, and one that shards them has none left to add a delta to.
"""

from torch import Tensor, nn

RECORD = "_capavision"  # the model's attribute that lists its injections

_RENAMING = {
    "_orig_mod": "torch.compile; compile it in place instead, module.compile()",
    "_checkpoint_wrapped_module": "checkpoint_wrapper; use the model's own set_grad_checkpointing(True)",
    "_fsdp_wrapped_module": "FullyShardedDataParallel; use torch.distributed.fsdp.fully_shard, after inject",
}


def bare(model: nn.Module) -> nn.Module:
    """The model that the names of a saved file refer to.

    Raises:
        TypeError: it is no module.
        ValueError: it stands in a wrapper that must come after inject, or holds one that renames its modules.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {model!r}")
    inner = model._modules.get("_orig_mod") or model  # swapping classes under a compiled model makes it compile again
    modules = dict(inner.named_modules())
    if carriers := [name for name, module in modules.items() if name and RECORD in vars(module)]:
        name = carriers[0]
        raise ValueError(f"{name} inside of {type(inner).__name__} carries the injection; pass model.{name} instead")
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"{type(inner).__name__} lists the parameters it serves when it is built, and would never see those of a "
            "delta; take model.module, inject or load there, then wrap it"
        )
    for name in modules:
        outer, _, last = name.rpartition(".")
        if last in _RENAMING:
            raise ValueError(
                f"{outer or type(inner).__name__} is wrapped by a tool that renames what lies inside: {_RENAMING[last]}"
            )
    return inner


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor of which each process holds a part."""
    return any(placement.is_shard() for placement in getattr(tensor, "placements", ()))


def refuse_sharded(model: nn.Module, cure: str) -> None:
    """Raise ValueError if a parameter is spread over processes."""
    for name, p in model.named_parameters():
        if is_sharded(p):
            raise ValueError(f"{name} is sharded over processes; {cure}")


def refuse_meta(model: nn.Module) -> None:
    """Raise ValueError if a parameter is on the meta device."""
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device and holds no values; create the model on a device, or fill it first: "
                "model.load_state_dict(values, assign=True)"
            )


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together where it is sharded over processes: then all of them must call."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered
