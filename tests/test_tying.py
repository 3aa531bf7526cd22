"""Weight-tied models: the equation, what is shared, what a file holds, what fold writes, what is refused."""

import copy
import json
import pickle
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import capavision as cv
from capavision import host as hosting
from capavision.masks import digest
from capavision.tying import masks_of, tied
from tests.conftest import assert_moved, assert_unchanged, awaken, create, images, outputs, seeded, snapshot, tiny_vit

Stack = namedtuple("Stack", "build blocks depth size", defaults=[32])
STACKS = {
    "vit": Stack(lambda: tiny_vit(depth=4), "blocks", 4),
    "vit with layer scales": Stack(lambda: tiny_vit(depth=3, init_values=1e-5), "blocks", 3),
    "vit with stochastic depth": Stack(lambda: tiny_vit(depth=3, drop_path_rate=0.3), "blocks", 3),
    "mixer": Stack(
        lambda: seeded(lambda: MlpMixer(5, img_size=32, patch_size=8, num_blocks=4, embed_dim=32)).eval(), "blocks", 4
    ),
    "equal blocks of a resnet's stage": Stack(
        lambda: create("resnet26", layers=(1, 3, 1, 1), channels=(16, 24, 32, 48)), ["layer2.[12]"], 2
    ),
    "swin stage, every other window shifted": Stack(
        lambda: create(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(4, 2), num_heads=(3, 6)
        ),
        "layers.0.blocks",
        4,
        64,
    ),
    "convnext stage": Stack(
        lambda: create("convnext_atto", depths=(1, 2, 3, 1), dims=(16, 24, 32, 48)), "stages.2.blocks", 3
    ),
}
MASKS = {
    "no masks": {},
    "random": {"density": 0.5, "seed": 3},
    "sparse": {"density": 0.2},
    "complementary": {"masks": "complementary"},
}
each_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
each_masks = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)


def build(stack):
    return awaken(stack.build())


def names_of(model):
    return tied(model)[0].blocks


def reference(stack, masks):
    """A plain model with W ⊙ M_l written into every depth by a loop over the parameters' names."""
    plain, model = build(stack), build(stack)
    cv.tie(model, stack.blocks, **masks)
    names, state = names_of(model), plain.state_dict()
    first = {key: value.clone() for key, value in state.items()}
    for name in names:
        for key, _ in plain.get_submodule(name).named_parameters():
            value = first[f"{names[0]}.{key}"]
            host = model.get_submodule(f"{name}.{key}".rpartition(".")[0])
            if masks and key.endswith("weight") and isinstance(host, (nn.Linear, nn.Conv2d)):
                value = torch.where(host.mask, value, 0.0)
            state[f"{name}.{key}"] = value
    plain.load_state_dict(state)
    return plain, model


@each_stack
@each_masks
def test_every_depth_computes_with_the_first_ones_weights_behind_its_mask(stack, masks):
    plain, model = reference(stack, masks)
    x = images(stack.size).double()
    expected = outputs(plain.double(), x)
    assert_moved(expected, outputs(build(stack).double(), x))
    torch.testing.assert_close(outputs(model.double(), x), expected, rtol=1e-12, atol=1e-12)


