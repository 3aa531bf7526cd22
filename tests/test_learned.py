"""Learned masks: scores that say what is kept, one prototype for all hosts, and files that hold bits."""

import json
import math
import pickle
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import capavision as cv
from capavision import masks, state
from capavision.learned import LearnedFactor, factors, largest
from capavision.masks import Sharing
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
    tiny_vit,
    twin,
)

LORA = cv.LoRA(rank=4, density=0.25, masks="learned")
ADAPTER = cv.Adapter(rank=4, branches=2, masks="learned")


def factor(rows=4, cols=6, key="0/host/A", dim=0, branches=2, density=0.3, dtype=torch.float64):
    value = seeded(lambda: torch.randn(rows, cols, dtype=dtype))
    return Sharing(branches=branches, density=density, masks="learned").factor(value, key, dim)


def adapted(method=LORA, seed=0, model=None):
    model = model or awaken(tiny_vit(global_pool="avg"))
    cv.inject(model, method, seed=seed)
    return awaken_deltas(model, 3)


def kept(model):
    """The masks, by name of the factor."""
    return {name: largest(f.scores, f.keep) for name, f in factors(model).items()}


def train(model, mask_lr, steps=3, lr=0.01):
    optimizer = torch.optim.AdamW(cv.parameter_groups(model, lr, mask_lr=mask_lr))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(images(batch=4)).square().mean().backward()
        optimizer.step()
    return model.eval()


# The factor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("branches", [1, 3])
def test_a_factor_and_its_gradients_are_those_of_the_equation_in_loops(dim, branches):
    ours = factor(dim=dim, branches=branches)
    V, S = ours.value.tolist(), ours.scores.tolist()
    M = [[[0.0] * 6 for _ in range(4)] for _ in range(branches)]
    for i in range(branches):
        places = [(r, c) for r in range(4) for c in range(6)]
        for r, c in sorted(places, key=lambda p: -abs(S[i][p[0]][p[1]]))[: round(0.3 * 24)]:
            M[i][r][c] = 1.0
    y = ours()
    G = seeded(lambda: torch.randn(y.shape, dtype=y.dtype), 1)
    (y * G).sum().backward()
    parts, parts_G = y.chunk(branches, dim), G.chunk(branches, dim)
    value_grad, negative = [[0.0] * 6 for _ in range(4)], 0
    for i in range(branches):
        for r in range(4):
            for c in range(6):
                g = parts_G[i][r, c].item()
                assert parts[i][r, c].item() == V[r][c] * M[i][r][c]
                value_grad[r][c] += g * M[i][r][c]
                # the mask moves with |S|, dropped entries included
                sign = -1 if S[i][r][c] < 0 else 1
                negative += sign < 0
                assert ours.scores.grad[i, r, c].item() == pytest.approx(g * V[r][c] * sign, rel=1e-12)
    assert 0 < negative < 24 * branches
    torch.testing.assert_close(ours.value.grad, torch.tensor(value_grad, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 7), (8, 768), (5, 27)])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("branches", [1, 2, 5])
def test_each_branch_keeps_exactly_the_rounded_share(shape, density, branches):
    ours = factor(*shape, branches=branches, density=density)
    assert (ours().view(branches, -1) != 0).sum(1).tolist() == [round(density * shape[0] * shape[1])] * branches


@pytest.mark.parametrize("scores", [torch.zeros(2, 4, 6), torch.tensor([1.0, -1.0]).repeat(2, 4, 3)])
def test_equal_scores_do_not_change_how_many_are_kept(scores):
    assert largest(scores, 7).sum((1, 2)).tolist() == [7, 7]


def test_scores_start_like_a_linear_and_from_their_key_alone():
    ours, theirs = factor(64, 48), torch.empty(64, 48)
    nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    bound = 48**-0.5
    assert 0.98 * bound < ours.scores.abs().max() < bound
    assert ours.scores.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    torch.manual_seed(5)
    assert torch.equal(factor(64, 48).scores, ours.scores)
    assert torch.equal(factor(64, 48, branches=5).scores[:2], ours.scores), "a branch keeps its scores"
    for key in ("1/host/A", "0/host/B", "0/host2/A"):
        assert (factor(64, 48, key=key).scores != ours.scores).all()


def test_a_factor_prints_its_shape_branches_and_what_it_keeps():
    assert "(4, 6), branches=2, keep=7" in repr(factor())


