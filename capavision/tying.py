"""Weight-tied models: one block's weights at every depth, each depth seeing them through a static mask of its own.

    z_{l+1} = f(z_l; W ⊙ M_l),    l = 0 … depth - 1

Source: arXiv 2307.08013, weight-tied models with distinct sparse masks per depth. CapaBoost is their parallel
        counterpart, Σ_i f(x; W ⊙ M_i).
Shapes: W each Linear and conv weight of one block, trained; M_l 0/1 of the same shape, drawn once, never learned.
        Biases, norms and layer scales are shared whole. Buffers (running statistics) and settings (stride, window
        shift, stochastic depth) stay each depth's own.
Cost:   the values of one block, whatever the depth; the products are those of the untied model.
Start:  the first block's initial values at every depth. At density s, W ⊙ M_l starts √s times smaller than W.

How it works:

    for block in blocks[1:]:                 # the same nn.Parameter objects at every depth
        for name, parameter in blocks[0].named_parameters():
            set_by_name(block, name, parameter)
    host.__class__ = MaskedLinear            # `weight` is W ⊙ M_l: capavision.host; autograd sums over the depths
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capavision import host as hosting
from capavision.attention import is_weighted, weight_of
from capavision.masks import KINDS, Sharing, draw_masks
from capavision.targets import near

RECORD = "_capavision_tied"  # the model's attribute that lists its tyings
Row = tuple[str, str, int, int]  # weight's place in the block, its kind and shape, its values, how many a mask keeps


@dataclass(frozen=True)
class Tying:
    """What one `tie` did, enough to do it again; print it."""

    blocks: tuple[str, ...]
    density: float
    masks: str
    seed: int
    rows: tuple[Row, ...] = ()
    before: int = 0  # parameters of the whole model, each counted once
    after: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Tying":
        """What `settings` gave, read back from JSON."""
        blocks = tuple(map(str, settings["blocks"]))
        return cls(blocks, float(settings["density"]), str(settings["masks"]), int(settings["seed"]))

    def settings(self) -> dict[str, Any]:
        """The arguments of `tie` that give the same model, as JSON."""
        return {"blocks": list(self.blocks), "density": self.density, "masks": self.masks, "seed": self.seed}

    def __str__(self) -> str:
        masked = f", density={self.density:g}, masks={self.masks!r}, seed={self.seed}" if self.rows else ""
        lines = [f"tie({self.blocks[0]} … {self.blocks[-1]}{masked})"]
        for place, kind, values, kept in self.rows:
            lines.append(f"  {values:>9,}  {kind:<28} {place:<16} each depth sees {kept:,}")
        lines.append(f"  parameters {self.before:,} -> {self.after:,}: one block's at {len(self.blocks)} depths")
        return "\n".join(lines)


def tied(model: nn.Module) -> list[Tying]:
    """What `tie` did to `model`, oldest first."""
    found: list[Tying] = getattr(model, RECORD, [])
    return found


def tie(
    model: nn.Module,
    blocks: str | Sequence[str] = "blocks",
    *,
    density: float | None = None,
    masks: str = "random",
    seed: int = 0,
) -> Tying:
    """Give every block of a stack the first one's parameters and, where asked, a static mask of its own.

    Call it before the optimizer is made: the other blocks' parameters go. All that was trainable stays so, since such a
    model trains from scratch; `save`, `load` and `fold` know it, and `fold` gives a plain, untied model.

    Args:
        model: any torch module; a timm model has its stacks in "blocks", "layers.2.blocks", "stages.2.blocks", ….
        blocks: the name of the Sequential or ModuleList that holds them, or names or globs of the blocks themselves,
            the first block first: ["layer1.1", "layer1.2"].
        density: share of ones in each mask. None is the masks' own: 1, hence no masks, for "random", 1/depth for
            "complementary", 0.5 for "2:4".
        masks: "random" (each depth keeps the same number of entries), "complementary" (the depths share the entries out
            among themselves), "2:4"; see `capavision.masks`.
        seed: of the masks. Each weight draws from its own key.

    Returns:
        Tying: the blocks, what each mask keeps, parameters before and after.

    Raises:
        ValueError: names that match nothing, fewer than two blocks, blocks that differ in class or in a parameter's
            name, shape or dtype, that share parameters already or carry deltas, or masks that cannot be served. The
            model is left as it was.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> tie(model, density=0.5).after, sum(p.numel() for p in model.parameters())
    (632842, 632842)
    """
    from capavision.inject import injections  # which imports this module

    if injections(model):
        raise ValueError("the model carries an injection; capavision.fold(model) or remove(model) first, then tie")
    names = _resolve(model, blocks)
    stack = [model.get_submodule(name) for name in names]
    _check_alike(names, stack)
    _check_own(model, names)
    density = _density(len(names), density, masks)
    bits = _draw(names[0], stack, density, masks, seed) if density < 1 else {}
    rows = tuple(_row(stack[0], place, drawn[0]) for place, drawn in bits.items())

    before = _count(model)
    _share(stack)
    for depth, block in enumerate(stack):
        for place, drawn in bits.items():
            hosting.mask(block.get_submodule(place), drawn[depth])
    plan = Tying(names, density, masks, seed, rows, before, _count(model))
    setattr(model, RECORD, [*tied(model), plan])
    return plan


@torch.no_grad()
def untie(model: nn.Module) -> None:
    """Write W ⊙ M_l into each depth as a parameter of its own: the plain model that computes the same."""
    for plan in tied(model):
        for depth, name in enumerate(plan.blocks):
            _own_parameters(model.get_submodule(name), copy=depth > 0)
    delattr(model, RECORD)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """All that a tied model's file holds: each parameter once, under its first name, and the persistent buffers."""
    once = dict(model.named_parameters())
    everything = model.state_dict(keep_vars=True)
    return {name: t for name, t in everything.items() if name in once or not isinstance(t, nn.Parameter)}


