"""Targets and parts: what is accepted beside what is refused, defaults by architecture, and where q, k and v lie."""

import contextlib
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from capavision.attention import attentions, classifier, parts_of
from capavision.blocks import blocks, mlps
from capavision.inject import injections
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    create,
    images,
    outputs,
    seeded,
    snapshot,
    tiny_beit,
    tiny_vit,
)

Case = namedtuple("Case", "targets hosts wrong")
CASES = [
    Case("qkv", 2, wrong=["kv", "qkvs", "attn.qkv", "QKV"]),  # a whole name, never a substring
    Case("blocks.0.attn.qkv", 1, wrong=["blocks.2.attn.qkv", "blocks.0.attn.qk", "blocks.0.attn.qkv."]),
    Case("blocks.[01].mlp.fc1", 2, wrong=["blocks.[23].mlp.fc1", "[01].mlp.fc1"]),
    Case("blocks.*.fc?", 4, wrong=["blocks.*.fc", "blocks.?.fc?"]),
    Case("*.proj", 3, wrong=["*.prj", ".proj"]),
    Case("*", 9, wrong=["?", "[a]"]),  # all but the head
    Case(["qkv", "fc1"], 4, wrong=[["qkv", "fc3"], ["fc3", "qkv"]]),
    Case(["qkv", "blocks.0.attn.qkv", "blocks.*.qkv"], 2, wrong=[["qkv", ""], ""]),
    Case(("proj",), 3, wrong=[("projs",)]),
    Case("attention", 4, wrong=["attentions"]),
    Case("mlp", 4, wrong=["mlps"]),
    Case("linear", 8, wrong=["Linear"]),
    Case("conv", 1, wrong=["convs"]),
    Case("all", 9, wrong=["everything"]),
    Case(["conv", "attention"], 5, wrong=[["conv", "attn1"]]),
    Case("head", 1, wrong=["heads"]),  # the classifier, where it is named itself
    Case(None, 2, wrong=[]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.targets))
def test_targets_match_whole_names(case):
    assert len(cv.inject(tiny_vit(), cv.LoRA(rank=2), case.targets).hosts) == case.hosts
    model = tiny_vit()
    before = snapshot(model)
    for wrong in case.wrong:
        with pytest.raises(ValueError, match="no module matches"):
            cv.inject(model, cv.LoRA(rank=2), wrong)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("qkvs", "no module matches 'qkvs'; did you mean 'qkv'"),
        ("blocks.0.attn.qk", r"no module matches 'blocks\.0\.attn\.qk'; did you mean 'blocks\.0\.attn\.qkv'"),
        ("zzzzzz", "groups: attention, mlp, linear, conv, all"),
        ("attn", "'attn' matches no Linear or Conv with a weight of its own, only Attention; name its inner modules"),
        ("norm1", "'norm1' matches no Linear or Conv with a weight of its own, only LayerNorm"),
        ("blocks", "only Sequential; name its inner modules"),
        (["qkv", "norm1"], "'norm1' matches no Linear"),
        ("hea*", "'hea\\*' matches no Linear or Conv with a weight of its own"),  # a wildcard is not its own name
    ],
)
def test_a_refusal_says_what_was_meant(vit, targets, match):
    before = snapshot(vit)
    with pytest.raises(ValueError, match=match):
        cv.inject(vit, cv.LoRA(rank=2), targets)
    assert_unchanged(vit, before)


def test_a_list_of_no_targets_is_refused(vit):
    before = snapshot(vit)
    with pytest.raises(ValueError, match=r"targets"):
        cv.inject(vit, cv.LoRA(rank=2), [])
    assert_unchanged(vit, before)


@pytest.mark.parametrize("method", [cv.LoRA, "lora", None, nn.Linear(2, 2)])
def test_what_is_no_method_is_refused(vit, method):
    before = snapshot(vit)
    with pytest.raises(TypeError, match="method must be a capavision method such as LoRA"):
        cv.inject(vit, method)
    assert_unchanged(vit, before)