Refused = namedtuple("Refused", "settings match")


@pytest.mark.parametrize(
    "case",
    [
        Refused(
            {"density": 1.0}, "density=1 keeps every entry, so there is nothing to learn; choose a density below 1"
        ),
        Refused({"density": 1}, r"or masks='random' with branches=1"),
        Refused({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        Refused({"branches": 0}, "branches=0 must be a whole number"),
    ],
)
@pytest.mark.parametrize("method", [cv.LoRA, cv.Adapter, cv.Prefix])
def test_settings_that_leave_nothing_to_learn_are_refused(method, case):
    assert method(masks="learned").density == method(masks="learned", branches=3).density == 0.5
    with pytest.raises(ValueError, match=case.match):
        method(**{"masks": "learned", **case.settings})


@pytest.mark.parametrize(("density", "kept"), [(0.001, "none"), (0.999, "all")])
def test_a_density_that_is_too_much_or_too_little_for_a_host_names_it(vit, density, kept):
    before = snapshot(vit)
    match = rf"blocks\.0\.attn\.qkv .*density={density} keeps {kept} of the 192 entries of a \(4, 48\) factor"
    with pytest.raises(ValueError, match=match):
        cv.inject(vit, cv.LoRA(rank=4, density=density, masks="learned"), "qkv", "qv")
    assert_unchanged(vit, before)


def test_a_tied_model_takes_no_learned_masks(vit):
    with pytest.raises(ValueError, match="masks='learned' is for the factors of a method; a tied model's: random, com"):
        cv.tie(vit, masks="learned")


# The prototype -------------------------------------------------------------------------------------------------------


def test_all_hosts_share_one_prototype_a_role():
    model = adapted()
    found = {f: factors(model)[f] for f in factors(model)}
    assert len(found) == 8
    for role in ("parts.q.A", "parts.q.B", "parts.v.A", "parts.v.B"):
        first, second = (found[f"blocks.{i}.attn.qkv.delta.{role}"] for i in (0, 1))
        assert first.prototype is second.prototype
        assert (first.scores != second.scores).all()
        assert "value" not in dict(second.named_parameters())
    assert len({id(f.prototype) for f in found.values()}) == 4
    assert len({id(p) for p in cv.parameters(model)}) == len(cv.parameters(model)) == 4 + 8 + 2
    assert sum(name.endswith(".value") for name in model.state_dict()) == 4  # an EMA must not meet it twice


def test_the_prototype_starts_as_the_plain_method_on_the_first_host(vit):
    cv.inject(vit, LORA, "qkv", "qv")
    plain = tiny_vit()
    cv.inject(plain, cv.LoRA(rank=4), "qkv", "qv")
    for part in "qv":
        ours, theirs = (m.blocks[0].attn.qkv.delta.parts[part].A.value for m in (vit, plain))
        assert torch.equal(ours, theirs)


def test_hosts_of_other_shapes_have_prototypes_of_their_own():
    model = create("test_resnet")
    report = cv.inject(model, LORA, "conv")
    found = [f for f in factors(model).values() if f.prototype.shape[0] == LORA.rank]
    shapes = {f.prototype.shape for f in found}
    assert len({id(f.prototype) for f in found}) == len(shapes)
    assert 1 < len(shapes) < len(report.hosts)


def test_two_injections_have_two_prototypes(tmp_path):
    model = awaken(tiny_vit())
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.qkv"):
        cv.inject(model, LORA, name)
    awaken_deltas(model)
    first, second = (model.blocks[i].attn.qkv.delta.A for i in (0, 1))
    assert first.value is not second.value
    cv.save(model, tmp_path / "it.safetensors")
    loaded = cv.load(tmp_path / "it.safetensors", awaken(tiny_vit()))
    assert torch.equal(outputs(loaded, images()), outputs(model, images()))


def own_prototypes(model):
    """A copy whose hosts have values of their own, all the same."""
    model = twin(model)
    for f in factors(model).values():
        if f._owner:
            f.value = nn.Parameter(f.prototype.detach().clone())
    for f in factors(model).values():
        f._owner = ()
    return model


@pytest.mark.parametrize("method", [LORA, ADAPTER, cv.Prefix(length=4, masks="learned")], ids=str)
def test_the_prototypes_gradient_is_the_sum_over_hosts(method):
    model = adapted(method).double()
    apart, x = own_prototypes(model), images().double()
    for each in (model, apart):
        each(x).square().sum().backward()
    for name, f in factors(model).items():
        if f._owner:
            continue
        role = name.partition(".delta.")[2]
        one_each = [g.value.grad for other, g in factors(apart).items() if other.endswith(f".delta.{role}")]
        assert len(one_each) == 2
        assert all(g.abs().max() > 0 for g in one_each)
        torch.testing.assert_close(f.value.grad, sum(one_each))


@pytest.mark.parametrize("copying", [twin, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_shares_its_own_prototype(copying):
    model = adapted()
    copied = copying(model)
    for name, f in factors(copied).items():
        assert f.prototype is not factors(model)[name].prototype
    first, second = (copied.blocks[i].attn.qkv.delta.parts.q.A for i in (0, 1))
    assert (
        first.prototype
        is second.prototype
        is dict(copied.named_parameters())["blocks.0.attn.qkv.delta.parts.q.A.value"]
    )


def test_a_users_method_has_learned_masks_from_sharing_alone(monkeypatch):
    monkeypatch.setattr(cv.Method, "known", dict(cv.Method.known))

    class Thin(cv.WeightDelta):
        def __init__(self, config, site):
            super().__init__()
            self.G = config.factor(site.zeros(site.n_out, 2), site.key("G"), dim=1)
            self.register_buffer("H", site.uniform("H", 2 * config.branches, site.n_in), persistent=False)

        def weight(self):
            return self.G() @ self.H

    class Outer(Sharing, cv.Method):
        name, placement = "outer", cv.WeightDelta

        def build(self, site):
            return Thin(self, site)

    model, x = awaken(tiny_vit()), images()
    plain = outputs(model, x)
    report = cv.inject(model, Outer(branches=2, masks="learned"), "fc1")
    assert torch.equal(outputs(model, x), plain)
    assert report.shared == 192 * 2
    assert report.scores == 2 * 2 * 192 * 2
    expected = outputs(awaken_deltas(model), x)
    assert_moved(expected, plain)
    torch.testing.assert_close(outputs(cv.fold(model), x), expected, rtol=1e-4, atol=1e-4)


# Counting ------------------------------------------------------------------------------------------------------------


def test_a_vit_b_stores_what_the_paper_counts():
    r, d, blocks = 32, 768, 12
    with torch.device("meta"):
        model = create("vit_base_patch16_224")
        report = cv.inject(model, cv.LoRA(rank=r, alpha=48, density=0.1, masks="learned"))
        prototypes, bits = 2 * (r * d + d * r), blocks * 2 * (r * d + d * r)
        assert (report.shared, report.scores) == (prototypes, bits)
        assert report.stored == prototypes + bits // 32 == 135_168
        assert report.trained == prototypes + bits
        assert "stored 135,168: 98,304 values are shared by hosts, 1,179,648 are scores, stored as a bit each" in str(
            report
        )
        report = cv.inject(create("vit_base_patch16_224"), cv.Adapter(rank=64, masks="learned"))
        assert report.stored == 2 * 64 * d + blocks * (64 + d) + blocks * 2 * 64 * d // 32
        report = cv.inject(create("vit_base_patch16_224"), cv.LoRA(rank=8))
        assert report.stored == report.trained
        assert "stored" not in str(report)


# Training ------------------------------------------------------------------------------------------------------------


def test_scores_have_a_learning_rate_of_their_own_and_no_decay():
    model = adapted()
    values, scores = cv.parameter_groups(model, 1e-3)
    assert (values["lr"], scores["lr"], scores["weight_decay"]) == (1e-3, pytest.approx(3e-2), 0.0)
    assert "weight_decay" not in values
    assert {id(p) for p in scores["params"]} == {id(f.scores) for f in factors(model).values()}
    together = [*values["params"], *scores["params"]]
    assert {id(p) for p in together} == {id(p) for p in cv.parameters(model)}
    assert len(together) == len(cv.parameters(model))
    assert cv.parameter_groups(model, 1e-3, mask_lr=0.5)[1]["lr"] == 0.5
    optimizer = torch.optim.AdamW(cv.parameter_groups(model, 1e-3), weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_without_learned_masks_there_is_one_group(vit):
    cv.inject(vit, cv.LoRA(rank=2, branches=2))
    (group,) = cv.parameter_groups(vit, 1e-3)
    assert group == {"params": cv.parameters(vit), "lr": 1e-3}


def test_scores_that_someone_froze_are_in_no_group():
    model = adapted()
    for f in factors(model).values():
        f.scores.requires_grad_(False)
    (group,) = cv.parameter_groups(model, 1e-3)
    assert len(group["params"]) == 4 + 2


@pytest.mark.parametrize("method", [LORA, ADAPTER], ids=str)
def test_training_moves_masks_as_far_as_their_learning_rate_lets_it(method):
    model = adapted(method)
    still, moved, before = train(twin(model), mask_lr=0.0), train(twin(model), mask_lr=0.1), kept(model)
    assert all(torch.equal(mask, before[name]) for name, mask in kept(still).items())
    changed = [name for name, mask in kept(moved).items() if not torch.equal(mask, before[name])]
    assert len(changed) > len(before) / 2
    for name, mask in kept(moved).items():
        assert torch.equal(mask.sum((1, 2)), before[name].sum((1, 2)))


def test_training_goes_on_after_loading(tmp_path):
    model = train(adapted(), mask_lr=0.05)
    cv.save(model, tmp_path / "it.safetensors")
    loaded = cv.load(tmp_path / "it.safetensors", awaken(tiny_vit(global_pool="avg")))
    before = kept(loaded)
    for f in factors(loaded).values():
        assert len(f.scores.unique()) == 2
        assert 0 < f.scores.min() < f.scores.max() < f.scores.shape[-1] ** -0.5
    after = kept(train(loaded, mask_lr=0.1))
    assert sum(not torch.equal(after[name], mask) for name, mask in before.items()) > len(before) / 2


# The file ------------------------------------------------------------------------------------------------------------


def saved(tmp_path, method=LORA):
    model = train(adapted(method), mask_lr=0.05)
    cv.save(model, tmp_path / "it.safetensors")
    return model, tmp_path / "it.safetensors"


@pytest.mark.parametrize("method", [LORA, ADAPTER, cv.Prefix(length=3, branches=3, masks="learned")], ids=str)
def test_a_file_gives_the_masks_back_bit_for_bit_whatever_is_drawn(tmp_path, method, monkeypatch):
    model, path = saved(tmp_path, method)
    monkeypatch.setattr(masks, "stream", lambda key, count, stream=masks.stream: stream(f"another {key}", count))
    loaded = cv.load(path, awaken(tiny_vit(global_pool="avg")))
    x = images()
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert_moved(outputs(model, x), outputs(awaken(tiny_vit(global_pool="avg")), x))
    for name, mask in kept(model).items():
        assert torch.equal(kept(loaded)[name], mask)
    first = load_file(path)
    cv.save(loaded, path)
    again = load_file(path)
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_a_file_holds_bits_and_one_prototype_and_no_scores(tmp_path):
    _, path = saved(tmp_path)
    tensors = load_file(path)
    assert not [name for name in tensors if "scores" in name]
    bits = {name: t for name, t in tensors.items() if name.endswith(".bits")}
    assert len(bits) == 8
    assert all(t.dtype is torch.uint8 and t.shape == (4 * 48 // 8,) for t in bits.values())
    assert sum(name.endswith(".value") for name in tensors) == 4
    report = cv.inject(awaken(tiny_vit(global_pool="avg")), LORA)
    own = sum(t.numel() * t.element_size() for name, t in tensors.items() if not name.startswith("head"))
    assert own == 4 * report.stored == 4 * (4 * 4 * 48 + 8 * 4 * 48 // 32)


def test_a_file_changes_a_model_with_learned_masks_in_place_or_not_at_all(tmp_path, monkeypatch):
    model, path = saved(tmp_path)
    other, x = train(adapted(), mask_lr=0.2), images()
    before, ids = snapshot(other), [id(p) for p in cv.parameters(other)]
    assert_moved(outputs(other, x), outputs(model, x))

    def interrupted(*args):
        with torch.no_grad():
            for f in factors(other).values():
                f.scores.zero_()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, "_restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cv.load(path, other)
    assert_unchanged(other, before)
    assert torch.equal(outputs(cv.load(path, other), x), outputs(model, x))
    assert [id(p) for p in cv.parameters(other)] == ids
    cv.inject(plain := awaken(tiny_vit(global_pool="avg")), cv.LoRA(rank=2))
    assert torch.equal(outputs(cv.load(path, plain), x), outputs(model, x))


def test_a_file_changes_a_model_whose_hosts_were_named_in_another_order(tmp_path):
    """The first host owns the prototype, so that the same settings in another order are another model."""
    names, x = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"], images()
    model, other = awaken(tiny_vit()), awaken(tiny_vit())
    cv.inject(model, LORA, names)
    cv.inject(other, LORA, names[::-1])
    cv.save(awaken_deltas(model), tmp_path / "it.safetensors")
    assert_moved(outputs(model, x), outputs(other, x))
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", other), x), outputs(model, x))


def test_a_card_counts_the_values_and_the_bytes_of_masks(tmp_path):
    _, path = saved(tmp_path)
    card = cv.model_card(path)
    assert (
        f"| values trained, without the head | {4 * 4 * 48:,}, and {8 * 4 * 48 // 8:,} bytes of learned masks |" in card
    )


def edited(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


BITS = "blocks.1.attn.qkv.delta.parts.v.A.bits"


def one_more(tensors):
    at = int((tensors[BITS] < 255).nonzero()[0])
    tensors[BITS][at] = 255


def one_elsewhere(tensors):
    """As many ones in all, but not in each branch."""
    name = "blocks.0.delta.D.bits"
    one, other = tensors[name].chunk(2)
    one[:], other[:] = 255, 0


DAMAGE = {
    "a bit too many": (
        one_more,
        LORA,
        r"is damaged: the masks in blocks\.1\S*\.bits keep \[\d+\] entries, not 48 each",
    ),
    "shorter": (lambda t: t.update({BITS: t[BITS][:-1].clone()}), LORA, r"\.bits is \(23,\) of uint8, .* \(24,\) of"),
    "floats": (lambda t: t.update({BITS: t[BITS].float()}), LORA, r"\.bits is \(24,\) of float32"),
    "absent": (lambda t: t.pop(BITS), LORA, r"does not fit the model: missing \['blocks.1.attn.qkv.delta.parts.v.A"),
    "foreign": (
        lambda t: t.update({"blocks.1.attn.qkv.delta.parts.k.A.bits": t[BITS].clone()}),
        LORA,
        r"not in the model \['blocks\.1\.attn\.qkv\.delta\.parts\.k\.A\.bits",
    ),
    "scores": (
        lambda t: t.update({BITS.replace("bits", "scores"): torch.zeros(1, 4, 48)}),
        LORA,
        r"holds blocks\.1\S*\.scores, where capavision\.save writes bits",
    ),
    "branches of other shares": (one_elsewhere, ADAPTER, r"D\.bits keep \[192, 0\] entries, not 96 each"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_bits_are_refused_and_the_model_stays_as_it_was(tmp_path, case):
    change, method, match = DAMAGE[case]
    _, path = saved(tmp_path, method)
    edited(path, change)
    fresh = awaken(tiny_vit(global_pool="avg"))
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=match):
        cv.load(path, fresh)
    assert_unchanged(fresh, before)


def test_a_model_in_half_precision_keeps_as_many(tmp_path):
    _, path = saved(tmp_path)
    model = cv.load(path, awaken(tiny_vit(global_pool="avg")))
    before = kept(model)
    assert all(torch.equal(mask.float(), before[name]) for name, mask in kept(model.bfloat16()).items())


# Other tools ---------------------------------------------------------------------------------------------------------


def test_peft_gets_the_masked_factors_and_gives_them_back(tmp_path):
    model, x = train(adapted(), mask_lr=0.05), images()
    cv.to_peft(model, tmp_path / "peft")
    again = cv.from_peft(tmp_path / "peft", awaken(tiny_vit(global_pool="avg")))
    torch.testing.assert_close(outputs(again, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    assert not factors(again)


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, ADAPTER], ids=str)
def test_onnx_runtime_computes_the_same(tmp_path, method):
    onnxruntime = pytest.importorskip("onnxruntime")
    from export.graph import folded, to_onnx

    model, x = train(adapted(method), mask_lr=0.05), images()
    proto = to_onnx(folded(model), 32, {"0": "a"}, exporter="legacy")  # the faster one
    assert "TopK" not in {node.op_type for node in proto.graph.node}
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (found,) = session.run(None, {"pixel_values": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(model, x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch is built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gradients(model, x):
    model(x).square().sum().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_ddp_reduces_the_prototype_once(alone):
    model, x = adapted(), images()
    expected = gradients(twin(model), x)
    found = gradients(nn.parallel.DistributedDataParallel(model), x)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected[name])


def test_fully_shard_takes_the_whole_model_but_no_single_blocks(alone, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model, x = adapted(), images()
    expected, whole, blocks = gradients(twin(model), x), twin(model), twin(model)
    fully_shard(whole, mesh=alone)
    found = gradients(whole, x)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name])
    cv.save(whole, tmp_path / "sharded.safetensors")
    cv.save(model, tmp_path / "it.safetensors")
    assert (tmp_path / "sharded.safetensors").read_bytes() == (tmp_path / "it.safetensors").read_bytes()

    for block in blocks.blocks:
        fully_shard(block, mesh=alone)
    fully_shard(blocks, mesh=alone)
    with pytest.raises(ValueError, match=r"used in every block.*call fully_shard\(model\) on the whole model only"):
        blocks(x)


def test_removing_and_folding_leave_no_scores():
    for end in (cv.remove, cv.fold):
        model = adapted(ADAPTER)
        end(model)
        assert not [m for m in model.modules() if isinstance(m, LearnedFactor)]
        assert bool(deltas(model)) == (end is cv.fold)


# vtab ----------------------------------------------------------------------------------------------------------------

ARGV = ["--task", "digits", "--model", "test_vit", "--weights", "random", "--img-size", "32", "--test-limit", "20"]
ARGV += ["--epochs", "2", "--batch-size", "125", "--rank", "2", "--masks", "learned", "--mask-lr", "0.1", "--name", "a"]


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, monkeypatch):
    from vtab import train as training
    from vtab.loop import Loop

    original = Loop.epoch

    def interrupted(self, epoch, bar):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(self, epoch, bar)

    whole = training.main([*ARGV, "--out", str(tmp_path / "whole")])
    assert whole["stored_parameters"] < whole["trained_parameters"]
    monkeypatch.setattr(Loop, "epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.main([*ARGV, "--out", str(tmp_path / "broken")])
    monkeypatch.setattr(Loop, "epoch", original)
    training.main([*ARGV, "--out", str(tmp_path / "broken")])
    one, other = (load_file(tmp_path / name / "a" / "adapter.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    start = awaken(create("test_vit", img_size=32))
    cv.inject(start, cv.LoRA(rank=2, masks="learned"))
    bits = {name: t for name, t in one.items() if name.endswith(".bits")}
    assert bits
    drawn = {f"{name}.bits": mask for name, mask in kept(start).items()}
    assert any(not torch.equal(unpack(t, drawn[name]), drawn[name]) for name, t in bits.items()), "no mask was trained"


def unpack(bits, like):
    flat = [int(b) >> (7 - i) & 1 for b in bits for i in range(8)]
    return torch.tensor(flat[: like.numel()], dtype=like.dtype).view(like.shape)


def test_a_config_from_before_learned_masks_is_the_same_run(tmp_path):
    from vtab import record
    from vtab.config import parse
    from vtab.textfile import write

    config = parse(["--task", "digits", "--out", str(tmp_path), "--name", "a"])
    settings = json.loads(json.dumps(config.record()))
    assert settings.pop("mask_lr") is None
    write(tmp_path / "a" / "config.json", json.dumps(settings))
    write(tmp_path / "a" / "checkpoint.safetensors", "")
    record.check(tmp_path / "a", config)
    learned = ["--task", "digits", "--masks", "learned"]
    digests = [parse([*learned, *more]).digest() for more in ([], ["--mask-lr", "0.1"], ["--mask-lr", "0.2"])]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--mask-lr", "0.1"], "--mask-lr has no use without learned masks; pass --masks learned"),
        (["--method", "linear_probe", "--mask-lr", "0.1"], "--mask-lr has no use without learned masks"),
        (["--masks", "learned", "--mask-lr", "-1"], r"--mask-lr -1.0 must lie in \[0, 1000\]"),
        (["--masks", "learned", "--density", "1"], "density=1 keeps every entry"),
    ],
)
def test_flags_that_cannot_be_served_are_refused(argv, match):
    from vtab.config import parse

    with pytest.raises(ValueError, match=match):
        parse(["--task", "digits", *argv])
