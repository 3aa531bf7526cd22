"""What several test files share: small models, the awakening of silent parameters, and snapshots to compare."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: no test may reach the network

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from capavision.delta import Delta
from export.families import awaken, seeded

torch.set_num_threads(1)  # pytest-xdist brings the parallelism


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CAPAVISION_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def same_draws():
    """A test draws the same numbers whenever it runs, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def no_pictures() -> Iterator[None]:
    """Empty files for a run's pictures: to draw them takes longer than to train most tests' models."""
    with pytest.MonkeyPatch.context() as patch:
        for picture in ("curve", "predictions"):
            patch.setattr(f"vtab.plots.{picture}", lambda path, *args: path.touch())
        yield


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the limit on this process stands in for a full disk."""
    resource = pytest.importorskip("resource")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@pytest.fixture
def vit() -> nn.Module:
    return tiny_vit()


def create(name: str, seed: int = 0, num_classes: int = 5, **kwargs: Any) -> nn.Module:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return seeded(lambda: timm.create_model(name, pretrained=False, num_classes=num_classes, **kwargs), seed).eval()


def tiny_vit(num_classes: int = 5, seed: int = 0, **kwargs: Any) -> nn.Module:
    sizes = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, **kwargs}
    return create("vit_tiny_patch16_224", seed, num_classes, **sizes)


def tiny_beit(**kwargs: Any) -> nn.Module:
    return create("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=32, patch_size=8, **kwargs)


def images(size: int = 32, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def deltas(model: nn.Module) -> dict[str, Delta]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Delta)}


def awaken_deltas(model: nn.Module, seed: int = 0) -> nn.Module:
    """The deltas alone: the base must stay the one that a fresh copy has."""
    for i, delta in enumerate(deltas(model).values()):
        awaken(delta, seed + i)
    return model


def answer(model: nn.Module, x: Any) -> Tensor:
    """The model's output for one batch; of transformers' models, whose batch is a mapping, the first output."""
    return model(**x)[0] if isinstance(x, Mapping) else model(x)


def outputs(model: nn.Module, x: Any) -> Tensor:
    """The model's output in eval mode without gradient; train() first, because some models cache in eval."""
    model.train()
    with torch.no_grad():
        return answer(model.eval(), x)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal or `remove` must leave alone: values, classes, flags, modes, hooks, attributes."""
    modules = dict(model.named_modules())
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": {name: id(p) for name, p in model.named_parameters()},
        "classes": {name: type(m) for name, m in modules.items()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: m.training for name, m in modules.items()},
        "hooks": {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in modules.items()},
        "attributes": {name: sorted(m.__dict__) for name, m in modules.items()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    after = snapshot(model)
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
    for what in before.keys() - {"values", *but}:
        assert before[what] == after[what], what


def run_in_half_and_traced(model: nn.Module, x: Tensor) -> None:
    """What never runs on W + ΔW in float32: a base in half precision, and traces for others to run."""
    model.bfloat16()(x.bfloat16())
    model.float()
    torch.jit.trace(model, x, check_trace=False)
    torch.export.export(model, (x,))


def assert_moved(adapted: Tensor, plain: Tensor) -> None:
    assert (adapted - plain).abs().max() > 1e-3, "the delta moved nothing, so this test would prove nothing"
