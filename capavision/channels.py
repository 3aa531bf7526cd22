"""Channels of a block's input and output, found by looking: one forward pass, one more where outputs are several."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from capavision.attention import is_weighted
from capavision.delta import adapted, chosen, first_input, input_name
from capavision.span import Span

Example = Tensor | Mapping[str, Any]  # one input batch; a mapping is passed to the model as keywords


def measure(
    model: nn.Module,
    hosts: Iterable[str],
    example: Example | None,
    *,
    named: bool = True,
    starts: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, int, int]]:
    """Channels out and in and the channel axis of each block, seen in one forward pass without gradient.

    Where `starts` names another module for a block, the input is that module's, which must run once before the block.
    Channels in are 0 where the input is no tensor that matches the output place by place: a block that downsamples.
    A block whose adapted output the model never uses is refused where it was `named`, else left out.
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    several: list[str] = []

    def note(name: str, x: Any, output: Any) -> None:
        y = output
        if isinstance(output, (tuple, list)):
            several.append(name)
            y = output[chosen(x, output)]
        if not isinstance(y, Tensor):
            raise ValueError(f"{name} returns {type(y).__name__}, to which nothing can be added; name its modules")
        shapes[name] = (x.shape if isinstance(x, Tensor) else torch.Size([0]), y.shape)

    with _hooked(model, hosts, note, starts or {}):
        run_once(model, example)
    unseen = [name for name in hosts if name not in shapes]
    if unseen:
        raise ValueError(f"{unseen[0]} did not run in the model's forward pass, so an adapter there would be dead")
    unheard = _unheard(model, several, example) if several else []
    used = [name for name in hosts if name not in unheard]
    if unheard and (named or not used):
        raise ValueError(f"{unheard[0]}: the model makes no use of its first output, so an adapter there would be dead")
    return {name: _channels(model, name, *shapes[name]) for name in used}


def _unheard(model: nn.Module, blocks: Iterable[str], example: Example | None) -> list[str]:
    """The blocks whose adapted output does not reach the model's: the pixel stream after tnt's last block."""
    probes: list[tuple[str, Tensor]] = []

    def probe(name: str, x: Any, output: Any) -> Any:
        def zeros(y: Tensor) -> Tensor:
            probes.append((name, torch.zeros_like(y, requires_grad=True)))
            return probes[-1][1]

        return adapted(x, output, zeros)

    with _hooked(model, blocks, probe, {}):
        output = run_once(model, example, gradient=True)
    ends = [end.sum() for end in _tensors(output) if end.requires_grad]
    grads = torch.autograd.grad(ends, [zero for _, zero in probes], allow_unused=True) if ends else [None] * len(probes)
    heard = {name for (name, _), grad in zip(probes, grads, strict=True) if grad is not None}
    return [name for name in blocks if name not in heard]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


@contextlib.contextmanager
def _hooked(
    model: nn.Module, names: Iterable[str], hook: Callable[[str, Any, Any], Any], starts: Mapping[str, str]
) -> Iterator[None]:
    """While this lasts, hook(name, x, output) runs after each of the modules; x may be the input of its start."""
    spans = {name: Span(start, name) for name, start in starts.items()}

    def before(span: Span) -> Any:
        module = model.get_submodule(span.start)
        called = input_name(type(module))

        def see(_: nn.Module, args: Any, kwargs: Any) -> None:
            if span.holds:
                raise ValueError(f"{span.start} runs twice before {span.end}, so no one input is that of both")
            span.put(first_input(called, args, kwargs))

        return module.register_forward_pre_hook(see, with_kwargs=True)

    def after(name: str) -> Any:
        block, span = model.get_submodule(name), spans.get(name)
        called = input_name(type(block))

        def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return hook(name, span.take() if span else first_input(called, args, kwargs), output)

        return block.register_forward_hook(see, with_kwargs=True)

    handles = [*map(before, spans.values()), *map(after, names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_once(model: nn.Module, example: Example | None, *, gradient: bool = False) -> Any:
    """The output of one forward pass in eval mode, on `example` or zeros; the modes are then as they were."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.set_grad_enabled(gradient):
            if isinstance(example, Mapping):
                return model.eval()(**example)
            return model.eval()(example_input(model) if example is None else example)
    finally:
        for module, mode in modes.items():
            module.training = mode


def example_input(model: nn.Module) -> Tensor:
    """One black image of the size the model asks for.

    Raises:
        ValueError: the model does not tell its input size.
    """
    like = next(model.parameters())
    sizes = (getattr(child, "img_size", None) for child in model.children())  # a PatchEmbed's, whatever its name
    size = next((size for size in sizes if isinstance(size, tuple)), None)
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
        kinds = {isinstance(m, nn.Linear) for m in block.modules() if is_weighted(m)}
        first, last = kinds == {False}, kinds == {True}
    if first == last:
        raise ValueError(
            f"{name}: cannot tell the channel axis of its output {tuple(y)}; pass an example= of another size"
        )
    return 1 if first else -1
