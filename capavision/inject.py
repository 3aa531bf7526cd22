"""Choose hosts, build deltas, freeze the base, report: `inject` either does all of it or leaves the model untouched."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from capavision import host as hosting
from capavision.attention import classifier, weight_of
from capavision.channels import Example, measure
from capavision.delta import AttentionDelta, Delta, Method, OutputDelta, Rows, Site, WeightDelta
from capavision.learned import MASK_RATIO, factors, share
from capavision.softmax import look
from capavision.targets import Parts, Spans, Targets, choose, starts
from capavision.tying import tied
from capavision.wrappers import RECORD, bare, refuse_sharded


@dataclass(frozen=True)
class Injection:
    """What one `inject` did, enough to do it again on a fresh base: kept on the model, written into its file.

    hosts maps a qualified module name to its parts: {"q": (0, 192), "v": (384, 576)}, or {} for all rows.
    """

    method: Method
    seed: int
    hosts: dict[str, Spans]
    # of blocks: channels out, in, and their axis; of attentions: width of the values, of the keys, heads
    axes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()  # the base's own tensors that change: parameters, statistics of batch norms
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)  # what `trained` were before
    frozen: tuple[str, ...] = ()  # the parameters that were trainable before
    freeze_norm: bool = True
    starts: dict[str, str] = field(default_factory=dict)  # of hosts whose x is another module's input: that module


@dataclass(frozen=True)
class Report:
    """What was injected where, and what it costs; print it."""

    method: Method
    rows: tuple[tuple[str, str, str, int], ...]  # host or own parameter, its kind and shape, parts, trained values
    head: int
    total: int
    shared: int = 0  # values of the prototypes that all hosts of learned masks share
    scores: int = 0  # of learned masks, among the rows' values

    @property
    def hosts(self) -> tuple[str, ...]:
        """The adapted modules, or the base's own parameters where the method trains these."""
        return tuple(row[0] for row in self.rows)

    @property
    def trained(self) -> int:
        """Values of all deltas and of the base's own trained parameters, the head not counted."""
        return sum(row[3] for row in self.rows) + self.shared

    @property
    def stored(self) -> int:
        """What a file holds of them, in values of 32 bits: a score of a learned mask counts 1/32, as ProPETL counts."""
        return self.trained - self.scores + math.ceil(self.scores / 32)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, int], list[str]] = {}
        for host, kind, parts, values in self.rows:
            groups.setdefault((kind, parts, values), []).append(host)
        lines = [f"{self.method}"]
        for (kind, parts, values), names in groups.items():
            span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            lines.append(f"  {len(names):3} × {values:>9,}  {kind:<28} {'rows ' + parts if parts else '':<10} {span}")
        share = f"{100 * self.trained / max(self.total, 1):.3f} % of {self.total:,}"
        where = f"{len(self.rows)} {'hosts' if self.method.placement else 'tensors'}"
        lines.append(f"  trained {self.trained:,} ({share}) in {where}; head {self.head:,}")
        if self.scores:
            shared = f"{self.shared:,} values are shared by hosts, {self.scores:,} are scores, stored as a bit each"
            lines.append(f"  stored {self.stored:,}: {shared}")
        return "\n".join(lines)


def injections(model: nn.Module) -> list[Injection]:
    """The injections `model` carries, oldest first."""
    found: list[Injection] = getattr(model, RECORD, [])
    return found


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `model` by name, deltas included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def own_tensors(model: nn.Module, plans: Iterable[Injection]) -> dict[str, Tensor]:
    """The base's own tensors that the plans train, by name."""
    names = [name for plan in plans for name in plan.trained]
    tensors = base_tensors(model) if names else {}
    return {name: tensors[name] for name in names}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, those of deltas and head: hand them to the optimizer.

    Raises:
        ValueError: the model was never injected, so that all of it would be trained; `Full` does that on purpose.

    >>> optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)  # doctest: +SKIP
    """
    if not any(injections(module) or tied(module) for module in model.modules()):
        raise ValueError(
            f"the {type(model).__name__} carries no injection, and all of it would be trained; capavision.inject first"
        )
    return [p for p in model.parameters() if p.requires_grad]


def parameter_groups(model: nn.Module, lr: float, *, mask_lr: float | None = None) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer's groups: the scores of learned masks take steps of their own size.

    Args:
        model: an injected model, wrapped or not; without learned masks there is one group.
        lr: the learning rate of values and head.
        mask_lr: that of scores, which get no weight decay: pulling all of them to 0 would change no mask. None is
            30 · lr, ProPETL's ratio for adapters (3e-3 beside 1e-4; for LoRA it takes 300, for prefixes 1).

    >>> groups = parameter_groups(model, lr=1e-3)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)  # doctest: +SKIP
    """
    scores = [factor.scores for factor in factors(model).values() if factor.scores.requires_grad]
    ids = set(map(id, scores))
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters(model) if id(p) not in ids], "lr": lr}]
    if scores:
        own = MASK_RATIO * lr if mask_lr is None else mask_lr
        groups.append({"params": scores, "lr": own, "weight_decay": 0.0})
    return groups