def masks_of(model: nn.Module) -> list[Tensor]:
    """The masks of all depths, by module name."""
    hosts = [module for _, module in sorted(model.named_modules()) if hosting.is_masked(module)]
    return [host.get_buffer("mask") for host in hosts]


def _resolve(model: nn.Module, blocks: str | Sequence[str]) -> tuple[str, ...]:
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, None] = {}
    for pattern in [blocks] if isinstance(blocks, str) else blocks:
        module = modules.get(pattern)
        if isinstance(blocks, str) and isinstance(module, nn.Sequential | nn.ModuleList):
            matched = [f"{pattern}.{name}" for name, _ in module.named_children()]
        else:
            matched = [pattern] if module is not None else _outermost(fnmatch.filter(modules, pattern))
        if not matched:
            lists = [name for name, m in modules.items() if isinstance(m, nn.Sequential | nn.ModuleList)]
            raise ValueError(f"no module matches blocks={pattern!r}; {near(pattern, lists)}")
        found.update(dict.fromkeys(matched))
    if len(found) < 2:
        raise ValueError(
            f"blocks={blocks!r} names {len(found)} block ({', '.join(found)}), and tying takes at least two; name the "
            "Sequential or ModuleList that holds them, or several of its blocks"
        )
    inner = [name for name in found if name not in _outermost(list(found))]
    if inner:
        raise ValueError(f"blocks={blocks!r}: {inner[0]} lies inside another of the blocks; name only the outer ones")
    return tuple(found)


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _signature(block: nn.Module) -> dict[str, str]:
    """Each parameter's name with all that must agree between depths, as text for the refusal."""
    found = {}
    for name, p in block.named_parameters(remove_duplicate=False):
        owner = type(block.get_submodule(name.rpartition(".")[0])).__name__
        found[name] = f"{owner} {tuple(p.shape)} {str(p.dtype).removeprefix('torch.')} {p.device}"
    return found


