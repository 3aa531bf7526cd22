"""LoRA against a slow reference: tied masked copies in a loop over branches, as the equation is printed."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from capavision.delta import Site
from capavision.masks import KINDS, stream
from tests.conftest import assert_moved, awaken, seeded, tiny_vit

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64
SETTINGS = [
    cv.LoRA(rank=4),
    cv.LoRA(rank=4, alpha=3.0, density=0.5),
    cv.LoRA(rank=4, branches=2),
    cv.LoRA(rank=3, alpha=5.0, branches=4, density=0.25),
    cv.LoRA(rank=4, branches=2, masks="complementary"),
    cv.LoRA(rank=2, alpha=16.0, branches=3, masks="complementary"),
    cv.LoRA(rank=4, branches=2, masks="2:4"),
    cv.LoRA(rank=4, branches=1, masks="2:4"),
]
each_setting = pytest.mark.parametrize("method", SETTINGS, ids=str)


def site(n_out=10, n_in=16, name="host", seed=0, dtype=torch.float64):
    return Site(name, n_out, n_in, seed, torch.empty(0, dtype=dtype))


def awake(method, at):
    delta = method.build(at)
    with torch.no_grad():
        delta.B.value.copy_(seeded(lambda: torch.randn(delta.B.value.shape, dtype=delta.B.value.dtype)))
    return delta


def drawn(method, key, shape):
    """The masks of one factor, from the public pieces: kind, shape and key."""
    if method.density == 1:
        return torch.ones(1, *shape, dtype=torch.float64)
    draw = lambda branch, count: stream(f"{key}/{branch}", count)  # noqa: E731
    return torch.from_numpy(KINDS[method.masks](shape, method.branches, method.density, draw)).double()


def masks_of(method, at):
    return (
        drawn(method, f"{at.seed}/{at.name}/A", (method.rank, at.n_in)),
        drawn(method, f"{at.seed}/{at.name}/B", (at.n_out, method.rank)),
    )


def slow_weight(A, B, N, M, scale):
    n_out, rank, n_in = len(B), len(A), len(A[0])
    product = [[0.0] * n_in for _ in range(n_out)]
    for i in range(len(N)):
        for o in range(n_out):
            for j in range(n_in):
                for k in range(rank):
                    product[o][j] += B[o][k] * M[i][o][k] * A[k][j] * N[i][k][j]
    return torch.tensor(product, dtype=torch.float64) * scale


@each_setting
def test_the_weight_is_the_sum_over_masked_branches(method):
    at = site(n_out=6, n_in=8)
    delta = awake(method, at)
    A, B, N, M = (t.tolist() for t in (delta.A.value, delta.B.value, *masks_of(method, at)))
    expected = slow_weight(A, B, N, M, method.alpha / method.rank)
    assert_moved(expected, torch.zeros_like(expected))
    torch.testing.assert_close(delta.weight(), expected, **EXACT)


class TiedCopies:
    """The authors' way: a dense layer per branch, whose gradients are masked and summed into the one parameter's."""

    def __init__(self, method, A, B, N, M):
        self.N, self.M, self.scale = N, M, method.alpha / method.rank
        self.downs = [(A * n).detach().requires_grad_() for n in N]
        self.ups = [(B * m).detach().requires_grad_() for m in M]

    def __call__(self, x):
        total = torch.zeros((), dtype=x.dtype)
        for down, up in zip(self.downs, self.ups, strict=True):
            total = total + self.scale * ((x @ down.T) @ up.T)
        return total

    def gradients(self):
        dA = sum(down.grad * n for down, n in zip(self.downs, self.N, strict=True))
        dB = sum(up.grad * m for up, m in zip(self.ups, self.M, strict=True))
        return dA, dB


@each_setting
@pytest.mark.parametrize("path", ["forward", "weight"])
def test_values_and_gradients_are_those_of_tied_copies(method, path):
    at = site()
    delta = awake(method, at)
    copies = TiedCopies(method, delta.A.value, delta.B.value, *masks_of(method, at))
    x = seeded(lambda: torch.randn(2, 5, at.n_in, dtype=torch.float64))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = seeded(lambda: torch.randn(2, 5, at.n_out, dtype=torch.float64), 1)
    y = delta(ours) if path == "forward" else F.linear(ours, delta.weight())
    expected = copies(theirs)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_moved(y, torch.zeros_like(y))
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    dA, dB = copies.gradients()
    torch.testing.assert_close(delta.A.value.grad, dA, **EXACT)
    torch.testing.assert_close(delta.B.value.grad, dB, **EXACT)


def test_one_full_branch_is_plain_lora():
    """loralib.Linear, by hand: F.linear(x, W, b) + (dropout(x) @ A.T @ B.T) * (alpha / r)."""
    host = seeded(lambda: nn.Linear(12, 20).double())
    model = nn.Sequential(host)
    W, b = host.weight.detach().clone(), host.bias.detach().clone()
    cv.inject(model, cv.LoRA(rank=3, alpha=7.0), "0")
    awaken(model)
    A, B = host.delta.A.value, host.delta.B.value
    x = seeded(lambda: torch.randn(4, 12, dtype=torch.float64))
    expected = F.linear(x, W, b) + (x @ A.T @ B.T) * (7.0 / 3)
    assert_moved(expected, F.linear(x, W, b))
    torch.testing.assert_close(model(x), expected, **EXACT)
    torch.testing.assert_close(host.weight, W + (7.0 / 3) * B @ A, **EXACT)


@pytest.mark.parametrize("masks", ["random", "complementary"])
@pytest.mark.parametrize(("rank", "branches"), [(1, 2), (2, 2), (2, 3), (4, 4)])
def test_the_rank_of_the_update_is_branches_times_rank(masks, rank, branches):
    delta = awake(cv.LoRA(rank=rank, branches=branches, masks=masks), site(40, 48))
    assert torch.linalg.matrix_rank(delta.weight()) == branches * rank


def test_equal_masks_would_not_raise_the_rank():
    """What the test above would see if the branches' masks were one and the same."""
    delta = awake(cv.LoRA(rank=2, branches=3), site(40, 48))
    for factor in (delta.A, delta.B):
        factor.mask = factor.mask.select(factor.dim, 0).unsqueeze(factor.dim).expand_as(factor.mask)
    assert torch.linalg.matrix_rank(delta.weight()) == 2


