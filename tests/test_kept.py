"""An adapted layer takes its input from what the layer before it keeps: the same gradients, fewer bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import capavision as cv
from benchmarks.step import floor, saved
from capavision import kept
from tests.conftest import awaken, awaken_deltas, create, seeded, twin

BEFORE = {
    "gelu": nn.GELU,
    "gelu, tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "layer norm": lambda: nn.LayerNorm(12, eps=1e-3),
    "layer norm without shift": lambda: nn.LayerNorm(12, bias=False),
    "layer norm alone": lambda: nn.LayerNorm(12, elementwise_affine=False),
}
each_layer = pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)


def chain(before):
    """A layer that keeps its input, and an adapted Linear after it."""
    net = nn.Sequential(nn.Linear(12, 12), before(), nn.Linear(12, 20)).double()
    cv.inject(net, cv.LoRA(rank=3, branches=2), "2")
    for p in net.parameters():
        nn.init.normal_(p)  # gains and shifts too
    return net, torch.randn(4, 9, 12).double() * 3 + 2


@pytest.fixture
def origins(monkeypatch):
    """What was asked, and whether there was an answer."""
    seen, original = [], kept.origin

    def origin(x):
        seen.append(original(x))
        return seen[-1]

    monkeypatch.setattr(kept, "origin", origin)
    return seen


@each_layer
def test_gradients_are_those_of_the_kept_input(before, origins, monkeypatch):
    net, x = seeded(lambda: chain(before))
    wanted = [x.requires_grad_(), *(p for p in net.parameters() if p.requires_grad)]

    def gradients():
        y = net(x)
        return torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(), wanted)

    found = gradients()
    assert origins[-1] is not None
    monkeypatch.setattr(kept, "origin", lambda x: None)
    for own, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10 * other.abs().max().item())


@each_layer
def test_gradients_are_the_limits_of_differences_once_and_twice(before, origins):
    net, x = seeded(lambda: chain(before))
    x = x[:2, :2].clone().requires_grad_()
    net(x.expand(40, 2, 2, 12)).sum()  # tokens enough to merge, as below
    parameters = [p for p in net.parameters() if p.requires_grad]

    def y(x, *parameters):
        return net(x.expand(40, *x.shape))[0]

    assert torch.autograd.gradcheck(y, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(y, (x, *parameters), fast_mode=True)
    assert all(origins)


def test_a_mean_far_above_the_deviation_costs_less_than_a_digit_more_than_the_norm_has_lost():
    """In float32, beside float64: products on z, ten deviations from 0, and those on the kept input."""
    net, x = seeded(lambda: chain(BEFORE["layer norm"]))
    z = x.flatten(0, 1) + 30
    norm, (k, D) = net[1], seeded(lambda: (torch.randn(len(z), 3).double(), torch.randn(3, 12).double()))

    def error(inputs):
        return max(
            (found.double() - expected).norm() / expected.norm()
            for found, expected in ((inputs.times(D), norm(z) @ D.mT), (inputs.gathered(k), k.mT @ norm(z)))
        )

    low = z.float().requires_grad_()
    y = twin(norm).float()(low)
    with torch.no_grad():
        assert error(kept.opened(y.grad_fn, torch.float32)) < 10 * error(kept.Tokens(y.detach()))


def test_a_vit_with_all_linears_adapted_keeps_what_a_frozen_one_keeps():
    def kept_bytes(prepare):
        model = seeded(lambda: create("test_vit", num_classes=3))
        prepare(model)
        own = {t.untyped_storage().data_ptr() for t in model.parameters()}
        y = model.train()(torch.randn(4, 3, 160, 160))
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved(y)}
        return sum(size for address, size in found.items() if address not in own)

    base = kept_bytes(floor)
    assert kept_bytes(lambda model: cv.inject(model, cv.LoRA(rank=2), "linear")) < 1.05 * base
    assert kept_bytes(lambda model: model.requires_grad_(True)) > 1.3 * base


def test_inputs_of_other_kinds_and_under_hooks_are_kept(origins):
    host = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 20))
    cv.inject(host, cv.LoRA(rank=2), "2")
    awaken_deltas(host)
    x = torch.randn(40, 12, requires_grad=True)
    expected = torch.autograd.grad(host(x).sum(), [x, *cv.parameters(host)])
    assert origins.pop() is not None
    with torch.autograd.graph.save_on_cpu():
        y = host(x).sum()
    for found, other in zip(torch.autograd.grad(y, [x, *cv.parameters(host)]), expected, strict=True):
        assert torch.equal(found, other)
    checkpoint(host, x, use_reentrant=False).sum().backward()
    host[1] = nn.Tanh()
    host(x)
    host[1] = nn.Identity()
    host(x.detach())
    whole = F.layer_norm(torch.randn(8, 5, 12, requires_grad=True), (5, 12))
    host[2](whole)  # a norm over more than the channels
    assert origins == [None] * 6


@each_layer
def test_hooks_around_the_layer_before_alone_leave_its_input_to_it(before, origins):
    """Those of checkpointing give it once, and the layer needs it for its own backward."""
    net, x = seeded(lambda: chain(before))
    wanted = [x.requires_grad_(), *(p for p in net.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(net(x).square().sum(), wanted)
    assert origins.pop() is not None
    y = net[2](checkpoint(net[:2], x, use_reentrant=False))
    assert origins == [None]
    for found, other in zip(torch.autograd.grad(y.square().sum(), wanted), expected, strict=True):
        assert torch.equal(found, other) or (found - other).norm() < 1e-12 * other.norm()


def unseen(x):
    with torch.no_grad():
        x.mul_(2)


WRITES = {"seen": lambda x: x.mul_(2), "unseen": unseen, "detached": lambda x: x.detach()[1:].zero_()}


@each_layer
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_an_input_that_was_written_into_is_kept_as_it_is(before, write, origins):
    """Also where autograd takes no notice of it, so that the node still says what made the first values."""
    net, x = seeded(lambda: chain(before))
    h = net[1](net[0](x.requires_grad_()))
    write(h)
    slope, factors = seeded(lambda: torch.randn(4, 9, 20).double()), (net[2].delta.B(), net[2].delta.A())
    found = torch.autograd.grad(net[2](h), cv.parameters(net), slope)
    dense = torch.einsum("bno,bni->oi", slope, h.detach())
    scale = net[2].delta.scale
    expected = torch.autograd.grad(factors[0] @ factors[1], cv.parameters(net), scale * dense)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * other.abs().max().item())
    assert origins == [None]


def test_what_the_layer_before_kept_must_not_change_until_the_backward():
    net, x = seeded(lambda: chain(BEFORE["layer norm"]))
    for changed in ("input", "gain"):
        z = net[0](x)
        y = net[2](net[1](z.requires_grad_()))
        with torch.no_grad():
            (z if changed == "input" else net[1].weight).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), cv.parameters(net))


def test_under_autocast_a_norm_in_float32_serves_a_product_in_bfloat16(origins):
    model = awaken(seeded(lambda: create("test_vit", num_classes=3)))
    cv.inject(model, cv.LoRA(rank=3), "qkv")
    awaken_deltas(model)
    x, exact = seeded(lambda: torch.randn(2, 3, 160, 160), 1), twin(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).square().sum()
    assert all(origins[1:])  # nothing before the first host is differentiated
    assert len(origins) > 1
    loss.backward()
    exact(x.double()).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = exact.get_parameter(name).grad
            assert (p.grad - expected).norm() < 0.1 * expected.norm(), name
