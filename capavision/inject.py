"""Choose hosts, build deltas, freeze the base, report: `inject` either does all of it or leaves the model untouched."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from capavision import host as hosting
from capavision.attention import classifier, weight_of
from capavision.channels import measure
from capavision.delta import Delta, Method, OutputDelta, Rows, Site, WeightDelta
from capavision.targets import Parts, Spans, Targets, choose
from capavision.tying import tied

RECORD = "_capavision"  # the model's attribute that lists its injections


@dataclass(frozen=True)
class Injection:
    """What one `inject` did, enough to do it again on a fresh base: kept on the model, written into its file.

    hosts maps a qualified module name to its parts: {"q": (0, 192), "v": (384, 576)}, or {} for all rows.
    """

    method: Method
    seed: int
    hosts: dict[str, Spans]
    axes: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # of blocks: channels out, in, and their axis
    head: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # the parameters that were trainable before
    freeze_norm: bool = True


@dataclass(frozen=True)
class Report:
    """What was injected where, and what it costs; print it."""

    method: Method
    rows: tuple[tuple[str, str, str, int], ...]  # host, its kind and shape, parts, trained values
    head: int
    total: int

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(row[0] for row in self.rows)

    @property
    def trained(self) -> int:
        """Values of all deltas, the head not counted."""
        return sum(row[3] for row in self.rows)

    def __str__(self) -> str:
        groups: dict[tuple[str, str, int], list[str]] = {}
        for host, kind, parts, values in self.rows:
            groups.setdefault((kind, parts, values), []).append(host)
        lines = [f"{self.method}"]
        for (kind, parts, values), names in groups.items():
            span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            lines.append(f"  {len(names):3} × {values:>9,}  {kind:<28} {'rows ' + parts if parts else '':<10} {span}")
        share = f"{100 * self.trained / max(self.total, 1):.3f} % of {self.total:,}"
        lines.append(f"  trained {self.trained:,} ({share}) in {len(self.rows)} hosts; head {self.head:,}")
        return "\n".join(lines)


def injections(model: nn.Module) -> list[Injection]:
    """The injections `model` carries, oldest first."""
    found: list[Injection] = getattr(model, RECORD, [])
    return found


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, those of deltas and head: hand them to the optimizer.

    >>> optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)  # doctest: +SKIP
    """
    return [p for p in model.parameters() if p.requires_grad]


def inject(
    model: nn.Module,
    method: Method,
    targets: Targets = None,
    parts: Parts = None,
    *,
    seed: int = 0,
    freeze_norm: bool = True,
    example: Tensor | None = None,
) -> Report:
    """Put `method` into `model`: chosen hosts gain a delta, everything else but the classifier is frozen.

    Args:
        model: any torch module; a timm model's classifier and input size are found by themselves.
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
        freeze_norm: keep batch norms in eval for good; their statistics are not in the saved file.
        example: one input batch, needed only to adapt blocks of a model that does not tell its input size.

    Returns:
        Report: hosts, shapes and trained values.

    Raises:
        ValueError: targets that match nothing or nothing adaptable, a host that carries a delta already, unknown
            parts, sizes the method cannot serve, a tied model. The model is left as it was.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    >>> from capavision.methods.lora import LoRA
    >>> inject(model, LoRA(rank=4, branches=2), targets="qkv", parts="qv").trained
    36864
    """
    if not isinstance(method, Method):
        raise TypeError(f"method must be a capavision method such as LoRA(rank=8), not {method!r}")
    if tied(model):
        raise ValueError("the model is tied, and a tied model trains all of itself; capavision.fold(model) first")
    hosts = choose(model, method, targets, parts)
    placed = measure(model, hosts, example) if method.placement is OutputDelta else {}
    head = tuple(n for n in classifier(model) if n not in hosts)
    if not hosts and not head:
        raise ValueError(f"{type(model).__name__} has no classifier, so {type(method).__name__} has nothing to train")
    return apply(model, Injection(method, seed, hosts, placed, head, freeze_norm=freeze_norm))


def apply(model: nn.Module, plan: Injection) -> Report:
    """Carry out a plan whose hosts are known: build every delta first, then attach, freeze and record."""
    deltas = {name: _build(model, plan, name) for name in plan.hosts}
    frozen = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    plan = replace(plan, frozen=frozen)
    for name, delta in deltas.items():
        hosting.attach(model.get_submodule(name), delta)
    if plan.freeze_norm:
        hosting.freeze_batch_norm(model)
    kept = {p for m in model.modules() if isinstance(m, Delta) for p in m.parameters()}
    kept |= {p for name in plan.head for p in model.get_submodule(name).parameters()}
    for p in model.parameters():
        p.requires_grad_(p in kept)
    setattr(model, RECORD, [*injections(model), plan])
    return _report(model, plan)


def _build(model: nn.Module, plan: Injection, name: str) -> Delta:
    host = model.get_submodule(name)
    like = next(host.parameters(), torch.empty(0)).detach()
    like = like.new_empty(0, dtype=hosting.delta_dtype(like))
    try:
        if plan.method.placement is OutputDelta:
            n_out, n_in, axis = plan.axes[name]
            return plan.method.build(Site(name, n_out, n_in, plan.seed, like, axis))
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


def _report(model: nn.Module, plan: Injection) -> Report:
    rows = []
    for name, parts in plan.hosts.items():
        host = model.get_submodule(name)
        base = type(host).__mro__[1].__name__
        shape = f" {tuple(weight_of(host).shape)}" if plan.method.placement is WeightDelta else ""
        values = sum(p.numel() for p in getattr(host, hosting.SLOT).parameters())
        rows.append((name, base + shape, ", ".join(parts), values))
    deltas = {p for m in model.modules() if isinstance(m, Delta) for p in m.parameters()}
    head = sum(p.numel() for name in plan.head for p in model.get_submodule(name).parameters())
    return Report(plan.method, tuple(rows), head, sum(p.numel() for p in model.parameters() if p not in deltas))