def test_the_equation_written_out_as_a_loop():
    """z <- f(z; W ⊙ M_l), the attention, MLP and norms spelled out."""
    model = awaken(tiny_vit(depth=3)).double()
    cv.tie(model, density=0.5)
    x = images().double()
    own = dict(model.named_parameters())
    W = {key.removeprefix("blocks.0."): p.detach() for key, p in own.items() if key.startswith("blocks.0.")}
    M = [{n: m.mask for n, m in block.named_modules() if isinstance(m, nn.Linear)} for block in model.blocks]
    with torch.no_grad():
        z = model._pos_embed(model.patch_embed(x))

        def linear(h, name, depth):
            return h @ (W[f"{name}.weight"] * M[depth][name]).T + W[f"{name}.bias"]

        def norm(h, name):
            return F.layer_norm(h, (48,), W[f"{name}.weight"], W[f"{name}.bias"], 1e-6)

        for depth in range(3):
            q, k, v = linear(norm(z, "norm1"), "attn.qkv", depth).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            a = ((q * 16**-0.5) @ k.mT).softmax(-1) @ v
            z = z + linear(a.transpose(1, 2).flatten(2), "attn.proj", depth)
            z = z + linear(F.gelu(linear(norm(z, "norm2"), "mlp.fc1", depth)), "mlp.fc2", depth)
        expected = model.head(model.norm(z)[:, 0])
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-10, atol=1e-10)


@each_stack
@pytest.mark.parametrize("masks", [MASKS["no masks"], MASKS["random"]], ids=["no masks", "random"])
def test_the_gradient_is_the_sum_over_depths_of_the_masked_gradients(stack, masks):
    plain, model = reference(stack, masks)
    plain, model, x = plain.double().eval(), model.double().eval(), images(stack.size).double()
    for m in (plain, model):
        m(x).square().sum().backward()
    untied, names = dict(plain.named_parameters()), names_of(model)
    for key, p in model.get_submodule(names[0]).named_parameters():
        place = key.rpartition(".")[0]
        expected = torch.zeros_like(p)
        for name in names:
            mask = getattr(model.get_submodule(f"{name}.{place}"), "mask", None) if key.endswith("weight") else None
            grad = untied[f"{name}.{key}"].grad
            expected += grad if mask is None else grad * mask
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-9)
    assert any(p.grad.abs().max() > 1e-6 for p in model.get_submodule(names[0]).parameters())


@each_stack
def test_one_block_is_stored_and_the_keys_stay(stack):
    model, plain = build(stack), build(stack)
    report = cv.tie(model, stack.blocks, density=0.5)
    each = sum(p.numel() for p in plain.get_submodule(report.blocks[0]).parameters())
    assert report.before == sum(p.numel() for p in plain.parameters())
    assert report.after == report.before - (stack.depth - 1) * each == sum(p.numel() for p in model.parameters())
    assert len(report.blocks) == stack.depth
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())
    first = dict(model.get_submodule(report.blocks[0]).named_parameters())
    for name in report.blocks:
        assert all(p is first[key] for key, p in model.get_submodule(name).named_parameters())


def test_batch_norms_keep_running_statistics_of_their_own():
    stack = STACKS["equal blocks of a resnet's stage"]
    model = build(stack)
    cv.tie(model, stack.blocks, density=0.5)
    model.train()(images(64, 4))
    one, two = model.layer2[1].bn1, model.layer2[2].bn1
    assert one.weight is two.weight
    assert (one.running_mean - two.running_mean).abs().max() > 1e-4


