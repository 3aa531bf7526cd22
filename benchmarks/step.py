"""A training step beside its floor: python -m benchmarks.step --model vit_tiny_patch16_224

The floor is what no method that adapts the first layers can go below: the frozen backbone's forward, the backward to
all activations, and the training of the head. Its first bias is trained too, so that the backward runs the whole depth.
A step is forward, loss, backward and AdamW. Batch norms stay in eval in every row, as capavision keeps them.

Every round takes one step of each case, in random order; a ratio is of a round's two times. Memory is what autograd
keeps for the backward, on a GPU the peak.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from benchmarks.tables import add_timed, check_counts, check_names, machine, table
from export.bench import interleaved
from vtab import cli, setup
from vtab.evaluate import PRECISIONS, autocast
from vtab.prefix import FrozenPrefix

CAPABOOST = cv.LoRA(rank=8, branches=2)
LATE = ("blocks.[6-9].attn.qkv", "blocks.1?.attn.qkv")  # of a ViT of 12 blocks, the last 6
NORMS = (nn.modules.batchnorm._BatchNorm,)


def floor(model: nn.Module) -> nn.Module:
    """Frozen, but for the head and the first bias."""
    model.requires_grad_(False)
    next(p for name, p in model.named_parameters() if name.endswith("bias")).requires_grad_(True)
    model.get_classifier().requires_grad_(True)  # type: ignore[operator]
    return model


def full(model: nn.Module) -> nn.Module:
    """All of it."""
    return model.requires_grad_(True)


def ours(method: cv.Method, targets: str | Sequence[str] | None = None) -> Callable[[nn.Module], nn.Module]:
    """With a delta; None are the method's own targets."""

    def inject(model: nn.Module) -> nn.Module:
        cv.inject(model, method, targets)
        return model

    return inject


def peft(kinds: tuple[type[nn.Module], ...], last: str = "") -> Callable[[nn.Module], nn.Module]:
    """With HF PEFT's LoRA of rank 16 on modules of a kind and name, not on grouped convs, which it cannot merge."""

    def wrap(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        head = model.get_classifier()  # type: ignore[operator]
        chosen = [
            name
            for name, m in model.named_modules()
            if isinstance(m, kinds) and m is not head and getattr(m, "groups", 1) == 1 and name.endswith(last)
        ]
        wrapped: nn.Module = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=chosen))  # type: ignore[arg-type]
        head.requires_grad_(True)
        return wrapped

    return wrap


CASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "floor": floor,
    "full": full,
    "capaboost qkv": ours(CAPABOOST, "qkv"),
    "capaboost linear": ours(CAPABOOST, "linear"),
    "capaboost conv": ours(CAPABOOST, "conv"),
    "peft qkv": peft((nn.Linear,), "qkv"),
    "peft linear": peft((nn.Linear,)),
    "peft conv": peft((nn.Conv2d,)),
    "lora 16 linear": ours(cv.LoRA(rank=16), "linear"),
    "circulant linear": ours(cv.Circulant(), "linear"),
    "toeplitz linear": ours(cv.Toeplitz(), "linear"),
    "kronecker linear": ours(cv.Kronecker(), "linear"),
    "ldr linear": ours(cv.LDR(), "linear"),
    "late qkv": ours(CAPABOOST, LATE),
    "late qkv, cached prefix": ours(CAPABOOST, LATE),
    "adapter": ours(cv.Adapter(rank=8, branches=2)),
    "prefix": ours(cv.Prefix()),
}
SETS = {
    "vit": ("floor", "full", "capaboost qkv", "peft qkv", "capaboost linear", "peft linear"),
    "methods": ("floor", "adapter", "prefix", "lora 16 linear", *(n for n in CASES if n.split()[0] in cv.Method.known)),
    "conv": ("floor", "full", "capaboost conv", "peft conv"),
    "late": ("floor", "capaboost qkv", "late qkv", "late qkv, cached prefix"),
}


