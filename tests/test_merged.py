"""The merged forward against the factored one and against explicit loops, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import capavision as cv
from capavision import merged
from tests.conftest import assert_moved, awaken, create, outputs, seeded, twin

EXACT = {"rtol": 1e-11, "atol": 1e-11}
METHODS = {
    "lora": cv.LoRA(rank=3, alpha=5.0),
    "capaboost": cv.LoRA(rank=3, alpha=5.0, branches=2),
    "complementary": cv.LoRA(rank=4, branches=4, masks="complementary"),
    "learned": cv.LoRA(rank=4, masks="learned"),
}


def parts(bias=True):
    x, weight = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    blocks = [
        merged.Block(0, 2, torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64), 0.7),
        merged.Block(4, 6, torch.randn(2, 1, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64), -1.3),
    ]
    return x, weight, torch.randn(6, dtype=torch.float64) if bias else None, blocks


def by_hand(x, weight, bias, blocks):
    """One multiplication at a time."""
    total = weight.clone()
    for start, stop, up, down, scale in blocks:
        for i in range(start, stop):
            for j in range(weight.shape[1]):
                for k in range(up.shape[1]):
                    total[i, j] += scale * up[i - start, k] * down[k, j]
    y = torch.zeros(*x.shape[:-1], len(weight), dtype=x.dtype)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for i in range(len(weight)):
                y[b, n, i] = (total[i] * x[b, n]).sum() + (0 if bias is None else bias[i])
    return y


@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_is_that_of_explicit_loops(bias):
    x, weight, b, blocks = seeded(lambda: parts(bias))
    torch.testing.assert_close(merged.linear(x, weight, b, blocks), by_hand(x, weight, b, blocks), **EXACT)


def test_the_gradients_are_the_limits_of_differences_once_and_twice():
    x, weight, bias, blocks = seeded(parts)

    def y(x, bias, *factors):
        made = [b._replace(up=factors[2 * i], down=factors[2 * i + 1]) for i, b in enumerate(blocks)]
        return merged.linear(x, weight, bias, made)

    inputs = [x, bias, *(factor for block in blocks for factor in (block.up, block.down))]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


def adapted(method, targets="blocks.*", **kwargs):
    """A ViT with deltas that are awake, and a batch of tokens enough to merge."""
    model = seeded(lambda: create("test_vit", num_classes=3)).double()
    cv.inject(model, method, targets, **kwargs)
    return awaken(model)


def step(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """How often a host merged."""
    seen, original = [], merged.linear
    monkeypatch.setattr(merged, "linear", lambda *args: seen.append(args[1].shape) or original(*args))
    return seen


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("targets", "rows"), [("qkv", "qv"), ("qkv", None), ("linear", None)])
def test_a_merged_step_is_the_factored_one(method, targets, rows, calls, monkeypatch):
    model = adapted(method, targets, **({"parts": rows} if rows else {}))
    x = seeded(lambda: torch.randn(4, 3, 160, 160, dtype=torch.float64), 1)
    found, y = step(model, x), model(x).detach()
    assert calls
    monkeypatch.setattr(merged, "pays", lambda x, weight: False)
    count = len(calls)
    expected = step(model, x)
    assert len(calls) == count
    torch.testing.assert_close(y, model(x).detach(), **EXACT)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())
    assert_moved(y, outputs(cv.remove(twin(model)), x))


def test_the_crossing_is_where_the_counted_operations_cross():
    """torch's counter, forward and the backward to x, on both sides of N = n_in n_out / (n_in + n_out)."""
    n_in, n_out, rank = 24, 72, 2
    host = nn.Linear(n_in, n_out).requires_grad_(False)
    up, down = torch.randn(n_out, rank), torch.randn(rank, n_in)

    def counted(call, tokens):
        x = torch.randn(tokens, n_in, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            call(x).sum().backward()
        return counter.get_total_flops()

    def thin(x):
        return F.linear(x, host.weight, host.bias) + F.linear(F.linear(x, down), up)

    def merges(x):
        return merged.linear(x, host.weight, host.bias, [merged.Block(0, n_out, up, down, 1.0)])

    factors = 2 * 2 * rank * 3 * (n_in + n_out)  # dU and dD of the merged step, which plain tensors spare the other
    for tokens in (17, 18, 19):
        extra = factors * tokens // 3
        cheaper = counted(merges, tokens) - extra <= counted(thin, tokens)
        assert merged.pays(torch.empty(tokens, n_in), host.weight) == cheaper == (tokens >= 18)


def test_few_tokens_evaluation_autocast_and_half_precision_stay_factored(calls):
    model = adapted(METHODS["lora"], "linear").float()
    few, many = torch.randn(1, 3, 160, 160), torch.randn(4, 3, 160, 160)
    with torch.no_grad():
        model(many)
    with torch.autocast("cpu", torch.bfloat16):
        model(many)
    model.bfloat16()(many.bfloat16())
    assert not calls
    model.float()(many)
    assert calls
    del calls[:]
    cv.remove(model)
    host = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    cv.inject(host, METHODS["lora"], "0")
    host(torch.randn(31, 64))
    assert not calls
    host(torch.randn(32, 64))
    assert len(calls) == 1
    assert few.shape[0] == 1


def test_compile_traces_the_merged_step_whole(calls):
    model = adapted(METHODS["capaboost"], "linear")
    x = seeded(lambda: torch.randn(4, 3, 160, 160, dtype=torch.float64), 1)
    expected = step(model, x)
    compiled = torch.compile(twin(model), backend="aot_eager", fullgraph=True)
    found = step(compiled, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, **EXACT)


def test_checkpointing_and_functional_gradients_agree():
    model = adapted(METHODS["lora"], "linear")
    x = seeded(lambda: torch.randn(4, 3, 160, 160, dtype=torch.float64), 1)
    expected = step(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, **EXACT)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    functional = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(trained)
    for name, gradient in expected.items():
        torch.testing.assert_close(functional[name], gradient, **EXACT)


def test_nothing_dense_is_kept_for_the_backward():
    """Saved beside x: the weight itself, which is there anyway, and the factors."""
    host = nn.Sequential(nn.Linear(64, 64))
    cv.inject(host, METHODS["lora"], "0")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        host(torch.randn(100, 64, requires_grad=True))
    fresh = [t for t in saved if t.numel() >= 64 * 64 and t.data_ptr() != host[0]._parameters["weight"].data_ptr()]
    assert [tuple(t.shape) for t in fresh] == [(100, 64)]
