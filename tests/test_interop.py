"""To PEFT and back: outputs equal in the installed peft, both ways; what peft would compute otherwise is refused."""

import json
import math
from collections import namedtuple

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import ScaledStdConv2d, StdConv2dSame
from torch import nn

import capavision as cv
from capavision.rehearsal import refuse_inexact
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

peft = pytest.importorskip("peft")
CAPA = cv.LoRA(rank=3, alpha=5.0, branches=2, masks="complementary")
STRONG = cv.LoRA(rank=2, alpha=400.0)
QKV = "blocks.0.attn.qkv"


class Plain(nn.Module):
    """A body and a classifier, with nothing that timm's models tell."""

    def __init__(self, *body):
        super().__init__()
        self.body, self.head = nn.Sequential(*body), nn.LazyLinear(5)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def plain(x, *body):
    model = seeded(lambda: Plain(*body))
    seeded(lambda: model(x))  # makes the lazy classifier
    return model.eval()


def deit():
    return create("deit_tiny_distilled_patch16_224", depth=2, img_size=32, patch_size=8, embed_dim=48, num_heads=3)


def injected(model, *injections, **kwargs):
    for i, arguments in enumerate(injections):
        cv.inject(model, *arguments, seed=i, **kwargs)
    awaken_deltas(model, 7)
    with torch.no_grad():
        for p in cv.parameters(model):
            p.add_(0.01)  # a classifier that was trained too
    return model


def in_peft(base, path):
    return peft.PeftModel.from_pretrained(twin(base), path)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Ours, in PEFT and back ----------------------------------------------------------------------------------------------