class Repeated(nn.Module):
    """One name at the top and inside a layer, as in sknet and xception; and a module called like a group."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.layer = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 1), "preconv1": nn.Conv2d(4, 4, 1)})
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.layer["preconv1"](self.layer["conv1"](self.conv1(x))))


@pytest.mark.parametrize(
    ("targets", "hosts"),
    [
        ("conv1", ["conv1"]),  # a qualified name is that module, whoever else ends in it
        ("layer.conv1", ["layer.conv1"]),
        ("*.conv1", ["layer.conv1"]),
        ("*conv1", ["conv1", "layer.conv1", "layer.preconv1"]),
        (["conv1", "*.conv1"], ["conv1", "layer.conv1"]),
        ("preconv1", ["layer.preconv1"]),
        ("all", ["conv1", "layer.conv1", "layer.preconv1", "conv"]),
    ],
)
def test_names_match_whole_components(targets, hosts):
    assert sorted(cv.inject(Repeated(), cv.LoRA(rank=2), targets).hosts) == sorted(hosts)


def test_a_qualified_name_goes_before_a_group_of_that_name():
    assert cv.inject(Repeated(), cv.LoRA(rank=2), "conv").hosts == ("conv",)
    model = nn.Sequential()
    model.add_module("block", nn.Linear(4, 4))
    assert cv.inject(model, cv.Adapter(rank=2), "block", example=torch.zeros(1, 4)).hosts == ("block",)


def test_the_adapters_groups_are_whole_modules(vit):
    method = cv.Adapter(rank=2)
    for group, count in {"attention": 2, "mlp": 2, "block": 2, "norm1": 2, "blocks.0": 1, "blocks.*.mlp": 2}.items():
        assert len(cv.inject(tiny_vit(), method, group).hosts) == count


ROWS = {"q": (0, 48), "k": (48, 96), "v": (96, 144)}
Parts = namedtuple("Parts", "accepted rows refused match")
PARTS = [
    Parts("q", ["q"], "x", r"qkv: parts='x', but its 144 rows are not known to hold x \(q, k, v known\)"),
    Parts("k", ["k"], "", "are not known to hold no part at all"),
    Parts("v", ["v"], "Q", "not known to hold Q"),
    Parts("qv", ["q", "v"], "qw", "not known to hold w"),
    Parts("vq", ["q", "v"], "o", r"give row slices such as parts=\[slice\(0, 48\)\], or leave parts out"),
    Parts("qkv", ["q", "k", "v"], "q v", "not known to hold  "),
]


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.accepted)
def test_letters_choose_rows_of_a_fused_projection(vit, case):
    before = snapshot(vit)
    with pytest.raises(ValueError, match=case.match):
        cv.inject(vit, cv.LoRA(rank=2), "qkv", case.refused)
    assert_unchanged(vit, before)
    report = cv.inject(vit, cv.LoRA(rank=2), "qkv", case.accepted)
    assert injections(vit)[0].hosts["blocks.0.attn.qkv"] == {part: ROWS[part] for part in case.rows}
    assert report.trained == 2 * len(case.rows) * 2 * (48 + 48)
    assert list(vit.blocks[0].attn.qkv.delta.parts) == case.rows


Slices = namedtuple("Slices", "accepted rows refused")
SLICES = [
    Slices([slice(0, 48)], [(0, 48)], [slice(0, 48), slice(47, 96)]),
    Slices([slice(0, 48), slice(48, 96)], [(0, 48), (48, 96)], [slice(0, 48), slice(0, 48)]),
    Slices([slice(100, 120), slice(3, 7)], [(3, 7), (100, 120)], [slice(7, 3)]),
    Slices([slice(None, 10)], [(0, 10)], [slice(5, 5)]),
    Slices([slice(-4, None)], [(140, 144)], [slice(0, 10, 2)]),
    Slices([slice(None)], [(0, 144)], [slice(10, 0, -1)]),
    Slices([slice(0, 144, 1)], [(0, 144)], []),
    Slices([slice(143, 144)], [(143, 144)], [slice(144, 200)]),
]


@pytest.mark.parametrize("case", SLICES, ids=lambda case: str(case.accepted))
def test_slices_choose_any_disjoint_rows(vit, case):
    before = snapshot(vit)
    with pytest.raises(ValueError, match="are not disjoint, non-empty row slices of its 144 rows"):
        cv.inject(vit, cv.LoRA(rank=2), "qkv", case.refused)
    assert_unchanged(vit, before)
    report = cv.inject(vit, cv.LoRA(rank=2), "qkv", case.accepted)
    assert list(injections(vit)[0].hosts["blocks.0.attn.qkv"].values()) == case.rows
    assert report.trained == 2 * sum(2 * (stop - start + 48) for start, stop in case.rows)


@pytest.mark.parametrize("parts", ["qv", "k", [slice(100, 120), slice(3, 7)], [slice(0, 144)], [slice(5, 6)]])
def test_only_the_chosen_rows_change(vit, parts):
    plain = vit.blocks[0].attn.qkv.weight.detach().clone()
    cv.inject(vit, cv.LoRA(rank=2, branches=2), "qkv", parts)
    awaken(vit.blocks[0].attn.qkv)
    host, rows = vit.blocks[0].attn.qkv, injections(vit)[0].hosts["blocks.0.attn.qkv"]
    change = host.weight.detach() - plain
    inside = torch.zeros(144, dtype=torch.bool)
    for part, (start, stop) in rows.items():
        inside[start:stop] = True
        torch.testing.assert_close(change[start:stop], host.delta.parts[part].weight(), rtol=1e-4, atol=1e-6)
        assert_moved(change[start:stop], torch.zeros(1))
    assert (change[~inside] == 0).all()
    x = images()[0, :, :4, 0].repeat(1, 12)  # (3, 48)
    y = host.delta(x)
    torch.testing.assert_close(y, x @ host.delta.weight().T, rtol=1e-4, atol=1e-6)
    assert (y[:, ~inside] == 0).all()


@pytest.mark.parametrize(
    ("targets", "parts", "match"),
    [
        ("fc1", "q", r"fc1: parts='q', but its 192 rows are not known to hold q \(nothing known\)"),
        ("proj", "qv", "not known to hold q and v"),
        (["qkv", "fc1"], "qv", r"mlp\.fc1: parts='qv'"),
        ("qkv", [], "are not disjoint, non-empty row slices"),
        (None, "z", "not known to hold z"),
    ],
)
def test_parts_of_an_ordinary_layer_are_refused(vit, targets, parts, match):
    before = snapshot(vit)
    with pytest.raises(ValueError, match=match):
        cv.inject(vit, cv.LoRA(rank=2), targets, parts)
    assert_unchanged(vit, before)


def test_rows_of_any_layer_may_be_sliced(vit):
    assert cv.inject(vit, cv.LoRA(rank=2), "fc1", [slice(0, 10)]).trained == 2 * 2 * (10 + 48)
    resnet = create("test_resnet")
    assert cv.inject(resnet, cv.LoRA(rank=2), "layer1.0.conv1", [slice(0, 4)]).hosts == ("layer1.0.conv1",)
    assert resnet.layer1[0].conv1.weight.shape == resnet.layer1[0].conv1._parameters["weight"].shape


# Defaults ------------------------------------------------------------------------------------------------------------


def test_a_vision_transformer_is_adapted_at_q_and_v(vit):
    cv.inject(vit, cv.LoRA(rank=2))
    expected = {"q": (0, 48), "v": (96, 144)}
    assert injections(vit)[0].hosts == {"blocks.0.attn.qkv": expected, "blocks.1.attn.qkv": expected}


def test_other_parts_of_the_default_hosts_may_be_asked_for(vit):
    cv.inject(vit, cv.LoRA(rank=2), parts="k")
    assert injections(vit)[0].hosts["blocks.1.attn.qkv"] == {"k": (48, 96)}


def test_a_net_without_attention_is_adapted_at_every_linear():
    model = create("mixer_s32_224", img_size=64)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "head"]
    assert sorted(cv.inject(model, cv.LoRA(rank=2)).hosts) == sorted(linears)


def test_a_convolutional_net_is_adapted_at_every_conv():
    model = create("test_resnet")
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(cv.inject(model, cv.LoRA(rank=2)).hosts) == sorted(convs)


class Separate(nn.Module):
    """q, k and v apart, two spellings of them wrapped as timm wraps them; their outputs in a sum."""

    def __init__(self, names):
        super().__init__()
        self.attn = nn.Module()
        for name in names:
            owner, _, inner = name.rpartition(".")
            if owner and not hasattr(self.attn, owner):
                self.attn.add_module(owner, nn.Module())
            self.attn.get_submodule(owner).add_module(inner, nn.Linear(4, 4))
        self.mlp = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        (["q", "k", "v"], ["q", "v"]),
        (["q_proj", "k_proj", "v_proj", "out_proj"], ["q_proj", "v_proj"]),
        (["query", "key", "value"], ["query", "value"]),
        (["wq", "wk", "wv"], ["wq", "wv"]),
        (["q_lin", "k_lin", "v_lin"], ["q_lin", "v_lin"]),
        (["query.proj", "key.proj", "value.proj", "output.proj"], ["query.proj", "value.proj"]),
        (["q.c", "k.c", "v.c"], ["q.c", "v.c"]),
        (["to_q", "to_kv"], ["to_q", "to_kv"]),
    ],
)
def test_separate_projections_are_adapted_at_q_and_v(names, hosts):
    report = cv.inject(Separate(names), cv.LoRA(rank=2))
    assert sorted(report.hosts) == sorted(f"attn.{name}" for name in hosts)


# The classifier ------------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A timm model inside a user's own, which tells its classifier as timm does."""

    def __init__(self):
        super().__init__()
        self.net = tiny_vit()

    def get_classifier(self):
        return self.net.head

    def forward(self, x):
        return self.net(x)


