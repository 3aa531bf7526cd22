"""timm's own tools on an injected model, and the architectures whose names or habits set traps."""

from collections import namedtuple

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn

import capavision as cv
from capavision.attention import classifier
from tests.conftest import (
    assert_moved,
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

LORA = cv.LoRA(rank=4, branches=2)
Arm = namedtuple("Arm", "build method targets size", defaults=[None, 32])
ARMS = {
    "linears": Arm(tiny_vit, LORA, "linear"),
    "weight read by the parent": Arm(tiny_beit, LORA, "qkv"),
    "convs": Arm(lambda: create("test_resnet"), LORA, "conv", 64),
    "adapters": Arm(lambda: tiny_vit(global_pool="avg"), cv.Adapter(rank=4, branches=2)),
    "adapters, channels first": Arm(lambda: create("test_convnext"), cv.Adapter(rank=4, branches=2), None, 64),
    "learned masks": Arm(tiny_vit, cv.LoRA(rank=4, branches=2, masks="learned"), "qkv"),
}
each_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)


def adapted(arm, model=None):
    model = awaken(model or arm.build())
    cv.inject(model, arm.method, arm.targets, example=images(arm.size))
    return awaken_deltas(model, 3)


def shifted(model, by=0.1):
    with torch.no_grad():
        for p in cv.parameters(model):
            p.add_(by)
    return model


# Features ------------------------------------------------------------------------------------------------------------


def everything(model, x):
    """What timm's ways into a model give, by way."""
    found = {"forward_features": model.forward_features(x)}
    last, stages = model.forward_intermediates(x)
    found |= {"forward_intermediates": last} | {f"stage {i}": stage for i, stage in enumerate(stages)}
    found["forward_head"] = model.forward_head(found["forward_features"])
    if hasattr(model, "get_intermediate_layers"):
        found["get_intermediate_layers"] = model.get_intermediate_layers(x, n=1)[0]
    return found


@each_arm
def test_every_way_into_the_features_sees_the_delta(arm):
    model, x = adapted(arm), images(arm.size)
    plain, folded = cv.remove(twin(model)), cv.fold(twin(model))
    ours, bare, expected = everything(model, x), everything(plain, x), everything(folded, x)
    assert ours.keys() == expected.keys()
    assert_moved(ours["forward_features"], bare["forward_features"])
    for way in ours:
        torch.testing.assert_close(ours[way], expected[way], rtol=1e-4, atol=1e-5, msg=way)


FEATURES = {
    "getter": ("test_vit", LORA, "qkv", {}, 160),
    "list": ("test_resnet", LORA, "conv", {}, 64),
    "list, adapters": ("test_convnext", cv.Adapter(rank=4, branches=2), None, {}, 64),
    "graph": ("test_resnet", LORA, "conv", {"feature_cls": "fx"}, 64),
}


@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES)
def test_a_feature_extractor_is_injected_saved_and_folded(case, tmp_path):
    name, method, targets, kwargs, size = case

    def build():
        model = seeded(lambda: timm.create_model(name, features_only=True, **kwargs))
        return awaken(model.eval())

    model, fresh, x = build(), build(), images(size)
    plain = model(x)
    cv.inject(model, method, targets, example=x)
    expected = awaken_deltas(model, 3)(x)
    assert_moved(expected[-1], plain[-1])
    cv.save(model, tmp_path / "it.safetensors")
    loaded = cv.load(tmp_path / "it.safetensors", fresh)(x)
    folded = cv.fold(model)(x)
    for ours, theirs, ends in zip(expected, loaded, folded, strict=True):
        assert torch.equal(theirs, ours)
        torch.testing.assert_close(ends, ours, rtol=1e-4, atol=1e-4)


def test_a_feature_extractor_has_no_classifier_to_probe():
    model = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(ValueError, match="FeatureListNet has no classifier, so LinearProbe has nothing to train"):
        cv.inject(model, cv.LinearProbe())


