"""The cached prefix: the same step, at less cost, or a refusal."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import capavision as cv
from tests.conftest import awaken, create, seeded
from tests.test_vtab_train import TINY, refused
from vtab import prefix, train
from vtab.prefix import FrozenPrefix

NETS = {
    "vit": ("test_vit", 160, "blocks.1*", "blocks.0"),
    "vit, linear probe": ("test_vit", 160, None, "head_drop"),
    "stem alone": ("test_resnet", 64, "layer1*", "maxpool"),
    "stages": ("test_resnet", 64, "layer4*", "layer3"),
    "blocks within stages": ("test_convnext", 64, "stages.3*", "stages.3.downsample.0"),
    "dense connections": ("densenet121", 64, "features.denseblock3.denselayer2*", "features.denseblock3.denselayer1"),
}


def normalize(images):
    return images.movedim(-1, 1).double() / 127 - 1


def made(name, size, targets, method=None):
    model = seeded(lambda: create(name, num_classes=5)).double()
    cv.inject(model, method or (cv.LoRA(rank=2) if targets else cv.LinearProbe()), targets)
    awaken(model)
    images = seeded(lambda: torch.randint(0, 256, (5, size, size, 3), dtype=torch.uint8), 1)
    return model.train(), images


def step(model, x):
    model.zero_grad()
    with FlopCounterMode(display=False) as flops:
        y = model(x)
        (y * seeded(lambda: torch.randn(y.shape))).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in cv.parameters(model))], flops.get_total_flops()


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_step_with_the_cached_prefix_is_the_whole_one_at_less_cost(net):
    name, size, targets, cut = net
    model, images = made(name, size, targets)
    cached = FrozenPrefix(model, images, normalize, batch_size=2)
    names = {module: name for name, module in model.named_modules()}
    if name != "densenet121":  # whose layers hand lists on
        assert names[cached.cut] == cut
    chosen = torch.tensor([4, 1, 3])
    expected, whole = step(model, normalize(images[chosen]))
    with cached(chosen):
        found, rest = step(model, normalize(images[chosen]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert rest < 0.9 * whole
    assert all("forward" not in module.__dict__ for module in model.modules())
    again, _ = step(model, normalize(images[chosen]))
    assert torch.equal(again[0], expected[0])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(self.norm(x))


class Listed(nn.Module):
    """Its list of blocks is never called itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(12, 8), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = block(x)
        return x


def test_a_residual_past_a_cut_rules_it_out():
    """In the last block, its norm is the latest frozen module; only what comes before the block can be kept."""
    net = seeded(Listed).double()
    cv.inject(net, cv.LoRA(rank=2), "blocks.2.fc")
    images = torch.randint(0, 256, (5, 2, 2, 3), dtype=torch.uint8)
    cached = FrozenPrefix(net, images, normalize, batch_size=2)
    assert cached.cut is net.blocks[1]
    assert [module for module, _ in cached.spared] == [net.stem, net.blocks[0]]


def test_a_zero_head_hides_no_wrong_cut():
    model, images = made("test_vit", 160, "blocks.1*")
    torch.nn.init.zeros_(model.head.weight)
    assert FrozenPrefix(model, images, normalize, batch_size=2).cut is model.blocks[0]


class Chain(nn.Module):
    """Three layers; `between` is what happens to the first one's output."""

    def __init__(self, between, norm):
        super().__init__()
        self.stem, self.norm, self.mid, self.head = (
            nn.Linear(12, 8),
            norm or nn.Identity(),
            nn.Linear(8, 8),
            nn.Linear(8, 5),
        )
        self.position, self.gate = nn.Parameter(torch.randn(8)), nn.Parameter(torch.zeros(1))
        self.register_buffer("table", torch.ones(1, 8))
        self.between = between

    def forward(self, x):
        x = self.norm(self.stem(x.flatten(1)))
        return self.head(self.between(self, x))


def plain(net, x):
    return net.mid(x)


