"""`cv.load` over a model that carries deltas: the file's adapter takes the place of the other one, in place."""

import copy
import itertools

import pytest
import torch

import capavision as cv
from capavision.base import fingerprint
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken_deltas,
    create,
    images,
    outputs,
    seeded,
    snapshot,
    tiny_vit,
)

# Each with a number of classes of its own, as tasks have them.
TASKS = {
    "capaboost": (cv.LoRA(rank=4, branches=2), 3),
    "adapter": (cv.Adapter(rank=2), 7),
    "prefix": (cv.Prefix(length=2), 5),
    "bitfit": (cv.BitFit(), 4),
    "full": (cv.Full(), 5),
    "circulant": (cv.Circulant(), 2),
    "probe": (cv.LinearProbe(), 6),
}


def base(num_classes=5, **kwargs):
    """One checkpoint, whatever the number of classes: timm draws the head's values first."""
    model = tiny_vit(**kwargs)
    seeded(lambda: model.reset_classifier(num_classes))
    return model


def stir(model, seed):
    """Other values for all that trains, and for the statistics of batch norms that move."""
    awaken_deltas(model, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in cv.parameters(model):
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    return model


def write(path, model, method, seed=0):
    cv.inject(model, method, seed=seed)
    cv.save(stir(model, model.num_classes + seed), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        name: write(folder / f"{name}.safetensors", base(classes), method) for name, (method, classes) in TASKS.items()
    }


def assert_same_model(model, fresh):
    """As if the file had been loaded onto a fresh base: names, values, classes, flags, modes and output."""
    x = images()
    assert torch.equal(outputs(model, x), outputs(fresh, x))
    ours, expected = snapshot(model), snapshot(fresh)
    assert ours["values"].keys() == expected["values"].keys()
    assert all(torch.equal(value, ours["values"][name]) for name, value in expected["values"].items())
    for what in ("classes", "trainable", "training", "hooks", "attributes"):
        assert ours[what] == expected[what], what


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(TASKS, 2)))
def test_the_files_adapter_takes_the_place_of_the_other(files, first, second):
    model = base(TASKS[first][1])
    plain = {name: p.clone() for name, p in model.named_parameters()}
    cv.load(files[first], model)
    assert cv.load(files[second], model) is model
    assert model.num_classes == TASKS[second][1]
    assert_same_model(model, cv.load(files[second], base(TASKS[second][1])))
    cv.remove(model)
    for name, value in model.named_parameters():
        assert name.startswith("head.") or torch.equal(value, plain[name]), name
    assert all(p.requires_grad for p in model.parameters())


def test_several_injections_take_the_place_of_one(tmp_path, files):
    def both(model):
        cv.inject(model, cv.LoRA(rank=2), "qkv")
        cv.inject(model, cv.Adapter(rank=2))
        return model

    cv.save(stir(both(base()), 1), tmp_path / "both.safetensors")
    model = cv.load(files["prefix"], base())
    assert_same_model(cv.load(tmp_path / "both.safetensors", model), cv.load(tmp_path / "both.safetensors", base()))
    assert_same_model(cv.load(files["prefix"], model), cv.load(files["prefix"], base()))


@pytest.mark.parametrize("method", [cv.LoRA(rank=2), cv.LoRA(rank=3)], ids=["equal settings", "other settings"])
def test_a_norm_in_the_head_keeps_the_bases_statistics(tmp_path, method):
    def levit(classes):
        model = create("levit_128s", num_classes=classes)
        model.head.bn.running_mean.fill_(0.5)
        return model

    write(tmp_path / "3.safetensors", levit(3), cv.LoRA(rank=2))
    write(tmp_path / "7.safetensors", levit(7), method)
    model = cv.load(tmp_path / "3.safetensors", levit(3))
    expected = outputs(cv.load(tmp_path / "7.safetensors", levit(7)), images(224))
    cv.load(tmp_path / "7.safetensors", model)
    assert torch.equal(outputs(model, images(224)), expected)
    cv.save(model, tmp_path / "again.safetensors")
    assert type(cv.remove(model).head.bn) is torch.nn.BatchNorm1d


