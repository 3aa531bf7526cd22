"""Would PEFT's LoRA layers compute what ours compute? Tried out on a copy, before anything is written or changed.

A host of ours is the same module with W + ΔW in it. PEFT instead puts a wrapper in its place that adds a second path:

    y = host(x) + scale · lora_B(lora_A(x))        lora_A a Linear or a conv of the host's own class, lora_B 1 × 1

Both agree for plain Linears and dense convs. They do not where the model reads host.weight itself (beit, eva, swin_v2:
PEFT's path is dead), where a conv standardises its weight (nfnet, BiT), where the second conv loses the dilation or the
padding mode, or where the model asks the host for something that a wrapper does not have (davit). The rehearsal needs
no list of such models: it runs the wrapper in every host's place, on random factors of rank 2, and compares.
"""

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from capavision import host as hosting
from capavision.attention import weight_of
from capavision.channels import Example, example_input, run_once
from capavision.ending import remove

RANK = 2  # weight-standardised layers of rank 1 do not even run
TOLERANCE = 1e-3  # of the effect of ΔW; rounding is 1e-5 at worst, a standardised weight is off by 0.9


class Wrapper(nn.Module):
    """PEFT's LoRA layer around `base`, as far as a model can tell; passes the base's output on and notes the error."""

    def __init__(self, name: str, base: nn.Module, random: torch.Generator) -> None:
        super().__init__()
        self.name, self.base_layer = name, base
        weight = weight_of(base)
        self.out_features, self.in_features = weight.shape[:2]
        up = torch.randn(weight.shape[0], RANK, generator=random).to(weight)
        down = torch.randn(RANK, weight[0].numel(), generator=random).to(weight)
        share = weight.norm() / (up @ down).norm()
        self.up, self.down = up * (share if share > 0 else 1), down
        self.calls = 0
        self.error = 0.0
        self.failure = ""

    @property
    def weight(self) -> Tensor:
        return weight_of(self.base_layer)

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"PEFT's layer in the place of {self.name} has no attribute {name!r}") from None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        plain = self.base_layer(x, *args, **kwargs)
        delta = (self.up @ self.down).view_as(self.weight)
        ours = functional_call(self.base_layer, {"weight": self.weight + delta}, (x, *args), kwargs)
        try:
            theirs = plain + self.second_path(x)
        except (RuntimeError, TypeError, ValueError) as error:
            self.failure = str(error).splitlines()[0]
        else:
            effect = (ours - plain).norm().clamp(min=torch.finfo(plain.dtype).tiny)
            self.error = max(self.error, ((theirs - ours).norm() / effect).item())
        return plain

    def second_path(self, x: Tensor) -> Tensor:
        base: Any = self.base_layer
        if isinstance(base, nn.Linear):
            return x @ self.down.T @ self.up.T
        ones = (1,) * len(base.kernel_size)
        lora_A = type(base)(base.in_channels, RANK, base.kernel_size, base.stride, base.padding, bias=False).to(x)
        lora_B = type(base)(RANK, base.out_channels, ones, ones, bias=False).to(x)
        lora_A.weight = nn.Parameter(self.down.view(RANK, *self.weight.shape[1:]), requires_grad=False)
        lora_B.weight = nn.Parameter(self.up.view(-1, RANK, *ones), requires_grad=False)
        y: Tensor = lora_B.eval()(lora_A.eval()(x))
        return y


def refuse_inexact(model: nn.Module, hosts: Collection[str], example: Example | None) -> None:
    """Raise ValueError, naming the host, if PEFT's layers in the places of `hosts` would compute something else.

    Args:
        model: any model; it is copied, and stays as it is.
        hosts: qualified names of Linears and convs.
        example: one input batch, or a mapping of them by name; None asks the model for its input size.
    """
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name in hosts:
        host: Any = model.get_submodule(name)
        if getattr(host, "groups", 1) > 1:
            raise ValueError(
                f"{name} is a grouped convolution (groups={host.groups}); PEFT's LoRA on it has another shape and "
                "cannot be merged; leave such convs out, or keep the adapter in capavision's own file"
            )
        if places[id(host)] > 1:
            raise ValueError(
                f"{name} stands in {places[id(host)]} places of the model; PEFT would adapt one of them, capavision "
                "adapts all; leave it out, or keep the adapter in capavision's own file"
            )
    wrappers = _rehearse(model, hosts, example)
    for name, wrapper in wrappers.items():
        kind = type(wrapper.base_layer).__name__
        if not wrapper.calls:
            raise ValueError(
                f"{name} ({kind}) is never called, its weight is read by its parent, if at all; a PEFT layer there "
                "would silently do nothing; leave it out, or keep the adapter in capavision's own file"
            )
        if wrapper.failure or not wrapper.error <= TOLERANCE:
            found = wrapper.failure or f"off by {100 * wrapper.error:.0f} % of the effect of ΔW"
            raise ValueError(
                f"{name}: PEFT's LoRA on this {kind} would not compute (W + ΔW) x ({found}); leave such layers out, or "
                "keep the adapter in capavision's own file"
            )


@torch.no_grad()
def _rehearse(model: nn.Module, hosts: Collection[str], example: Example | None) -> dict[str, Wrapper]:
    copied = remove(copy.deepcopy(model)).eval().requires_grad_(False)
    exact = hosting.delta_dtype(next(copied.parameters()))
    copied.to(exact)
    with torch.random.fork_rng(devices=[]):  # making convs draws from the global generator
        random = torch.Generator().manual_seed(0)
        if example is None:
            zeros = example_input(copied)
            example = torch.randn(zeros.shape, generator=random).to(zeros.device)
        x = _exact(example, exact)
        wrappers = {name: Wrapper(name, copied.get_submodule(name), random) for name in hosts}
        for name, wrapper in wrappers.items():
            copied.set_submodule(name, wrapper)
        _run(type(model).__name__, copied, x)
    return wrappers


def _exact(example: Any, dtype: torch.dtype) -> Any:
    """The batch in `dtype`, but for what counts: numbers of tokens, masks."""
    if isinstance(example, Mapping):
        return {name: _exact(part, dtype) for name, part in example.items()}
    return example.to(dtype) if isinstance(example, Tensor) and example.is_floating_point() else example


def _run(model: str, copied: nn.Module, x: Example) -> None:
    try:
        run_once(copied, x)
    except Exception as error:
        raise ValueError(
            f"{model} does not run with PEFT's layers in it ({type(error).__name__}: {error}); adapt other layers, or "
            "keep the adapter in capavision's own file"
        ) from error
