"""The merged forward against the factored one and against explicit loops, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import capavision as cv
from benchmarks.step import saved
from capavision import merged
from tests.conftest import (
    assert_moved,
    awaken,
    awaken_deltas,
    create,
    deltas,
    outputs,
    run_in_half_and_traced,
    seeded,
    twin,
)

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
    monkeypatch.setattr(merged, "linear_pays", lambda x, weight: False)
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
        assert merged.linear_pays(torch.empty(tokens, n_in), host.weight) == cheaper == (tokens >= 18)


# Convs ---------------------------------------------------------------------------------------------------------------

CONVS = {
    "3 × 3": lambda: (nn.Conv2d(3, 6, 3, padding=1), (2, 3, 5, 5)),
    "strided, dilated": lambda: (nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 3, 7, 6)),
    "1 × 1": lambda: (nn.Conv2d(4, 6, 1), (3, 4, 3, 5)),
    "1 × 1, strided": lambda: (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 5)),
    "1 × 1, padded": lambda: (nn.Conv2d(4, 6, 1, padding=1), (2, 4, 3, 3)),
    "no bias": lambda: (nn.Conv2d(3, 6, 3, bias=False), (2, 3, 5, 5)),
    "over time": lambda: (nn.Conv1d(3, 6, 3), (2, 3, 9)),
    "over volumes": lambda: (nn.Conv3d(2, 6, 2), (1, 2, 3, 3, 3)),
}
each_conv = pytest.mark.parametrize("made", CONVS.values(), ids=CONVS)


def conv_parts(made):
    """A conv, an input, and two blocks of rows."""
    conv, shape = made()
    conv, K = conv.double().requires_grad_(False), conv.weight[0].numel()
    blocks = [
        merged.Block(start, stop, torch.randn(stop - start, r).double(), torch.randn(r, K).double(), scale)
        for start, stop, r, scale in ((0, 2, 3, 0.7), (3, 6, 1, -1.3))
    ]
    return conv, torch.randn(shape).double(), blocks


def merged_conv(conv, x, blocks):
    return merged.conv(x, conv.weight, conv.bias, merged.Geometry(conv.stride, conv.padding, conv.dilation), blocks)


@each_conv
@pytest.mark.parametrize("last", [False, True])
def test_a_convs_step_is_that_of_the_dense_weight(made, last):
    conv, x, blocks = seeded(lambda: conv_parts(made))
    if last and x.dim() == 4:
        conv, x = conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    factors = [x, *(factor for block in blocks for factor in (block.up, block.down))]

    def step(call):
        inputs = [tensor.clone().requires_grad_() for tensor in factors]
        made = [b._replace(up=inputs[1 + 2 * i], down=inputs[2 + 2 * i]) for i, b in enumerate(blocks)]
        y = call(inputs[0], made)
        return y, *torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(), inputs)

    def dense(x, blocks):
        weight = conv.weight.flatten(1).clone()
        for start, stop, up, down, scale in blocks:
            weight[start:stop] += scale * (up[:, :, None] * down).sum(1)
        return type(conv)._conv_forward(conv, x, weight.view(conv.weight.shape), conv.bias)

    plain = conv(x)
    for found, expected in zip(step(lambda *args: merged_conv(conv, *args)), step(dense), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
    assert_moved(step(dense)[0], plain)


@each_conv
def test_a_convs_gradients_are_the_limits_of_differences_once_and_twice(made):
    conv, x, blocks = seeded(lambda: conv_parts(made))
    geometry = merged.Geometry(conv.stride, conv.padding, conv.dilation)
    bias = seeded(lambda: torch.randn(len(conv.weight)).double())

    def y(x, bias, *factors):
        made = [b._replace(up=factors[2 * i], down=factors[2 * i + 1]) for i, b in enumerate(blocks)]
        return merged.conv(x, conv.weight, bias, geometry, made)

    inputs = [x, bias, *(factor for block in blocks for factor in (block.up, block.down))]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(y, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(y, inputs, fast_mode=True)


def test_the_crossing_of_a_conv_is_where_the_counted_operations_cross():
    n_in, rank = 8, 2
    for n_out in (4, 5, 6, 9):
        conv = nn.Conv2d(n_in, n_out, 3).requires_grad_(False)
        x = torch.randn(2, n_in, 12, 12)
        up, down = (torch.randn(shape, requires_grad=True) for shape in ((n_out, rank), (rank, n_in * 9)))
        block = merged.Block(0, n_out, up, down, 1.0)
        with FlopCounterMode(display=False) as factored:
            merged_conv(conv, x, [block]).sum().backward()
        with FlopCounterMode(display=False) as dense:
            weight = conv.weight + (up @ down).view_as(conv.weight)
            F.conv2d(x, weight, conv.bias).sum().backward()
        merges = 2 * rank * n_out * n_in * 9  # the dense way's products of the factors, which do not grow with x
        found, other = factored.get_total_flops() - merges, dense.get_total_flops() - 3 * merges
        assert merged.conv_pays(conv.weight, [block]) == (found < other) == (n_out >= 5)


@pytest.fixture
def convs(monkeypatch):
    """How often a conv took factored gradients."""
    seen, original = [], merged.conv
    monkeypatch.setattr(merged, "conv", lambda *args: seen.append(args[1].shape) or original(*args))
    return seen


def test_a_convolutional_net_takes_the_same_step_either_way(convs, monkeypatch):
    model = seeded(lambda: create("test_resnet", num_classes=3)).double()
    cv.inject(model, cv.LoRA(rank=2, branches=2), "conv")
    awaken(model)
    x = seeded(lambda: torch.randn(2, 3, 64, 64, dtype=torch.float64), 1)
    found, y = step(model, x), model(x).detach()
    assert len({tuple(shape) for shape in convs}) > 3
    with torch.no_grad():
        count = len(convs)
        torch.testing.assert_close(model(x), y, **EXACT)
    monkeypatch.setattr(merged, "conv_pays", lambda *args: False)
    assert torch.equal(model(x).detach(), y), "a deep net would make much of another last bit"
    expected = step(model, x)
    assert len(convs) == count
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item())


def test_convs_that_are_no_plain_product_keep_the_dense_gradient(convs):
    for conv in (
        nn.Conv2d(32, 32, 3, groups=2),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
    ):
        host = nn.Sequential(conv, nn.Flatten())
        cv.inject(host, METHODS["lora"], "0")
        host(torch.randn(2, 32, 9, 9)).sum().backward()
    host = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Flatten(0))
    cv.inject(host, METHODS["lora"], "0")
    host(torch.randn(32, 9, 9)).sum().backward()  # one image without its batch
    assert not convs
    host(torch.randn(1, 32, 9, 9)).sum().backward()
    assert convs


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_gradients_of_single_images_by_vmap(kind, calls, convs):
    if kind == "vit":
        model, size, seen = adapted(METHODS["lora"], "linear").eval(), 160, calls
    else:
        model, size, seen = seeded(lambda: create("test_resnet", num_classes=3)).double().eval(), 64, convs
        cv.inject(model, cv.LoRA(rank=2), "conv")
        awaken(model)
    x = seeded(lambda: torch.randn(3, 3, size, size, dtype=torch.float64), 1)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(p, image):
        return torch.func.functional_call(model, p, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    assert seen
    for i, image in enumerate(x):
        for name, gradient in torch.func.grad(loss)(trained, image).items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-8, atol=1e-9)


# What autograd can be asked for --------------------------------------------------------------------------------------


def attention():
    made = Attention(6, num_heads=2)
    made.fused_attn = False  # torch's kernel has no forward mode
    return made


HOSTS = {
    "linear": (lambda: nn.Linear(6, 8), cv.LoRA(rank=2), "0", None, (3, 7, 6)),
    "rows": (attention, cv.LoRA(rank=2), "0.qkv", "qv", (3, 7, 6)),
    "conv": (lambda: nn.Conv2d(6, 8, 3), cv.LoRA(rank=2), "0", None, (3, 6, 5, 5)),
    "1 × 1 conv": (lambda: nn.Conv2d(6, 8, 1), cv.LoRA(rank=2), "0", None, (3, 6, 2, 2)),
    "circulant": (lambda: nn.Linear(6, 8), cv.Circulant(), "0", None, (3, 7, 6)),
    "kronecker": (lambda: nn.Linear(6, 8), cv.Kronecker(), "0", None, (3, 7, 6)),
}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


def host_and_input(host):
    made, method, targets, rows, shape = host
    model = nn.Sequential(made()).double()
    cv.inject(model, method, targets, **({"parts": rows} if rows else {}))
    return awaken(model), torch.randn(shape, dtype=torch.float64)


def values(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def called(model, x):
    return lambda p, x=x: torch.func.functional_call(model, p, (x,))


def batched_gradients(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    slopes = torch.stack([torch.ones_like(y), y.detach().cos()])
    return torch.autograd.grad(y, [x, *cv.parameters(model)], slopes, is_grads_batched=True)


def several(model):
    return {name: torch.stack([p, 2 * p, p + 1]) for name, p in values(model).items()}


def many_adapters(model, x):
    return (torch.func.vmap(called(model, x))(several(model)),)


def many_adapters_without_gradients(model, x):
    with torch.no_grad():
        return many_adapters(model, x)


def gradients_of_many_adapters(model, x):
    each = torch.func.grad(lambda p: called(model, x)(p).square().sum())
    return torch.func.vmap(each)(several(model)).values()


def forward_mode(model, x):
    moved = values(model)
    return torch.func.jvp(called(model, x), (moved, x), (moved, x.cos()))


def other_dtype(model, x):
    for delta in deltas(model).values():
        delta.float()
    y = model(x)
    y.square().sum().backward()
    return y, *(p.grad for p in cv.parameters(model))


ASKED = [
    *(batched_gradients, many_adapters, many_adapters_without_gradients, gradients_of_many_adapters),
    *(forward_mode, other_dtype),
]


@each_host
@pytest.mark.parametrize("ask", ASKED)
def test_autograd_gives_what_it_gives_without_merging(host, ask, monkeypatch):
    model, x = seeded(lambda: host_and_input(host))
    merges, pay = [], [True]
    for way, pays in (("linear", "linear_pays"), ("conv", "conv_pays"), ("contracted", "contractions_pay")):
        own = getattr(merged, way)
        monkeypatch.setattr(merged, way, lambda *args, own=own: merges.append(args) or own(*args))
        monkeypatch.setattr(merged, pays, lambda *args: pay[0])
    found = ask(twin(model), x)
    if ask not in (forward_mode, many_adapters_without_gradients):
        assert merges
    merges.clear()
    pay[0] = False
    expected = ask(twin(model), x)
    assert not merges
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-2
        loose = 1e-5 if ask is other_dtype else 1e-10  # float32 factors
        torch.testing.assert_close(one, other, rtol=loose, atol=loose * other.abs().max().item())


@pytest.mark.parametrize(("n_in", "n_out"), [(8, 1), (1, 8), (2, 2)])
def test_one_token_without_its_batch(n_in, n_out, calls):
    """Of so few channels that merging pays even there."""
    host = seeded(lambda: nn.Sequential(nn.Linear(n_in, n_in), nn.GELU(), nn.Linear(n_in, n_out)).double())
    cv.inject(host, cv.LoRA(rank=2), "2")
    awaken(host)
    x = seeded(lambda: torch.randn(n_in, dtype=torch.float64), 1)
    found, expected = step(host, x), step(host, x.expand(3, n_in))
    assert len(calls) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(3 * found[name], gradient, **EXACT)


@each_host
def test_models_without_values_run(host):
    """On the meta device, which autocast does not know: shapes and operations are counted there."""
    model, x = host_and_input(host)
    expected, model, x = model(x), model.to("meta"), x.to("meta").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops()
    assert model(x).shape == expected.shape
    assert all(p.grad.shape == p.shape for p in cv.parameters(model))


# Where it runs, and what runs on it ----------------------------------------------------------------------------------


def test_few_tokens_half_precision_and_traces_stay_factored(calls):
    model = adapted(METHODS["lora"], "linear").float()
    x = torch.randn(4, 3, 160, 160)
    run_in_half_and_traced(model, x)
    assert not calls
    model(x)
    assert calls
    del calls[:]
    host = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3))
    cv.inject(host, METHODS["lora"], "0")
    host(torch.randn(31, 64))
    assert not calls
    host(torch.randn(32, 64))
    assert len(calls) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_merges_too(mode, calls):
    model = adapted(METHODS["capaboost"], "linear").eval()
    x = torch.randn(4, 3, 160, 160, dtype=torch.float64)
    expected = model(x).detach()
    count = len(calls)
    with mode():
        found = model(x)
    assert len(calls) == 2 * count
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(found, outputs(cv.fold(twin(model)), x), **EXACT)


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


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_autocast_sums_in_float32_and_rounds_once(kind, calls, convs):
    """Every host's product is that of fold's weight under the same autocast, but for its rare other roundings."""
    if kind == "vit":
        model, size, seen = adapted(METHODS["capaboost"], "linear").float(), 160, calls
    else:
        model, size, seen = seeded(lambda: create("test_resnet", num_classes=3)), 64, convs
        cv.inject(model, cv.LoRA(rank=2, branches=2), "conv")
        awaken(model)
    x = seeded(lambda: torch.randn(4, 3, size, size), 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x).detach()
        count = len(seen)
        expected = cv.fold(twin(model))(x).detach()
    assert count
    exact = outputs(model, x)
    assert (found.float() - expected.float()).norm() < 0.5 * (expected.float() - exact).norm()
    assert_moved(found, outputs(cv.remove(twin(model)), x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_under_autocast_gradients_are_those_of_the_rounded_product(kind):
    """All factors of one host, beside float64: as near as bfloat16 comes, and float32 themselves."""
    layer, shape = (nn.Linear(24, 40), (3, 30, 24)) if kind == "linear" else (nn.Conv2d(24, 40, 3), (2, 24, 7, 7))
    host = nn.Sequential(nn.Identity(), layer)
    cv.inject(host, METHODS["capaboost"], "1")
    awaken_deltas(host)
    exact, x = twin(host).double(), seeded(lambda: torch.randn(shape))
    given, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = host(given)
    assert y.dtype is torch.bfloat16
    slope = seeded(lambda: torch.randn(y.shape), 2)
    y.backward(slope.bfloat16())
    exact(wide).backward(slope.double())
    pairs = [(given.grad, wide.grad), *((p.grad, exact.get_parameter(n).grad) for n, p in trained(host))]
    assert len(pairs) == 3
    for found, expected in pairs:
        assert found.dtype is torch.float32
        assert (found - expected).norm() < 0.01 * expected.norm()


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_a_linear_keeps_its_input_and_the_factors_for_the_backward():
    """Besides, the weight itself, which is there anyway."""
    host = nn.Sequential(nn.Linear(64, 64))
    cv.inject(host, METHODS["lora"], "0")
    y = host(torch.randn(100, 64, requires_grad=True))
    weight = host[0]._parameters["weight"]
    fresh = [t for t in saved(y) if t.numel() >= 64 * 64 and t.data_ptr() != weight.data_ptr()]
    assert [tuple(t.shape) for t in fresh] == [(100, 64)]