@pytest.mark.parametrize("freeze", [True, False])
def test_batch_norms_change_with_their_adapter(tmp_path, freeze):
    def resnet():
        return create("test_resnet")

    def train(path, seed):
        model = resnet()
        cv.inject(model, cv.LoRA(rank=2), "conv", seed=seed, freeze_norm=False)
        stir(model, seed).train()(images(seed=seed))  # the statistics move
        cv.save(model, path)
        return path

    moved = [train(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    kept = write(tmp_path / "kept.safetensors", resnet(), cv.LoRA(rank=2))
    statistics = {name: b.clone() for name, b in resnet().named_buffers()}
    model = cv.load(moved[0], resnet())
    for path in [kept, moved[1]] if freeze else [moved[1], moved[0]]:
        assert_same_model(cv.load(path, model), cv.load(path, resnet()))
    cv.remove(model)
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())


def test_equal_settings_change_values_alone(tmp_path):
    """The same objects with other values: optimizers, averaged models and compiled graphs go on."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        model = base()
        cv.inject(model, TASKS["capaboost"][0])
        cv.save(stir(model, seed), path)
    model = cv.load(paths[0], base()).eval()
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    x = images()
    with torch.no_grad():
        first = compiled(x)
        ids = {name: id(p) for name, p in model.named_parameters()}
        cv.load(paths[1], compiled)
        second, count = compiled(x), len(graphs)
    assert ids == {name: id(p) for name, p in model.named_parameters()}
    assert count == 1
    assert_moved(second, first)
    assert torch.equal(outputs(model, x), outputs(cv.load(paths[1], base()), x))


def test_another_seed_brings_its_masks(tmp_path):
    paths = [write(tmp_path / f"{seed}.safetensors", base(), TASKS["capaboost"][0], seed=seed) for seed in (0, 1)]
    model = cv.load(paths[0], base())
    assert_same_model(cv.load(paths[1], model), cv.load(paths[1], base()))


def test_a_host_that_was_replaced_is_made_anew(files):
    model = cv.load(files["capaboost"], base(3))
    fresh = base(3)
    model.blocks[0].attn.qkv = fresh.blocks[0].attn.qkv
    assert_same_model(cv.load(files["capaboost"], model), cv.load(files["capaboost"], base(3)))


def wrong_base(tmp_path, files):
    return write(tmp_path / "other.safetensors", base(7, seed=9), cv.LoRA(rank=2))


def wrong_architecture(tmp_path, files):
    return write(tmp_path / "deep.safetensors", base(7, depth=3), cv.LoRA(rank=2))


def damaged(tmp_path, files):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(files["adapter"].read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (wrong_base, "was trained on other base weights"),
        (wrong_architecture, r"adapts 'blocks\.2\.attn\.qkv', which VisionTransformer lacks"),
        (damaged, "is damaged"),
    ],
)
@pytest.mark.parametrize("first", ["capaboost", "full"])
def test_a_refusal_leaves_the_other_adapter_in_place(tmp_path, files, make, match, first):
    model = cv.load(files[first], base(TASKS[first][1]))
    before, x = snapshot(model), images()
    y = outputs(model, x)
    with pytest.raises(ValueError, match=match):
        cv.load(make(tmp_path, files), model)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model, x), y)


@pytest.mark.parametrize("second", TASKS)
def test_ctrl_c_in_the_middle_leaves_the_other_adapter_in_place(files, monkeypatch, second):
    model = cv.load(files["full"], base())
    before = snapshot(model)

    def interrupted(path, model, tensors):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
                p.requires_grad_(False)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("capavision.state._restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cv.load(files[second], model)
    assert_unchanged(model, before)
    assert_same_model(cv.load(files[second], model), cv.load(files[second], base(TASKS[second][1])))


def test_a_head_that_cannot_follow_is_refused(files):
    model = cv.load(files["capaboost"], base(3))
    model.reset_classifier = None
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"7 classes and the model has 3; create it with num_classes=7"):
        cv.load(files["adapter"], model)
    assert_unchanged(model, before)


def test_an_adapted_head_is_part_of_the_base(tmp_path, files):
    model = base()
    cv.inject(model, cv.LoRA(rank=2), ["head", "qkv"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"3 classes and the model has 5"):
        cv.load(files["capaboost"], model)
    assert_unchanged(model, before)


def test_a_head_that_timm_would_make_anew_otherwise_is_refused_with_the_cure(tmp_path):
    """repvit's reset_classifier drops the distilled half of the head."""
    sizes = {"embed_dim": (8, 16, 24, 32), "depth": (1, 1, 2, 1), "distillation": True}
    model = create("repvit_m0_9", num_classes=3, **sizes)
    cv.inject(model, cv.LoRA(rank=2))
    cv.save(model, tmp_path / "it.safetensors")
    other = create("repvit_m0_9", num_classes=5, **sizes)
    cv.inject(other, cv.LoRA(rank=2))
    before = snapshot(other)
    with pytest.raises(
        ValueError, match=r"RepVit\.reset_classifier\(3\) makes a head without head\.head_dist\..* with num_classes=3"
    ):
        cv.load(tmp_path / "it.safetensors", other)
    assert_unchanged(other, before)


def test_a_base_that_changed_since_is_noticed(files):
    """Norms are taken once a version, and a weight written in place has a new one."""
    model = cv.load(files["capaboost"], base(3))
    cv.load(files["adapter"], model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"other base weights: 1 of .* first blocks\.0\.mlp\.fc1\.weight"):
        cv.load(files["capaboost"], model)
    assert fingerprint(model.half()) == fingerprint(copy.deepcopy(model))


def test_a_base_written_through_data_is_another_base(tmp_path, files):
    """`.data` leaves a tensor's version as it was; weights are often copied so."""
    model = cv.load(files["capaboost"], base(3))
    own = dict(model.named_parameters())
    for name, other in base(3, seed=9).named_parameters():
        own[name].data.copy_(other.data)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))
    model.pos_embed.data.mul_(1.01)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))
    with pytest.raises(ValueError, match="was trained on other base weights"):
        cv.load(files["capaboost"], model)


def test_a_tied_model_takes_another_file_of_the_same_tying(tmp_path):
    def tied(seed, masks=0):
        model = tiny_vit(depth=3, seed=seed)
        cv.tie(model, density=0.5, seed=masks)
        cv.save(model, tmp_path / f"{seed}.safetensors")
        return model

    model, other = tied(0), tied(1)
    cv.load(tmp_path / "1.safetensors", model)
    assert torch.equal(outputs(model, images()), outputs(other, images()))
    tied(2, masks=4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"tied already, and not as in .*; create a fresh one"):
        cv.load(tmp_path / "2.safetensors", model)
    assert_unchanged(model, before)