def inject(
    model: nn.Module,
    method: Method,
    targets: Targets = None,
    parts: Parts = None,
    *,
    seed: int = 0,
    freeze_norm: bool = True,
    example: Example | None = None,
) -> Report:
    """Put `method` into `model`: chosen hosts gain a delta, everything else but the classifier is frozen.

    Args:
        model: any torch module; a timm model's classifier and input size are found by themselves. A compiled model
            compiles again by itself; wrappers for many processes (DDP, fully_shard) come after inject.
        method: LoRA(...), Adapter(...), or any other Method.
        targets: what to adapt; None takes the method's own default for this architecture. A string or a list of
            - a qualified module name, "blocks.0.attn.qkv": that module;
            - a name, "qkv": every module whose last component it is (never a substring);
            - a glob over qualified names, "blocks.[0-5].mlp.fc?" ('*' crosses dots);
            - a group: "attention", "mlp", "linear", "conv", "all".
            The classifier is adapted only where it is named itself.
        parts: rows of a fused projection: letters of "q", "k", "v" ("qv"), or a list of row slices. None adapts all
            rows, but q and v alone where targets is None too.
        seed: of initial values and masks. Each host draws from its own key, so the order of modules does not matter.
        freeze_norm: keep batch norms in eval for good. If not, their statistics move, are saved, and are put back by
            `remove`.
        example: one input batch, or a mapping of them by name; needed only to adapt blocks or attentions of a model
            that does not tell its input size.

    Returns:
        Report: hosts, shapes and trained values.

    Raises:
        ValueError: targets that match nothing or nothing adaptable, a host that carries a delta already, unknown
            parts, sizes the method cannot serve, a wrapper that must come after, a tied model, a folded adapter. The
            model is left as it was.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> from capavision.methods.lora import LoRA
    >>> inject(model, LoRA(rank=4, branches=2), targets="qkv", parts="qv").trained
    36864
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a capavision method such as LoRA(rank=8), not {method!r}")
    if not isinstance(seed, int):
        raise TypeError(f"seed={seed!r} must be an int: files hold it, and what they cannot hold is refused here")
    model = bare(model)
    refuse_sharded(model, "inject before fully_shard")
    if tied(model):
        raise ValueError("the model is tied, and a tied model trains all of itself; capavision.fold(model) first")
    refuse_stray(model)
    hosts = choose(model, method, targets, parts)
    begins = starts(model, method, hosts)
    placed, named = {}, targets is not None
    if method.placement is OutputDelta:
        placed = measure(model, hosts, example, named=named, starts=begins)
    if method.placement is AttentionDelta:
        placed = _attentions(model, hosts, example, named=named)
    if method.placement in (OutputDelta, AttentionDelta):
        hosts = {name: hosts[name] for name in placed}
    head = whole_head(model, hosts)
    trained = tuple(method.trains(model))
    if not hosts and not head and not trained:
        raise ValueError(f"{type(model).__name__} has no classifier, so {type(method).__name__} has nothing to train")
    if not freeze_norm:
        trained += hosting.batch_norm_statistics(model)
    begins = {name: start for name, start in begins.items() if name in hosts}
    plan = Injection(method, seed, hosts, placed, head, trained, freeze_norm=freeze_norm, starts=begins)
    apply(model, plan)
    return _report(model, plan)


def refuse_stray(model: nn.Module) -> None:
    """Raise ValueError for a delta that no injection knows of: what a file holds would not bring it back."""
    hosts = {name for plan in injections(model) for name in plan.hosts}
    for name, module in model.named_modules():
        if name not in hosts and isinstance(getattr(module, hosting.SLOT, None), Delta):
            raise ValueError(
                f"{name} ({type(module).__name__}) carries a delta of no injection: fold made it dense, or it came "
                "with a module from another model, and a file would not load; inject into a model that was not "
                "folded, or keep this one's state_dict"
            )


def whole_head(model: nn.Module, hosts: Collection[str]) -> tuple[str, ...]:
    """The classifier by name, which is trained as it stands; a host in it, of an earlier injection too, is not."""
    return tuple(name for name, m in classifier(model).items() if name not in hosts and not hosting.is_swapped(m))


def _attentions(
    model: nn.Module, hosts: Collection[str], example: Example | None, *, named: bool
) -> dict[str, tuple[int, int, int]]:
    """The sizes of those attentions that can take keys and values; all of them must where the user named them."""
    found = look(model, hosts, example)
    refused = [f"{name}: {why}" for name, why in found.items() if isinstance(why, str)]
    if refused and (named or len(refused) == len(found)):
        raise ValueError(
            f"{refused[0]}, so no keys and values can be added to it; name other attentions, or use another method"
        )
    return {name: sizes for name, sizes in found.items() if not isinstance(sizes, str)}


def apply(model: nn.Module, plan: Injection) -> None:
    """Carry out a plan whose hosts are known: build every delta first, then attach, freeze and record."""
    deltas = {name: _build(model, plan, name) for name in plan.hosts}
    share(deltas.values())
    frozen = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    own = own_tensors(model, [*injections(model), plan])
    originals = {name: _spare(own[name].detach()) for name in plan.trained}
    plan = replace(plan, frozen=frozen, originals=originals)
    for name, delta in deltas.items():
        hosting.attach(model, name, delta, plan.starts.get(name))
    if plan.freeze_norm:
        hosting.freeze_batch_norm(model)
    setattr(model, RECORD, [*injections(model), plan])
    trained = {id(p) for m in model.modules() if isinstance(m, Delta) for p in m.parameters()}
    trained |= {id(p) for name in plan.head for p in model.get_submodule(name).parameters()}
    trained |= {id(tensor) for tensor in own.values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)


def _spare(tensor: Tensor) -> Tensor:
    """A copy in main memory, so that a GPU need not hold the base twice."""
    return tensor.clone() if tensor.is_meta else tensor.to("cpu", copy=True)


def _build(model: nn.Module, plan: Injection, name: str) -> Delta:
    host = model.get_submodule(name)
    like = next(host.parameters(), torch.empty(0)).detach()
    like = like.new_empty(0, dtype=hosting.delta_dtype(like))
    try:
        if plan.method.placement is OutputDelta:
            n_out, n_in, axis = plan.axes[name]
            return plan.method.build(Site(name, n_out, n_in, plan.seed, like, axis))
        if plan.method.placement is AttentionDelta:
            n_out, n_in, heads = plan.axes[name]
            return plan.method.build(Site(name, n_out, n_in, plan.seed, like, heads=heads))
        n_out, n_in = weight_of(host).shape[0], weight_of(host)[0].numel()
        if not plan.hosts[name]:
            return plan.method.build(Site(name, n_out, n_in, plan.seed, like))
        built: dict[str, Any] = {}
        for part, (start, stop) in plan.hosts[name].items():
            delta = plan.method.build(Site(f"{name}:{part}", stop - start, n_in, plan.seed, like))
            built[part] = ((start, stop), delta)
        return Rows(n_out, built)
    except ValueError as error:
        shape = f" {tuple(weight_of(host).shape)}" if plan.method.placement is WeightDelta else ""
        raise ValueError(f"{name} ({type(host).__name__}{shape}): {error}") from error


def _apart(start: str, name: str) -> str:
    """What of `start` is not also the beginning of `name`.

    >>> _apart("layer.0.intermediate.dense", "layer.0.output.dense")
    'intermediate.dense'
    """
    parts, others = start.split("."), name.split(".")
    while len(parts) > 1 and parts[:1] == others[:1]:
        parts, others = parts[1:], others[1:]
    return ".".join(parts)


def _report(model: nn.Module, plan: Injection) -> Report:
    rows = []
    learned = [f for name in plan.hosts for f in factors(getattr(model.get_submodule(name), hosting.SLOT)).values()]
    shared = {factor.prototype for factor in learned}
    for name, parts in plan.hosts.items():
        host = model.get_submodule(name)
        base = type(host).__mro__[1].__name__
        shape = f" {tuple(weight_of(host).shape)}" if plan.method.placement is WeightDelta else ""
        if name in plan.starts:
            shape = f", x of {_apart(plan.starts[name], name)}"
        values = sum(p.numel() for p in getattr(host, hosting.SLOT).parameters() if p not in shared)
        rows.append((name, base + shape, ", ".join(parts), values))
    own = dict(model.named_parameters())
    for name in [name for name in plan.trained if name in own]:
        module, _, last = name.rpartition(".")
        kind = f"{type(model.get_submodule(module)).__name__}.{last} {tuple(own[name].shape)}"
        rows.append((name, kind, "", own[name].numel()))
    deltas = {p for m in model.modules() if isinstance(m, Delta) for p in m.parameters()}
    head = sum(p.numel() for name in plan.head for p in model.get_submodule(name).parameters())
    total = sum(p.numel() for p in model.parameters() if p not in deltas)
    values, scores = (sum(p.numel() for p in found) for found in (shared, [factor.scores for factor in learned]))
    return Report(plan.method, tuple(rows), head, total, values, scores)
