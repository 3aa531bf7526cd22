"""What every method promises on every kind of host: one table of settings, one of hosts, and all promises over both."""

import functools
import math
from collections import namedtuple
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from capavision import merged
from capavision.attention import weight_of, weighted
from capavision.inject import injections
from capavision.masks import Sharing
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    awaken_deltas,
    create,
    deltas,
    images,
    outputs,
    seeded,
    snapshot,
    tiny_beit,
    tiny_vit,
    twin,
)

MASKS = {
    "plain": {},
    "random 2": {"branches": 2},
    "random 4 sparse": {"branches": 4, "density": 0.25},
    "complementary 2": {"branches": 2, "masks": "complementary"},
    "complementary 3": {"branches": 3, "masks": "complementary"},
    "2:4": {"branches": 2, "masks": "2:4"},
    "learned": {"branches": 2, "density": 0.3, "masks": "learned"},
}
# Each registered method with the settings to test; a new method is a new row.
SETTINGS = {
    "lora": [cv.LoRA(rank=4, alpha=6.0, **masks) for masks in MASKS.values()],
    "adapter": [
        cv.Adapter(rank=4, where=where, activation=activation, scale=0.7, **masks)
        for where, activation in (("pfeiffer", "relu"), ("houlsby", "silu"), ("parallel", "gelu"))
        for masks in MASKS.values()
    ],
    "circulant": [
        cv.Circulant(alpha=0.3),
        cv.Circulant(alpha=1.0, product=True),  # the default's 30 on awakened values would put ReLUs to sleep
        *(cv.Circulant(where=w) for w in ("pfeiffer", "houlsby", "parallel")),
    ],
    "toeplitz": [
        cv.Toeplitz(alpha=0.7),
        cv.Toeplitz(kind="symmetric", product=True),
        cv.Toeplitz(where="houlsby", activation="silu"),
    ],
    "kronecker": [cv.Kronecker(), cv.Kronecker(where="houlsby", activation="tanh")],
    "ldr": [cv.LDR(alpha=1.0, rank=2), cv.LDR(where="pfeiffer")],
    "prefix": [cv.Prefix(length=4, **masks) for masks in MASKS.values()],
    "linear_probe": [cv.LinearProbe()],
    "bitfit": [cv.BitFit()],
    "full": [cv.Full()],
}

Kind = namedtuple("Kind", "build size targets parts", defaults=[None])
WEIGHTS = {
    "fused qkv": Kind(tiny_vit, 32, "qkv", "qv"),
    "every linear": Kind(tiny_vit, 32, "linear"),
    "weight read by the parent": Kind(tiny_beit, 32, "qkv", "qkv"),
    "convs": Kind(lambda: create("test_resnet"), 64, "conv"),
    "depthwise convs": Kind(lambda: create("test_efficientnet"), 64, "conv"),
    "grouped, standardised convs": Kind(lambda: create("test_nfnet"), 64, "conv"),
}
BLOCKS = {
    # All tokens reach the head: class tokens alone are so alike that ReLU units sleep for all of them.
    "tokens": Kind(lambda: tiny_vit(global_pool="avg"), 32, None),
    "images, channels first": Kind(lambda: create("test_convnext", depths=(1, 1, 1, 1)), 64, None),
}
SWIN = {"img_size": 64, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)}  # windows, shifted ones, a reduction
ATTENTIONS = {
    "tokens": BLOCKS["tokens"],
    "windows": Kind(lambda: create("swin_tiny_patch4_window7_224", **SWIN), 64, None),
}
PLACES = {cv.WeightDelta: WEIGHTS, cv.OutputDelta: BLOCKS, cv.AttentionDelta: ATTENTIONS, None: BLOCKS}
# A prefix takes its share of the attention from the start.
ELSEWHERE = ("prefix",)