@dataclasses.dataclass
class Trainee:
    """One case, ready to take steps."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    precision: str = "auto"
    prefix: Callable[[torch.Tensor], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.forward: Any = self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.values = sum(p.numel() for p in trained)

    def loss(self) -> torch.Tensor:
        """Of the batch."""
        chosen = torch.arange(len(self.x), device=self.x.device)
        with autocast(self.x.device, self.precision), self.prefix(chosen):
            return F.cross_entropy(self.forward(self.x), self.y)

    def step(self) -> None:
        """Forward, backward, update; on a GPU to its end."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)

    def memory(self) -> float:
        """MB: the peak on a GPU, else what is kept for the backward beside parameters and buffers."""
        if self.x.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.x.device)
            before = torch.cuda.memory_allocated(self.x.device)
            self.step()
            return (torch.cuda.max_memory_allocated(self.x.device) - before) / 1e6
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        loss = self.loss()
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved(loss)}
        return sum(size for address, size in kept.items() if address not in own) / 1e6


def saved(loss: torch.Tensor) -> list[torch.Tensor]:
    """All tensors that the graph behind `loss` keeps; hooks on saved tensors would change what is kept."""
    waiting, seen, found = [loss.grad_fn], set[Any](), list[torch.Tensor]()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        each = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in (*each, getattr(node, "saved_tensors", ())):
            found += [
                t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)
            ]
    return found


def trainee(case: str, options: argparse.Namespace) -> Trainee:
    """The case's model, injected and on its device."""
    torch.manual_seed(0)
    model = CASES[case](cv.Base(options.model, "random", options.img_size).build(100))
    model.to(options.device).train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
    size = options.img_size or model.get_submodule("").pretrained_cfg["input_size"][-1]  # type: ignore[union-attr]
    x = torch.randn(options.batch, 3, size, size, device=options.device)
    found = Trainee(model, x, torch.arange(options.batch, device=options.device) % 100, options.precision)
    if "cached" in case:
        found.prefix = FrozenPrefix(model, x, lambda x: x, options.batch, options.precision)
    if options.compile:
        found.forward = torch.compile(model)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(prog="python -m benchmarks.step", description=__doc__.splitlines()[0])
    add_timed(parser, cases=f"one of the sets {', '.join(SETS)}, or names with semicolons (default: vit)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of products, as of vtab.train")
    parser.add_argument("--compile", action="store_true", help="torch.compile every case")
    options = check_counts(parser.parse_args(argv), "batch", "rounds", "threads")
    named = options.cases or "vit"
    options.cases = SETS.get(named) or tuple(named.split(";"))
    check_names("--cases", options.cases, CASES)
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print a row for each case; returns their ratios to the floor."""
    options = parse(argv)
    device = options.device = setup.pick_device(options.device)
    torch.set_num_threads(options.threads)
    cases = {case: trainee(case, options) for case in dict.fromkeys(("floor", *options.cases))}
    times = interleaved({case: each.step for case, each in cases.items()}, options.rounds)
    kept = {case: each.memory() for case, each in cases.items()}
    rows, ratios = [], {}
    for case, each in cases.items():
        low, ratios[case], high = np.percentile(times[case] / times["floor"], [25, 50, 75])
        share = kept[case] / kept["floor"]
        spread = f"{ratios[case]:.3f} ({low:.3f} … {high:.3f})"
        rows.append((case, f"{each.values:,}", f"{np.median(times[case]):.1f}", spread, f"{share:.3f}"))
    print(table(("case", "trained", "step, ms", "of the floor (quartiles)", "memory, of the floor's"), rows))
    shape = "" if options.img_size is None else f" at {options.img_size}"
    how = f"precision {options.precision}{', compiled' if options.compile else ''}"
    print(f"{options.model}{shape}, batch {options.batch}, {options.rounds} rounds, {how}; {machine(device, 'peft')}")
    return ratios


if __name__ == "__main__":
    cli.run(main)
