"""The class swap over kinds of hosts: identity, W + ΔW wherever it is read, copies, pickles, fold and remove."""

import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import nn

import capavision as cv
from capavision import host as hosting
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    create,
    images,
    outputs,
    seeded,
    snapshot,
    tiny_vit,
    twin,
)


class Net(nn.Module):
    """A host in a model, with a norm before it and a head behind."""

    def __init__(self, host, channels):
        super().__init__()
        self.host = host
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        y = self.host(x)
        y = y if isinstance(self.host, nn.Linear) else y.flatten(2).mT
        return self.head(torch.tanh(y))


class Reader(Net):
    """Reads its host's weight as beit, eva and swin_v2 do; the host's forward never runs."""

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.host.weight, self.host.bias)))


Kind = namedtuple("Kind", "build n_out shape net", defaults=[Net])
KINDS = {
    "linear": Kind(lambda: nn.Linear(12, 16), 16, (2, 5, 12)),
    "linear without bias": Kind(lambda: nn.Linear(12, 16, bias=False), 16, (2, 5, 12)),
    "linear on a batch of vectors": Kind(lambda: nn.Linear(12, 16), 16, (5, 12)),
    "weight read by the parent": Kind(lambda: nn.Linear(12, 16), 16, (2, 5, 12), Reader),
    "conv": Kind(lambda: nn.Conv2d(8, 12, 3, padding=1), 12, (2, 8, 9, 9)),
    "conv 1x1 without bias": Kind(lambda: nn.Conv2d(8, 12, 1, bias=False), 12, (2, 8, 9, 9)),
    "strided conv": Kind(lambda: nn.Conv2d(8, 12, 3, stride=2), 12, (2, 8, 9, 9)),
    "dilated conv": Kind(lambda: nn.Conv2d(8, 12, 3, dilation=2), 12, (2, 8, 9, 9)),
    "conv padded by reflection": Kind(lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), 12, (2, 8, 9, 9)),
    "conv padded in a circle": Kind(lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), 12, (2, 8, 9, 9)),
    "conv padded to the same size": Kind(lambda: nn.Conv2d(8, 12, 3, padding="same"), 12, (2, 8, 9, 9)),
    "grouped conv": Kind(lambda: nn.Conv2d(8, 12, 3, groups=4), 12, (2, 8, 9, 9)),
    "depthwise conv": Kind(lambda: nn.Conv2d(8, 8, 5, groups=8, padding=2), 8, (2, 8, 9, 9)),
    "conv over time": Kind(lambda: nn.Conv1d(8, 12, 5), 12, (2, 8, 19)),
    "conv over volumes": Kind(lambda: nn.Conv3d(4, 8, 3), 8, (2, 4, 5, 5, 5)),
    "weight-standardised conv": Kind(lambda: ScaledStdConv2d(8, 12, 3), 12, (2, 8, 9, 9)),
    "weight-standardised conv of BiT": Kind(lambda: StdConv2d(8, 12, 3), 12, (2, 8, 9, 9)),
    "weight-standardised same conv": Kind(lambda: StdConv2dSame(8, 12, 3, stride=2), 12, (2, 8, 9, 9)),
    "tensorflow's same conv": Kind(lambda: Conv2dSame(8, 12, 3, stride=2), 12, (2, 8, 9, 9)),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
METHOD = cv.LoRA(rank=4, alpha=4.0, branches=2)


def net(kind, dtype=torch.float64):
    return seeded(lambda: kind.net(kind.build(), kind.n_out)).to(dtype).eval()


def batch(kind, dtype=torch.float64):
    return seeded(lambda: torch.randn(kind.shape), 1).to(dtype)


def injected(kind, dtype=torch.float64):
    model = net(kind, dtype)
    cv.inject(model, METHOD, "host")
    return awaken(model)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_start_is_the_plain_model_bit_for_bit(kind, dtype):
    model, x = net(kind, dtype), batch(kind, dtype)
    plain = outputs(model, x)
    cv.inject(model, METHOD, "host")
    assert outputs(model, x).dtype is dtype
    assert torch.equal(outputs(model, x), plain)


