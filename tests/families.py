"""The chain of promises that every method keeps in each of timm's 98 families, see export.families.

In float64, where a fold is exact but for rounding.
"""

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

import capavision as cv
from capavision.attention import classifier
from capavision.delta import Rows
from capavision.host import is_batch_norm
from export.families import FAMILIES, small_model
from tests.conftest import answer, outputs, seeded, snapshot, twin
from tests.thin import thin_model


def family_model(family, thin=False):
    if not timm.is_model(FAMILIES[family]):
        pytest.skip(f"timm {timm.__version__} has no {FAMILIES[family]}")
    return (thin_model if thin else small_model)(family, torch.float64)


def recorded(model, x):
    """The output in eval mode, with its graph: torch may choose another kernel without one."""
    model.train()  # clears what some models cache in eval
    return answer(model.eval(), x)


def gradients(model, x):
    """The output in eval mode, and the gradient of a random projection of it; by parameter name."""
    model.zero_grad()
    y = recorded(model, x)
    (y * seeded(lambda: torch.randn(y.shape, dtype=y.dtype))).sum().backward()
    model.train().eval()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layers(model):
    """Every Linear and Conv outside of the classifier, by their classes alone."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    inside = {part for head in heads for part in head.modules()}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m not in inside}


@dataclass(frozen=True)
class Outcome:
    """What the chain saw: hosts, their trained values, hosts whose own weights get no gradient either, batch norms."""

    hosts: int
    values: int
    unused: int
    norms: int


class RefusedError(ValueError):
    """What `inject` said."""


def chain(model, x, method, targets, path):
    """Inject, one training step, save, load on a fresh base, remove, fold; an AssertionError where a promise breaks.

    `model` is the plain base and comes back as such, its classifier trained; `path` is the file to write.
    """
    fresh, before = twin(model), snapshot(model)
    norms = sum(map(is_batch_norm, model.modules()))
    frozen = start(model, x)
    try:
        report = cv.inject(model, method, targets, example=x)
    except ValueError as error:
        raise RefusedError(*error.args) from error
    prefixed = method.placement is cv.AttentionDelta
    assert torch.equal(outputs(model, x), frozen) != prefixed, "the start is not the plain model"

    step(model, x)
    adapted = recorded(model, x).detach()
    cv.save(model, path)
    loaded, found = gradients(cv.load(path, fresh), x)
    assert torch.equal(loaded, adapted), "another output after save and load"

    cv.remove(model)
    check_removed(model, before)
    moved = movement(adapted, outputs(model, x))  # by the deltas alone: `model` keeps the trained classifier
    checks = {cv.WeightDelta: check_weights, cv.OutputDelta: check_blocks, cv.AttentionDelta: check_prefixes}
    check = checks[method.placement]
    folded, unused = check(fresh, x, report.hosts, found)
    assert (folded - adapted).abs().max() < 1e-6 * moved, "another output after fold"
    return Outcome(len(report.hosts), report.trained, unused, norms)


def start(model, x):
    """The output before the delta. Torch may choose another kernel for a frozen weight, and its last bit may differ."""
    if not classifier(model):
        return outputs(twin(model).requires_grad_(False), x)
    cv.inject(model, cv.LinearProbe())
    frozen = outputs(model, x)
    cv.remove(model)
    return frozen


def chain_of_norms(model, x, path):
    """Batch norms left to train beside the classifier: save, load on a fresh base, remove."""
    fresh, before = twin(model), snapshot(model)
    cv.inject(model, cv.LinearProbe(), freeze_norm=False)
    step(model, x)
    trained = outputs(model, x)
    assert any(
        not torch.equal(value, before["values"][name])
        for name, value in model.state_dict().items()
        if name.endswith("running_mean")
    ), "no statistic moved, so this test would prove nothing"
    cv.save(model, path)
    assert torch.equal(outputs(cv.load(path, fresh), x), trained), "another output after save and load"
    cv.remove(model)
    check_removed(model, before)


def movement(adapted, plain):
    moved = (adapted - plain).abs().max()  # in float64, whose noise is 1e-12 here
    assert moved > 1e-5 * max(1, plain.abs().max()), "the delta moved nothing, so this test would prove nothing"
    return moved


def step(model, x):
    """One step of training in train() mode; every trained parameter that got a gradient got a finite one."""
    trained = cv.parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=5e-2)  # one step that shows
    y = seeded(lambda: answer(model.train(), x))
    (y * seeded(lambda: torch.randn(y.shape, dtype=y.dtype))).sum().backward()
    grads = [p.grad for p in trained if p.grad is not None]
    assert grads, "no delta got a gradient"
    assert all(g.isfinite().all() for g in grads), "a gradient is not finite"
    optimizer.step()
    optimizer.zero_grad()


def silent(gradient):
    return gradient is None or not gradient.any()


def check_weights(model, x, hosts, found):
    """Fold, per layer W + ΔW, and the deltas' gradients: those of the folded weights, carried on by the chain rule.

    Returns the folded model's output, and the number of hosts whose own weight gets no gradient, nor its delta then.
    """
    modules = {name: model.get_submodule(name) for name in hosts}
    bases = {name: host._parameters["weight"].detach() for name, host in modules.items()}
    deltas = {name: (host.delta, host.delta.weight()) for name, host in modules.items()}
    cv.fold(model)
    y, weights = gradients(model, x)
    unused = 0
    for name, (delta, product) in deltas.items():
        folded = modules[name].weight
        assert torch.equal(folded, bases[name] + product.view_as(folded)), f"{name}: the folded weight is not W + ΔW"
        gradient = weights.get(f"{name}.weight")
        unused += silent(gradient)
        gradient = torch.zeros_like(product) if gradient is None else gradient.view_as(product)
        parameters = dict(delta.named_parameters())
        expected = torch.autograd.grad(product, list(parameters.values()), gradient, materialize_grads=True)
        for part, reference in zip(parameters, expected, strict=True):
            rows = slice(*delta.rows[part.split(".")[1]]) if isinstance(delta, Rows) else slice(None)
            assert silent(gradient[rows]) or not silent(reference), f"{name}.delta.{part} is dead"
            ours = found.get(f"{name}.delta.{part}", torch.zeros_like(reference))
            wrong = (ours - reference).abs().max() > 1e-5 * reference.abs().max()
            assert not wrong, f"{name}.delta.{part} has another gradient than the chain rule gives"
    return y, unused


def check_blocks(model, x, hosts, found):
    """Fold, per block the dense bottleneck against the masked one, and no delta dead where the block is not.

    Returns the folded model's output, and the number of hosts whose own weights get no gradient.
    """
    modules = {name: model.get_submodule(name) for name in hosts}
    masked = {name: host.delta for name, host in modules.items()}
    seen = arguments(model, x, masked)
    cv.fold(model)
    y, own = gradients(model, x)
    unused = 0
    for name, delta in masked.items():
        with torch.no_grad():
            before, after = delta(*seen[name]), modules[name].delta(*seen[name])
        assert (before - after).abs().max() <= 1e-9 * before.abs().max(), f"{name}: the folded adapter is another one"
        inside = [g for key, g in own.items() if key.startswith(f"{name}.") and ".delta." not in key]
        used = not all(map(silent, inside))
        unused += not used
        for part, _ in delta.named_parameters():
            assert not used or not silent(found.get(f"{name}.delta.{part}")), f"{name}.delta.{part} is dead"
    return y, unused


def check_prefixes(model, x, hosts, found):
    """Fold, per attention the dense keys and values against the masked ones, and none of them dead."""
    modules = {name: model.get_submodule(name) for name in hosts}
    masked = {name: torch.cat(host.delta()) for name, host in modules.items()}
    cv.fold(model)
    for name, host in modules.items():
        assert torch.equal(torch.cat(host.delta()), masked[name]), f"{name}: the folded prefix is another one"
        assert not any(silent(found.get(f"{name}.delta.{part}.value")) for part in "KV"), f"{name}.delta is dead"
    return outputs(model, x), 0


def arguments(model, x, deltas):
    """What each delta is called with in one forward pass."""
    seen = {}
    hooks = [
        delta.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
        for name, delta in deltas.items()
    ]
    outputs(model, x)
    for hook in hooks:
        hook.remove()
    return seen


def check_removed(model, before):
    """Every bit, class, flag and attribute of the base is as it was; the classifier alone keeps what it learned."""
    after, heads = snapshot(model), tuple(f"{name}." for name in classifier(model))
    for name, value in before["values"].items():
        assert name.startswith(heads) or torch.equal(value, after["values"][name]), f"{name} changed for good"
    for what in before.keys() - {"values"}:
        assert before[what] == after[what], f"remove left other {what}"
