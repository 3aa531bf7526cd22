"""Gradients of structured matrices without the dense gᵀx: loops over the equations, differences, counted products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import capavision as cv
from capavision import merged
from capavision.methods.kronecker import best_split
from tests.conftest import assert_moved, awaken, create, outputs, run_in_half_and_traced, seeded, twin

METHODS = {
    "circulant": cv.Circulant(alpha=1.7),
    "circulant product": cv.Circulant(alpha=1.7, product=True),
    "toeplitz": cv.Toeplitz(alpha=1.7),
    "toeplitz symmetric": cv.Toeplitz(alpha=1.7, kind="symmetric"),
    "kronecker": cv.Kronecker(alpha=1.7),
}
SHAPES = [(6, 6), (7, 7), (12, 4), (4, 12), (9, 4), (4, 9), (5, 1), (1, 5)]
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def built(method, n_out, n_in, dtype=torch.float64):
    return awaken(method.build(cv.Site("host", n_out, n_in, 0, torch.empty(0, dtype=dtype))), seed=n_out)


def by_hand(delta, g, x):
    """What each entry of M adds to the gradient of the values that make it, one entry at a time."""
    M, n_out, n_in = delta.M, g.shape[1], x.shape[1]
    found = {name: torch.zeros_like(p) for name, p in M.named_parameters()}
    n = min(n_out, n_in)
    for i in range(n_out):
        for j in range(n_in):
            G = sum(g[t, i] * x[t, j] for t in range(len(g)))
            if isinstance(M, type(built(cv.Circulant(), 2, 2).M)):
                at = (i // n if n_out >= n_in else j // n), (i % n - j % n) % n
                scale = 1.7 / n**0.5
                found["c"][at] += scale * G * (1 if M.a is None else M.a[at])
                if M.a is not None:
                    found["a"][at] += scale * G * M.c[at]
            elif isinstance(M, type(built(cv.Toeplitz(), 2, 2).M)):
                found["t"][i - j + n_in - 1 if M.kind == "general" else abs(i - j)] += 1.7 / n**0.5 * G
            else:
                r, m = M.A.shape
                found["B"][i // r, j // m] += 1.7 * G * M.A[i % r, j % m]
                found["A"][i % r, j % m] += 1.7 * G * M.B[i // r, j // m]
    return found


def gradients(delta, g, x, merge=merged.contracted):
    weight = delta.weight()
    y = merge(x, weight, None, delta.contractions())
    return dict(zip(dict(delta.M.named_parameters()), torch.autograd.grad(y, list(delta.parameters()), g), strict=True))


@each_method
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_the_gradients_are_those_of_explicit_loops(method, n_out, n_in, monkeypatch):
    monkeypatch.setattr(merged, "IN_CACHE", 2 * (n_out + n_in))  # two tokens at a time, and one at last
    delta = built(method, n_out, n_in)
    g, x = seeded(lambda: (torch.randn(5, n_out).double(), torch.randn(5, n_in).double()))
    with torch.no_grad():
        expected = by_hand(delta, g, x)
    for name, gradient in gradients(delta, g, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11)
        assert expected[name].abs().max() > 1e-2


@each_method
@pytest.mark.parametrize(("n_out", "n_in"), [(4, 4), (6, 2), (2, 5)])
def test_they_are_the_limits_of_differences_once_and_twice(method, n_out, n_in):
    delta = built(method, n_out, n_in)
    names = [name for name, _ in delta.named_parameters()]
    x, weight, bias = seeded(lambda: [torch.randn(s).double() for s in ((2, 3, n_in), (n_out, n_in), (n_out,))])

    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.delta = delta

        def forward(self, x, bias):
            return merged.contracted(x, weight + self.delta.weight(), bias, self.delta.contractions())

    def y(x, bias, *values):
        named = {f"delta.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Host(), named, (x, bias))

    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, bias, *delta.parameters())]
    assert torch.autograd.gradcheck(y, inputs)
    assert torch.autograd.gradgradcheck(y, inputs)


@pytest.mark.parametrize("method", [cv.Circulant(), cv.Toeplitz(), cv.Kronecker()], ids=lambda m: m.name)
@pytest.mark.parametrize(("n_out", "n_in"), [(192, 192), (768, 192)])
def test_in_single_precision_they_round_like_the_dense_gradient(method, n_out, n_in):
    delta = built(method, n_out, n_in, torch.float32)
    g, x = seeded(lambda: (torch.randn(1576, n_out), 0.3 + torch.randn(1576, n_in)))  # with a mean, as after a GELU
    exact = gradients(twin(delta).double(), g.double(), x.double())
    found, dense = gradients(delta, g, x), gradients(delta, g, x, lambda x, weight, *_: F.linear(x, weight))
    for name, gradient in exact.items():
        ours, theirs = ((side[name] - gradient).norm() / gradient.norm() for side in (found, dense))
        assert ours < 2 * theirs + 1e-7, (name, ours, theirs)


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The hosts that contracted, on whatever machine."""
    monkeypatch.setattr(merged, "MKL", True)
    seen, original = [], merged.contracted
    monkeypatch.setattr(merged, "contracted", lambda *args: seen.append(args[1].shape) or original(*args))
    return seen


@pytest.fixture
def always(monkeypatch):
    """Whatever it costs: the models here are small."""
    monkeypatch.setattr(merged, "contractions_pay", lambda *args: True)


def adapted(method, targets="linear", **kwargs):
    model = seeded(lambda: create("test_vit", num_classes=3)).double()
    cv.inject(model, method, targets, **kwargs)
    return awaken(model)


def pictures():
    return seeded(lambda: torch.randn(4, 3, 160, 160, dtype=torch.float64), 1)


