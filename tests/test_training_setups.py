"""What a practitioner does around training: compile, checkpoint activations, change formats, average, wrap."""

import os
import shutil
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import capavision as cv
from capavision import host as hosting
from capavision.masks import Factor
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    awaken_deltas,
    create,
    images,
    outputs,
    seeded,
    snapshot,
    tiny_beit,
    tiny_vit,
    twin,
)

LORA = cv.LoRA(rank=4, branches=2)
Arm = namedtuple("Arm", "build method targets parts size")
ARMS = {
    "q and v": Arm(tiny_vit, LORA, "qkv", "qv", 32),
    "weight read by the parent": Arm(tiny_beit, LORA, "qkv", None, 32),
    "convs": Arm(lambda: create("test_resnet"), LORA, "conv", None, 64),
    "adapters": Arm(lambda: tiny_vit(global_pool="avg"), cv.Adapter(rank=4, branches=2), None, None, 32),
    "adapters, channels first": Arm(lambda: create("test_convnext"), cv.Adapter(rank=4, branches=2), None, None, 64),
    "learned masks": Arm(tiny_vit, cv.LoRA(rank=4, branches=2, masks="learned"), "qkv", "qv", 32),
}
each_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)


def inject(arm, model):
    x = images(arm.size).to(next(model.parameters()).dtype)
    return cv.inject(model, arm.method, arm.targets, arm.parts, example=x)


def adapted(arm, model=None):
    model = model or awaken(arm.build())
    inject(arm, model)
    return awaken_deltas(model, 3)


def step(model, x):
    """The output in train mode, and the gradients of a random projection of it, in order."""
    model.zero_grad()
    y = model.train()(x)
    (y * seeded(lambda: torch.randn(y.shape)).to(y.dtype)).sum().backward()
    return y.detach(), [None if p.grad is None else p.grad.clone() for p in cv.parameters(model)]


def assert_same_step(ours, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours[0], expected[0], rtol=rtol, atol=atol)
    assert len(ours[1]) == len(expected[1]) > 2
    for one, other in zip(ours[1], expected[1], strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=10 * rtol, atol=10 * atol)


# torch.compile -------------------------------------------------------------------------------------------------------


class Counting:
    """The eager backend, counting its graphs: a model that fell back to Python would prove nothing."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def wrapped(model, backend):
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model, backend):
    model.compile(backend=backend, fullgraph=True)
    return model


COMPILED = [(wrapped, name) for name in ("q and v", "weight read by the parent", "adapters", "learned masks")]
COMPILED += [(in_place, "convs")]


@pytest.mark.slow
@pytest.mark.parametrize(("compiling", "name"), COMPILED, ids=[f"{c.__name__}, {n}" for c, n in COMPILED])
def test_a_model_compiled_before_inject_is_never_stale(compiling, name):
    """Graphs that ran before inject, fold or remove must not run after: the class of a host is guarded."""
    torch._dynamo.reset()
    arm, backend = ARMS[name], Counting()
    model, x = awaken(arm.build()), images(arm.size)
    base, compiled = twin(model), compiling(model, backend)
    compiled.eval()
    plain = compiled(x).detach()

    def check():
        graphs = backend.graphs
        ours, expected = compiled(x).detach(), outputs(twin(model), x)  # a copy is not compiled
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert backend.graphs > graphs, "nothing was compiled again"
        return expected

    assert inject(arm, compiled).hosts == inject(arm, base).hosts
    awaken_deltas(model, 3)
    assert_moved(check(), plain)
    assert_same_step(step(compiled, x), step(twin(model), x))
    compiled.eval()
    assert cv.fold(compiled) is compiled
    if arm.method.placement is cv.WeightDelta:
        assert_moved(compiled(x), plain)
        torch.testing.assert_close(compiled(x), outputs(twin(model), x), rtol=1e-4, atol=1e-5)
    else:
        assert_moved(check(), plain)


@pytest.mark.slow
def test_remove_under_a_compiled_model_gives_the_base_back(vit):
    torch._dynamo.reset()
    compiled, x = torch.compile(awaken(vit), backend=Counting(), fullgraph=True).eval(), images()
    plain = compiled(x)
    before = snapshot(vit)
    cv.inject(compiled, LORA, "linear")
    awaken_deltas(vit)
    assert_moved(compiled(x), plain)
    assert cv.remove(compiled) is compiled
    assert torch.equal(compiled(x), plain)
    assert_unchanged(vit, before)


@pytest.mark.parametrize("name", ["q and v", "adapters"])
def test_a_compiled_model_is_saved_and_loaded_as_what_it_is(name, tmp_path):
    arm = ARMS[name]
    model, x = adapted(arm), images(arm.size)
    base = cv.remove(twin(model))
    cv.save(model, tmp_path / "plain.safetensors")
    cv.save(torch.compile(model, backend="eager"), tmp_path / "compiled.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "compiled.safetensors").read_bytes()
    compiled = torch.compile(base, backend="eager")
    assert cv.load(tmp_path / "plain.safetensors", compiled) is compiled
    assert {id(p) for p in cv.parameters(compiled)} == {id(p) for p in cv.parameters(base)}
    assert torch.equal(outputs(base, x), outputs(model, x))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which(os.environ.get("CXX", "c++"))), reason="no C++ compiler")
def test_inductor_computes_the_same_step():
    torch._dynamo.reset()
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 12), nn.Linear(12, 5)))
    cv.inject(model, LORA, ["0", "2"])
    awaken_deltas(model)
    x = images(8)
    assert_same_step(step(torch.compile(model, fullgraph=True), x), step(twin(model), x))


# Wrappers that must come after, or that are passed in the model's place ----------------------------------------------


class Whole(nn.Module):
    """A trainer's module around the model."""

    def __init__(self, net):
        super().__init__()
        self.net = net