class Arm:
    """One method in one setting on one kind of host."""

    def __init__(self, method, name, kind):
        self.method, self.kind = method, kind
        shown = ("where", "kind", "product", "branches", "density", "masks")
        changed = ", ".join(str(v) for k, v in asdict(method).items() if k in shown)
        self.id = f"{method.name}({changed}) {name}"

    def base(self, dtype=torch.float32):
        return twin(base(self.kind, dtype))

    def plain(self, dtype=torch.float32):
        return plain(self.kind, dtype)

    def x(self, dtype=torch.float32):
        return images(self.kind.size, 3).to(dtype)

    def inject(self, model):
        targets = self.kind.targets
        if getattr(self.method, "masks", "") == "2:4" and self.method.placement is cv.WeightDelta:
            hosts = cv.inject(twin(model), cv.LoRA(rank=1), targets).hosts
            targets = [name for name in hosts if weight_of(model.get_submodule(name))[0].numel() % 4 == 0]
        return cv.inject(model, self.method, targets, self.kind.parts, example=self.x(next(model.parameters()).dtype))

    def adapted(self, dtype=torch.float32):
        model = self.base(dtype)
        self.inject(model)
        return shaken(awaken_deltas(model, 7))


def shaken(model):
    """The base's own trained parameters, moved as by training."""
    own = dict(model.named_parameters())
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in injections(model)[0].trained:
            own[name].add_(0.05 * torch.randn(own[name].shape, generator=rng))
    return model


@functools.cache
def base(kind, dtype=torch.float32):
    """To be read; what changes it takes a copy."""
    return awaken(kind.build()).to(dtype)


@functools.cache
def plain(kind, dtype):
    return outputs(base(kind, dtype), images(kind.size, 3).to(dtype))


ARMS = [
    Arm(method, name, kind)
    for settings in SETTINGS.values()
    for method in settings
    for name, kind in PLACES[method.placement].items()
]
WITH_HOSTS = [arm for arm in ARMS if arm.method.placement is not None]
SHARED = [arm for arm in WITH_HOSTS if isinstance(arm.method, Sharing)]
each_arm = pytest.mark.parametrize("arm", ARMS, ids=[arm.id for arm in ARMS])
each_with_hosts = pytest.mark.parametrize("arm", WITH_HOSTS, ids=[arm.id for arm in WITH_HOSTS])


def test_every_registered_method_is_tested_here():
    known = {name for name, cls in cv.Method.known.items() if cls.__module__.startswith("capavision.")}
    assert known == SETTINGS.keys()
    assert all(settings for settings in SETTINGS.values())
    for name, settings in SETTINGS.items():
        assert {method.name for method in settings} == {name}
        assert cv.Method.known[name] is type(settings[0])


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.method.name not in ELSEWHERE], ids=lambda arm: arm.id)
def test_the_start_is_the_plain_model_bit_for_bit(arm):
    model = arm.base()
    arm.inject(model)
    assert torch.equal(outputs(model, arm.x()), arm.plain())


@each_arm
def test_every_trained_parameter_gets_a_gradient_and_nothing_else_does(arm):
    model = arm.adapted()
    y = model.train()(arm.x())
    (y * seeded(lambda: torch.randn(y.shape))).sum().backward()
    trained = cv.parameters(model)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    expected = [p for delta in deltas(model).values() for p in delta.parameters()]
    expected += list(model.get_classifier().parameters())
    expected += [p for name, p in model.named_parameters() if name in injections(model)[0].trained]
    assert {id(p) for p in trained} == {id(p) for p in expected}


@pytest.mark.parametrize(
    "arm", [arm for arm in WITH_HOSTS if arm.method.placement is cv.WeightDelta], ids=lambda arm: arm.id
)
def test_the_fast_path_is_the_dense_weight(arm):
    model, plain = arm.adapted(torch.float64), base(arm.kind, torch.float64)
    for name in injections(model)[0].hosts:
        host, before = model.get_submodule(name), plain.get_submodule(name).weight
        dense = host.delta.weight()
        x = seeded(lambda n=dense.shape[1]: torch.randn(3, n, dtype=torch.float64))
        assert_moved(dense, torch.zeros_like(dense))
        torch.testing.assert_close(host.delta(x), F.linear(x, dense), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(host.weight, before + dense.view_as(before), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "arm", [arm for arm in WITH_HOSTS if arm.method.placement is cv.WeightDelta], ids=lambda arm: arm.id
)
def test_a_step_is_the_same_with_and_without_the_merged_forward(arm, monkeypatch):
    model, x = arm.adapted(torch.float64), arm.x(torch.float64)
    steps = []
    for always in (True, False):
        for rule in ("linear_pays", "conv_pays"):
            monkeypatch.setattr(merged, rule, lambda *_, always=always: always)
        model.zero_grad()
        y = model(x)
        (y * seeded(lambda y=y: torch.randn(y.shape))).sum().backward()
        steps.append((y.detach(), outputs(model, x), *(p.grad for p in cv.parameters(model))))
    for found, expected in zip(*steps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())


@each_with_hosts
def test_folding_leaves_the_outputs_alone_and_plain_modules_or_dense_bottlenecks(arm):
    model, x = arm.adapted(torch.float64), arm.x(torch.float64)
    expected, plain = outputs(model, x), snapshot(base(arm.kind, torch.float64))
    assert_moved(expected, arm.plain(torch.float64))
    torch.testing.assert_close(outputs(cv.fold(model), x), expected, rtol=1e-9, atol=1e-9)
    assert injections(model) == []
    if arm.method.placement is cv.WeightDelta:
        assert snapshot(model)["classes"] == plain["classes"]
        assert snapshot(model)["attributes"] == plain["attributes"]
        assert model.state_dict().keys() == plain["values"].keys()
    else:
        assert not any(list(delta.buffers()) for delta in deltas(model).values())
        own = {name: value for name, value in model.state_dict().items() if ".delta." not in name}
        assert own.keys() == plain["values"].keys()
        assert all(torch.equal(value, plain["values"][name]) for name, value in own.items())
        if isinstance(arm.method, cv.Adapter):
            width = arm.method.rank * arm.method.branches
            assert all(delta.D.value.shape[0] == width for delta in deltas(model).values())
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".delta." not in n} == plain["trainable"]