@pytest.mark.parametrize("name", ["A", "B"])
def test_masks_on_one_factor_alone_would_not_raise_the_rank(name):
    delta = awake(cv.LoRA(rank=2, branches=3), site(40, 48))
    factor = getattr(delta, name)
    factor.mask = torch.ones_like(factor.mask)
    assert torch.linalg.matrix_rank(delta.weight()) == 2


@pytest.mark.parametrize("branches", [1, 2, 4])
def test_alpha_over_rank_scales_once_for_all_branches(branches):
    small = awake(cv.LoRA(rank=4, alpha=1.0, branches=branches), site())
    large = awake(cv.LoRA(rank=4, alpha=6.0, branches=branches), site())
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(large.weight(), 6 * small.weight(), **EXACT)
    torch.testing.assert_close(large(x), 6 * small(x), **EXACT)
    product = large.B() @ large.A()
    torch.testing.assert_close(large.weight(), (6 / 4) * product, **EXACT)


@each_setting
def test_the_start_is_a_uniform_and_b_zero(method):
    delta = method.build(site(30, 64))
    bound = 1 / math.sqrt(64)  # loralib: kaiming_uniform(a=sqrt(5)) is U(-1/sqrt(fan_in), 1/sqrt(fan_in))
    assert (delta.B.value == 0).all()
    assert delta.A.value.abs().max() <= bound
    assert delta.A.value.max() > 0.9 * bound
    assert delta.A.value.min() < -0.9 * bound
    assert delta.A.value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert (delta.weight() == 0).all()


def test_the_start_depends_on_seed_and_name_alone():
    method = cv.LoRA(rank=4, branches=2)
    torch.manual_seed(0)
    first = method.build(site()).A.value
    torch.manual_seed(1)
    method.build(site(name="between"))
    assert torch.equal(first, method.build(site()).A.value)
    assert not torch.equal(first, method.build(site(name="other")).A.value)
    assert not torch.equal(first, method.build(site(seed=1)).A.value)


def test_the_start_is_that_of_the_first_release():
    """In float64 from the key alone: independent of torch's generators, versions and default dtype."""
    A = cv.LoRA(rank=2).build(site(n_in=3)).A.value
    words = [[int(word) >> 11 for word in row] for row in stream("0/host/A/init", 6).reshape(2, 3)]
    rows = [[(2 * word / 2**53 - 1) / math.sqrt(3) for word in row] for row in words]
    expected = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(A, expected, rtol=1e-15, atol=1e-15)
    assert A[0, 0].item() == pytest.approx(-0.24181674402102613, rel=1e-15)


def test_every_host_and_every_part_starts_with_values_and_masks_of_its_own(vit):
    cv.inject(vit, cv.LoRA(rank=4, branches=2), "qkv", "qkv")
    built = [part for block in vit.blocks for part in block.attn.qkv.delta.parts.values()]
    for pair in (lambda d: d.A.value, lambda d: d.A.mask, lambda d: d.B.mask):
        assert len({pair(d).detach().numpy().tobytes() for d in built}) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_deltas_are_kept_in_single_precision_or_better(dtype):
    model = nn.Sequential(nn.Linear(8, 8, dtype=dtype))
    cv.inject(model, cv.LoRA(rank=2, branches=2), "0")
    assert model[0].delta.A.value.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


