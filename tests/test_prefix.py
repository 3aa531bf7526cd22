"""Prefixes against the equation, and what attentions they serve."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from capavision.inject import injections
from capavision.softmax import prepended
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    awaken_deltas,
    create,
    images,
    outputs,
    snapshot,
    tiny_beit,
    tiny_vit,
    twin,
)


def by_hand(q, keys, values, bias=None):
    """softmax(q kᵀ / √d + bias) v of one head, query by query."""
    rows = []
    for i, query in enumerate(q):
        scores = [
            float(query @ key) / math.sqrt(len(query)) + (0 if bias is None else float(bias[i][j]))
            for j, key in enumerate(keys)
        ]
        weights = [math.exp(s - max(scores)) for s in scores]
        rows.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return torch.stack(rows)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_prefix_is_more_keys_and_values_in_the_one_softmax(branches):
    model = awaken(tiny_vit()).double()
    cv.inject(model, cv.Prefix(length=3, branches=branches))
    awaken_deltas(model)
    attention, x = model.blocks[0].attn, random(1, 5, 48)
    delta = attention.delta
    masked = [[P.value * P.mask[i] for i in range(branches)] if branches > 1 else [P.value] for P in (delta.K, delta.V)]
    K, V = (torch.cat(views).detach() for views in masked)
    assert K.shape == (3 * branches, 48)
    q, k, v = attention.qkv(x)[0].detach().chunk(3, dim=-1)
    heads = [
        by_hand(q[:, s], torch.cat([K[:, s], k[:, s]]), torch.cat([V[:, s], v[:, s]]))
        for s in (slice(0, 16), slice(16, 32), slice(32, 48))
    ]
    expected = F.linear(torch.cat(heads, -1), attention.proj.weight, attention.proj.bias)
    found = attention(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert_moved(found, cv.remove(twin(model)).blocks[0].attn(x)[0])


@pytest.mark.parametrize("mask", ["bias", "bool", "causal", "one column"])
def test_masks_and_biases_are_zero_at_the_prefix(mask):
    q, k, v, P_k, P_v = (random(1, 2, n, 4, seed=n) for n in (5, 6, 6, 3, 3))
    q = q[:, :, :5]
    attn_mask = {"bias": random(1, 2, 5, 6), "bool": random(5, 6) > 0, "one column": random(1, 1, 5, 1)}.get(mask)
    if mask == "bool":
        attn_mask[:, 0] = True
    found = prepended(P_k[0], P_v[0], q, k, v, attn_mask, is_causal=mask == "causal")
    for head in range(2):
        bias = torch.zeros(5, 6, dtype=torch.float64)
        if mask == "bias":
            bias = attn_mask[0, head]
        elif mask == "one column":
            bias = bias + attn_mask[0, 0]
        elif mask == "bool":
            bias = torch.where(attn_mask, bias, -torch.inf)
        else:
            bias = torch.where(torch.ones(5, 6).tril() > 0, bias, -torch.inf)
        bias = torch.cat([torch.zeros(5, 3, dtype=torch.float64), bias], 1)
        keys, values = torch.cat([P_k[0, head], k[0, head]]), torch.cat([P_v[0, head], v[0, head]])
        torch.testing.assert_close(found[0, head], by_hand(q[0, head], keys, values, bias), rtol=1e-10, atol=1e-10)


def test_the_start_takes_the_prefix_share_of_the_attention_and_no_more():
    """K is small, V = 0: what an attention returns shrinks by about length / (length + tokens)."""
    model = awaken(tiny_vit()).double()
    attention, x = model.blocks[0].attn, random(1, 17, 48)
    attention.proj = nn.Identity()
    plain = attention(x)
    cv.inject(model, cv.Prefix(length=3), "blocks.0.attn")
    ratio = (attention(x) / plain).median().item()
    assert 0.7 < ratio < 1
    assert ratio == pytest.approx(17 / 20, abs=0.1)


def test_parameters_of_a_vit_b():
    with torch.device("meta"):
        model = create("vit_base_patch16_224")
        assert cv.inject(model, cv.Prefix(length=10)).trained == 12 * 10 * 2 * 768


SERVED = {
    "windows with a position bias": (lambda: create("swin_tiny_patch4_window7_224", img_size=64, embed_dim=48), 64),
    "a bias, and weights read by the parent": (tiny_beit, 32),
    "rotated keys": (lambda: create("vit_tiny_patch16_dinov3_qkvb", img_size=64, depth=2), 64),
    "relative positions": (lambda: create("vit_relpos_small_patch16_224", img_size=64, depth=2), 64),
    "channels first, fewer keys": (lambda: create("pvt_v2_b0"), 64),
    "several widths": (lambda: create("davit_tiny", embed_dims=(48, 96, 192, 384)), 64),
}


@pytest.mark.parametrize("name", SERVED)
def test_attentions_of_many_kinds_take_a_prefix(name, tmp_path):
    build, size = SERVED[name]
    model, x = awaken(build()), images(size)
    fresh, before, plain = twin(model), snapshot(model), outputs(model, x)
    report = cv.inject(model, cv.Prefix(length=4, branches=2, masks="complementary"))
    assert report.hosts
    awaken_deltas(model)
    expected = outputs(model, x)
    assert_moved(expected, plain)
    model(x).sum().backward()
    for name_ in report.hosts:
        delta = model.get_submodule(name_).delta
        assert delta.K.value.grad.abs().max() > 0
        assert delta.V.value.grad.abs().max() > 0
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), expected)
    torch.testing.assert_close(outputs(cv.fold(fresh), x), expected)
    cv.remove(model)
    assert_unchanged(model, before)


def test_channel_attentions_are_left_out_and_refused_by_name():
    model = create("davit_tiny", embed_dims=(48, 96, 192, 384))
    hosts = cv.inject(twin(model), cv.Prefix(), example=images(64)).hosts
    assert hosts
    assert not any("blocks.0.1" in host for host in hosts)  # spatial and channel attention take turns
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"stages.0.blocks.0.1.attn: ChannelAttention\w* .*name other attentions"):
        cv.inject(model, cv.Prefix(), "stages.0.blocks.0.1.attn", example=images(64))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["levit_128s", "swinv2_tiny_window8_256"])
def test_attentions_with_a_softmax_of_their_own_are_refused(name):
    model = create(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match="computes its softmax in a way of its own"):
        cv.inject(model, cv.Prefix())
    assert_unchanged(model, before)


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match="^ResNet has no attention that Prefix could enter; use Adapter, .*LoRA"):
        cv.inject(create("test_resnet"), cv.Prefix())


def test_the_switch_of_fused_attention_does_not_lead_past_the_prefix():
    model, x = awaken(tiny_vit()), images()
    cv.inject(model, cv.Prefix(length=4))
    expected = outputs(awaken_deltas(model), x)
    for block in model.blocks:
        block.attn.__dict__["fused_attn"] = False
    assert torch.equal(outputs(model, x), expected)


def test_torch_compile_traces_the_prefix_whole():
    model, x = awaken(tiny_vit()), images()
    cv.inject(model, cv.Prefix(length=4, branches=2))
    awaken_deltas(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, model(x))
    assert injections(model)