def measured(**kwargs):
    return nn.Sequential(nn.Unflatten(1, (2, 4)), nn.BatchNorm1d(2, **kwargs), nn.Flatten())


UNFIT = {
    "a trained parameter before the cut": (lambda net, x: net.mid(x + net.position), "position", nn.Identity),
    "a skip past the cut behind a zero": (lambda net, x: net.mid(x) + net.gate * x, "gate", nn.Identity),
    "batch norm": (plain, "head.bias", measured),
    "batch norm without statistics": (plain, "head.bias", lambda: measured(track_running_stats=False)),
    "another mixing of the batch": (lambda net, x: net.mid(x - x.mean(0)), "head.bias", nn.Identity),
    "one row whatever the batch": (lambda net, x: x + net.mid(net.table), "head.bias", nn.Identity),
}


def chain(between, trained, norm):
    model = seeded(lambda: Chain(between, norm())).double().requires_grad_(False)
    for name in ("head.weight", trained):
        model.get_parameter(name).requires_grad_(True)
    return model, seeded(lambda: torch.randint(0, 256, (5, 2, 2, 3), dtype=torch.uint8))


@pytest.mark.parametrize("net", UNFIT.values(), ids=UNFIT)
def test_nets_whose_steps_would_differ_are_refused(net):
    model, images = chain(*net)
    with pytest.raises(ValueError, match="--cache-frozen-prefix"):
        FrozenPrefix(model, images, normalize, batch_size=2)


def test_the_same_net_without_what_is_unfit_has_a_prefix():
    model, images = chain(plain, "head.bias", nn.Identity)
    assert FrozenPrefix(model, images, normalize, batch_size=2).cut is model.mid


def test_forwards_come_back_after_an_error():
    model, images = made(*NETS["vit"][:3])
    cached = FrozenPrefix(model, images, normalize, batch_size=2)
    with pytest.raises(KeyError), cached(torch.tensor([0])):
        raise KeyError
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.usefixtures("no_pictures")
def test_a_run_learns_the_same_with_it(tmp_path):
    argv = ["--task", "digits", *TINY, "--targets", "blocks.1*", "--drop-path", "0", "--out", str(tmp_path)]
    plain, cached = (train.main([*argv, *more]) for more in ((), ("--cache-frozen-prefix",)))
    assert cached["config"]["cache_frozen_prefix"]
    assert cached["accuracy"] == pytest.approx(plain["accuracy"], abs=0.3)


def test_what_cannot_be_kept_is_refused(tmp_path, capsys, monkeypatch):
    argv = ["--task", "digits", *TINY, "--out", str(tmp_path), "--cache-frozen-prefix", "--targets", "blocks.1*"]
    assert "choose one" in refused(capsys, [*argv, "--compile"])
    monkeypatch.setattr(prefix, "MOST", 1000)
    assert "would keep 0.0 GiB, above 0; lower --img-size" in refused(capsys, argv)


def test_a_model_trained_from_its_first_module_on_is_refused():
    model, images = made("test_vit", 160, None, cv.Full())
    with pytest.raises(ValueError, match="the first modules are trained themselves"):
        FrozenPrefix(model, images, normalize, batch_size=2)


def test_a_prefix_that_draws_at_random_is_refused_however_seldom():
    model = seeded(lambda: create("test_vit", num_classes=5, depth=4, drop_path_rate=1e-4)).double()
    cv.inject(model, cv.LoRA(rank=2), "blocks.3*")
    images = torch.zeros(2, 160, 160, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="draw at random .stochastic depth.; pass --drop-path 0"):
        FrozenPrefix(model, images, normalize, batch_size=2)
    cv.remove(model)
    cv.inject(model, cv.LoRA(rank=2), "blocks.1*")  # timm gives the first block no stochastic depth
    before = torch.get_rng_state()
    assert FrozenPrefix(model, images, normalize, batch_size=2).cut is model.blocks[0]
    assert torch.equal(torch.get_rng_state(), before)