HOSTS = [
    (lambda: nn.Linear(12, 20), 12, 20),
    (lambda: nn.Linear(12, 20, bias=False), 12, 20),
    (lambda: nn.Conv1d(6, 10, 5), 6 * 5, 10),
    (lambda: nn.Conv2d(6, 10, 3), 6 * 9, 10),
    (lambda: nn.Conv2d(6, 10, (1, 7)), 6 * 7, 10),
    (lambda: nn.Conv2d(8, 12, 3, groups=4), 2 * 9, 12),
    (lambda: nn.Conv2d(8, 8, 5, groups=8), 25, 8),
    (lambda: nn.Conv3d(2, 4, 3), 2 * 27, 4),
]


@pytest.mark.parametrize(("build", "n_in", "n_out"), HOSTS)
@pytest.mark.parametrize("method", [cv.LoRA(rank=3), cv.LoRA(rank=3, branches=4, density=0.5)], ids=str)
def test_a_host_costs_rank_times_in_plus_out(build, n_in, n_out, method):
    model = nn.Sequential(build())
    report = cv.inject(model, method, "0")
    assert report.trained == 3 * (n_in + n_out) == sum(p.numel() for p in cv.parameters(model))
    assert model[0].delta.weight().shape == (n_out, n_in)


def vit_base():
    with torch.device("meta"):  # shapes without values: 86 M parameters cost nothing
        return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.mark.parametrize("branches", [1, 2])
def test_the_papers_vit_b_costs_294912_values(branches):
    assert cv.inject(vit_base(), cv.LoRA(rank=8, branches=branches)).trained == 294_912


def test_all_six_projections_of_vit_b_cost_1327104_values():
    model = vit_base()
    fused = cv.inject(model, cv.LoRA(rank=8), "qkv", "qkv")
    others = cv.inject(model, cv.LoRA(rank=8), ["blocks.*.proj", "fc1", "fc2"])
    assert fused.trained + others.trained == 1_327_104
    assert len(others.hosts) == 36


def test_training_reduces_a_loss_and_touches_deltas_and_head_alone(vit):
    base = {name: value.clone() for name, value in vit.state_dict().items()}
    cv.inject(vit, cv.LoRA(rank=4, branches=2), "qkv", "qv")
    optimizer = torch.optim.Adam(cv.parameters(vit), lr=1e-2)
    x, labels = seeded(lambda: torch.randn(8, 3, 32, 32)), torch.arange(8) % 5
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(vit(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {name for name, value in vit.state_dict().items() if name in base and not torch.equal(value, base[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(block.attn.qkv.delta.parts[part].B.value.abs().max() > 0 for block in vit.blocks for part in "qv")


@pytest.mark.parametrize(("accepted", "refused"), [(1, 0), (2, -1), (3, 2.5), (4, "4"), (8, None)])
def test_a_rank_is_a_whole_number_of_at_least_one(accepted, refused):
    assert cv.LoRA(rank=accepted).rank == accepted
    with pytest.raises(ValueError, match=f"rank={refused!r} must be a whole number of at least 1"):
        cv.LoRA(rank=refused)


def test_lora_refuses_what_its_masks_refuse():
    with pytest.raises(ValueError, match="density=1 makes the 2 branches equal"):
        cv.LoRA(branches=2, density=1.0)


@pytest.mark.parametrize(
    ("size", "rank", "target", "match"),
    [
        (6, 4, "patch_embed.proj", None),  # 3 channels of 6 x 6 pixels are 108 inputs, a multiple of 4
        (5, 4, "patch_embed.proj", r"patch_embed\.proj \(Conv2d \(48, 3, 5, 5\)\): 2:4 masks need .* is \(4, 75\)"),
        (6, 8, "fc1", None),
        (6, 3, "fc1", r"blocks\.0\.mlp\.fc1 \(Linear \(192, 48\)\): 2:4 masks need .* is \(192, 3\)"),
    ],
)
def test_a_refusal_names_the_host_and_its_shape(size, rank, target, match):
    model, method = tiny_vit(patch_size=size, img_size=4 * size), cv.LoRA(rank=rank, branches=2, masks="2:4")
    if match is None:
        assert cv.inject(model, method, target).hosts
    else:
        with pytest.raises(ValueError, match=match):
            cv.inject(model, method, target)


def test_a_report_prints_hosts_shapes_and_costs(vit):
    text = str(cv.inject(vit, cv.LoRA(rank=4, branches=2), "qkv", "qv"))
    assert "LoRA(branches=2, density=0.5, masks='random', rank=4, alpha=8.0)" in text
    assert "2 ×       768  Linear (144, 48)" in text
    assert "rows q, v" in text
    assert "blocks.0.attn.qkv … blocks.1.attn.qkv" in text
    assert "trained 1,536 " in text
    assert "in 2 hosts; head 245" in text


def test_the_report_counts_the_base_without_deltas(vit):
    plain = sum(p.numel() for p in vit.parameters())
    first = cv.inject(vit, cv.LoRA(rank=4), "qkv")
    second = cv.inject(vit, cv.LoRA(rank=4), "fc1")
    assert first.total == second.total == plain


def test_the_first_argument_is_the_rank():
    assert cv.LoRA(4) == cv.LoRA(rank=4)
    with pytest.raises(TypeError, match="positional"):
        cv.LoRA(4, 4.0, 2)