def test_a_classifier_below_the_top_level_leaves_the_defaults_alone():
    assert cv.inject(Wrapped(), cv.LoRA(rank=2)).hosts == ("net.blocks.0.attn.qkv", "net.blocks.1.attn.qkv")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("test_vit", ["head"]),
        ("test_resnet", ["fc"]),
        ("test_convnext", ["head.fc"]),
        ("test_efficientnet", ["classifier"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("levit_128s", ["head", "head_dist"]),
        ("crossvit_tiny_240", ["head"]),
    ],
)
def test_the_classifier_is_trained_and_no_host(name, head):
    model = create(name)
    assert list(classifier(model)) == head
    report = cv.inject(model, cv.LoRA(rank=2), "all")
    inside = tuple(f"{name}." for name in head)
    assert not [host for host in report.hosts if host in head or host.startswith(inside)]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".delta." not in n}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(inside)}
    assert report.head == sum(p.numel() for n, p in model.named_parameters() if n in trained)


@pytest.mark.parametrize("targets", ["*", "linear", "*.linear", "*linear*"])
def test_no_wildcard_reaches_into_a_classifier_of_several_modules(targets):
    model = create("levit_128s")  # its heads are a norm and a Linear each
    try:
        hosts = cv.inject(model, cv.LoRA(rank=2), targets).hosts
    except ValueError:
        hosts = ()
    assert not [host for host in hosts if host.startswith("head")]


