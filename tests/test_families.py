"""Every family of timm keeps the promises: LoRA on every Linear and Conv, adapters on MLPs, attentions and blocks.

On thin models; benchmarks/coverage.py takes the same chain through whole ones.
"""

import pytest
import torch

import capavision as cv
from capavision.attention import attentions
from capavision.blocks import blocks, mlps
from tests.conftest import awaken_deltas, outputs, twin
from tests.families import FAMILIES, chain, family_model, layers, movement

# No MLP by name or class: convolutional nets, and blocks whose MLP is spelt out in convs.
WITHOUT_MLPS = (
    "byoanet", "byobnet", "convmixer", "cpubone", "cspnet", "cspnext", "densenet", "dla", "dpn", "efficientnet",
    "efficientvit_mit", "ghostnet", "hardcorenas", "hgnet", "hrnet", "iformer", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnetv2", "mambaout", "mobilenetv3", "nasnet", "nfnet", "pnasnet", "rdnet", "regnet", "repghost",
    "res2net", "resnest", "resnet", "resnetv2", "rexnet", "selecsls", "senet", "sknet", "starnet", "tresnet", "vgg",
    "vovnet", "xception", "xception_aligned",
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, images); pytest runs all tests of a family before it makes the next."""
    return request.param, *family_model(request.param, thin=True)


@pytest.mark.slow
def test_every_layer_of_every_family_trains_saves_folds_and_comes_off(family, tmp_path):
    _, model, x = family
    model = twin(model)
    expected = layers(model)
    assert cv.LoRA().targets(model)
    assert expected.keys() >= cv.LoRA().targets(model).keys()
    outcome = chain(model, x, cv.LoRA(rank=4, branches=2), "all", tmp_path / "it.safetensors")
    assert outcome.hosts == len(expected)
    assert outcome.unused < 0.2 * outcome.hosts


@pytest.mark.slow
def test_adapters_sit_in_every_family(family):
    name, model, x = family
    model = twin(model)
    assert (name in WITHOUT_MLPS) == (not mlps(model))
    assert blocks(model)
    cv.inject(model, cv.LinearProbe())
    plain = outputs(model, x)
    cv.remove(model)
    for where in ("pfeiffer", "houlsby", "parallel"):
        method = cv.Adapter(rank=4, branches=2, where=where)
        if not method.targets(model):
            assert not mlps(model)
            assert where == "parallel" or not attentions(model)
            continue
        cv.inject(model, method, example=x)
        assert torch.equal(outputs(model, x), plain)
        awaken_deltas(model, 3)
        adapted = outputs(model, x)
        moved = movement(adapted, plain)
        cv.fold(model)
        assert (outputs(model, x) - adapted).abs().max() < 1e-6 * moved
        cv.remove(model)