@pytest.mark.parametrize(("masks", "density"), [("random", 0.3), ("complementary", 0.25), ("2:4", 0.5)])
def test_masks_are_distinct_exact_and_those_of_the_seed(masks, density):
    def drawn(seed):
        model = tiny_vit(depth=4)
        report = cv.tie(model, density=density, masks=masks, seed=seed)
        for _, _, values, kept in report.rows:
            assert abs(kept - density * values) <= 1
        return torch.stack([block.attn.qkv.mask for block in model.blocks]), masks_of(model)

    bits, everything = drawn(1)
    assert len(everything) == 4 * 4
    for i in range(4):
        assert bits[i].sum() == round(density * bits[i].numel())
        assert all(not torch.equal(bits[i], bits[j]) for j in range(i))
    if masks == "complementary":
        assert torch.equal(bits.sum(0), torch.ones(bits.shape[1:], dtype=torch.long))
    if masks == "2:4":
        assert (bits.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    assert all(torch.equal(a, b) for a, b in zip(everything, drawn(1)[1], strict=True))
    assert not torch.equal(bits, drawn(2)[0])


# Frozen: a file holds the seed and not the masks.
@pytest.mark.parametrize(
    ("kind", "density", "expected"),
    [
        ("random", 0.3, "e79f443072155c915c56a312f40909978b849b3d94a0eb9a7e95c25f9e0a301c"),
        ("complementary", None, "ccec6dcdabe5a15030acc556280ce5c48961e8d4b6168bf1c722ff3e57842048"),
        ("2:4", None, "ae3d49150d5d3d6bea98ba621856bc35ae556421dbe271a9c7e1bd7ddd9c5fa0"),
    ],
)
def test_the_masks_are_those_of_the_first_release(kind, density, expected):
    model = tiny_vit(depth=4)
    cv.tie(model, density=density, masks=kind, seed=3)
    assert digest(masks_of(model)) == expected


def test_nothing_but_linear_and_conv_weights_is_masked():
    model = awaken(tiny_vit(depth=3, init_values=0.1))
    report = cv.tie(model, density=0.5)
    assert [row[0] for row in report.rows] == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert {name for name, m in model.blocks[1].named_modules() if hosting.is_masked(m)} == {r[0] for r in report.rows}


def test_a_step_of_training_keeps_the_depths_tied_and_the_masks_fixed():
    model = awaken(tiny_vit(depth=3))
    cv.tie(model, density=0.5)
    before, masks = snapshot(model)["values"], [mask.clone() for mask in masks_of(model)]
    optimizer = torch.optim.AdamW(cv.parameters(model), lr=1e-2)
    model.train()(images()).square().sum().backward()
    optimizer.step()
    for block in model.blocks[1:]:
        assert block.attn.qkv._parameters["weight"] is model.blocks[0].attn.qkv._parameters["weight"]
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], model.state_dict()["blocks.2.attn.qkv.weight"])
    assert all(torch.equal(a, b) for a, b in zip(masks, masks_of(model), strict=True))


def trained(stack, masks):
    model = build(stack)
    cv.tie(model, stack.blocks, **masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seeded(lambda: model.train()(images(stack.size, 4))).square().mean().backward()
    optimizer.step()
    return model.eval()


@each_stack
@pytest.mark.parametrize("masks", [MASKS["no masks"], MASKS["random"]], ids=["no masks", "random"])
def test_save_and_load_on_a_fresh_model_give_the_same_outputs(stack, masks, tmp_path):
    model, fresh, x = trained(stack, masks), stack.build(), images(stack.size)
    expected = outputs(model, x)
    assert_moved(expected, outputs(fresh, x))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), expected)
    assert tied(fresh)[0].settings() == tied(model)[0].settings()
    assert sum(p.numel() for p in fresh.parameters()) == sum(p.numel() for p in model.parameters())
    with safe_open(tmp_path / "it.safetensors", "pt") as file:
        assert {name for name, _ in model.named_parameters()} <= set(file.keys())
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    stored += sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name in model.state_dict())
    assert (tmp_path / "it.safetensors").stat().st_size < stored + 64 * 1024


def test_load_builds_a_timm_model_and_fetches_no_weights(tmp_path):
    model = create("test_vit", num_classes=4)
    cv.tie(model, masks="complementary")
    cv.save(model, tmp_path / "it.safetensors", classes=list("abcd"))
    assert cv.describe(tmp_path / "it.safetensors")["base"]["weights"] == "random"
    x = images(160)
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors"), x), outputs(model, x))


def edited(path, change):
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["capavision"])
    tensors = load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, {"capavision": json.dumps(metadata)})


