"""Adapters against a slow reference: a loop over branches, the non-linearity inside each, b_U outside the sum."""

import math
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from capavision.delta import Site
from capavision.inject import injections
from capavision.masks import KINDS, stream
from tests.conftest import assert_moved, assert_unchanged, awaken, create, images, outputs, seeded, snapshot, twin

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64
SIGMA = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
SETTINGS = [
    cv.Adapter(rank=4),
    cv.Adapter(rank=4, density=0.5, activation="gelu", scale=0.3),
    cv.Adapter(rank=4, branches=2, activation="silu"),
    cv.Adapter(rank=3, branches=4, density=0.25, activation="tanh", scale=2.0),
    cv.Adapter(rank=4, branches=2, masks="complementary"),
    cv.Adapter(rank=2, branches=3, masks="complementary", activation="gelu"),
    cv.Adapter(rank=4, branches=2, masks="2:4", where="parallel"),
]
each_setting = pytest.mark.parametrize("method", SETTINGS, ids=str)


def site(n_out=8, n_in=8, axis=-1):
    return Site("block", n_out, n_in, 0, torch.empty(0, dtype=torch.float64), axis)


def awake(method, at):
    delta = method.build(at)
    with torch.no_grad():
        for seed, p in enumerate((delta.U.value, delta.b_D, delta.b_U)):
            p.copy_(seeded(lambda p=p: torch.randn_like(p), seed))
    return delta


def drawn(method, factor, shape, name="block"):
    if method.density == 1:
        return torch.ones(1, *shape, dtype=torch.float64)
    draw = lambda branch, count: stream(f"0/{name}/{factor}/{branch}", count)  # noqa: E731
    return torch.from_numpy(KINDS[method.masks](shape, method.branches, method.density, draw)).double()


class TiedCopies:
    """One dense bottleneck per branch on (…, channels); b_U is added once, for it belongs to the sum."""

    def __init__(self, method, delta, at):
        self.config = method
        self.N = drawn(method, "D", (method.rank, at.n_in), at.name)
        self.M = drawn(method, "U", (at.n_out, method.rank), at.name)
        self.downs = [(delta.D.value * n).detach().requires_grad_() for n in self.N]
        self.ups = [(delta.U.value * m).detach().requires_grad_() for m in self.M]
        self.starts = [delta.b_D.detach().clone().requires_grad_() for _ in self.N]
        self.end = delta.b_U.detach().clone().requires_grad_()

    def __call__(self, h):
        total = torch.zeros((), dtype=h.dtype)
        for down, start, up in zip(self.downs, self.starts, self.ups, strict=True):
            total = total + SIGMA[self.config.activation](h @ down.T + start) @ up.T
        return self.config.scale * (total + self.end)

    def gradients(self):
        dD = sum(down.grad * n for down, n in zip(self.downs, self.N, strict=True))
        dU = sum(up.grad * m for up, m in zip(self.ups, self.M, strict=True))
        return dD, sum(start.grad for start in self.starts), dU, self.end.grad