def _check_alike(names: Sequence[str], stack: Sequence[nn.Module]) -> None:
    first = _signature(stack[0])
    if not first:
        raise ValueError(f"{names[0]} ({type(stack[0]).__name__}) has no parameters to tie")
    for name, block in zip(names, stack, strict=True):
        if type(block) is not type(stack[0]):
            raise ValueError(
                f"{name} is a {type(block).__name__} and {names[0]} a {type(stack[0]).__name__}; name blocks of one "
                f"class{_equal_run(names, stack)}"
            )
        other = _signature(block)
        for key in [*first, *other]:
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"{name} differs from {names[0]}: its {key} is {other.get(key, 'absent')}, not "
                    f"{first.get(key, 'absent')}; name blocks that are equal{_equal_run(names, stack)}"
                )


def _equal_run(names: Sequence[str], stack: Sequence[nn.Module]) -> str:
    groups: dict[Any, list[str]] = {}
    for name, block in zip(names, stack, strict=True):
        groups.setdefault((type(block), *_signature(block).items()), []).append(name)
    largest = max(groups.values(), key=len)
    return f", such as {largest}" if len(largest) > 1 else ""


def _check_own(model: nn.Module, names: Sequence[str]) -> None:
    """A parameter that something outside its block uses too would change here and stay there."""
    users: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        users.setdefault(p, []).append(name)
    for block in names:
        for shared in users.values():
            outside = [name for name in shared if not name.startswith(f"{block}.")]
            if outside and len(outside) < len(shared):
                inside = next(name for name in shared if name not in outside)
                raise ValueError(f"{inside} and {outside[0]} are one parameter already; tie blocks that share none")


def _density(depth: int, density: float | None, masks: str) -> float:
    if masks == "random" and density in (None, 1):
        return 1.0
    if masks == "learned":
        raise ValueError(f"masks='learned' is for the factors of a method; a tied model's: {', '.join(KINDS)}")
    try:
        settled = Sharing(branches=depth, density=density, masks=masks).density
    except ValueError as error:
        raise ValueError(f"each of the {depth} depths is one branch of the masks: {error}") from error
    assert settled is not None
    return settled


def _draw(name: str, stack: Sequence[nn.Module], density: float, masks: str, seed: int) -> dict[str, list[Tensor]]:
    """The masks of every depth for each weight of a block, by the weight's place in the block."""
    bits: dict[str, list[Tensor]] = {}
    for place, host in stack[0].named_modules():
        if not is_weighted(host):
            continue
        weight = weight_of(host)
        full = f"{name}.{place}" if place else name
        try:
            shape = (len(weight), weight[0].numel())
            drawn = draw_masks(masks, shape, len(stack), density, f"{seed}/{full}/tie")
        except ValueError as error:
            raise ValueError(f"{full} ({type(host).__name__} {tuple(weight.shape)}): {error}") from error
        if any(hosting.is_swapped(m) or hasattr(m, "mask") for m in (block.get_submodule(place) for block in stack)):
            raise ValueError(f"{full} ({type(host).__name__}) has a delta or an attribute named 'mask' of its own")
        bits[place] = [torch.from_numpy(mask).view(weight.shape).to(weight.device) for mask in drawn]
    if not bits:
        raise ValueError(f"{name} ({type(stack[0]).__name__}) has no Linear or Conv weight to mask; leave density out")
    return bits


def _row(block: nn.Module, place: str, mask: Tensor) -> Row:
    host = block.get_submodule(place)
    return place, f"{type(host).__name__} {tuple(mask.shape)}", mask.numel(), int(mask.sum())


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _share(stack: Sequence[nn.Module]) -> None:
    shared = list(stack[0].named_parameters(remove_duplicate=False))
    for block in stack[1:]:
        for name, parameter in shared:
            owner, _, last = name.rpartition(".")
            block.get_submodule(owner)._parameters[last] = parameter


def _own_parameters(block: nn.Module, copy: bool) -> None:
    """A masked weight becomes a new, dense parameter; the others are copied where `copy`, else kept."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for module in block.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if name == "weight" and hosting.is_masked(module):
                value = p * module.get_buffer("mask")
                hosting.unmask(module)
                module._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
            elif copy:
                module._parameters[name] = copies.setdefault(p, nn.Parameter(p.clone(), requires_grad=p.requires_grad))