BROKEN = {
    "other masks": (lambda m, t: m["tyings"][0].update(seed=9), "could not be rebuilt"),
    "no such block": (lambda m, t: m["tyings"][0].update(blocks=["blocks.0", "blocks.9"]), "no module matches"),
    "a missing tensor": (lambda m, t: t.pop("blocks.0.attn.qkv.weight"), "missing"),
    "a foreign tensor": (lambda m, t: t.update(stray=torch.zeros(1)), "not in the model"),
    "a mask": (lambda m, t: t.update({"blocks.0.attn.qkv.mask": torch.zeros(144, 48)}), "not in the model"),
    "a wrong shape": (lambda m, t: t.update({"norm.bias": torch.zeros(3)}), "norm.bias"),
    "no density": (lambda m, t: m["tyings"][0].pop("density"), "damaged"),
    "an unknown mask": (lambda m, t: m["tyings"][0].update(masks="striped"), "striped"),
    "deltas too": (lambda m, t: m.update(injections=[PLAN]), "damaged"),
}
PLAN = {"method": {"name": "linear_probe"}, "seed": 0, "hosts": {}, "axes": {}, "head": ["head"], "freeze_norm": True}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(case, tmp_path):
    model, fresh = tiny_vit(depth=3), tiny_vit(depth=3, seed=1)
    cv.tie(model, density=0.5)
    cv.save(model, tmp_path / "it.safetensors")
    edited(tmp_path / "it.safetensors", case[0])
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=case[1]):
        cv.load(tmp_path / "it.safetensors", fresh)
    assert_unchanged(fresh, before)


@each_stack
@each_masks
def test_fold_gives_a_plain_model_that_computes_the_same(stack, masks):
    model, plain, x = trained(stack, masks), build(stack), images(stack.size)
    expected, before = outputs(model, x), snapshot(plain)
    assert cv.fold(model) is model
    torch.testing.assert_close(outputs(model, x), expected, rtol=0, atol=0)
    after = snapshot(model)
    assert after["classes"] == before["classes"]
    assert after["attributes"] == before["attributes"]
    assert after["values"].keys() == before["values"].keys()
    assert all(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(outputs(plain, x), expected)
    assert tied(model) == []


def test_a_tied_models_file_exports_to_onnx(tmp_path):
    from export.package import Source
    from export.package import build as build_package

    model = awaken(create("test_vit", num_classes=2))
    cv.tie(model, density=0.5)
    preprocessing = {"size": 160, "mean": [0.5] * 3, "std": [0.5] * 3, "resize": "squash, bicubic"}
    cv.save(model, tmp_path / "it.safetensors", classes=["a", "b"], info={"preprocessing": preprocessing})
    manifest = build_package(Source.open(tmp_path / "it.safetensors"), tmp_path / "package", exporter="legacy")
    (task,) = manifest["tasks"].values()
    assert max(task["parity"]["relative_error"].values()) < 1e-5


def test_a_folded_model_takes_lora():
    model = awaken(tiny_vit(depth=3))
    cv.tie(model, density=0.5)
    cv.fold(model)
    assert cv.inject(model, cv.LoRA(rank=2)).trained > 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_tied_equal_and_independent(copied):
    model, x = awaken(tiny_vit(depth=3)), images()
    cv.tie(model, density=0.5)
    other, expected = copied(model), outputs(model, x)
    assert torch.equal(outputs(other, x), expected)
    assert len(list(other.parameters())) == len(list(model.parameters()))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    assert_moved(outputs(other, x), expected)
    assert torch.equal(outputs(model, x), expected)


def test_a_tied_model_compiles():
    model, x = awaken(tiny_vit(depth=2)), images()
    cv.tie(model, density=0.5)
    expected = outputs(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


def test_two_stacks_are_tied_one_after_the_other(tmp_path):
    stack = STACKS["swin stage, every other window shifted"]
    model, fresh, x = build(stack), build(stack), images(64)
    cv.tie(model, "layers.0.blocks", density=0.5)
    cv.tie(model, ["layers.1.blocks.*"])
    assert [len(plan.blocks) for plan in tied(model)] == [4, 2]
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), outputs(model, x))
    assert torch.equal(outputs(cv.fold(fresh), x), outputs(model, x))