@each_arm
def test_remove_gives_every_bit_back(arm):
    model = arm.base()
    before = snapshot(model)
    arm.inject(model)
    shaken(awaken_deltas(model))
    cv.remove(model)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model, arm.x()), arm.plain())


@each_arm
def test_save_and_load_on_a_fresh_base_give_the_same_outputs(arm, tmp_path):
    model, fresh, x = arm.adapted(), arm.base(), arm.x()
    with torch.no_grad():
        for p in model.get_classifier().parameters():
            p.add_(0.1)
    expected = outputs(model, x)
    assert_moved(expected, arm.plain())
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), expected)
    assert injections(fresh)[0].method == arm.method
    payload = 4 * sum(p.numel() for p in cv.parameters(model))
    assert (tmp_path / "it.safetensors").stat().st_size < payload + 64 * 1024


@each_with_hosts
def test_the_delta_moves_the_output_and_a_deep_copy_is_equal_and_independent(arm):
    model, x = arm.adapted(), arm.x()
    expected, copied = outputs(model, x), twin(model)
    assert_moved(expected, arm.plain())
    assert torch.equal(outputs(copied, x), expected)
    with torch.no_grad():
        for p in cv.parameters(copied):
            p.add_(0.2)
    assert_moved(outputs(copied, x), expected)
    assert torch.equal(outputs(model, x), expected)


def matrix_values(method, n_out, n_in):
    """What the equation of a structured method asks for."""
    short, long = sorted((n_out, n_in))
    twice = 2 if getattr(method, "product", False) else 1
    symmetric = getattr(method, "kind", "") == "symmetric"
    return {
        "lora": lambda: method.rank * (n_out + n_in),
        "circulant": lambda: twice * math.ceil(long / short) * short,
        "kronecker": lambda: n_out + n_in,
        "ldr": lambda: 2 * method.rank * math.ceil(long / short) * short,
        "toeplitz": lambda: long + (twice - 1) * n_in if symmetric else n_out + n_in - 1,
    }[method.name]()


def stored(arm, model):
    """The values the equations ask for, from the shapes of the plain model."""
    plan, method = injections(model)[0], arm.method
    own = dict(base(arm.kind).named_parameters())
    values = sum(own[name].numel() for name in plan.trained)
    if method.placement is cv.AttentionDelta:
        return sum(method.length * (n_out + n_in) for n_out, n_in, _ in plan.axes.values())
    if method.placement is cv.OutputDelta:
        for c_out, c_in, _ in plan.axes.values():
            read = c_in if method.where == "parallel" else c_out
            bottleneck = isinstance(method, cv.Adapter)
            matrix = method.rank * (read + c_out + 1) if bottleneck else matrix_values(method, c_out, read)
            values += matrix + c_out
        return values
    layers = weighted(base(arm.kind))
    for name, parts in plan.hosts.items():
        weight = layers[name].weight
        for start, stop in list(parts.values()) or [(0, weight.shape[0])]:
            values += matrix_values(method, stop - start, weight[0].numel())
    return values