def test_the_classifier_is_a_host_where_it_is_named_itself(vit):
    report = cv.inject(vit, cv.LoRA(rank=2), ["qkv", "head"])
    assert "head" in report.hosts
    assert report.head == 0
    assert not vit.head.bias.requires_grad


def test_a_classifier_that_was_frozen_is_trained_and_frozen_again_by_remove(vit):
    vit.head.requires_grad_(False)
    before = snapshot(vit)
    cv.inject(vit, cv.LoRA(rank=2))
    assert vit.head.weight.requires_grad
    cv.remove(vit)
    assert_unchanged(vit, before)


def test_a_plain_module_is_searched_for_the_usual_names():
    assert list(classifier(Separate(["q", "k", "v"]))) == ["head"]
    assert classifier(nn.Sequential(nn.Linear(2, 2))) == {}


def test_a_model_without_classifier_trains_its_deltas_alone():
    model = tiny_vit(num_classes=0)
    report = cv.inject(model, cv.LoRA(rank=2))
    assert report.head == 0
    assert sum(p.numel() for p in cv.parameters(model)) == report.trained


def test_a_linear_probe_trains_the_head_alone(vit):
    report = cv.inject(vit, cv.LinearProbe())
    assert report.trained == 0
    assert report.head == 5 * 48 + 5
    assert cv.parameters(vit) == [vit.head.weight, vit.head.bias]


@pytest.mark.parametrize("kwargs", [{"targets": "qkv"}, {"parts": "qv"}])
def test_a_linear_probe_has_no_hosts(vit, kwargs):
    before = snapshot(vit)
    with pytest.raises(ValueError, match="LinearProbe adapts no module; leave targets and parts out"):
        cv.inject(vit, cv.LinearProbe(), **kwargs)
    assert_unchanged(vit, before)