def shared_weight():
    model = tiny_vit(depth=3)
    model.blocks[2].mlp.fc1.weight = model.blocks[1].mlp.fc1.weight
    return model


def injected():
    model = tiny_vit(depth=3)
    cv.inject(model, cv.LoRA(rank=2))
    return model


def already_tied():
    model = tiny_vit(depth=3)
    cv.tie(model)
    return model


def normed_mlp():
    model = tiny_vit(depth=3)
    model.blocks[1].mlp.norm = nn.LayerNorm(192)
    return model


def named_mask():
    model = tiny_vit(depth=3)
    model.blocks[1].attn.proj.mask = None
    return model


Refusal = namedtuple("Refusal", "build arguments match")
REFUSED = {
    "no such stack": Refusal(tiny_vit, {"blocks": "block"}, "did you mean 'blocks'"),
    "one block": Refusal(tiny_vit, {"blocks": "blocks.1"}, "names 1 block"),
    "a block in a block": Refusal(tiny_vit, {"blocks": ["blocks.0", "blocks.1", "blocks.1.mlp"]}, "lies inside"),
    "other classes": Refusal(tiny_vit, {"blocks": ["blocks.0", "blocks.1", "norm"]}, "norm is a LayerNorm"),
    "other shapes": Refusal(lambda: create("resnet26"), {"blocks": "layer1"}, r"conv1.weight is .*256.*not .*64"),
    "other names": Refusal(normed_mlp, {}, r"blocks.1 differs from blocks.0: its mlp.norm.weight is .*, not absent"),
    "shared already": Refusal(shared_weight, {}, "are one parameter already"),
    "tied already": Refusal(already_tied, {}, "are one parameter already"),
    "injected": Refusal(injected, {}, "carries an injection"),
    "no parameters": Refusal(lambda: tiny_vit(drop_path_rate=0.1), {"blocks": ["blocks.*.mlp.drop?"]}, "no param"),
    "nothing to mask": Refusal(tiny_vit, {"blocks": "blocks.*.norm?", "density": 0.5}, "no Linear or Conv"),
    "a mask of its own": Refusal(named_mask, {"density": 0.5}, "'mask' of its own"),
    "density 0": Refusal(tiny_vit, {"density": 0.0}, r"\(0, 1\]"),
    "density above 1": Refusal(tiny_vit, {"density": 1.5}, r"\(0, 1\]"),
    "an unknown mask": Refusal(tiny_vit, {"masks": "stripes"}, "stripes"),
    "complementary at a density of its own": Refusal(tiny_vit, {"masks": "complementary", "density": 0.3}, "share the"),
    "2:4 on odd widths": Refusal(lambda: tiny_vit(embed_dim=54), {"masks": "2:4"}, r"attn.qkv \(Linear \(162, 54\)\)"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_tied_is_refused_and_left_alone(case):
    model = case.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=case.match):
        cv.tie(model, **case.arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("density", [None, 0.5])
def test_a_tied_model_is_not_injected_or_removed(density):
    model = tiny_vit(depth=3)
    cv.tie(model, density=density)
    before = snapshot(model)
    with pytest.raises(ValueError, match="is tied, and a tied model trains all of itself"):
        cv.inject(model, cv.LoRA(rank=2))
    with pytest.raises(ValueError, match="earlier weights are gone"):
        cv.remove(model)
    assert_unchanged(model, before)


def test_the_report_says_what_is_shared_and_what_is_kept():
    model = tiny_vit(depth=2)
    text = str(cv.tie(model, density=0.5))
    assert "tie(blocks.0 … blocks.1, density=0.5, masks='random', seed=0)" in text
    assert "Linear (144, 48)" in text
    assert "each depth sees 3,456" in text
    assert f"-> {sum(p.numel() for p in model.parameters()):,}" in text