def step(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())


@each_method
@pytest.mark.parametrize("targets", [{"targets": "qkv", "parts": "qv"}, {"targets": "linear"}], ids=["qv", "linear"])
def test_a_contracted_step_is_the_dense_one(method, targets, calls, always, monkeypatch):
    model, x = adapted(method, **targets), pictures()
    found, y = step(model, x), model(x).detach()
    assert calls
    monkeypatch.setattr(merged, "contractions_pay", lambda *args: False)
    count = len(calls)
    expected = step(model, x)
    assert len(calls) == count
    assert torch.equal(model(x).detach(), y)
    assert found.keys() == expected.keys()
    assert_close(found, expected)
    assert_moved(y, outputs(cv.remove(twin(model)), x))


def flops(host, x):
    with FlopCounterMode(display=False) as counter:
        host(x).sum().backward()
    return counter.get_total_flops()


SIDES = [(16, 16), (192, 192), (768, 192), (192, 768), (768, 768), (3072, 768)]


@pytest.mark.parametrize(("n_out", "n_in"), SIDES)
@pytest.mark.parametrize(
    ("method", "paying"),
    [(cv.Circulant(), SIDES[1:]), (cv.Toeplitz(), SIDES[4:]), (cv.Kronecker(), SIDES[1:])],
    ids=["circulant", "toeplitz", "kronecker"],
)
def test_where_it_pays_no_dense_gradient_is_formed(method, paying, n_out, n_in, calls):
    host = nn.Sequential(nn.Linear(n_in, n_out))
    cv.inject(host, method, "0")
    tokens, pays = 40, (n_out, n_in) in paying
    products = flops(host, torch.randn(tokens, n_in, requires_grad=True)) // (2 * tokens)
    own = 2 * best_split(n_out, n_in) * (n_out + n_in) if method.name == "kronecker" else 0  # no transform is counted
    assert products == 2 * n_out * n_in + (own if pays else n_out * n_in)
    assert bool(calls) == pays


def test_only_adapted_rows_are_contracted_and_pay(calls):
    """q and v of a qkv leave k's rows out, which a dense gradient would have."""
    model = create("vit_tiny_patch16_224", depth=1, img_size=32)
    cv.inject(model, cv.Circulant())
    host, x = model.blocks[0].attn.qkv, torch.randn(50, 192)
    ways = host.delta.contractions()
    assert [(way.start, way.stop) for way in ways] == [(0, 192), (384, 576)]
    assert flops(host, x) == 2 * 50 * 576 * 192  # forward alone: nothing asks for the gradient to x
    assert calls == [(576, 192)]


def test_what_is_not_measured_keeps_the_dense_gradient(calls, monkeypatch):
    host = nn.Sequential(nn.Linear(256, 256))
    cv.inject(host, cv.Circulant(), "0")
    ways, weight = host[0].delta.contractions(), host[0]._parameters["weight"]
    assert merged.contractions_pay(torch.empty(3, 256), weight, ways)
    assert not merged.contractions_pay(torch.empty(3, 256, device="meta"), weight, ways)
    monkeypatch.setattr(merged, "MKL", False)
    assert not merged.contractions_pay(torch.empty(3, 256), weight, ways)
    host(torch.randn(3, 256)).sum().backward()
    assert not calls


@pytest.mark.parametrize("method", [cv.LDR(), cv.Toeplitz(product=True)], ids=lambda m: m.name)
def test_products_of_structured_matrices_keep_it_too(method, calls, always):
    model = adapted(method, "qkv")
    assert step(model, pictures())
    assert not calls


def test_a_trained_base_needs_the_dense_gradient(calls, always):
    host = nn.Sequential(nn.Linear(64, 64))
    cv.inject(host, cv.Circulant(), "0")
    host[0]._parameters["weight"].requires_grad_(True)
    host(torch.randn(3, 64)).sum().backward()
    assert not calls
    assert host[0]._parameters["weight"].grad is not None


def test_evaluation_autocast_half_precision_and_traces_run_as_before(calls, always):
    model, x = adapted(cv.Circulant()).float(), pictures().float()
    with torch.no_grad():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    run_in_half_and_traced(model, x)
    assert not calls
    model(x)
    assert calls


@each_method
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 64), (2, 3, 64)], ids=str)
def test_any_number_of_tokens(method, shape, calls, always):
    host = nn.Sequential(nn.Linear(64, 64))
    cv.inject(host, method, "0")
    awaken(host)
    x = torch.randn(shape, requires_grad=True)
    host(x).sum().backward()
    assert calls
    assert x.grad.shape == shape
    assert all(bool(p.grad.any()) == bool(x.numel()) for p in cv.parameters(host))


@each_method
def test_compile_traces_the_contracted_step_whole_with_the_choice(method, calls):
    model, x = nn.Sequential(nn.Linear(640, 640)).double(), torch.randn(7, 640, dtype=torch.float64)
    cv.inject(model, method, "0")
    expected = step(awaken(model), x)
    assert calls
    found = step(torch.compile(twin(model), backend="aot_eager", fullgraph=True), x)
    assert_close(found, {f"_orig_mod.{name}": gradient for name, gradient in expected.items()})


@each_method
def test_checkpointing_functional_gradients_and_vmap_agree(method, calls, always):
    model, x = adapted(method, "qkv", parts="qv"), pictures()
    expected = step(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(p, x):
        return torch.func.functional_call(model, p, (x,)).square().sum()

    assert_close(torch.func.grad(loss)(trained, x), expected)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x[:, None])
    assert_close({name: gradient.sum(0) for name, gradient in found.items()}, expected)