Case = namedtuple("Case", "build size injections merges", defaults=[True])
CASES = {
    "q and v, complementary branches": Case(tiny_vit, 32, [(CAPA, "qkv", "qv")]),
    "v alone, random masks": Case(tiny_vit, 32, [(cv.LoRA(rank=2, branches=3), "qkv", "v")]),
    "every linear": Case(tiny_vit, 32, [(CAPA, "linear")]),
    "three ranks and alphas": Case(
        tiny_vit, 32, [(CAPA, "qkv", "qv"), (cv.LoRA(rank=2, alpha=-7.0), "fc1"), (cv.LoRA(rank=5, alpha=0.3), "proj")]
    ),
    "every linear of a mixer": Case(lambda: create("mixer_s32_224", img_size=64), 64, [(CAPA, "linear")]),
    "convs": Case(lambda: create("test_resnet"), 64, [(CAPA, "conv")]),
    "two classifiers": Case(deit, 32, [(CAPA, None)]),
    "the classifier itself": Case(tiny_vit, 32, [(CAPA, ["qkv", "head"])]),
    "a classifier inside another of its name": Case(
        lambda: create("iformer_t"), 64, [(STRONG, ["stages.3.downsample.c", "stages.3.*.q.c"])]
    ),
    "a module whose name ends like the classifier's": Case(
        lambda: create("lowformer_b0", width_list=[8, 16, 32, 64, 128]), 64, [(STRONG, "stages.*.mlp.main.1")]
    ),
    "a name that is the end of others": Case(lambda: create("skresnet18", layers=(1, 1, 1, 1)), 64, [(CAPA, "conv1")]),
    "a child named like PEFT's own": Case(
        lambda: create("dla46x_c"), 64, [(CAPA, ["level2.tree1.conv1", "level2.tree1.conv3"])], merges=False
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ours_gives_the_same_outputs_in_peft_and_back(case, tmp_path):
    base = awaken(case.build()).double()
    x = images(case.size).double()
    model = injected(twin(base), *case.injections)
    expected = outputs(model, x)
    assert_moved(expected, outputs(base, x))
    before = snapshot(model)
    cv.to_peft(model, tmp_path / "peft")
    assert_unchanged(model, before)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["adapter_config.json", "adapter_model.safetensors", "peft"]
    theirs = in_peft(base, tmp_path / "peft")
    close(outputs(theirs, x), expected)
    if case.merges:
        close(outputs(theirs.merge_and_unload(safe_merge=True), x), expected)
    back = twin(base)
    assert cv.from_peft(tmp_path / "peft", back) is back
    close(outputs(back, x), expected)


def test_each_delta_of_its_own_is_what_peft_merges(tmp_path):
    """Layer by layer, since a deep net may hide one wrong layer."""
    base = tiny_vit().double()
    model = injected(twin(base), (CAPA, ["qkv", "proj", "fc2"]))
    cv.to_peft(model, tmp_path / "peft")
    layers = {n: m for n, m in in_peft(base, tmp_path / "peft").named_modules() if hasattr(m, "get_delta_weight")}
    assert {name.removeprefix("base_model.model.") + ".delta" for name in layers} == deltas(model).keys()
    for name, layer in layers.items():
        ours = model.get_submodule(name.removeprefix("base_model.model.")).delta.weight()
        assert_moved(ours, torch.zeros_like(ours))
        close(layer.get_delta_weight("default").flatten(1), ours)


def test_parts_keep_their_rows_and_the_rank_adds_up(tmp_path):
    model = injected(tiny_vit(), (CAPA, "qkv", "qv"))
    cv.to_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    B = load_file(tmp_path / "peft" / "adapter_model.safetensors")[f"base_model.model.{QKV}.lora_B.weight"]
    assert config["r"] == B.shape[1] == 2 * 2 * 3  # q and v, two branches, rank 3
    assert config["lora_alpha"] == 20
    assert config["lora_alpha"] / config["r"] == 5 / 3
    assert not B[:48, 6:].any()
    assert not B[48:96].any()  # k
    assert not B[96:, :6].any()
    assert B[:48, :6].any()
    assert B[96:, 6:].any()


def test_convs_of_one_and_three_dimensions(tmp_path):
    cases = [
        (torch.randn(2, 4, 9), [nn.Conv1d(4, 6, 3, stride=2, padding=1)]),
        (torch.randn(2, 4, 5, 5, 5), [nn.Conv3d(4, 6, (3, 1, 2), padding=(1, 0, 1)), nn.ReLU(), nn.Conv3d(6, 4, 1)]),
    ]
    for i, (example, body) in enumerate(cases):
        base, x = plain(example, *body).double(), example.double()
        model = injected(twin(base), (CAPA, "conv"))
        cv.to_peft(model, tmp_path / str(i), example=x)
        assert_moved(outputs(model, x), outputs(base, x))
        close(outputs(in_peft(base, tmp_path / str(i)), x), outputs(model, x))
        close(outputs(cv.from_peft(tmp_path / str(i), twin(base), example=x), x), outputs(model, x))


def test_a_method_of_ones_own_goes_by_its_factors(monkeypatch, tmp_path):
    monkeypatch.setattr(cv.Method, "known", dict(cv.Method.known))

    class Thin(cv.WeightDelta):
        def __init__(self, site):
            super().__init__()
            self.u, self.v = nn.Parameter(site.zeros(site.n_out, 1)), nn.Parameter(site.uniform("v", 1, site.n_in))

        def weight(self):
            return 3 * self.u @ self.v

        def factors(self):
            return cv.Factors(self.u, self.v, 3.0)

    class RankOne(cv.Method):
        name, placement = "rank_one", cv.WeightDelta

        def build(self, site):
            return Thin(site)

    base, x = tiny_vit().double(), images().double()
    model = injected(twin(base), (RankOne(), "qkv", "kv"), (CAPA, "proj"))
    cv.to_peft(model, tmp_path / "peft")
    assert_moved(outputs(model, x), outputs(base, x))
    close(outputs(in_peft(base, tmp_path / "peft"), x), outputs(model, x))


# PEFT's, here and back -----------------------------------------------------------------------------------------------

TRAINED = {
    "linears by name": (tiny_vit, 32, {"target_modules": ["qkv", "fc1"]}),
    "all-linear, the classifier too": (tiny_vit, 32, {"target_modules": "all-linear", "modules_to_save": None}),
    "patterns": (
        tiny_vit,
        32,
        {
            "target_modules": r".*\.(qkv|proj|fc2)",
            "rank_pattern": {"proj": 2, r"^blocks\.1\.mlp\.fc2": 5},
            "alpha_pattern": {"qkv": 3, "fc2": 11, r"blocks\.1\.mlp\.fc2": 12},
        },
    ),
    "rank-stabilised": (tiny_vit, 32, {"target_modules": ["qkv"], "use_rslora": True, "rank_pattern": {"1.*qkv": 7}}),
    "convs": (lambda: create("test_resnet"), 64, {"target_modules": r"layer.*\.conv\d", "modules_to_save": ["fc"]}),
    "two classifiers": (deit, 32, {"target_modules": ["proj"], "modules_to_save": ["head", "head_dist"]}),
}


def trained_in_peft(base, path=None, **config):
    """A PEFT model with random B and another classifier, saved where a path is given."""
    settings = {"r": 4, "lora_alpha": 6, "modules_to_save": ["head"], "init_lora_weights": False, **config}
    model = peft.get_peft_model(twin(base), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05)
    if path:
        model.save_pretrained(path)
    return model


@pytest.mark.parametrize(("build", "size", "config"), TRAINED.values(), ids=TRAINED)
def test_theirs_gives_the_same_outputs_here_and_back(build, size, config, tmp_path):
    base = awaken(build()).double()
    x = images(size).double()
    trained_in_peft(base, tmp_path / "theirs", **config)
    expected = outputs(in_peft(base, tmp_path / "theirs"), x)  # saving sorts the patterns, and the first match counts
    assert_moved(expected, outputs(base, x))
    model = twin(base)
    modes = snapshot(model)["training"]
    cv.from_peft(tmp_path / "theirs", model)
    assert {name: m.training for name, m in model.named_modules() if name in modes} == modes
    close(outputs(model, x), expected)
    cv.to_peft(model, tmp_path / "ours")
    close(outputs(in_peft(base, tmp_path / "ours"), x), expected)
    if config.get("modules_to_save", True) and "use_rslora" not in config:  # else the classifier is written folded
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_came_from_peft_is_trained_saved_loaded_and_folded(tmp_path):
    base, x = awaken(tiny_vit()), images()
    trained_in_peft(base, tmp_path / "theirs", target_modules=["qkv", "fc1"], rank_pattern={"fc1": 3})
    model = cv.from_peft(tmp_path / "theirs", twin(base))
    model.train()(x).square().sum().backward()
    trained = cv.parameters(model)
    assert {id(p) for p in trained} == {id(p) for d in deltas(model).values() for p in d.parameters()} | {
        id(p) for p in model.head.parameters()
    }
    assert all(p.grad is not None and p.grad.any() for p in trained)
    expected = outputs(model, x)
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", twin(base)), x), expected)
    torch.testing.assert_close(outputs(cv.fold(model), x), expected, rtol=1e-4, atol=1e-5)


def rewritten(path, tensors=lambda t: t, **config):
    """The adapter folder with its keys or its configuration changed by hand."""
    weights, settings = path / "adapter_model.safetensors", path / "adapter_config.json"
    save_file(tensors(load_file(weights)), weights)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return path


def with_adapter_names(tensors):
    names = {"lora_A": "lora_A.mine", "lora_B": "lora_B.mine", "head.": "head.modules_to_save.mine."}
    return {renamed(key, names): tensor for key, tensor in tensors.items()}


def renamed(key, names):
    for old, new in names.items():
        key = key.replace(old, new)
    return key


@pytest.mark.parametrize(
    "change",
    [
        with_adapter_names,
        lambda tensors: {key.removeprefix("base_model.model."): t for key, t in tensors.items()},
        lambda tensors: {key.replace("model.model.", "model.model.timm_model."): t for key, t in tensors.items()},
    ],
    ids=["adapter name in the keys", "no prefix", "a timm model inside transformers' wrapper"],
)
def test_other_spellings_of_the_keys(change, tmp_path):
    base, x = awaken(tiny_vit()).double(), images().double()
    expected = outputs(trained_in_peft(base, tmp_path / "it", target_modules=["qkv"]), x)
    close(outputs(cv.from_peft(rewritten(tmp_path / "it", change), twin(base)), x), expected)


# Refusals ------------------------------------------------------------------------------------------------------------


def with_trained_norm(model):
    model.norm.weight.requires_grad_(True)
    return model


def shared():
    layer = nn.Linear(8, 8)
    return plain(torch.zeros(1, 8), layer, nn.ReLU(), layer)


REFUSED = {
    "nothing injected": (tiny_vit, "carries no injection"),
    "block adapters": (lambda: injected(tiny_vit(), (cv.Adapter(rank=2),)), "blocks.0 carries a Bottleneck, which is"),
    "the classifier alone": (lambda: injected(tiny_vit(), (cv.LinearProbe(),)), "no layer outside the classifier"),
    "the classifier's delta alone": (lambda: injected(tiny_vit(), (CAPA, "head")), "no layer outside the classifier"),
    "another parameter": (lambda: with_trained_norm(injected(tiny_vit(), (CAPA,))), "norm.weight was trained too"),
    "batch norms that train": (
        lambda: injected(create("test_resnet"), (CAPA, "layer1.*.conv1"), freeze_norm=False),
        "running_mean was trained too",
    ),
    "a weight read by the parent": (lambda: injected(tiny_beit(), (CAPA,)), "attn.qkv .* is never called"),
    "swin v2": (lambda: injected(create("swinv2_tiny_window8_256", depths=(1, 1, 1, 1)), (CAPA,)), "is never called"),
    "grouped convs": (
        lambda: injected(create("test_efficientnet"), (CAPA, "conv")),
        r"conv_dw is a grouped convolution \(groups=128\)",
    ),
    "standardised convs": (
        lambda: injected(create("test_nfnet"), (CAPA, "stages.*.conv1")),
        "on this ScaledStdConv2d would not compute .* % of the effect",
    ),
    "dilated convs": (lambda: injected(create("skresnet18"), (CAPA, "conv")), "this Conv2d would not compute"),
    "a host in a namesake of the classifier": (
        lambda: injected(create("lowformer_b0"), (CAPA, "pre_classifier.*")),
        "pre_classifier.0 lies in pre_classifier, whose name ends like the classifier's",
    ),
    "a module in two places": (lambda: injected(shared(), (CAPA, "body.0")), "body.0 stands in 2 places"),
    "an unknown input size": (
        lambda: injected(plain(torch.zeros(1, 8), nn.Linear(8, 8)), (CAPA, "body.0")),
        "does not tell its input size; pass example=",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_hold_is_refused_and_nothing_is_written(build, message, tmp_path):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        cv.to_peft(model, tmp_path / "deep" / "peft")
    assert_unchanged(model, before)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="exists; name another folder"):
        cv.to_peft(injected(tiny_vit(), (CAPA,)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("capavision.peft_format.json.dumps", full)
    with pytest.raises(OSError, match="no space left"):
        cv.to_peft(injected(tiny_vit(), (CAPA,)), tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []


UNFIT = {
    "another method": (tiny_vit, {"peft_type": "LOHA"}, None, "type 'LOHA'; only 'LORA'"),
    "DoRA": (tiny_vit, {"use_dora": True}, None, r"no plain LoRA \(use_dora=True\)"),
    "biases": (tiny_vit, {"bias": "lora_only"}, None, "bias='lora_only'"),
    "PiSSA": (tiny_vit, {"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa'"),
    "a setting of tomorrow": (tiny_vit, {"twisted": 2}, None, "twisted=2"),
    "a rank that is not the file's": (tiny_vit, {"r": 9}, None, "has rank 4, the configuration says 9"),
    "no alpha": (tiny_vit, {"lora_alpha": None}, None, "its rank or alpha is damaged"),
    "an alpha of zero": (tiny_vit, {"lora_alpha": 0}, None, "finite int or float other than 0"),
    "another architecture": (
        lambda: create("test_resnet"),
        {},
        lambda t: {k: v for k, v in t.items() if "head" not in k},
        "adapts 'blocks.0.attn.qkv', which ResNet lacks",
    ),
    "another width": (lambda: tiny_vit(embed_dim=96), {}, None, "the model's is"),
    "other classes": (
        lambda: tiny_vit(num_classes=7),
        {},
        None,
        r"model's is \(7,.*; create it with num_classes=5",
    ),
    "injected already": (lambda: injected(tiny_vit(), (CAPA,)), {}, None, "carries deltas already"),
    "a host that is a whole block": (
        tiny_vit,
        {},
        lambda t: {k.replace(".attn.qkv", ""): v for k, v in t.items()},
        "adapts 'blocks.0', which VisionTransformer has as a Block",
    ),
    "half of a pair": (
        tiny_vit,
        {},
        lambda t: {k: v for k, v in t.items() if "1.attn.qkv.lora_A" not in k},
        "blocks.1.attn.qkv lacks lora_A or lora_B",
    ),
    "factors turned round": (
        tiny_vit,
        {},
        lambda t: {k: v.T.contiguous() if "lora_B" in k else v for k, v in t.items()},
        r"asks for \(4, 48\) and \(144, 4\)",
    ),
    "no factors": (tiny_vit, {}, lambda t: {k: v for k, v in t.items() if "lora" not in k}, "holds no lora_A"),
    "DoRA's magnitudes": (
        tiny_vit,
        {},
        lambda t: t | {f"base_model.model.{QKV}.lora_magnitude_vector": torch.ones(3)},
        "lora_magnitude_vector, which VisionTransformer lacks",
    ),
    "another module trained": (
        tiny_vit,
        {},
        lambda t: t | {"base_model.model.norm.weight": torch.full((48,), 2.0)},
        "trained norm.weight too",
    ),
    "two adapters": (
        tiny_vit,
        {},
        lambda t: t | {k.replace("lora_A", "lora_A.other"): v.clone() for k, v in t.items()},
        "several adapters for blocks.0.attn.qkv",
    ),
}


@pytest.mark.parametrize(("build", "config", "tensors", "message"), UNFIT.values(), ids=UNFIT)
def test_a_checkpoint_that_does_not_fit_changes_nothing(build, config, tensors, message, tmp_path):
    trained_in_peft(tiny_vit(), tmp_path / "it", target_modules=["qkv"])
    rewritten(tmp_path / "it", tensors or (lambda t: t), **config)
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        cv.from_peft(tmp_path / "it", model)
    assert_unchanged(model, before)


def test_a_projection_that_was_dead_in_peft_is_not_brought_to_life(tmp_path):
    base, x = awaken(tiny_beit()), images()
    theirs = trained_in_peft(base, tmp_path / "it", target_modules=["qkv"], modules_to_save=None)
    assert torch.equal(outputs(theirs, x), outputs(base, x))
    with pytest.raises(ValueError, match="is never called"):
        cv.from_peft(tmp_path / "it", base)


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=r"adapter_model.bin, which may hold code and is not loaded"):
        cv.from_peft(tmp_path, tiny_vit())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_damaged_files_are_named(name, tmp_path):
    trained_in_peft(tiny_vit(), tmp_path / "it", target_modules=["qkv"])
    (tmp_path / "it" / name).write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="is damaged"):
        cv.from_peft(tmp_path / "it", tiny_vit())
    (tmp_path / "it" / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        cv.from_peft(tmp_path / "it", tiny_vit())


# The rehearsal -------------------------------------------------------------------------------------------------------


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.inner.weight.T


class Curious(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.inner(x) * self.inner.kernel_size[0]


FLAT, SQUARE = (2, 8), (2, 8, 9, 9)
LAYERS = {
    "linear": (FLAT, lambda: nn.Linear(8, 6), "0"),
    "conv": (SQUARE, lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), "0"),
    "padding same": (SQUARE, lambda: nn.Conv2d(8, 6, 3, padding="same"), "0"),
    "dilated": (SQUARE, lambda: nn.Conv2d(8, 6, 3, padding=1, dilation=2), "0"),
    "dilated 1 × 1": (SQUARE, lambda: nn.Conv2d(8, 6, 1, dilation=2), "0"),
    "reflecting": (SQUARE, lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), "0"),
    "reflecting, unpadded": (SQUARE, lambda: nn.Conv2d(8, 6, 3, padding_mode="reflect"), "0"),
    "timm's same": (SQUARE, lambda: timm.layers.create_conv2d(8, 6, 3, stride=2, padding="same"), "0"),
    "standardised": (SQUARE, lambda: ScaledStdConv2d(8, 6, 3, padding=1), "0"),
    "standardised, same": (SQUARE, lambda: StdConv2dSame(8, 6, 3, stride=2), "0"),
    "bypassed": (FLAT, Bypassed, "0.inner"),
    "asked for its kernel": (SQUARE, Curious, "0.inner"),
}


def peft_is_exact(base, x, target):
    """The reference: peft's own layer against the dense sum that it says it adds, in float64."""
    try:
        model = trained_in_peft(base, target_modules=target, modules_to_save=None)
        found = outputs(model, x)
        A, B = (dict(model.named_parameters())[f"base_model.model.{target}.lora_{n}.default.weight"] for n in "AB")
    except (RuntimeError, AttributeError, ValueError):
        return False
    dense = twin(base)
    with torch.no_grad():
        weight = dense.get_submodule(target).weight
        weight += 6 / 4 * (B.flatten(1) @ A.flatten(1)).view_as(weight)
    return torch.allclose(found, outputs(dense, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shape", "build", "inner"), LAYERS.values(), ids=LAYERS)
def test_the_rehearsal_judges_as_peft_behaves(shape, build, inner):
    x = seeded(lambda: torch.randn(shape))
    base = plain(x, seeded(build)).double()
    target = f"body.{inner}"
    exact = peft_is_exact(base, x.double(), target)
    before = snapshot(base)
    if exact:
        refuse_inexact(base, [target], x)
    else:
        with pytest.raises(
            ValueError, match=f"{target}.*(in the place|never called|would not compute)|place of {target} has no"
        ):
            refuse_inexact(base, [target], x)
    assert_unchanged(base, before)


def test_the_layers_above_are_of_both_kinds():
    judged = {}
    for name, (shape, build, inner) in LAYERS.items():
        x = seeded(lambda shape=shape: torch.randn(shape))
        judged[name] = peft_is_exact(plain(x, seeded(build)).double(), x.double(), f"body.{inner}")
    assert [name for name, exact in judged.items() if exact] == [
        "linear",
        "conv",
        "padding same",
        "dilated 1 × 1",
        "reflecting, unpadded",
        "timm's same",
    ]


def test_half_precision_is_rehearsed_in_float32_and_written_as_it_is(tmp_path):
    model = injected(tiny_vit().bfloat16(), (CAPA, "qkv", "qv"))
    cv.to_peft(model, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{QKV}.lora_A.weight"].dtype == torch.float32
    assert tensors["base_model.model.head.weight"].dtype == torch.bfloat16


def test_the_rehearsal_draws_nothing_from_the_global_generator(tmp_path):
    model = injected(create("test_resnet"), (CAPA, "conv"))
    state = torch.get_rng_state()
    cv.to_peft(model, tmp_path / "peft")
    assert torch.equal(torch.get_rng_state(), state)
    assert math.isfinite(outputs(model, images(64)).sum())