@pytest.mark.parametrize("name", ["linears", "weight read by the parent", "convs", "adapters"])
def test_a_graph_traced_from_an_injected_model_follows_its_values(name):
    """torch.fx writes constants into its graph where it cannot follow; a delta among them would be stale for good."""
    from timm.models._features_fx import create_feature_extractor

    arm = ARMS[name]
    model, x = adapted(arm), images(arm.size)
    before, head = outputs(model, x), next(iter(classifier(model)))
    traced = create_feature_extractor(model, {head: "logits"})
    torch.testing.assert_close(traced(x)["logits"], before, rtol=1e-4, atol=1e-5)
    shifted(model)
    assert_moved(outputs(model, x), before)
    torch.testing.assert_close(traced(x)["logits"], outputs(model, x), rtol=1e-4, atol=1e-5)
    traced(x)["logits"].square().sum().backward()
    assert all(p.grad is not None for p in cv.parameters(model))


class Derived(nn.Linear):
    """A Linear that torch.fx looks into, unlike torch's own."""


def test_a_tracer_that_looks_into_a_host_counts_the_delta_once():
    model, x = seeded(lambda: nn.Sequential(Derived(8, 8), nn.Tanh())), torch.randn(3, 8)
    cv.inject(model, LORA, "0")
    plain = outputs(model, x)
    traced = torch.fx.symbolic_trace(awaken_deltas(model))
    assert_moved(outputs(model, x), plain)
    torch.testing.assert_close(traced(x), model(x))
    shifted(model)
    torch.testing.assert_close(traced(x), model(x))


# Parameter groups ----------------------------------------------------------------------------------------------------


@each_arm
def test_a_delta_is_in_the_layer_group_of_its_host(arm):
    model = arm.build()
    before = group_parameters(model, model.group_matcher())
    layer = {name: index for index, names in before.items() for name in names}
    adapted(arm, model)
    after = group_parameters(model, model.group_matcher())
    found = {name: index for index, names in after.items() for name in names}
    assert {name: index for name, index in found.items() if ".delta." not in name} == layer
    for host, delta in ((name.removesuffix(".delta"), delta) for name, delta in deltas(model).items()):
        expected = {index for name, index in layer.items() if name.startswith(f"{host}.")}
        assert {found[f"{host}.delta.{name}"] for name, _ in delta.named_parameters()} == expected
        assert len(expected) == 1


@each_arm
def test_layer_decay_scales_a_delta_like_its_layer_and_holds_what_is_trained(arm):
    model = arm.build()
    scale = {}
    for group in param_groups_layer_decay(model, 0.05, layer_decay=0.5):
        scale |= {id(p): group["lr_scale"] for p in group["params"]}
    by_host = {name.rpartition(".")[0]: scale[id(p)] for name, p in model.named_parameters()}
    by_block = {block: by_host[host] for block in by_host for host in by_host if host.startswith(block)}
    adapted(arm, model)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in cv.parameters(model)}
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, delta in deltas(model).items():
        host = name.removesuffix(".delta")
        inside = [by_block[block] for block in by_block if block == host or block.startswith(f"{host}.")]
        for p in delta.parameters():
            assert scales[id(p)] == inside[0]
            assert (decays[id(p)] == 0) == (p.ndim < 2)
    assert len({scales[id(p)] for delta in deltas(model).values() for p in delta.parameters()}) > 1


@each_arm
def test_timms_optimizer_trains_all_deltas_and_nothing_frozen(arm):
    model, x = adapted(arm), images(arm.size)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(x).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_names_without_weight_decay_are_those_of_the_base(vit):
    before = vit.no_weight_decay()
    cv.inject(vit, LORA, "linear")
    assert vit.no_weight_decay() == before


# Averages ------------------------------------------------------------------------------------------------------------