def compiled_inside(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


def checkpointed_inside(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


VERBS = {
    "inject": lambda model, path: cv.inject(model, LORA, "fc1"),
    "save": lambda model, path: cv.save(model, path.parent / "never.safetensors"),
    "load": lambda model, path: cv.load(path, model),
    "fold": lambda model, path: cv.fold(model),
    "remove": lambda model, path: cv.remove(model),
}
INSIDE = r"{} inside of {} carries the injection; pass model\.{} instead"
WRAPPED = {
    "averaged": (AveragedModel, INSIDE.format("module", "AveragedModel", "module")),
    "data parallel": (nn.DataParallel, INSIDE.format("module", "DataParallel", "module")),
    "a trainer's": (Whole, INSIDE.format("net", "Whole", "net")),
    "compiled inside": (
        compiled_inside,
        r"blocks\.0 is wrapped by .* torch\.compile; compile it in place instead",
    ),
    "checkpointed inside": (checkpointed_inside, r"blocks\.1 is wrapped by .*set_grad_checkpointing\(True\)"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", WRAPPED)
def test_a_wrapper_around_an_injected_model_is_refused_by_every_verb(case, verb, tmp_path):
    wrap, match = WRAPPED[case]
    cv.save(adapted(ARMS["q and v"]), tmp_path / "it.safetensors")
    model = wrap(adapted(ARMS["q and v"]))
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        VERBS[verb](model, tmp_path / "it.safetensors")
    assert_unchanged(model, before)
    assert [path.name for path in tmp_path.iterdir()] == ["it.safetensors"]


@pytest.mark.parametrize("verb", ["inject", "load"])
@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (nn.DataParallel, r"DataParallel lists .* take model\.module, inject or load there, then wrap it"),
        (compiled_inside, r"blocks\.0 is wrapped by"),
        (checkpointed_inside, r"blocks\.1 is wrapped by"),
    ],
)
def test_a_wrapper_that_must_come_after_is_refused(wrap, match, verb, tmp_path):
    cv.save(adapted(ARMS["q and v"]), tmp_path / "it.safetensors")
    model = wrap(awaken(tiny_vit()))
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        VERBS[verb](model, tmp_path / "it.safetensors")
    assert_unchanged(model, before)


def test_data_parallel_refuses_to_copy_a_computed_weight(vit):
    """It assigns weights to its copies; on one device it makes none, so the copying itself is called here."""
    cv.inject(vit, LORA, "qkv")
    with pytest.raises(TypeError, match=r"nn\.DataParallel assigns weights .*DistributedDataParallel"):
        vit.blocks[0].attn.qkv._replicate_for_data_parallel()


# Activation checkpointing --------------------------------------------------------------------------------------------

CHECKPOINTED = {name: ARMS[name] for name in ARMS} | {"deep hosts": Arm(tiny_vit, LORA, "blocks.1.mlp.fc2", None, 32)}


@pytest.mark.parametrize("arm", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_checkpointing_leaves_output_and_gradients_alone(arm):
    model, x = adapted(arm), images(arm.size)
    other = twin(model)
    other.set_grad_checkpointing(True)
    last, runs = [m for m in other.modules() if isinstance(m, Factor)][-1], []
    last.register_forward_hook(lambda *_: runs.append(1))
    assert_same_step(step(other, x), step(model, x))
    assert len(runs) == 2, "nothing was computed a second time"


@pytest.mark.parametrize("name", ["q and v", "adapters"])
def test_reentrant_checkpointing_needs_an_input_with_a_gradient(name):
    """torch's rule, and its warning: without it the deltas of the checkpointed blocks stay where they are."""
    arm = ARMS[name]
    model, x = adapted(arm), images(arm.size)
    other = twin(model)
    other.set_grad_checkpointing(True)
    set_reentrant_ckpt(True)
    try:
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            assert None in step(other, x)[1]
        assert_same_step(step(other, x.requires_grad_()), step(model, x))
    finally:
        set_reentrant_ckpt(False)


# Memory formats and precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convs", "adapters, channels first"])
@pytest.mark.parametrize("when", ["before inject", "after inject"])
def test_channels_last_computes_the_same_and_stays_after_folding(name, when):
    arm = ARMS[name]
    base = awaken(arm.build()).double()
    expected, x = adapted(arm, twin(base)), images(arm.size).double()
    model = base
    if when == "before inject":
        model = adapted(arm, model.to(memory_format=torch.channels_last))
    else:
        model = adapted(arm, model).to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_same_step(step(model, last), step(expected, x), 1e-9, 1e-11)
    cv.fold(model)
    torch.testing.assert_close(outputs(model, last), outputs(expected, x), rtol=1e-9, atol=1e-11)
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convs)
    assert not all(weight.is_contiguous() for weight in convs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q and v", "weight read by the parent", "convs", "adapters"])
def test_deltas_on_a_half_precision_base_train_in_single_precision(name, dtype, tmp_path):
    arm = ARMS[name]
    base = awaken(arm.build()).to(dtype)
    model, x = adapted(arm, twin(base)), images(arm.size).to(dtype)
    deltas = [p for name, p in model.named_parameters() if ".delta." in name]
    assert {p.dtype for p in deltas} == {torch.float32}
    before, frozen = [p.detach().clone() for p in deltas], base.state_dict()
    optimizer = torch.optim.SGD(deltas, lr=1e-3)
    F.cross_entropy(model.train()(x).float(), torch.tensor([0, 2])).backward()
    optimizer.step()
    assert all(p.grad.dtype is torch.float32 and not torch.equal(p, old) for p, old in zip(deltas, before, strict=True))
    assert all(torch.equal(value, frozen[n]) for n, value in model.state_dict().items() if n in frozen)
    cv.save(model, tmp_path / "it.safetensors")
    expected = outputs(model, x)
    assert expected.isfinite().all()
    assert_moved(expected, outputs(base, x))
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", twin(base)), x), expected)
    cv.fold(model)
    assert {p.dtype for n, p in model.named_parameters() if ".delta." not in n} == {dtype}
    assert (outputs(model, x) - expected).float().norm() < 0.05 * expected.float().norm()


def test_a_half_precision_copy_of_the_base_counts_as_another_base(tmp_path):
    model, x = adapted(ARMS["q and v"]), images()
    half = cv.remove(twin(model)).bfloat16()
    cv.save(model, tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="was trained on other base weights: .* pass check_base=False"):
        cv.load(tmp_path / "it.safetensors", half)
    loaded = cv.load(tmp_path / "it.safetensors", half, check_base=False)
    exact = outputs(model, x)
    assert (outputs(loaded, x.bfloat16()).float() - exact).norm() < 0.05 * exact.norm()


# Averages and batch norms --------------------------------------------------------------------------------------------


@each_arm
def test_an_average_of_weights_averages_the_deltas(arm, tmp_path):
    model, x = adapted(arm), images(arm.size)
    base, first = cv.remove(twin(model)), [p.detach().clone() for p in cv.parameters(model)]
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        for p in cv.parameters(model):
            p.add_(0.2)
    averaged.update_parameters(model)
    for p, before in zip(cv.parameters(averaged.module), first, strict=True):
        torch.testing.assert_close(p, before + 0.1)
    assert_moved(outputs(averaged.module, x), outputs(model, x))
    cv.save(averaged.module, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", base), x), outputs(averaged.module, x))


def with_statistics(name, size=64):
    """A base whose batch norms have seen something."""
    model = awaken(create(name))
    with torch.no_grad():
        for seed in range(3):
            model.train()(images(size, 4, seed))
    return model.eval()


def test_renewing_batch_norms_leaves_frozen_ones_alone():
    """torch.optim.swa_utils.update_bn zeroes the statistics first, and a norm in eval never measures them again."""
    model, x = adapted(ARMS["convs"], with_statistics("test_resnet")), images(64)
    expected, before = outputs(model, x), snapshot(model)["values"]
    update_bn([x], model)
    assert torch.equal(outputs(model, x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cv.remove(model)
    update_bn([x], model)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "mobilenetv3_small_050", "repvit_m1", "levit_128s"]
)
def test_batch_norms_are_the_bases_after_training_saving_and_loading(name, tmp_path):
    size = 224 if name == "levit_128s" else 64
    base = with_statistics(name, size)
    model, x = twin(base), images(size)
    cv.inject(model, cv.LoRA(rank=2))
    optimizer = torch.optim.SGD(cv.parameters(model), lr=0.05)
    for seed in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images(size, 4, seed)), torch.arange(4)).backward()
        optimizer.step()
    kept = {n: v for n, v in model.state_dict().items() if "running" in n or "batches" in n}
    assert kept
    assert all(torch.equal(value, base.state_dict()[n]) for n, value in kept.items())
    expected = outputs(model, x)
    assert_moved(expected, outputs(base, x))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", base), x), expected)


def test_norms_that_were_made_synchronous_before_inject_are_frozen():
    model, x = nn.SyncBatchNorm.convert_sync_batchnorm(with_statistics("test_resnet")), images(64)
    adapted(ARMS["convs"], model)
    norms = [m for m in model.train().modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert all(hosting.is_swapped(norm) and not norm.training for norm in norms)
    before = snapshot(model)["values"]
    model(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Two hosts, one weight -----------------------------------------------------------------------------------------------


def test_two_hosts_of_one_weight_train_two_deltas():
    """Gradients are those of W + ΔW_1 and W + ΔW_2, and the shared W stays."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))).double()
    model[2].weight = model[0].weight
    cv.inject(model, LORA, ["0", "2"])
    awaken_deltas(model)
    x = seeded(lambda: torch.randn(5, 8, dtype=torch.float64))
    factors = [[twin(f) for f in (model[i].delta.A, model[i].delta.B)] for i in (0, 2)]
    first, second = (model[0]._parameters["weight"] + LORA.alpha / LORA.rank * b() @ a() for a, b in factors)
    (torch.tanh(x @ first.T) @ second.T).square().sum().backward()
    before = model[0]._parameters["weight"].clone()
    model(x).square().sum().backward()
    for i, pair in zip((0, 2), factors, strict=True):
        for ours, reference in zip((model[i].delta.A, model[i].delta.B), pair, strict=True):
            assert reference.value.grad.abs().max() > 1e-3
            torch.testing.assert_close(ours.value.grad, reference.value.grad)
    torch.optim.SGD(cv.parameters(model), lr=0.1).step()
    assert torch.equal(model[2]._parameters["weight"], before)
    assert model[0]._parameters["weight"] is model[2]._parameters["weight"]
