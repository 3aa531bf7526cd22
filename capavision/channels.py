"""Channels of a block's input and output, found by looking: one forward pass without gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def measure(model: nn.Module, hosts: Iterable[str], example: Tensor | None) -> dict[str, tuple[int, int, int]]:
    """Channels out and in and the channel axis of each block, seen in one forward pass without gradient.

    Channels in are 0 where the input is no tensor that matches the output place by place: a block that downsamples.
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            x = args[0] if args and isinstance(args[0], Tensor) else y.new_empty(0)
            shapes[name] = (x.shape, y.shape)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(note(name)) for name in hosts]
    try:
        run_once(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [name for name in hosts if name not in shapes]
    if unseen:
        raise ValueError(f"{unseen[0]} did not run in the model's forward pass, so an adapter there would be dead")
    return {name: _channels(model, name, *shapes[name]) for name in hosts}


def run_once(model: nn.Module, example: Tensor | None) -> None:
    """One forward pass in eval mode without gradient, on `example` or zeros; the modes are then as they were."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(_example(model) if example is None else example)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _example(model: nn.Module) -> Tensor:
    like = next(model.parameters())
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    shape = (3, *size) if size else cfg.get("test_input_size") if cfg.get("fixed_input_size") else cfg.get("input_size")
    shape = shape or cfg.get("input_size")
    if not shape:
        raise ValueError("the model does not tell its input size; pass example=, one input batch")
    return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)


def _channels(model: nn.Module, name: str, x: torch.Size, y: torch.Size) -> tuple[int, int, int]:
    axis = _axis(model.get_submodule(name), name, y)
    aligned = len(x) == len(y) and all(a == b for i, (a, b) in enumerate(zip(x, y, strict=True)) if i != axis % len(y))
    return y[axis], x[axis] if aligned else 0, axis


def _axis(block: nn.Module, name: str, y: torch.Size) -> int:
    if len(y) != 4:
        return -1
    widths = {size for p in block.parameters() if p.ndim > 1 for size in (p.shape[0], p[0].numel())}
    first, last = y[1] in widths, y[-1] in widths
    if first == last:  # widths do not tell: images are square more often than channels equal a side
        first, last = y[2] == y[3], y[1] == y[2]
    if first == last:
        raise ValueError(
            f"{name}: cannot tell the channel axis of its output {tuple(y)}; pass an example= of another size"
        )
    return 1 if first else -1