@each_setting
def test_values_and_gradients_are_those_of_tied_copies(method):
    at = site()
    delta = awake(method, at)
    copies = TiedCopies(method, delta, at)
    h = seeded(lambda: torch.randn(2, 5, 8, dtype=torch.float64))
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    weights = seeded(lambda: torch.randn(2, 5, 8, dtype=torch.float64), 1)
    y, expected = delta(ours, ours), copies(theirs)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_moved(y, torch.zeros_like(y))
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    got = (delta.D.value.grad, delta.b_D.grad, delta.U.value.grad, delta.b_U.grad)
    for gradient, reference in zip(got, copies.gradients(), strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(gradient, reference, **EXACT)


def test_every_entry_by_hand():
    """Loops over i, o, k, c as the equation is printed, sigma = tanh."""
    at, method = site(3, 4), cv.Adapter(rank=2, branches=2, where="parallel", activation="tanh", scale=0.7)
    delta = awake(method, at)
    D, b_D, U, b_U = (t.tolist() for t in (delta.D.value, delta.b_D, delta.U.value, delta.b_U))
    N, M = drawn(method, "D", (2, 4)).tolist(), drawn(method, "U", (3, 2)).tolist()
    h = [0.3, -1.2, 0.8, 2.0]
    expected = []
    for o in range(3):
        total = b_U[o]
        for i in range(2):
            for k in range(2):
                inner = sum(D[k][c] * N[i][k][c] * h[c] for c in range(4)) + b_D[k]
                total += U[o][k] * M[i][o][k] * math.tanh(inner)
        expected.append(0.7 * total)
    x = torch.tensor([h], dtype=torch.float64)
    torch.testing.assert_close(delta(x, x), torch.tensor([expected], dtype=torch.float64), **EXACT)


def test_the_bias_after_the_sum_is_added_once():
    delta = cv.Adapter(rank=4, branches=4, scale=0.5).build(site())
    with torch.no_grad():
        delta.b_U.fill_(3.0)
    h = torch.randn(2, 8, dtype=torch.float64)
    assert (delta(h, h) == 1.5).all()


def test_one_full_branch_is_a_plain_bottleneck():
    delta = awake(cv.Adapter(rank=4, activation="gelu"), site())
    down, up = nn.Linear(8, 4).double(), nn.Linear(4, 8).double()
    down.load_state_dict({"weight": delta.D.value, "bias": delta.b_D})
    up.load_state_dict({"weight": delta.U.value, "bias": delta.b_U})
    h = torch.randn(2, 8, dtype=torch.float64)
    torch.testing.assert_close(delta(h, h), up(F.gelu(down(h))), **EXACT)


@each_setting
def test_the_start_is_d_uniform_and_the_rest_zero(method):
    delta = method.build(site(256, 256))
    bound = 256**-0.5
    assert delta.D.value.abs().max() <= bound
    assert delta.D.value.max() > 0.9 * bound
    assert all((p == 0).all() for p in (delta.U.value, delta.b_D, delta.b_U))


@each_setting
@pytest.mark.parametrize("axis", [1, -1])
def test_images_are_adapted_along_their_channel_axis(method, axis):
    at = site(axis=axis)
    delta = awake(method, at)
    h = seeded(lambda: torch.randn(2, 3, 5, 8, dtype=torch.float64))
    expected = TiedCopies(method, delta, at)(h)
    if axis == 1:
        h, expected = h.movedim(-1, 1), expected.movedim(-1, 1)
    torch.testing.assert_close(delta(h, h), expected, **EXACT)


@each_setting
@pytest.mark.parametrize("axis", [1, -1])
def test_folded_is_the_same_function_dense_and_as_wide_as_all_branches(method, axis):
    delta = awake(method, site(axis=axis))
    folded = delta.folded()
    x, y = (seeded(lambda: torch.randn(2, 8, 4, 8, dtype=torch.float64), seed) for seed in (0, 1))
    torch.testing.assert_close(folded(x, y), delta(x, y), **EXACT)
    assert folded.D.mask is None
    assert folded.U.mask is None
    assert folded.D.value.shape == (method.branches * method.rank, 8)
    assert folded.U.value.shape == (8, method.branches * method.rank)
    assert folded.b_D.shape == (method.branches * method.rank,)
    shared = {p.data_ptr() for p in delta.parameters()} & {p.data_ptr() for p in folded.parameters()}
    assert not shared
    torch.testing.assert_close(folded.folded()(x, y), delta(x, y), **EXACT)


@pytest.mark.parametrize(("where", "reads"), [("pfeiffer", "y"), ("houlsby", "y"), ("parallel", "x")])
def test_parallel_reads_the_input_and_the_others_the_output(where, reads):
    at, method = site(), cv.Adapter(rank=4, branches=2, where=where)
    delta = awake(method, at)
    given = {name: seeded(lambda: torch.randn(2, 8, dtype=torch.float64), i) for i, name in enumerate("xy")}
    torch.testing.assert_close(delta(**given), TiedCopies(method, delta, at)(given[reads]), **EXACT)


@pytest.mark.parametrize(("where", "width"), [("pfeiffer", 12), ("houlsby", 12), ("parallel", 8)])
def test_a_block_that_changes_the_width_is_served(where, width):
    """8 channels in, 12 out: the bottleneck is as wide as what it reads, the block's output or its input."""
    method = cv.Adapter(rank=4, branches=2, where=where)
    delta = awake(method, site(12, 8))
    assert delta.D.value.shape == (4, width)
    assert delta.U.value.shape == (12, 4)
    given = {n: seeded(lambda c=c: torch.randn(2, c, dtype=torch.float64)) for n, c in (("x", 8), ("y", 12))}
    expected = TiedCopies(method, delta, site(12, width))(given["x" if where == "parallel" else "y"])
    torch.testing.assert_close(delta(**given), expected, **EXACT)


@pytest.mark.parametrize("where", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize(("name", "size"), [("hiera_tiny_224", 224), ("levit_128s", 224), ("test_coatnet", 160)])
def test_downsampling_blocks_are_served(name, size, where):
    model, x = awaken(create(name)), images(size, 1)
    plain = outputs(model, x)
    cv.inject(model, cv.Adapter(rank=2, where=where), example=x)
    torch.testing.assert_close(outputs(model, x), plain, rtol=1e-4, atol=1e-5)
    assert any(c_out != c_in for c_out, c_in, _ in injections(model)[0].axes.values())
    awaken(model, 1)
    assert_moved(outputs(model, x), plain)


def test_a_block_that_takes_a_list_is_served_by_what_it_returns():
    model = Listed()
    x = torch.randn(3, 6)
    plain = model(x)
    cv.inject(model, cv.Adapter(rank=2), "body", example=x)
    assert torch.equal(model(x), plain)
    awaken(model.body.delta)
    torch.testing.assert_close(model(x), plain + model.body.delta(None, plain))


def test_nothing_runs_beside_a_block_whose_input_does_not_match_its_output():
    model, method = Listed(), cv.Adapter(rank=2, where="parallel")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"body \(Fuse\): its output has another shape than its input, so nothing can"):
        cv.inject(model, method, "body", example=torch.zeros(3, 6))
    assert_unchanged(model, before)
    hiera, x = create("hiera_tiny_224", img_size=64), images(64)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn.* so nothing can run beside it; name other targets"):
        cv.inject(hiera, method, "attn", example=x)
    assert len(cv.inject(hiera, method, example=x).hosts) == 12  # its MLPs keep the shape


class Fuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(12, 6)

    def forward(self, xs):
        return self.proj(torch.cat(xs, -1))


class Listed(nn.Module):
    """A block of several inputs, as mobilenetv5's fusion of features."""

    def __init__(self):
        super().__init__()
        self.body = Fuse()

    def forward(self, x):
        return self.body([x, x])


PLACES = [
    ("pfeiffer", ["blocks.0", "blocks.1"]),
    ("houlsby", ["blocks.0.attn", "blocks.1.attn", "blocks.0.mlp", "blocks.1.mlp"]),
    ("parallel", ["blocks.0.mlp", "blocks.1.mlp"]),
]


@pytest.mark.parametrize(("where", "hosts"), PLACES)
def test_default_hosts_are_the_papers(vit, where, hosts):
    report = cv.inject(vit, cv.Adapter(rank=4, where=where))
    assert sorted(report.hosts) == sorted(hosts)
    assert report.trained == len(hosts) * (4 * (48 + 48 + 1) + 48)


@pytest.mark.parametrize(("where", "hosts"), PLACES)
def test_an_adapted_block_adds_the_reference_to_what_it_returned(vit, where, hosts):
    plain = twin(awaken(vit).double())
    method = cv.Adapter(rank=4, where=where, branches=2)
    cv.inject(vit, method)
    awaken(vit, 1)
    x = seeded(lambda: torch.randn(2, 17, 48, dtype=torch.float64))
    for name in hosts:
        host, base = vit.get_submodule(name), plain.get_submodule(name)
        y = base(x)
        copies = TiedCopies(method, host.delta, Site(name, 48, 48, 0, torch.empty(0)))
        expected = y + copies(x if where == "parallel" else y)
        assert_moved(expected, y)
        torch.testing.assert_close(host(x), expected, **EXACT)


def test_houlsby_stays_inside_the_residual(vit):
    """x + (f + Δ(f)) on both halves of a pre-norm block, by hand."""
    cv.inject(awaken(vit).double(), cv.Adapter(rank=4, where="houlsby"))
    awaken(vit, 1)
    block = vit.blocks[0]
    plain = cv.remove(twin(vit)).blocks[0]
    x = seeded(lambda: torch.randn(2, 17, 48, dtype=torch.float64))
    f = plain.attn(plain.norm1(x))
    middle = x + f + block.attn.delta(None, f)
    f = plain.mlp(plain.norm2(middle))
    torch.testing.assert_close(block(x), middle + f + block.mlp.delta(None, f), **EXACT)


def test_targets_replace_the_hosts_and_where_keeps_its_reading(vit):
    report = cv.inject(vit, cv.Adapter(rank=4, where="parallel"), targets="attn")
    assert report.hosts == ("blocks.0.attn", "blocks.1.attn")


@pytest.mark.parametrize(
    ("name", "size", "where", "axis"),
    [
        ("test_convnext", 64, "pfeiffer", 1),  # its blocks take (B, C, H, W)
        ("test_convnext", 64, "parallel", -1),  # and its MLPs (B, H, W, C)
        ("swin_tiny_patch4_window7_224", 64, "pfeiffer", -1),
        ("swin_tiny_patch4_window7_224", 64, "parallel", -1),
        ("poolformerv2_s12", 64, "parallel", 1),
        ("test_vit", 64, "pfeiffer", -1),
    ],
)
def test_the_channel_axis_is_seen_in_a_forward_pass(name, size, where, axis):
    kwargs = {"img_size": size} if "patch" in name or name == "test_vit" else {}
    small = {"embed_dim": 24, "depths": (1, 1, 2, 1), "window_size": 4} if "swin" in name else {}
    model, x = awaken(create(name, **kwargs, **small)), images(size)
    plain = outputs(model, x)
    report = cv.inject(model, cv.Adapter(rank=2, where=where), example=x)
    placed = injections(model)[0].axes
    assert {a for _, _, a in placed.values()} == {axis}
    assert report.trained == sum(2 * (c_in + c_out + 1) + c_out for c_out, c_in, _ in placed.values())
    assert torch.equal(outputs(model, x), plain)
    awaken(model, 1)
    assert_moved(outputs(model, x), plain)


def test_without_an_example_the_model_tells_its_input_size(vit):
    cv.inject(vit, cv.Adapter(rank=2))
    assert set(injections(vit)[0].axes.values()) == {(48, 48, -1)}


class Square(nn.Module):
    """A block whose 8 channels look like its sides of 8 pixels, and whose layers speak for either axis."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.conv(x).movedim(1, -1)).movedim(-1, 1)


def test_an_axis_that_cannot_be_told_is_refused_until_an_example_tells():
    model = nn.Sequential(OrderedDict(body=Square()))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"body: cannot tell the channel axis of its output \(1, 8, 8, 8\); pass an example="
    ):
        cv.inject(model, cv.Adapter(rank=2), "body", example=torch.zeros(1, 8, 8, 8))
    assert_unchanged(model, before)
    assert cv.inject(model, cv.Adapter(rank=2), "body", example=torch.zeros(1, 8, 6, 6)).trained == 2 * 17 + 8
    assert injections(model)[0].axes == {"body": (8, 8, 1)}


@pytest.mark.parametrize(("layer", "axis"), [(nn.Conv2d(8, 8, 3, padding=1), 1), (nn.Linear(8, 8), -1)])
def test_where_sizes_do_not_tell_the_axis_the_layers_do(layer, axis):
    """256 pixels make 64 channels of 64 x 64 in the first stage of a resnet."""
    model = nn.Sequential(layer, nn.ReLU())
    cv.inject(model, cv.Adapter(rank=2), "0", example=torch.zeros(1, 8, 8, 8))
    assert injections(model)[0].axes == {"0": (8, 8, axis)}


def test_a_sequential_is_a_block_and_does_not_run_its_own_adapter():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 2))
    plain, x = twin(model), torch.randn(3, 6)
    cv.inject(model, cv.Adapter(rank=2), "0", example=x)
    awaken(model[0].delta)
    y = plain[0](x)
    assert_moved(model[0](x), y)
    torch.testing.assert_close(model[0](x), y + model[0].delta(x, y))
    assert [type(m) for m in model[0]] == [nn.Linear, nn.Tanh]
    assert len(model[0]) == 2
    assert model[0][-1] is list(model[0])[-1]
    assert torch.equal(twin(model)(x), model(x))
    cv.remove(model)
    assert torch.equal(model(x), plain(x))


class Dictionary(nn.ModuleDict):
    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


def test_a_dict_of_modules_is_refused_for_it_would_run_its_adapter():
    model = nn.Sequential(Dictionary({"a": nn.Linear(6, 6)}))
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"0 \(Dictionary\) is a list of modules .* name the modules in it, or the one"
    ):
        cv.inject(model, cv.Adapter(rank=2), "0", example=torch.zeros(3, 6))
    assert_unchanged(model, before)
    assert cv.inject(model, cv.Adapter(rank=2), "a", example=torch.zeros(3, 6)).hosts == ("0.a",)


class Tupled(nn.Module):
    """A block that returns its output and something else, as attention modules do."""

    def __init__(self):
        super().__init__()
        self.body = Pair()

    def forward(self, x):
        return self.body(x, scale=2.0)[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x, scale=1.0):
        return self.proj(x) * scale, "attention map"


def test_a_block_that_returns_a_tuple_keeps_its_other_outputs():
    model, x = Tupled(), torch.randn(3, 6)
    plain = model(x)
    cv.inject(model, cv.Adapter(rank=2), "body", example=x)
    awaken(model)
    y, rest = model.body(x, scale=2.0)
    assert rest == "attention map"
    assert_moved(y, plain)
    torch.testing.assert_close(y, plain + model.body.delta(x, plain))


class Passing(nn.Module):
    """A block that returns its first input as it came, as coat's parallel blocks do, and the second one changed."""

    def __init__(self, kind):
        super().__init__()
        self.proj, self.kind = nn.Linear(6, 6), kind

    def forward(self, x, z):
        return self.kind([x, self.proj(z)])


class Streams(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body = Passing(kind)

    def forward(self, x):
        return self.body(x, 2 * x)[-1]


@pytest.mark.parametrize("kind", [tuple, list])
def test_an_input_that_is_only_passed_on_is_not_the_output_adapted(kind):
    model, x = Streams(kind), torch.randn(3, 6)
    plain = model(x)
    cv.inject(model, cv.Adapter(rank=2), "body", example=x)
    awaken(model.body.delta)
    passed, adapted = returned = model.body(x, 2 * x)
    assert type(returned) is kind
    assert passed is x
    assert_moved(adapted, plain)
    torch.testing.assert_close(adapted, plain + model.body.delta(None, plain))
    assert torch.equal(model(x), adapted)


def test_an_output_that_the_model_never_uses_is_not_adapted():
    """The pixels that tnt's last block returns go nowhere: left out of the defaults, refused by name."""
    model, x = awaken(create("tnt_s_legacy_patch16_224", img_size=32, depth=3)), images(32)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.2: the model makes no use of its first output, so an adapter there"):
        cv.inject(model, cv.Adapter(rank=2), ["blocks.1", "blocks.2"], example=x)
    assert_unchanged(model, before)
    assert cv.inject(model, cv.Adapter(rank=2), example=x).hosts == ("blocks.0", "blocks.1")
    lone = Streams(tuple)
    lone.forward = lambda x: {"logits": lone.body(2 * x, x)[0]}
    lone.body.forward = lambda x, z: (lone.body.proj(x), z)
    assert cv.inject(lone, cv.Adapter(rank=2), "body", example=torch.zeros(3, 6)).hosts == ("body",)


class Named(NamedTuple):
    states: torch.Tensor
    weights: torch.Tensor


def test_a_named_tuple_stays_one():
    model = Streams(lambda parts: Named(*reversed(parts)))
    model.forward = lambda x: model.body(x, x).states
    cv.inject(model, cv.Adapter(rank=2), "body", example=torch.zeros(3, 6))
    assert type(model.body(torch.zeros(3, 6), torch.zeros(3, 6))) is Named


def test_a_block_that_returns_no_tensor_is_refused():
    model = Streams(dict.fromkeys)
    model.forward = lambda x: model.body(x, x)
    before = snapshot(model)
    with pytest.raises(ValueError, match="body returns dict, to which nothing can be added; name its modules"):
        cv.inject(model, cv.Adapter(rank=2), "body", example=torch.zeros(3, 6))
    assert_unchanged(model, before)


def test_measuring_leaves_modes_and_hooks_alone(vit):
    vit.train()
    vit.blocks[0].eval()
    before = snapshot(vit)
    with pytest.raises(ValueError, match="did not run in the model's forward pass"):
        cv.inject(vit, cv.Adapter(rank=2), "*")  # ModuleLists and the like never run
    assert_unchanged(vit, before)
    cv.inject(vit, cv.Adapter(rank=2))
    assert vit.training
    assert not vit.blocks[0].training
    assert snapshot(vit)["hooks"].keys() >= before["hooks"].keys()
    assert sum(snapshot(vit)["hooks"].values()) == sum(before["hooks"].values())


def test_a_failing_forward_pass_leaves_the_model_alone(vit):
    vit.train()
    before = snapshot(vit)
    with pytest.raises(AssertionError, match="Input height"):
        cv.inject(vit, cv.Adapter(rank=2), example=torch.zeros(1, 3, 30, 30))
    assert_unchanged(vit, before)


@pytest.mark.parametrize(
    ("refused", "match"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 2.5}, r"rank=2\.5 must be a whole number"),
        ({"where": "sequential"}, "where='sequential' is unknown; choose one of pfeiffer, houlsby, parallel"),
        ({"activation": "swish"}, "activation='swish' is unknown; choose one of relu, gelu, silu, tanh"),
        ({"branches": 3, "masks": "2:4"}, "branches is 1 or even"),
        ({"density": 2.0}, r"density=2\.0 must lie in"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(refused, match):
    assert cv.Adapter().rank == 32
    with pytest.raises(ValueError, match=match):
        cv.Adapter(**refused)


class Plain(nn.Module):
    """Says nothing about its input and has no MLP."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"targets": "body", "parts": "q", "example": torch.zeros(1, 6)}, "acts on whole blocks, which have no rows"),
        (
            {"targets": "spare", "example": torch.zeros(1, 6)},
            "spare did not run in the model's forward pass, so an ada",
        ),
        ({"targets": "body"}, "the model does not tell its input size; pass example="),
        ({"example": torch.zeros(1, 6)}, "Plain has no default host for Adapter; name targets"),
        ({"targets": "bodi", "example": torch.zeros(1, 6)}, "no module matches 'bodi'; did you mean 'body'"),
    ],
)
def test_hosts_that_cannot_be_served_are_refused(kwargs, match):
    model = Plain()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        cv.inject(model, cv.Adapter(rank=2), **kwargs)
    assert_unchanged(model, before)
    assert cv.inject(model, cv.Adapter(rank=2), "body", example=torch.zeros(1, 6)).trained == 2 * 13 + 6


class Inner(nn.Module):
    """A block whose input has a name."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states, scale=1.0):
        return scale * self.fc(hidden_states)


class ByName(nn.Module):
    """Calls its block as transformers' models do, every input by name and in an order of its own."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Inner(), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.block(scale=torch.tensor(2.0), hidden_states=x))


def test_a_block_whose_input_comes_by_name_is_adapted_on_that_input():
    model, x = ByName().double(), seeded(lambda: torch.randn(2, 3, 8)).double()
    cv.inject(model, cv.Adapter(rank=4, where="parallel", activation="gelu"), "block", example=x)
    assert injections(model)[0].axes == {"block": (8, 8, -1)}
    block = awaken(model.block)
    by_place, y = block(x, 2.0), 2.0 * block.fc(x)
    assert torch.equal(block(scale=2.0, hidden_states=x), by_place)
    torch.testing.assert_close(by_place, y + block.delta(x, y), **EXACT)
    assert_moved(by_place, y)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x), **EXACT)