def test_a_linear_probe_of_a_model_without_head_is_refused():
    model = tiny_vit(num_classes=0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="classifier|head"):
        cv.inject(model, cv.LinearProbe())
    assert_unchanged(model, before)


# Attentions, MLPs, blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention", "mlp", "block"),
    [
        ("test_vit", "blocks.0.attn", "blocks.0.mlp", "blocks.0"),
        ("test_convnext", None, "stages.0.blocks.0.mlp", "stages.0.blocks.0"),
        ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", "layers.0.blocks.0.mlp", "layers.0.blocks.0"),
        ("mixer_s32_224", None, "blocks.0.mlp_channels", "blocks.0"),
        ("test_resnet", None, None, "layer1.0"),
    ],
)
def test_structures_are_found_by_name_and_class(name, attention, mlp, block):
    model = create(name)
    for found, expected in ((attentions(model), attention), (mlps(model), mlp), (blocks(model), block)):
        assert found[:1] == ([expected] if expected else [])
        assert len(found) == len(set(found))


def meta(name):
    with torch.device("meta"):
        return create(name)


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("resnet18", "layer1.0", "layer4.1", 8),
        ("regnetx_002", "s1.b1", "s4.b7", 13),  # its stages are no lists
        ("hgnetv2_b0", "stages.0.blocks.0", "stages.3.blocks.0", 5),  # downsampling convs stand beside the blocks
        ("dpn48b", "features.conv2_1", "features.conv5_3", 16),  # features.conv1_1 is the stem
        ("xception41p", "blocks.0", "blocks.12", 13),
        ("vgg11", "features.3", "features.18", 7),  # convs; its ReLUs and poolings have the same kind of name
        ("efficientvit_b0", "stages.0.blocks.0", "stages.3.blocks.2", 10),
        ("fasternet_t0", "stages.0.blocks.0", "stages.3.blocks.1", 13),  # MLPs, but in a Sequential each
        ("inception_v3", "Mixed_5b", "Mixed_7c", 11),  # its group_matcher is a function
    ],
)
def test_without_an_mlp_the_blocks_are_those_the_model_declares(name, first, last, count):
    found = blocks(meta(name))
    assert (found[0], found[-1], len(found)) == (first, last, count)
    assert not any(a.startswith(f"{b}.") for a in found for b in found)


def test_an_mlp_of_positions_is_no_blocks_mlp():
    """vit_srelpos has one for all attentions, at the top level, whose result is added inside of them."""
    model = meta("vit_srelpos_small_patch16_224")
    assert mlps(model) == [f"blocks.{i}.mlp" for i in range(12)]
    assert blocks(model) == [f"blocks.{i}" for i in range(12)]


def test_without_a_declaration_the_blocks_are_the_outermost_modules_of_several_layers():
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    assert blocks(model) == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert blocks(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))) == []


# Where q, k and v lie ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def added(host, shift):
    """Adds `shift` to the fused projection's output at every token, also where the parent reads the weight itself."""
    plain = F.linear

    def linear(input, weight, bias=None):
        y = plain(input, weight, bias)
        return y + shift if weight is host.weight else y

    hook = None
    if isinstance(host, nn.Linear):
        F.linear = linear
    else:
        hook = host.register_forward_hook(lambda module, args, y: y + shift.view(-1, 1, 1))
    try:
        yield
    finally:
        F.linear = plain
        if hook is not None:
            hook.remove()


class ReachedError(Exception):
    """Carries the arguments of the call; what comes after it in the model need not run."""


def attention_alone(model, owner, size):
    """The attention as a function of nothing: called again with what the model gave it."""

    def stop(module, args, kwargs):
        raise ReachedError(args, kwargs)

    hook = owner.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(ReachedError) as reached:
        outputs(model, images(size, batch=1).double())
    hook.remove()
    args, kwargs = reached.value.args

    def run():
        with torch.no_grad():
            y = owner(*args, **kwargs)
        return y[0] if isinstance(y, tuple) else y

    return run


def reactions(model, name, size):
    """How the attention's output moves, once and bent, as a constant is added to the rows of q, k and v."""
    model = awaken(model).double()
    host, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    run, found = attention_alone(model, owner, size), {}
    for part, (start, stop) in parts_of(model, name).items():
        shift = torch.zeros(host.weight.shape[0], dtype=torch.float64)
        shift[start:stop] = seeded(lambda n=stop - start: 10 * torch.randn(n, dtype=torch.float64))
        y = [run()]
        for factor in (1, 2):
            with added(host, factor * shift):
                y.append(run())
        found[part] = (y[1] - y[0]).abs().max().item(), (y[2] - 2 * y[1] + y[0]).abs().max().item()
    return found