@each_arm
def test_an_ema_follows_the_deltas_and_is_saved(arm, tmp_path):
    model, x = adapted(arm), images(arm.size)
    base = cv.remove(twin(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = ModelEmaV3(model, decay=0.75)
    shifted(model).train()
    ema.update(model)
    for name, p in ema.module.named_parameters():
        ours = dict(model.named_parameters())[name]
        expected = 0.75 * before[name] + 0.25 * ours if ours.requires_grad else before[name]
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(p, before[name]) != ours.requires_grad
    assert_moved(outputs(ema.module, x), outputs(model, x))
    cv.save(ema.module, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", twin(base)), x), outputs(ema.module, x))
    with pytest.raises(ValueError, match=r"module inside of ModelEmaV3 carries the injection; pass model\.module"):
        cv.save(ema, tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


# Heads and other modules that are replaced after inject --------------------------------------------------------------


@each_arm
def test_a_head_that_was_reset_is_trained_and_saved(arm, tmp_path):
    fresh = awaken(arm.build())
    model, x = adapted(arm), images(arm.size)
    seeded(lambda: model.reset_classifier(7))
    head = list(model.get_classifier().parameters())
    assert {id(p) for p in head} <= {id(p) for p in cv.parameters(model)}
    awaken(shifted(model))
    cv.save(model, tmp_path / "it.safetensors")
    assert cv.describe(tmp_path / "it.safetensors")["num_classes"] == 7
    with pytest.raises(ValueError, match="was trained with 7 classes and the model has 5"):
        cv.load(tmp_path / "it.safetensors", fresh)
    seeded(lambda: fresh.reset_classifier(7), 8)
    assert_moved(outputs(fresh, x), outputs(model, x))
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), outputs(model, x))
    assert all(p.requires_grad for p in fresh.get_classifier().parameters())


@pytest.mark.parametrize("end", [cv.fold, cv.remove])
def test_a_head_that_came_after_inject_is_trained_in_whoever_loads_the_file(end, tmp_path):
    model, x = awaken(tiny_vit(num_classes=0)), images()
    fresh = twin(model)
    cv.inject(model, LORA)
    for each in (model, fresh):
        seeded(lambda each=each: each.reset_classifier(7))
    awaken(shifted(model))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), outputs(model, x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained > {"head.weight", "head.bias"}
    for each in (model, fresh):
        assert all(p.requires_grad for p in end(each).get_classifier().parameters())


def test_a_head_may_be_taken_off_after_training(tmp_path):
    model, x = adapted(ARMS["linears"]), images()
    fresh = cv.remove(twin(model))
    for each in (model, fresh):
        each.reset_classifier(0)
    cv.save(model, tmp_path / "it.safetensors")
    assert_moved(outputs(fresh, x), outputs(model, x))
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), outputs(model, x))


def with_a_host_in_the_head():
    model = tiny_vit()
    cv.inject(model, LORA, ["qkv", "head"])
    model.reset_classifier(7)
    return model


def with_a_block_less():
    model = tiny_vit()
    cv.inject(model, LORA, "qkv")
    model.prune_intermediate_layers([0])
    return model


def with_fused_branches():
    model = create("repghostnet_050")
    cv.inject(model, LORA, "conv")
    return reparameterize_model(model)


def with_norms_of_another_kind(convert):
    model = create("test_resnet")
    cv.inject(model, LORA, "conv")
    return convert(model)


REPLACED = {
    "reset_classifier": (with_a_host_in_the_head, "head has lost its delta: the module was replaced"),
    "prune_intermediate_layers": (with_a_block_less, r"blocks\.1\.attn\.qkv has lost its delta"),
    "reparameterize_model": (with_fused_branches, "has lost its delta: the module was replaced"),
    "timm's convert_sync_batchnorm": (
        lambda: with_norms_of_another_kind(convert_sync_batchnorm),
        r"\(SyncBatchNorm.*\) came after inject and keeps statistics",
    ),
    "torch's convert_sync_batchnorm": (
        lambda: with_norms_of_another_kind(nn.SyncBatchNorm.convert_sync_batchnorm),
        r"\(SyncBatchNorm\) came after inject and keeps statistics.*do first what brought it",
    ),
}


