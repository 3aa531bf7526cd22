"""One small model of each of timm's 98 families: every Linear and Conv but the head takes a delta, trains it and folds.

Random weights; silent parameters are awakened and batch norms calibrated first, so that zero heads, layer scales of
1e-5 and vanishing signals hide nothing. In float64, where a fold is exact but for rounding.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import capavision as cv
from capavision.attention import mlps
from tests.conftest import awaken, awaken_deltas, create, images, outputs, seeded, twin

FAMILIES = json.loads((Path(__file__).parent / "timm_families.json").read_text())
# The side of the input in pixels, 64 where none is given.
SIZES = {
    **dict.fromkeys(("inception_resnet_v2", "inception_v3", "inception_v4"), 80),
    **{"byoanet": 256, "deepseek_vit": 56, "efficientformer": 224, "iformer": 128, "levit": 224, "maxxvit": 160},
}
# Built for 64 pixels too, where the architecture is told its input size.
SIZED = (
    "beit", "cait", "coat", "convit", "deit", "efficientformer_v2", "gcvit", "hiera", "mlp_mixer", "nest", "pit",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "visformer", "vitamin", "volo",
)  # fmt: skip
# And the large ones, cut down.
SMALL = {"embed_dim": 192, "num_heads": 3, "depth": 2}
KWARGS = {
    **{family: {"img_size": 64} for family in SIZED},
    **dict.fromkeys(("deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer_sam"), SMALL),
    "beit": {"img_size": 64, **SMALL},
    "davit": {"embed_dims": (48, 96, 192, 384)},
    **{f"swin_transformer{version}": {"img_size": 64, "embed_dim": 48} for version in ("", "_v2", "_v2_cr")},
    "hiera": {"img_size": 64, "embed_dim": 48},
    "hieradet_sam2": {"embed_dim": 48},
    "mobilenetv5": {"channel_multiplier": 0.5},
    "nasnet": {"num_features": 672, "stem_size": 16},
    "res2net": {"layers": (2, 1, 1, 2)},
    "sequencer": {"embed_dims": (48, 96, 96, 96)},
    "tresnet": {"width_factor": 0.5},
    "twins": {"embed_dims": (32, 64, 128, 256)},
    "vgg": {"mlp_ratio": 1 / 16},
}
# No MLP by name or class: convolutional nets, and blocks whose MLP is spelt out in convs.
WITHOUT_MLPS = (
    "byoanet", "byobnet", "convmixer", "cpubone", "cspnet", "cspnext", "densenet", "dla", "dpn", "efficientnet",
    "efficientvit_mit", "ghostnet", "hardcorenas", "hgnet", "hrnet", "iformer", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnetv2", "mambaout", "mobilenetv3", "nasnet", "nfnet", "pnasnet", "rdnet", "regnet", "repghost",
    "res2net", "resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet", "sknet", "starnet", "tresnet", "vgg",
    "vovnet", "xception", "xception_aligned",
)  # fmt: skip


def calibrated(model, x):
    """Running statistics of batch norms as of `x`, or the signal dies away in a deep net of random weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        usual = {norm: norm.momentum for norm in norms}
        for norm in norms:
            norm.momentum = None  # the mean of all batches seen, that is of this one
        with torch.no_grad():
            seeded(lambda: model.train()(x))
        for norm in norms:
            norm.momentum = usual[norm]
    return model.eval()


def family_model(family):
    size = SIZES.get(family, 64)
    x = images(size, 1 if size == 256 else 2).double()
    return calibrated(awaken(create(FAMILIES[family], **KWARGS.get(family, {}))).double(), x), x


def gradients(model, x):
    """The output in eval mode, and the gradient of a random projection of it; by parameter name."""
    model.zero_grad()
    model.train()  # clears what some models cache in eval
    y = model.eval()(x)
    (y * seeded(lambda: torch.randn(y.shape, dtype=y.dtype))).sum().backward()
    model.train().eval()
    return y.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layers(model):
    """Every Linear and Conv outside of the classifier, by their classes alone."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    inside = {part for head in heads for part in head.modules()}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m not in inside}


def movement(adapted, plain):
    moved = (adapted - plain).abs().max()
    assert moved > 1e-3 * max(1, plain.abs().max()), "the delta moved nothing, so this test would prove nothing"
    return moved


def chain(host):
    """ΔW and its factors, to carry a gradient of the weight on to them."""
    return host.delta.weight(), [host.delta.A.value, host.delta.B.value]


def assert_chained(chains, weights, found):
    """The factors' gradients are those of the weights of the folded model, carried on by the chain rule."""
    alive = 0
    for name, (product, factors) in chains.items():
        gradient = weights.get(f"{name}.weight", torch.zeros_like(product))  # a layer that did not run
        expected = torch.autograd.grad(product, factors, gradient.view_as(product))
        alive += all(g.abs().max() > 0 for g in expected)
        for factor, reference in zip("AB", expected, strict=True):
            ours = found.get(f"{name}.delta.{factor}.value", torch.zeros_like(reference))
            assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max(), f"{name}.{factor}"
    assert alive > 0.8 * len(chains), f"only {alive} of {len(chains)} layers got a gradient, so this would prove little"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_trains_folds_and_comes_off(family):
    model, x = family_model(family)
    assert (family in WITHOUT_MLPS) == (not mlps(model))
    plain, expected = outputs(model, x), layers(model)
    assert cv.LoRA().targets(model)
    assert expected.keys() >= cv.LoRA().targets(model).keys()

    cv.inject(model, cv.LinearProbe())
    frozen = outputs(model, x)  # torch may choose another kernel for a frozen weight, and its last bit may differ
    cv.remove(model)
    report = cv.inject(model, cv.LoRA(rank=2, branches=2), "all")
    assert set(report.hosts) == expected.keys()
    assert torch.equal(outputs(model, x), frozen)
    awaken_deltas(model, 3)
    adapted, found = gradients(model, x)
    moved = movement(adapted, plain)
    assert torch.equal(outputs(cv.remove(twin(model)), x), plain)

    hosts = {name: model.get_submodule(name) for name in report.hosts}
    bases = {name: host._parameters["weight"].detach() for name, host in hosts.items()}
    chains = {name: chain(host) for name, host in hosts.items()}
    cv.fold(model)
    for name, host in hosts.items():
        assert torch.equal(host.weight, bases[name] + chains[name][0].view_as(host.weight)), name
    folded, weights = gradients(model, x)
    assert (folded - adapted).abs().max() < 1e-6 * moved
    assert_chained(chains, weights, found)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_MLPS])
def test_adapters_sit_in_every_family_with_mlps(family):
    model, x = family_model(family)
    cv.inject(model, cv.LinearProbe())
    plain = outputs(model, x)
    cv.remove(model)
    for where in ("pfeiffer", "houlsby", "parallel"):
        method = cv.Adapter(rank=4, branches=2, where=where)
        if not method.targets(model):
            assert where == "pfeiffer"
            assert family == "fasternet"  # its MLPs stand in no block of their own
            continue
        cv.inject(model, method, example=x)
        assert torch.equal(outputs(model, x), plain)
        awaken_deltas(model, 3)
        adapted = outputs(model, x)
        moved = movement(adapted, plain)
        cv.fold(model)
        assert (outputs(model, x) - adapted).abs().max() < 1e-6 * moved
        cv.remove(model)