SMALL_SWIN = {"img_size": 56, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
Fused = namedtuple("Fused", "build name size parts", defaults=["qkv"])
SOFTMAX = {
    "vit": Fused(tiny_vit, "blocks.0.attn.qkv", 32),
    "beit": Fused(tiny_beit, "blocks.1.attn.qkv", 32),
    "eva": Fused(
        lambda: create("eva_giant_patch14_224", img_size=56, depth=2, embed_dim=48, num_heads=3),
        "blocks.0.attn.qkv",
        56,
    ),
    "swin": Fused(lambda: create("swin_tiny_patch4_window7_224", **SMALL_SWIN), "layers.0.blocks.0.attn.qkv", 56),
    "hiera": Fused(lambda: create("hiera_tiny_224", img_size=64), "blocks.0.attn.qkv", 64),
    "hiera, pooled": Fused(lambda: create("hiera_tiny_224", img_size=64), "blocks.1.attn.qkv", 64),
    "sam2": Fused(lambda: create("sam2_hiera_tiny"), "blocks.0.attn.qkv", 64),
    "sam": Fused(lambda: create("samvit_base_patch16_224", depth=1), "blocks.0.attn.qkv", 64),
    "pit": Fused(lambda: create("pit_ti_224"), "transformers.1.blocks.0.attn.qkv", 224),
    "nest": Fused(lambda: create("nest_tiny"), "levels.0.transformer_encoder.0.attn.qkv", 224),
    "visformer": Fused(lambda: create("visformer_tiny"), "stage2.0.attn.qkv", 224),
    "twins, local": Fused(lambda: create("twins_svt_small"), "blocks.0.0.attn.qkv", 64),
    "twins, global": Fused(lambda: create("twins_svt_small"), "blocks.0.1.attn.kv", 64, "kv"),
    "pvt": Fused(lambda: create("pvt_v2_b0"), "stages.0.blocks.0.attn.kv", 64, "kv"),
    "mobilevit": Fused(lambda: create("mobilevit_xxs"), "stages.2.1.transformer.0.attn.qkv", 64),
    "davit, windows": Fused(lambda: create("davit_tiny"), "stages.0.blocks.0.0.attn.qkv", 64),
    "volo": Fused(lambda: create("volo_d1_224", img_size=64), "network.2.0.attn.qkv", 64),
    "volo, class": Fused(lambda: create("volo_d1_224", img_size=64), "post_network.0.attn.kv", 64, "kv"),
    "gcvit, local": Fused(lambda: create("gcvit_xxtiny"), "stages.0.blocks.0.attn.qkv", 224),
    "convit": Fused(lambda: create("convit_tiny", img_size=64), "blocks.0.attn.qk", 64, "qk"),
    "tnt": Fused(lambda: create("tnt_s_legacy_patch16_224"), "blocks.0.attn_in.qk", 224, "qk"),
    "relpos": Fused(lambda: create("test_vit_relpos"), "blocks.0.attn.qkv", 160),
    "botnet": Fused(lambda: create("botnet26t_256"), "stages.2.1.self_attn.qkv", 256),
    "fastvit": Fused(lambda: create("fastvit_sa12"), "stages.3.blocks.0.token_mixer.qkv", 64),
}


@pytest.mark.parametrize("fused", SOFTMAX.values(), ids=SOFTMAX)
def test_a_constant_on_k_is_lost_in_the_softmax_and_one_on_q_or_v_is_not(fused):
    """q (k + c) = q k + q c: the same for every key, so the softmax drops it. v enters linearly, q does not.

    Left out: swinv2 and swinv2_cr (cosine attention), dinov3 and qwen3 (their rotation of k depends on the position),
    mvitv2 (k is pooled with zero padding), cross-covariance (xcit, edgenext, davit's channels: softmax over channels),
    coat (the product of k and v is formed first).
    """
    found = reactions(fused.build(), fused.name, fused.size)
    assert list(found) == list(fused.parts)
    assert found["k"][0] < 1e-11
    if "q" in found:
        assert found["q"][0] > 1e-4
        assert found["q"][1] > 1e-6
    if "v" in found:
        assert found["v"][0] > 1e-2
        assert found["v"][1] < 1e-9


LINEAR_IN_V = {
    "dinov3": Fused(lambda: create("vit_tiny_patch16_dinov3_qkvb", depth=1), "blocks.0.attn.qkv", 64),
    "swinv2": Fused(lambda: create("swinv2_tiny_window8_256"), "layers.0.blocks.0.attn.qkv", 256),
    "swinv2_cr": Fused(lambda: create("swinv2_cr_tiny_224"), "stages.0.blocks.0.attn.qkv", 224),
    "xcit": Fused(lambda: create("xcit_nano_12_p8_224"), "blocks.0.attn.qkv", 64),
    "edgenext": Fused(lambda: create("edgenext_xx_small"), "stages.1.blocks.1.xca.qkv", 64),
}


@pytest.mark.parametrize("fused", LINEAR_IN_V.values(), ids=LINEAR_IN_V)
def test_where_no_softmax_runs_over_keys_v_alone_enters_linearly(fused):
    found = reactions(fused.build(), fused.name, fused.size)
    assert list(found) == list("qkv")
    assert found["v"][0] > 1e-2
    assert found["v"][1] < 1e-9
    assert all(found[part][1] > 1e-6 for part in "qk")


INTERLEAVED = [
    ("tiny_vit_5m_224", "stages.1.blocks.0.attn.qkv"),
    ("levit_128s", "stages.0.blocks.0.attn.qkv.linear"),
    ("levit_128s", "stages.1.downsample.attn_downsample.kv.linear"),
    ("efficientformer_l1", "stages.3.blocks.4.token_mixer.qkv"),
    ("efficientvit_b0", "stages.2.blocks.1.context_module.main.qkv.conv"),
    ("test_coatnet", "stages.2.blocks.0.attn.qkv"),
    ("coatnet_nano_rw_224", "stages.2.blocks.0.attn.qkv"),
    ("halonet_h1", "stages.0.0.self_attn.kv"),
]
UNEVEN = [
    ("shvit_s1", "stages.1.blocks.0.mixer.m.qkv.c"),
    ("mobilevitv2_050", "stages.2.1.transformer.0.attn.qkv_proj"),
    ("lambda_resnet26t", "stages.2.1.self_attn.qkv"),
    ("gcvit_xxtiny", "stages.0.blocks.1.attn.qkv"),  # global: only k and v
]


@pytest.mark.parametrize(("model", "name"), INTERLEAVED + UNEVEN)
def test_projections_without_three_even_blocks_have_no_parts(model, name):
    model = create(model)
    assert parts_of(model, name) == {}
    with pytest.raises(ValueError, match="rows are not known to hold q and v|rows are not known to hold"):
        cv.inject(model, cv.LoRA(rank=2), name, "qv")
    assert cv.inject(model, cv.LoRA(rank=2), name).hosts == (name,)


def test_every_interleaved_projection_is_adapted_whole_by_default():
    model = create("levit_128s")
    cv.inject(model, cv.LoRA(rank=2))
    hosts = injections(model)[0].hosts
    assert len(hosts) == 11
    assert set(map(tuple, hosts.values())) == {()}


def test_ordinary_layers_have_no_parts(vit):
    assert parts_of(vit, "blocks.0.attn.proj") == parts_of(vit, "blocks.0.mlp.fc1") == {}
    assert parts_of(vit, "blocks.0.attn.qkv") == ROWS


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((cv.LoRA(), ["qkv", nn.Linear(2, 2)]), "targets are names of modules, not Linear"),
        ((cv.LoRA(), [3]), "targets are names of modules, not int: 3"),
        ((cv.LoRA(), "qkv", [(0, 10)]), r"parts=\[\(0, 10\)\] must be letters .* \[slice\(0, 144\)\]"),
        ((cv.LoRA(), "qkv", slice(0, 10)), "must be letters of 'q', 'k', 'v', or a list of slices"),
    ],
)
def test_arguments_of_another_type_are_refused(vit, arguments, match):
    before = snapshot(vit)
    with pytest.raises(TypeError, match=match):
        cv.inject(vit, *arguments)
    assert_unchanged(vit, before)