def learned(arm, model):
    """Learned masks: the matrices of each host by their place, all of which have scores, and the values of biases."""
    plan, method = injections(model)[0], arm.method
    if method.placement is cv.AttentionDelta:
        sizes = plan.axes.values()
        return [m for n_out, n_in, _ in sizes for m in (("K", method.length, n_in), ("V", method.length, n_out))], 0
    if method.placement is cv.OutputDelta:
        matrices, biases = [], 0
        for c_out, c_in, _ in plan.axes.values():
            read = c_in if method.where == "parallel" else c_out
            matrices += [("D", method.rank, read), ("U", c_out, method.rank)]
            biases += method.rank + c_out
        return matrices, biases
    matrices = []
    layers = weighted(base(arm.kind))
    for name, parts in plan.hosts.items():
        weight = layers[name].weight
        for part, (start, stop) in (parts or {"": (0, len(weight))}).items():
            matrices += [(f"{part}.A", method.rank, weight[0].numel()), (f"{part}.B", stop - start, method.rank)]
    return matrices, 0


@each_arm
def test_the_report_counts_what_is_trained(arm):
    model = arm.base()
    report = arm.inject(model)
    head = sum(p.numel() for p in model.get_classifier().parameters())
    if getattr(arm.method, "masks", "") == "learned":
        matrices, biases = learned(arm, model)
        prototypes = sum(rows * cols for _, rows, cols in set(matrices))
        scores = arm.method.branches * sum(rows * cols for _, rows, cols in matrices)
        assert report.trained == prototypes + biases + scores
        assert report.stored == math.ceil(prototypes + biases + scores / 32)
    else:
        assert report.trained == report.stored == stored(arm, model)
    assert report.head == head
    assert report.total == sum(p.numel() for p in base(arm.kind).parameters())
    assert sum(p.numel() for p in cv.parameters(model)) == report.trained + head
    plan = injections(model)[0]
    assert set(report.hosts) == {*plan.hosts, *plan.trained}
    assert bool(report.hosts) == (arm.method.name != "linear_probe")
    assert str(report.method) in str(report)


@pytest.mark.parametrize("arm", [arm for arm in SHARED if arm.method.masks != "learned"], ids=lambda arm: arm.id)
def test_branches_cost_no_values(arm):
    plain = type(arm.method)(**{**asdict(arm.method), "branches": 1, "density": 1.0, "masks": "random"})
    models = [arm.base(), arm.base()]
    reports = [arm.inject(models[0]), None]
    reports[1] = cv.inject(models[1], plain, list(reports[0].hosts), arm.kind.parts, example=arm.x())
    assert reports[0].trained == reports[1].trained


@pytest.mark.parametrize("method", [method for settings in SETTINGS.values() for method in settings], ids=str)
def test_a_method_is_its_fields(method):
    """The fields are the command line's flags and the file's metadata: they must rebuild an equal method."""
    again = type(method)(**asdict(method))
    assert again == method
    assert hash(again) == hash(method)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        method.alpha = 1


def test_a_method_without_hosts_builds_no_delta():
    with pytest.raises(TypeError, match="LinearProbe has no hosts, so it builds no delta"):
        cv.LinearProbe().build(cv.Site("host", 2, 2, 0, torch.empty(0)))


def test_a_new_weight_method_works_from_its_weight_alone(monkeypatch):
    """A method file gives the dense ΔW; the factored path, masks and sharing are options."""
    monkeypatch.setattr(cv.Method, "known", dict(cv.Method.known))

    class Diagonal(cv.WeightDelta):
        def __init__(self, site):
            super().__init__()
            self.values, self.n_in = nn.Parameter(site.zeros(min(site.n_out, site.n_in))), site.n_in

        def weight(self):
            return F.pad(torch.diag(self.values), (0, self.n_in - len(self.values)))

    class Stretch(cv.Method):
        name, placement = "stretch", cv.WeightDelta

        def build(self, site):
            return Diagonal(site)

    model, x = tiny_vit().double(), images().double()
    plain = outputs(model, x)
    report = cv.inject(model, Stretch(), "qkv", "q")
    assert report.trained == 2 * 48
    assert torch.equal(outputs(model, x), plain)
    awaken_deltas(model)
    expected = outputs(model, x)
    assert_moved(expected, plain)
    torch.testing.assert_close(outputs(cv.fold(model), x), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="VisionTransformer has no default host for Stretch; name targets"):
        cv.inject(tiny_vit(), Stretch())
