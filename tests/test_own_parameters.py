"""BitFit, full fine-tuning and trained batch norms: what changes the base's own tensors, and gives them back."""

import pytest
import torch
from torch import nn

import capavision as cv
from capavision.inject import injections
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    create,
    images,
    outputs,
    snapshot,
    tiny_beit,
    tiny_vit,
    twin,
)


def train(model, x, steps=3):
    optimizer = torch.optim.SGD(cv.parameters(model), lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_bitfit_on_a_vit_b_trains_the_published_count():
    with torch.device("meta"):
        model = create("vit_base_patch16_224")
        assert cv.inject(model, cv.BitFit()).trained == 12 * (3 * 768 + 768 + 3072 + 768 + 2 * 768) + 2 * 768 == 102_912


def test_full_fine_tuning_on_a_vit_b_trains_the_published_count():
    with torch.device("meta"):
        assert cv.inject(create("vit_base_patch16_224"), cv.Full()).trained == 85_798_656


def test_bitfit_trains_biases_alone_and_those_read_by_the_parent_too():
    model, x = awaken(tiny_beit()), images()
    plain = twin(model)
    report = cv.inject(model, cv.BitFit())
    assert "blocks.0.attn.q_bias" in report.hosts
    assert not [name for name in report.hosts if "table" in name or name.startswith("head")]
    train(model, x)
    before = dict(plain.named_parameters())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n]) and not n.startswith("head")}
    assert changed <= set(report.hosts)
    assert len(changed) > 0.9 * len(report.hosts)  # v_bias and k: softmax forgets some


def test_a_model_without_biases_is_refused():
    model = nn.Sequential()
    model.fc = nn.Linear(3, 3)
    model.first = nn.Linear(3, 3, bias=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Sequential has no bias to train; choose another method"):
        cv.inject(model, cv.BitFit())
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", [cv.BitFit(), cv.Full()], ids=str)
def test_training_saving_loading_and_removing(method, tmp_path):
    model, x = awaken(create("test_resnet")), images(64)
    fresh, before, plain = twin(model), snapshot(model), outputs(model, x)
    cv.inject(model, method)
    train(model, x)
    expected = outputs(model, x)
    assert_moved(expected, plain)
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), expected)
    cv.save(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "it.safetensors").read_bytes()
    head = {name: p.clone() for name, p in model.get_classifier().state_dict().items()}
    for each in (model, fresh):
        cv.remove(each)
        each.get_classifier().load_state_dict(
            {k.partition("fc.")[2]: before["values"][k] for k in before["values"] if k.startswith("fc.")}
        )
        assert torch.equal(outputs(each, x), plain)
    assert_unchanged(model, before)
    assert head


@pytest.mark.parametrize("method", [cv.BitFit(), cv.Full()], ids=str)
def test_folding_keeps_what_was_trained(method):
    model, x = awaken(tiny_vit()), images()
    plain = outputs(model, x)
    cv.inject(model, method)
    expected = outputs(train(model, x), x)
    cv.fold(model)
    assert injections(model) == []
    assert torch.equal(outputs(model, x), expected)
    assert_moved(expected, plain)


@pytest.mark.parametrize("method", [cv.LoRA(rank=2), cv.Full()], ids=str)
def test_batch_norms_left_to_train_are_saved_loaded_and_put_back(method, tmp_path):
    model, x = awaken(create("test_resnet")), images(64)
    fresh, before = twin(model), snapshot(model)
    plain = outputs(twin(model), x)
    cv.inject(model, method, freeze_norm=False)
    train(model, x)
    assert not torch.equal(model.bn1.running_mean, before["values"]["bn1.running_mean"])
    with torch.no_grad():
        expected = model.eval()(x)
    assert_moved(expected, plain)
    cv.save(model, tmp_path / "it.safetensors")
    with torch.no_grad():
        assert torch.equal(cv.load(tmp_path / "it.safetensors", fresh)(x), expected)
    cv.remove(fresh)
    for name, value in fresh.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, before["values"][name]), name


def test_stacked_methods_come_off_in_turn():
    """LoRA over BitFit: remove puts back what each found."""
    model, x = awaken(tiny_vit()), images()
    before = snapshot(model)
    cv.inject(model, cv.BitFit())
    cv.inject(model, cv.LoRA(rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"blocks.0.norm1.bias", "blocks.0.attn.qkv.delta.parts.q.A.value", "head.weight"} <= trained
    model.zero_grad()
    model(x).sum().backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not name.startswith("head"):
                p.add_(0.1)
    cv.remove(model)
    assert_unchanged(model, before)


def test_a_model_without_injection_has_no_parameters_to_hand_out(vit):
    """A forgotten inject would train all of it."""
    with pytest.raises(ValueError, match=r"VisionTransformer carries no injection.*capavision\.inject first"):
        cv.parameters(vit)
    with pytest.raises(ValueError, match="carries no injection"):
        cv.parameter_groups(vit, 1e-3)
    cv.inject(vit, cv.Full())
    assert len(cv.parameters(nn.Sequential(vit))) == len(list(vit.parameters()))