@pytest.mark.parametrize("case", REPLACED.values(), ids=REPLACED)
def test_a_file_that_would_not_load_is_not_written(case, tmp_path):
    build, match = case
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        cv.save(model, tmp_path / "it.safetensors")
    assert not list(tmp_path.iterdir())
    assert snapshot(model)["classes"] == before["classes"]


def test_a_model_whose_branches_are_fused_computes_the_same():
    model, x = awaken(create("repghostnet_050")), images(64)
    plain = outputs(model, x)
    cv.inject(model, LORA, "conv")
    expected = outputs(awaken_deltas(model, 3), x)
    assert_moved(expected, plain)
    torch.testing.assert_close(outputs(reparameterize_model(model), x), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs(reparameterize_model(cv.fold(model)), x), expected, rtol=1e-3, atol=1e-4)


# Architectures with traps of their own -------------------------------------------------------------------------------

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
READERS = {
    "beit": tiny_beit,
    "eva": lambda: create("vit_tiny_patch16_dinov3_qkvb", depth=2, img_size=64, embed_dim=48, num_heads=3),
    "swin_v2": lambda: create("swinv2_tiny_window8_256", **SWIN),
}


@pytest.mark.parametrize("name", READERS)
def test_a_qkv_whose_forward_never_runs_is_adapted_all_the_same(name, tmp_path):
    model, size = awaken(READERS[name]()), 32 if name == "beit" else 64
    fresh, x = twin(model), images(size)
    report = cv.inject(model, LORA, "qkv")
    assert len(report.hosts) == 2
    hosts = [model.get_submodule(host) for host in report.hosts]
    ran = []
    hooks = [host.register_forward_hook(lambda *_: ran.append(1)) for host in hosts]
    awaken_deltas(model, 3)
    model(x).square().sum().backward()
    assert not ran, "a forward that runs is no trap"
    for hook in hooks:
        hook.remove()
    assert all(p.grad.abs().max() > 0 for host in hosts for p in host.delta.parameters())
    shifted(model)
    expected = outputs(model, x)
    assert_moved(expected, outputs(fresh, x))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), expected)
    torch.testing.assert_close(outputs(cv.fold(model), x), expected, rtol=1e-4, atol=1e-5)


def test_a_child_called_base_layer_is_a_module_like_any_other(tmp_path):
    """PEFT marks its own wrappers with that name, and cannot merge dla."""
    model, x = awaken(create("dla46x_c")), images(64)
    fresh = twin(model)
    names = [name for name, _ in model.named_modules() if "base_layer" in name]
    assert names
    report = cv.inject(model, LORA, "conv")
    assert any("base_layer" in host for host in report.hosts)
    expected = outputs(awaken_deltas(model, 3), x)
    assert_moved(expected, outputs(fresh, x))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", twin(fresh)), x), expected)
    assert cv.fold(model).state_dict().keys() == fresh.state_dict().keys()
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-3, atol=1e-4)


def test_a_head_whose_name_ends_another_modules_name_is_not_mistaken_for_it(tmp_path):
    """lowformer: the trained head is `classifier`; `pre_classifier` is backbone, and no file's business."""
    model, x = create("lowformer_b0"), images(64)
    fresh = twin(model)
    modules = [name for name, _ in model.named_modules()]
    head = next(iter(classifier(model)))
    others = [name for name in modules if name != head and name.endswith("classifier")]
    assert others
    cv.inject(model, LORA, "conv")
    awaken_deltas(model, 3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(f"{head}.")}
    with torch.no_grad():
        model.get_submodule(head).weight.add_(0.1)
    assert_moved(outputs(model, x), outputs(fresh, x))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), outputs(model, x))