@each_kind
def test_the_forward_is_that_of_the_weight_plus_delta(kind):
    model, x = injected(kind), batch(kind)
    delta = model.host.delta
    dense = delta.scale * delta.B() @ delta.A()
    plain = cv.remove(twin(model))
    expected = twin(plain)
    with torch.no_grad():
        expected.host.weight += dense.view_as(expected.host.weight)
    assert_moved(outputs(model, x), outputs(plain, x))
    torch.testing.assert_close(outputs(model, x), outputs(expected, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(model.host.weight, expected.host.weight)


@each_kind
def test_the_delta_gets_the_gradient_of_the_weight(kind):
    """dL/dA and dL/dB through the host are those through W + ΔW of a plain host."""
    model, x = injected(kind), batch(kind)
    host = model.host
    model(x).square().sum().backward()
    got = [p.grad.clone() for p in host.delta.parameters()]
    dense = host.weight.detach().requires_grad_()
    torch.func.functional_call(cv.remove(twin(model)), {"host.weight": dense}, x).square().sum().backward()
    weight = host.delta.weight().view_as(dense)
    expected = torch.autograd.grad(weight, list(host.delta.parameters()), dense.grad)
    for ours, reference in zip(got, expected, strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@each_kind
def test_a_host_stays_what_it_is(kind):
    model = net(kind)
    cls, parameter, before = type(model.host), model.host._parameters["weight"], snapshot(model)
    cv.inject(model, METHOD, "host")
    assert isinstance(model.host, cls)
    assert type(model.host).__name__ == f"Adapted{cls.__name__}"
    assert type(model.host).__module__ == cls.__module__
    assert model.host._parameters["weight"] is parameter
    after = model.state_dict()
    assert {name for name in after if ".delta." not in name} == before["values"].keys()
    assert all(torch.equal(after[name], value) for name, value in before["values"].items())
    assert set(after) - before["values"].keys() == {"host.delta.A.value", "host.delta.B.value"}


def test_one_class_serves_all_hosts_of_a_class(vit):
    cv.inject(vit, METHOD, "linear")
    assert len({type(m) for m in vit.modules() if isinstance(m, nn.Linear)}) == 2  # AdaptedLinear, and the head's own


@each_kind
def test_a_deep_copy_is_equal_and_independent(kind):
    model, x = injected(kind), batch(kind)
    copied = twin(model)
    expected = outputs(model, x)
    assert torch.equal(outputs(copied, x), expected)
    assert type(copied.host) is type(model.host)
    with torch.no_grad():
        copied.host.delta.B.value.add_(1.0)
    assert_moved(outputs(copied, x), expected)
    assert torch.equal(outputs(model, x), expected)
    cv.remove(copied)
    assert hosting.is_swapped(model.host)
    assert torch.equal(outputs(model, x), expected)


@each_kind
def test_a_pickle_comes_back_where_no_class_was_generated_yet(kind, monkeypatch):
    model, x = injected(kind), batch(kind)
    expected, frozen = outputs(model, x), pickle.dumps(model)
    monkeypatch.setattr(hosting, "_classes", {})  # as in a new process
    thawed = pickle.loads(frozen)
    assert type(thawed.host) is not type(model.host)
    assert torch.equal(outputs(thawed, x), expected)
    assert torch.equal(outputs(cv.remove(thawed), x), outputs(cv.remove(model), x))


@each_kind
def test_remove_gives_every_bit_back(kind):
    model, x = net(kind, torch.float32), batch(kind, torch.float32)
    model.host.weight.requires_grad_(False)
    before, plain = snapshot(model), outputs(model, x)
    cv.inject(model, METHOD, "host")
    awaken(model)
    assert_moved(outputs(model, x), plain)
    assert cv.remove(model) is model
    assert_unchanged(model, before)
    assert torch.equal(outputs(model, x), plain)


@each_kind
def test_fold_writes_the_weight_that_was_read(kind):
    model, x = injected(kind), batch(kind)
    plain = snapshot(cv.remove(twin(model)))
    expected, weight = outputs(model, x), model.host.weight.detach().clone()
    assert cv.fold(model) is model
    assert type(model.host) is plain["classes"]["host"]
    assert model.state_dict().keys() == plain["values"].keys()
    assert isinstance(model.host.weight, nn.Parameter)
    assert torch.equal(model.host.weight, weight)
    assert_moved(weight, plain["values"]["host.weight"])
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-12, atol=1e-12)
    assert snapshot(model)["trainable"] == plain["trainable"]
    assert snapshot(model)["attributes"] == plain["attributes"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_folded_in_single_precision(dtype):
    model = injected(KINDS["linear"], dtype)
    delta, base = model.host.delta, model.host._parameters["weight"].detach()
    exact = base.float() + delta.weight().detach()
    twice_rounded = base + delta.weight().detach().to(dtype)
    cv.fold(model)
    assert model.host.weight.dtype is dtype
    assert torch.equal(model.host.weight, exact.to(dtype))
    assert not torch.equal(model.host.weight, twice_rounded)


@pytest.mark.parametrize("kind", [KINDS["linear"], KINDS["conv"], KINDS["weight read by the parent"]])
def test_a_half_precision_base_runs_and_trains(kind):
    model, x = injected(kind, torch.bfloat16), batch(kind, torch.bfloat16)
    y = model(x)
    y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16
    assert all(p.grad.dtype is torch.float32 and p.grad.abs().max() > 0 for p in model.host.delta.parameters())
    exact = injected(kind, torch.float32)
    torch.testing.assert_close(y.float(), exact(x.float()), rtol=0.1, atol=0.1)


class Tied(nn.Module):
    """Two modules around one parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("end", [cv.fold, cv.remove])
def test_a_shared_weight_does_not_change_under_the_other_module(end):
    model, x = seeded(Tied).double(), torch.randn(3, 8, dtype=torch.float64)
    shared = model.second.weight.detach().clone()
    cv.inject(model, METHOD, "first")
    awaken(model)
    expected, changed = model(x), model.first.weight.detach().clone()
    assert torch.equal(model.second.weight, shared)
    end(model)
    assert torch.equal(model.second.weight, shared)
    if end is cv.fold:
        assert torch.equal(model.first.weight, changed)
        torch.testing.assert_close(model(x), expected)
    else:
        assert model.first.weight is model.second.weight


def test_both_modules_of_a_shared_weight_carry_deltas_of_their_own():
    model, x = seeded(Tied).double(), torch.randn(3, 8, dtype=torch.float64)
    cv.inject(model, METHOD, ["first", "second"])
    awaken(model)
    expected = model(x)
    assert_moved(model.first.weight, model.second.weight)
    torch.testing.assert_close(cv.fold(model)(x), expected)


class Subclassed(nn.Linear):
    """A Linear with a forward of its own: the factored path would be wrong."""

    def forward(self, x):
        return super().forward(x) * 2 + x.sum()


class Normed(nn.Linear):
    """A Linear that changes its weight before use."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize("cls", [Subclassed, Normed])
def test_a_forward_of_its_own_is_kept(cls):
    model, x = seeded(lambda: nn.Sequential(cls(6, 6))).double(), torch.randn(3, 6, dtype=torch.float64)
    plain = model(x)
    cv.inject(model, METHOD, "0")
    assert torch.equal(model(x), plain)
    awaken(model)
    expected = model(x)
    assert_moved(expected, plain)
    torch.testing.assert_close(cv.fold(model)(x), expected)


def test_input_that_is_cast_by_autocast_is_served():
    model, x = injected(KINDS["linear"], torch.float32), batch(KINDS["linear"], torch.float32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


EXPORTED = [
    (tiny_vit, cv.LoRA(rank=4, branches=2), {"targets": "qkv", "parts": "qv"}),
    (tiny_vit, cv.LoRA(rank=4, branches=2), {"targets": "all"}),
    (tiny_vit, cv.Adapter(rank=4, branches=2), {}),
    (lambda: create("test_resnet"), cv.LoRA(rank=4, branches=2), {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("build", "method", "kwargs"), EXPORTED, ids=["qkv", "all", "adapter", "resnet"])
def test_torch_export_and_compile_see_the_delta(build, method, kwargs):
    model, x = awaken(build()), images(32)
    plain = outputs(model, x)
    cv.inject(model, method, **kwargs)
    awaken(model, 1)
    expected = outputs(model, x)
    assert_moved(expected, plain)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_step_trains_like_an_eager_one(vit):
    cv.inject(awaken(vit), cv.LoRA(rank=4, branches=2), "qkv", "qv")
    awaken(vit, 1)
    other, x = twin(vit), images()
    vit(x).square().sum().backward()
    torch.compile(other, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for ours, theirs in zip(cv.parameters(vit), cv.parameters(other), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-4)


def train(model, steps=3):
    optimizer = torch.optim.SGD(cv.parameters(model), lr=0.01)
    model.train()
    for step in range(steps):
        loss = F.cross_entropy(model(images(64, 4, step)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_batch_norms_stay_in_eval_and_keep_their_statistics(tmp_path):
    base = create("resnet18")
    model = twin(base).train()
    cv.inject(model, cv.LoRA(rank=2, branches=2))
    statistics = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    assert len(norms(model)) == 20
    train(model)
    assert model.training
    assert not any(norm.training for norm in norms(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in statistics.items())
    cv.save(model, tmp_path / "it.safetensors")
    x = images(64)
    assert_moved(outputs(model, x), outputs(base, x))
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", base), x), outputs(model, x))


def test_batch_norms_may_be_left_alone():
    model = create("test_resnet").train()
    before = model.state_dict()["bn1.running_mean"].clone()
    cv.inject(model, cv.LoRA(rank=2), freeze_norm=False)
    train(model, 1)
    assert all(norm.training for norm in norms(model))
    assert not torch.equal(model.state_dict()["bn1.running_mean"], before)


@pytest.mark.parametrize("end", [cv.fold, cv.remove])
def test_batch_norms_are_plain_again_in_the_end(end):
    model = create("test_resnet").train()
    before = snapshot(model)
    cv.inject(model, cv.LoRA(rank=2))
    assert all(type(norm).__name__.startswith("Frozen") for norm in norms(model))
    end(model)
    after = snapshot(model)
    assert after["classes"] == before["classes"]
    model.train()
    assert all(norm.training for norm in norms(model))


@pytest.mark.parametrize("end", [cv.fold, cv.remove])
def test_batch_norms_go_back_to_the_mode_they_were_in(end):
    """A model in train mode is wholly in train mode after the delta is gone; nobody has to call train() again."""
    model = create("test_resnet").train()
    before = snapshot(model)
    cv.inject(model, cv.LoRA(rank=2))
    end(model)
    assert snapshot(model)["training"] == before["training"]


def test_a_frozen_batch_norm_survives_copy_and_pickle(monkeypatch):
    model, x = create("test_resnet"), images(32)
    cv.inject(model, cv.LoRA(rank=2))
    expected, frozen = outputs(model, x), pickle.dumps(model)
    copied = twin(model).train()
    monkeypatch.setattr(hosting, "_classes", {})
    for other in (copied, pickle.loads(frozen).train()):
        assert not any(norm.training for norm in norms(other))
        assert torch.equal(outputs(other, x), expected)


def test_a_host_that_owns_the_attribute_delta_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].delta = 3.0
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0 \(Linear\) has an attribute named 'delta' of its own"):
        cv.inject(model, METHOD, "0")
    assert_unchanged(model, before)


def test_a_weight_that_is_computed_is_no_host():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert cv.inject(model, METHOD, "linear").hosts == ("1",)
    with pytest.raises(ValueError, match="'0' matches no Linear or Conv with a weight of its own"):
        cv.inject(model, METHOD, "0")


@pytest.mark.parametrize("again", ["qkv", "blocks.1.attn.qkv", "all"])
def test_a_host_carries_one_delta(vit, again):
    cv.inject(vit, METHOD, "blocks.1.attn.qkv")
    before = snapshot(vit)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv already carries a delta; capavision\.remove"):
        cv.inject(vit, METHOD, again)
    assert_unchanged(vit, before)


def test_two_methods_live_in_one_model_and_leave_together(vit):
    before, x = snapshot(awaken(vit).double()), images().double()
    plain = outputs(vit, x)
    cv.inject(vit, cv.LoRA(rank=4, branches=2), "qkv", "qv")
    awaken(vit, 1)
    first = outputs(vit, x)
    cv.inject(vit, cv.Adapter(rank=4, where="parallel"))
    assert torch.equal(outputs(vit, x), first)
    awaken(vit, 2)
    both = outputs(vit, x)
    assert_moved(both, first)
    assert {name.partition(".delta")[0] for name, p in vit.named_parameters() if p.requires_grad} == {
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.0.mlp",
        "blocks.1.mlp",
        "head.weight",
        "head.bias",
    }
    torch.testing.assert_close(outputs(cv.fold(twin(vit)), x), both, rtol=1e-10, atol=1e-10)
    cv.remove(vit)
    assert_unchanged(vit, before)
    assert torch.equal(outputs(vit, x), plain)


def test_a_module_carries_one_placement_and_its_parent_may_carry_the_other(vit):
    cv.inject(vit, cv.LoRA(rank=2), "proj")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj already carries a delta"):
        cv.inject(vit, cv.Adapter(rank=2), "blocks.0.attn.proj")
    assert cv.inject(vit, cv.Adapter(rank=2), "blocks.0.attn").hosts == ("blocks.0.attn",)


def test_remove_and_fold_work_after_folding_adapters(vit):
    before, x = snapshot(awaken(vit).double()), images().double()
    plain = outputs(vit, x)
    cv.inject(vit, cv.Adapter(rank=4, branches=2))
    awaken(vit, 1)
    adapted = outputs(vit, x)
    assert_moved(adapted, plain)
    cv.fold(vit)
    torch.testing.assert_close(outputs(vit, x), adapted, rtol=1e-10, atol=1e-10)
    assert vit.blocks[0].delta.D.value.shape == (8, 48)
    with pytest.raises(ValueError, match="carries no injection, so there is nothing to fold"):
        cv.fold(vit)
    cv.remove(vit)
    assert_unchanged(vit, before)
