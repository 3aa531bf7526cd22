"""One file per adapter: what comes back from it, what is refused and changes nothing, and that writing is atomic."""

import copy
import json
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import capavision as cv
from capavision import files
from capavision.base import Base, fingerprint
from capavision.inject import injections
from tests.conftest import (
    assert_moved,
    assert_unchanged,
    awaken,
    awaken_deltas,
    create,
    full_disk,
    images,
    outputs,
    snapshot,
    tiny_vit,
    twin,
)

RANDOM = Base("test_vit", weights="random", seed=3)  # rebuilt anywhere, without network
METHOD = cv.LoRA(rank=4, branches=2)


def adapted(model, method=METHOD, targets=None, parts=None, **kwargs):
    cv.inject(model, method, targets, parts, **kwargs)
    return awaken_deltas(model, 5)


def written(path, model=None, **kwargs):
    cv.save(model or adapted(tiny_vit()), path, **kwargs)
    return path


def rewritten(path, change):
    """The file with its metadata changed by hand."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["capavision"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, tensors)
    save_file(tensors, path, {"capavision": json.dumps(metadata)})
    return path


# There and back ------------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "q and v": (METHOD, "qkv", "qv"),
    "row slices": (METHOD, "fc1", [slice(0, 10), slice(20, 48)]),
    "everything": (cv.LoRA(rank=2, branches=3, masks="complementary"), "all", None),
    "2:4": (cv.LoRA(rank=4, branches=2, masks="2:4"), "linear", None),
    "plain": (cv.LoRA(rank=2), None, None),
    "adapters": (cv.Adapter(rank=4, branches=2, where="houlsby", activation="gelu", scale=0.5), None, None),
    "parallel adapters": (cv.Adapter(rank=4, where="parallel"), "attn", None),
    "the classifier": (METHOD, ["qkv", "head"], None),
    "probe": (cv.LinearProbe(), None, None),
}


def with_another_head(model):
    """As timm makes it: two models of one checkpoint agree in all but the fresh head."""
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(99))
    return model


@pytest.mark.parametrize("given", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_fresh_base_with_the_file_gives_the_same_outputs_bit_for_bit(tmp_path, given):
    model, fresh, x = tiny_vit(), with_another_head(tiny_vit()), images()
    plain = outputs(model, x)
    adapted(model, *given, seed=11)
    with torch.no_grad():
        for p in model.head.parameters():
            p.add_(0.5 if p.requires_grad else 0)
    expected = outputs(model, x)
    assert_moved(expected, plain)
    assert cv.load(written(tmp_path / "it.safetensors", model), fresh) is fresh
    assert torch.equal(outputs(fresh, x), expected)
    assert injections(fresh)[0].method == given[0]
    assert injections(fresh)[0].seed == 11
    assert injections(fresh)[0].hosts == injections(model)[0].hosts


def test_two_injections_come_back_in_their_order(tmp_path):
    model, fresh, x = tiny_vit(), tiny_vit(), images()
    adapted(model, METHOD, "qkv", "qv", seed=1)
    adapted(model, cv.Adapter(rank=4, branches=2), seed=2)
    cv.load(written(tmp_path / "it.safetensors", model), fresh)
    assert [plan.method.name for plan in injections(fresh)] == ["lora", "adapter"]
    assert torch.equal(outputs(fresh, x), outputs(model, x))


def test_a_second_injection_leaves_an_adapted_head_frozen(tmp_path):
    model, fresh, x = tiny_vit(), with_another_head(tiny_vit()), images()
    adapted(model, METHOD, ["head"])
    adapted(model, METHOD, "fc1")
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name] == []
    cv.load(written(tmp_path / "it.safetensors", model), fresh)
    assert torch.equal(outputs(fresh, x), outputs(model, x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained


def test_what_was_loaded_is_trained_folded_and_saved_again(tmp_path):
    model, fresh, x = adapted(tiny_vit()), tiny_vit(), images()
    cv.load(written(tmp_path / "first.safetensors", model), fresh)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained
    fresh(x).square().sum().backward()
    assert all(p.grad is not None for p in cv.parameters(fresh))
    written(tmp_path / "second.safetensors", fresh)
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()
    torch.testing.assert_close(outputs(cv.fold(fresh), x), outputs(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", [cv.fold, cv.remove])
def test_a_loaded_model_ends_with_the_flags_it_had_before(tmp_path, end):
    path, fresh = written(tmp_path / "it.safetensors"), tiny_vit()
    fresh.norm.weight.requires_grad_(False)
    before = snapshot(fresh)["trainable"]
    cv.load(path, fresh)
    end(fresh)
    assert snapshot(fresh)["trainable"] == before


def test_a_model_of_float64_is_saved_in_float64(tmp_path):
    model, fresh, x = adapted(tiny_vit().double()), tiny_vit().double(), images().double()
    cv.load(written(tmp_path / "it.safetensors", model), fresh)
    assert torch.equal(outputs(fresh, x), outputs(model, x))


@pytest.mark.parametrize("mode", [True, False])
def test_a_given_model_keeps_its_mode(tmp_path, mode):
    path, fresh = written(tmp_path / "it.safetensors"), tiny_vit().train(mode)
    own = list(fresh.modules())
    cv.load(path, fresh)
    assert {m.training for m in own} == {mode}


def test_other_parameters_that_were_trained_are_saved_too(tmp_path):
    model, fresh, x = tiny_vit(), tiny_vit(), images()
    cv.inject(model, METHOD)
    before = outputs(model, x)
    for norm in (model.norm, model.blocks[0].norm1):
        norm.requires_grad_(True)
        with torch.no_grad():
            norm.weight.add_(0.3)
    assert_moved(outputs(model, x), before)
    cv.load(written(tmp_path / "it.safetensors", model), fresh)
    assert torch.equal(fresh.norm.weight, model.norm.weight)
    assert torch.equal(outputs(fresh, x), outputs(model, x))


def test_other_parameters_that_were_trained_stay_known_after_loading(tmp_path):
    """Saved again, taken back by remove, and by load of a file that does not have them."""
    model, plain, x = adapted(tiny_vit()), tiny_vit(), images()
    model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight.add_(0.3)
    first = written(tmp_path / "first.safetensors", model)
    loaded = cv.load(first, tiny_vit())
    assert loaded.norm.weight.requires_grad
    again = cv.load(written(tmp_path / "again.safetensors", loaded), tiny_vit())
    assert torch.equal(outputs(again, x), outputs(model, x))
    without = written(tmp_path / "without.safetensors", adapted(tiny_vit(), seed=3))
    assert torch.equal(outputs(cv.load(without, again), x), outputs(cv.load(without, tiny_vit()), x))
    assert torch.equal(cv.remove(loaded).norm.weight, plain.norm.weight)


def test_values_are_saved_whatever_their_flags_say_now(tmp_path):
    model, fresh, x = adapted(tiny_vit()), tiny_vit(), images()
    model.requires_grad_(False)
    cv.load(written(tmp_path / "it.safetensors", model), fresh)
    assert torch.equal(outputs(fresh, x), outputs(model, x))


def test_the_base_is_rebuilt_where_none_is_given(tmp_path):
    model, x = adapted(RANDOM.build(5)), images(160)
    cv.load(written(tmp_path / "it.safetensors", model, base=RANDOM))
    again = cv.load(tmp_path / "it.safetensors")
    assert not any(m.training for m in again.modules())
    assert torch.equal(outputs(again, x), outputs(model, x))


def test_a_rebuilt_base_takes_the_size_it_was_trained_at(tmp_path):
    base = Base("test_vit", weights="random", img_size=96)
    model, x = adapted(base.build(5)), images(96)
    again = cv.load(written(tmp_path / "it.safetensors", model, base=base))
    assert again.patch_embed.img_size == (96, 96)
    assert torch.equal(outputs(again, x), outputs(model, x))


@pytest.mark.parametrize("seed", [0, 1])
def test_rebuilding_depends_on_no_global_seed(tmp_path, seed):
    path = written(tmp_path / "it.safetensors", adapted(RANDOM.build(5)), base=RANDOM)
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    assert outputs(cv.load(path), images(160)).shape == (2, 5)
    assert torch.equal(torch.get_rng_state(), state)


# The file ------------------------------------------------------------------------------------------------------------


def test_a_file_says_what_it_holds(tmp_path):
    path = tmp_path / "it.safetensors"
    model = adapted(RANDOM.build(3), METHOD, "qkv", "qv", seed=4)
    cv.save(model, path, base=RANDOM, classes=["a", "b", "c"], info={"mean": [0.5, 0.5], "task": "pets"})
    known = cv.describe(path)
    assert known["format"] == 1
    assert known["classes"] == ["a", "b", "c"]
    assert known["num_classes"] == 3
    assert known["info"] == {"mean": [0.5, 0.5], "task": "pets"}
    assert Base(**known["base"]) == RANDOM
    plan = known["injections"][0]
    assert plan["method"] == {
        "name": "lora", "rank": 4, "alpha": 8.0, "branches": 2, "density": 0.5, "masks": "random"
    }  # fmt: skip
    assert plan["seed"] == 4
    assert plan["hosts"]["blocks.0.attn.qkv"] == {"q": [0, 64], "v": [128, 192]}
    assert plan["head"] == ["head"]
    assert len(known["masks"]) == 64


def test_a_file_holds_values_and_no_masks_and_no_base(tmp_path):
    model = adapted(tiny_vit(), METHOD, "qkv", "qv")
    with safe_open(written(tmp_path / "it.safetensors", model), "pt") as file:
        names = set(file.keys())
    factors = {f"blocks.{i}.attn.qkv.delta.parts.{part}.{f}.value" for i in "01" for part in "qv" for f in "AB"}
    assert names == factors | {"head.weight", "head.bias"}


@pytest.mark.parametrize("given", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_file_is_hardly_larger_than_its_values(tmp_path, given):
    model = adapted(tiny_vit(), *given)
    path = written(tmp_path / "it.safetensors", model)
    payload = 4 * sum(p.numel() for p in cv.parameters(model))
    assert payload < path.stat().st_size < payload + 64 * 1024


def test_a_large_model_has_a_small_file(tmp_path):
    model = create("vit_tiny_patch16_224")  # 12 blocks, 5.7 M values
    cv.inject(model, cv.LoRA(rank=8, branches=2))
    path = written(tmp_path / "it.safetensors", model)
    assert path.stat().st_size < 4 * (8 * 2 * 12 * (192 + 192) + 5 * 193) + 64 * 1024


def test_save_makes_missing_folders_and_replaces_files(tmp_path):
    path = tmp_path / "runs" / "pets" / "it.safetensors"
    first = written(path).read_bytes()
    assert written(path, adapted(tiny_vit(), cv.LoRA(rank=2))).read_bytes() != first
    assert [p.name for p in path.parent.iterdir()] == ["it.safetensors"]


def test_the_base_of_a_timm_model_is_derived(tmp_path):
    assert cv.describe(written(tmp_path / "a.safetensors", adapted(create("test_vit"))))["base"] == {
        "model": "test_vit.r160_in1k", "weights": "pretrained", "img_size": None, "seed": 0, "hint": "",
        "kwargs": {},
    }  # fmt: skip
    sized = adapted(create("test_vit", img_size=96))
    assert cv.describe(written(tmp_path / "b.safetensors", sized))["base"]["img_size"] == 96


class Mine(nn.Module):
    """No timm model: nothing says how to build it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.q_proj(x))


def test_a_model_that_is_not_timms_is_loaded_onto_the_given_one(tmp_path):
    model = Mine()
    fresh, x = twin(model), torch.randn(2, 4)
    path = written(tmp_path / "it.safetensors", adapted(model))
    assert cv.describe(path)["base"] is None
    with pytest.raises(ValueError, match="does not say how its base model was built; pass it"):
        cv.load(path)
    assert torch.equal(cv.load(path, fresh)(x), model(x))


STRAY = r"blocks\.0 \(ExtendedBlock\) carries a delta of no injection: fold made it den"


def test_a_folded_adapter_takes_no_injection_that_could_not_be_saved():
    model = cv.fold(adapted(tiny_vit(), cv.Adapter(rank=2)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=STRAY):
        cv.inject(model, METHOD)
    assert_unchanged(model, before)


def test_a_folded_block_that_came_after_inject_is_not_saved(tmp_path):
    model = adapted(tiny_vit(), targets="blocks.1.attn.qkv")
    model.blocks[0] = cv.fold(adapted(tiny_vit(), cv.Adapter(rank=2))).blocks[0]
    with pytest.raises(ValueError, match=STRAY):
        written(tmp_path / "it.safetensors", model)
    assert not list(tmp_path.iterdir())


# Refusals: the given model stays as it was ----------------------------------------------------------------------------


def file_of(**kwargs):
    return lambda path: written(path, **kwargs)


def changed(change):
    return lambda path: rewritten(written(path), change)


def cut(keep):
    def make(path):
        data = written(path).read_bytes()
        path.write_bytes(data[: keep if keep >= 0 else len(data) + keep])

    return make


def plan_of(metadata):
    return metadata["injections"][0]


def drop(metadata, tensors):
    tensors.pop("blocks.0.attn.qkv.delta.parts.q.A.value")


def add(metadata, tensors):
    tensors["blocks.0.attn.qkv.delta.parts.k.A.value"] = torch.zeros(4, 48)


def smuggle(metadata, tensors):
    tensors["blocks.0.attn.qkv.delta.parts.q.A.mask"] = torch.zeros(2, 4, 48, dtype=torch.bool)


def reshape(metadata, tensors):
    tensors["blocks.0.attn.qkv.delta.parts.q.A.value"] = torch.zeros(4, 47)


def cast(dtype):
    def change(metadata, tensors):
        tensors["blocks.0.attn.qkv.delta.parts.q.A.value"] = torch.ones(4, 48, dtype=dtype)

    return change


Refusal = namedtuple("Refusal", "make match model", defaults=[tiny_vit])
REFUSALS = {
    "other architecture": Refusal(
        file_of(), r"adapts 'blocks\.0\.attn\.qkv', which ResNet lacks", lambda: create("test_resnet")
    ),
    "deeper architecture": Refusal(
        lambda path: written(path, adapted(tiny_vit(depth=3))), r"adapts 'blocks\.2\.attn\.qkv', which VisionTr"
    ),
    "other width": Refusal(
        lambda path: written(path, adapted(tiny_vit(embed_dim=96))), "was trained on other base weights"
    ),
    "other number of classes": Refusal(
        file_of(), "was trained with 5 classes and the model has 7; create it with num_classes=5", lambda: tiny_vit(7)
    ),
    "no classes": Refusal(file_of(), "the model has 0; create it with num_classes=5", lambda: tiny_vit(0)),
    "other checkpoint": Refusal(
        file_of(), r"was trained on other base weights: \d+ of \d+ tensors differ.*load the same checkpoint",
        lambda: tiny_vit(seed=1),
    ),
    "cut in the header": Refusal(cut(20), "is damaged or no safetensors file"),
    "cut in the values": Refusal(cut(-100), "is damaged or no safetensors file"),
    "cut by one byte": Refusal(cut(-1), "is damaged or no safetensors file"),
    "empty": Refusal(cut(0), "is damaged or no safetensors file"),
    "text": Refusal(lambda path: path.write_text("hello " * 99), "is damaged or no safetensors file"),
    "a pickle": Refusal(lambda path: torch.save({"a": torch.ones(2)}, path), "is damaged or no safetensors file"),
    "another program's safetensors": Refusal(
        lambda path: save_file({"a": torch.ones(2)}, path), "is a safetensors file, but not one that capavision.save"
    ),
    "another program's metadata": Refusal(
        lambda path: save_file({"a": torch.ones(2)}, path, {"format": "pt"}), "not one that capavision.save wrote"
    ),
    "metadata that is no JSON": Refusal(
        lambda path: save_file({"a": torch.ones(2)}, path, {"capavision": "{"}), "is damaged or no safetensors file"
    ),
    "metadata of other JSON": Refusal(
        lambda path: save_file({"a": torch.ones(2)}, path, {"capavision": "[1]"}), "not one that capavision.save wrote"
    ),
    "newer format": Refusal(
        changed(lambda m, t: m.update(format=2)), "has format 2, this capavision reads up to 1; upgrade capavision"
    ),
    "a folder": Refusal(lambda path: path.mkdir(), "is not a file"),
    "nothing": Refusal(lambda path: None, "is not a file"),
    "unknown method": Refusal(
        changed(lambda m, t: plan_of(m)["method"].update(name="lorra")),
        "holds the method 'lorra', which is not known here; did you mean 'lora'",
    ),
    "other seed of the masks": Refusal(
        changed(lambda m, t: plan_of(m).update(seed=1)), "its masks could not be rebuilt from the seed"
    ),
    "other density of the masks": Refusal(
        changed(lambda m, t: plan_of(m)["method"].update(density=0.25)), "its masks could not be rebuilt"
    ),
    "other checksum of the masks": Refusal(
        changed(lambda m, t: m.update(masks="0" * 64)), "its masks could not be rebuilt"
    ),
    "a value is missing": Refusal(changed(drop), r"does not fit the model: missing \['blocks\.0\.attn\.qkv\.delta"),
    "a mask among the values": Refusal(changed(smuggle), r"not in the model \['blocks\.0.*\.mask"),
    "a value too many": Refusal(changed(add), r"not in the model \['blocks\.0\.attn\.qkv\.delta\.parts\.k\.A\."),
    "a value of another shape": Refusal(changed(reshape), r"q\.A\.value is \(4, 47\), the model's is \(4, 48\)"),
    "whole numbers": Refusal(changed(cast(torch.int64)), r"A\.value is of int64, the model's of float32; save it a"),
    "complex numbers": Refusal(changed(cast(torch.complex64)), r"q\.A\.value is of complex64, the model's of float32"),
    "bits": Refusal(changed(cast(torch.bool)), r"q\.A\.value is of bool, the model's of float32"),
}  # fmt: skip


def lying(entry, match, method=METHOD, **values):
    """A file in which `entry` of the metadata, of its injection, or a host's entry there, is another one."""
    targets, parts = ("qkv", "qv") if method is METHOD else (None, None)

    def change(metadata, tensors):
        place = metadata if entry in metadata else plan_of(metadata)
        if values:
            place[entry] |= values["add"]
        else:
            place[entry] = None

    return Refusal(lambda path: rewritten(written(path, adapted(tiny_vit(), method, targets, parts)), change), match)


def rows(**parts):
    return {"blocks.0.attn.qkv": parts}


ADAPTER, PREFIX = cv.Adapter(rank=4), cv.Prefix(length=2)
LIES = {
    "rows that overlap": lying("hosts", r"\(24, 72\)\] are not disjoint rows", add=rows(q=[0, 48], v=[24, 72])),
    "rows beyond the last": lying("hosts", "which has 144", add=rows(q=[0, 48], v=[120, 168])),
    "rows before the first": lying("hosts", "are not disjoint rows", add=rows(q=[-48, 0], v=[96, 144])),
    "rows backwards": lying("hosts", "are not disjoint rows", add=rows(q=[48, 0], v=[96, 144])),
    "rows of no length": lying("hosts", "are not disjoint rows", add=rows(q=[48, 48], v=[96, 144])),
    "rows without end": lying("hosts", "are not disjoint rows", add=rows(q=[0, 10**9], v=[96, 144])),
    "rows of floats": lying("hosts", r"\[0.0, 48\] in the place of 2 whole", add=rows(q=[0.0, 48], v=[96, 144])),
    "one row": lying("hosts", r"\[0\] in the place of 2 whole numbers", add=rows(q=[0], v=[96, 144])),
    "a part with a dot": lying("hosts", r"'q\.x' names rows of blocks", add=rows(**{"q.x": [0, 48]})),
    "a part that is a method": lying("hosts", "'keys' names rows of blocks", add=rows(keys=[0, 48])),
    "a part without a name": lying("hosts", "'' names rows of blocks", add=rows(**{"": [0, 48]})),
    "LoRA on a block": lying("hosts", r"lora has no place at blocks\.0, a Block", add={"blocks.0": {}}),
    "a parameter as host": lying("hosts", "adapts 'cls_token', which VisionTr", add={"cls_token": {}}),
    "rows of a block": lying("hosts", "adapter has no place at", ADAPTER, add={"blocks.0": {"q": [0, 4]}}),
    "no axes": lying("axes", "adapter has no place at", ADAPTER, add={"blocks.0": [0, 0, -1]}),
    "an axis that is none": lying("axes", "adapter has no place at", ADAPTER, add={"blocks.0": [48, 48, 7]}),
    "axes of strings": lying("axes", "in the place of 3 whole", ADAPTER, add={"blocks.0": ["48", 48, -1]}),
    "no heads": lying("axes", "prefix has no place at", PREFIX, add={"blocks.0.attn": [48, 48, 0]}),
    "heads that do not divide": lying("axes", "prefix has no place at", PREFIX, add={"blocks.0.attn": [48, 48, 5]}),
    "a host twice": Refusal(
        changed(lambda m, t: m["injections"].append(plan_of(m))), r"blocks\.0\.attn\.qkv is given two deltas"
    ),
    "a parameter as head": Refusal(changed(lambda m, t: plan_of(m).update(head=["cls_token"])), "adapts 'cls_token'"),
    "a list as head": Refusal(changed(lambda m, t: plan_of(m).update(head=[["a"]])), "in the place of names"),
    "a module as tensor": Refusal(changed(lambda m, t: plan_of(m).update(trained=["blocks.0"])), "adapts 'blocks.0'"),
    "a rank below 1": Refusal(changed(lambda m, t: plan_of(m)["method"].update(rank=-1)), r"it\S+: lora: rank=-1 must"),
    "a seed that is none": Refusal(changed(lambda m, t: plan_of(m).update(seed="0")), "in the place of 1 whole"),
    "a format of text": Refusal(changed(lambda m, t: m.update(format="1")), "format is a str"),
    "a base of numbers": Refusal(changed(lambda m, t: m["base"].update(model=5)), "model=5 must be str"),
    "norms of text": Refusal(changed(lambda m, t: m.update(fingerprint={"a": "x"})), "something else than numbers"),
    "deep JSON": Refusal(
        lambda path: save_file({"a": torch.ones(1)}, path, {"capavision": "[" * 200_000}), "is damaged or no safet"
    ),
} | {
    f"{name} of null": lying(name, f"metadata is damaged .*{name if name in ('fingerprint', 'masks') else ''}")
    for name in ("fingerprint", "masks", "injections", "hosts", "axes", "head", "method")
}  # fmt: skip
REFUSALS |= LIES


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_a_file_that_does_not_fit_is_refused_and_the_model_stays_as_it_was(tmp_path, case):
    path = tmp_path / "it.safetensors"
    case.make(path)
    model = case.model()
    model.patch_embed.requires_grad_(False) if hasattr(model, "patch_embed") else model.train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=case.match):
        cv.load(path, model)
    assert_unchanged(model, before)


def test_a_refusal_gives_batch_norms_back_their_mode(tmp_path):
    path = written(tmp_path / "it.safetensors", adapted(create("test_resnet")))
    rewritten(path, lambda m, t: m.update(masks="0" * 64))
    model = create("test_resnet").train()
    before = snapshot(model)
    with pytest.raises(ValueError, match="its masks could not be rebuilt"):
        cv.load(path, model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, t: m.pop("format"),
        lambda m, t: m.pop("injections"),
        lambda m, t: plan_of(m)["method"].update(ranks=3),
        lambda m, t: plan_of(m).pop("hosts"),
        lambda m, t: plan_of(m).update(hosts={"blocks.0.norm1": {}}),
    ],
    ids=["no format", "no injections", "unknown field", "no hosts", "a host that is none"],
)
def test_metadata_that_was_tampered_with_is_refused_in_words(tmp_path, change):
    path, model = rewritten(written(tmp_path / "it.safetensors"), change), tiny_vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match="safetensors"):
        cv.load(path, model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name", ["cut in the values", "text", "newer format", "a folder", "another program's metadata"]
)
def test_describe_refuses_what_load_refuses(tmp_path, name):
    path = tmp_path / "it.safetensors"
    REFUSALS[name].make(path)
    with pytest.raises(ValueError, match=REFUSALS[name].match):
        cv.describe(path)


def test_a_model_with_folded_adapters_is_refused(tmp_path):
    path = written(tmp_path / "it.safetensors", adapted(tiny_vit(), cv.Adapter(rank=2)))
    model = cv.fold(adapted(tiny_vit(), cv.Adapter(rank=2)))
    before = snapshot(model)
    with pytest.raises(ValueError, match="already carries a delta"):
        cv.load(path, model, check_base=False)
    assert_unchanged(model, before)


def test_another_checkpoint_is_taken_from_who_knows_better(tmp_path):
    path, other = written(tmp_path / "it.safetensors"), tiny_vit(seed=1)
    plain = outputs(other, images())
    assert_moved(outputs(cv.load(path, other, check_base=False), images()), plain)


def test_the_fingerprint_tells_checkpoints_apart_and_forgives_rounding():
    model = tiny_vit()
    known = fingerprint(model)
    assert known.keys() == {name for name in model.state_dict() if not name.startswith("head.")}
    assert fingerprint(adapted(twin(model))) == known
    slightly = twin(model).to(torch.float64)
    assert all(value == pytest.approx(known[name], rel=1e-6) for name, value in fingerprint(slightly).items())
    other = fingerprint(tiny_vit(seed=1))
    differing = [name for name in known if abs(known[name] - other[name]) > 1e-4 * known[name]]
    assert len(differing) >= 10  # every matrix that was drawn


def test_one_other_tensor_is_enough_to_be_refused(tmp_path):
    path, model = written(tmp_path / "it.safetensors"), tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1.001)
    with pytest.raises(ValueError, match=r"1 of \d+ tensors differ, first blocks\.1\.mlp\.fc2\.weight"):
        cv.load(path, model)


@pytest.mark.parametrize("verb", [cv.fold, lambda model: cv.save(model, "never.safetensors")], ids=["fold", "save"])
def test_a_plain_model_has_nothing_to_fold_or_save(vit, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    before = snapshot(vit)
    with pytest.raises(ValueError, match="the model carries no injection, so there is nothing to"):
        verb(vit)
    assert_unchanged(vit, before)
    assert not list(tmp_path.iterdir())


def test_remove_leaves_a_plain_model_alone(vit):
    vit.norm.requires_grad_(False)
    before = snapshot(vit)
    assert cv.remove(vit) is vit
    assert_unchanged(vit, before)


def test_class_names_fit_the_logits(tmp_path):
    model = adapted(tiny_vit(num_classes=2))
    cv.save(model, tmp_path / "it.safetensors", classes=["cat", "dog"])
    with pytest.raises(ValueError, match="3 class names for a model with 2 classes"):
        cv.save(model, tmp_path / "it.safetensors", classes=["cat", "dog", "cow"])
    assert cv.describe(tmp_path / "it.safetensors")["classes"] == ["cat", "dog"]


# Atomic writes -------------------------------------------------------------------------------------------------------


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = written(tmp_path / "it.safetensors")
    old = path.read_bytes()

    def fail(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        written(path, adapted(tiny_vit(), cv.LoRA(rank=2)))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["it.safetensors"]


def test_info_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = written(tmp_path / "it.safetensors")
    old = path.read_bytes()
    with pytest.raises(TypeError, match=r"info goes into the file as JSON.*Tensor is not JSON.*\.tolist\(\)"):
        written(path, info={"mean": torch.zeros(3)})
    with pytest.raises(TypeError, match=r"classes goes into the file as JSON.*ndarray"):
        written(path, classes=np.array(list("abcde")))
    with pytest.raises(TypeError, match="classes='abcde' is one string; pass a list"):
        written(path, classes="abcde")
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["it.safetensors"]


def test_a_model_without_values_is_neither_saved_nor_loaded_onto(tmp_path):
    path = written(tmp_path / "it.safetensors")
    match = "cls_token is on the meta device and holds no values; create"
    with pytest.raises(ValueError, match=match):
        cv.load(path, tiny_vit().to("meta"), check_base=False)
    with pytest.raises(ValueError, match=match):
        written(tmp_path / "never.safetensors", adapted(tiny_vit()).to("meta"))


@pytest.mark.parametrize(
    "verb", [cv.fold, cv.remove, lambda model: cv.save(model, "a"), lambda m: cv.inject(m, METHOD)]
)
def test_what_is_no_model_is_called_so(verb):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not 'a\.safetensors'"):
        verb("a.safetensors")


@pytest.mark.parametrize("settings", [{"alpha": np.float32(3)}, {"alpha": "8"}, {"density": "1"}, {"branches": True}])
def test_settings_that_json_cannot_hold_are_refused_before_training(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}=.* must"):
        cv.LoRA(**settings)


def test_a_seed_that_json_cannot_hold_is_refused_before_training(vit):
    before = snapshot(vit)
    with pytest.raises(TypeError, match=r"seed=.*3.* must be an int"):
        cv.inject(vit, METHOD, seed=np.int64(3))
    assert_unchanged(vit, before)


def test_a_folder_in_the_way_is_an_os_error(tmp_path):
    (tmp_path / "it.safetensors").mkdir()
    with pytest.raises(OSError, match="directory"):
        written(tmp_path / "it.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["it.safetensors"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The kernel refuses to let the file grow, so the bytes run out in the middle of a true write."""
    path = tmp_path / "it.safetensors"
    path.write_bytes(b"old")
    model = nn.Sequential(OrderedDict(q_proj=nn.Linear(64, 64)))
    cv.inject(model, cv.LoRA(rank=64), "q_proj")
    with full_disk(3000), pytest.raises(OSError, match="File too large"):
        cv.save(model, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["it.safetensors"]


# How the base is built -----------------------------------------------------------------------------------------------


def test_weights_may_lie_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPAVISION_CACHE", str(tmp_path))
    trunk = {name: t for name, t in create("test_vit", seed=9).state_dict().items() if not name.startswith("head.")}
    save_file(
        trunk | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}, tmp_path / "mine.safetensors"
    )
    base = Base("test_vit", weights="mine.safetensors")
    model = base.build(5)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in trunk.items())
    assert model.num_classes == 5
    x = images(160)
    again = cv.load(written(tmp_path / "it.safetensors", adapted(model), base=base))
    assert torch.equal(outputs(again, x), outputs(model, x))


@pytest.mark.parametrize(
    ("base", "match"),
    [
        (Base("tst_vit"), "unknown timm model 'tst_vit'; did you mean 'test_vit'"),
        (Base("test_vit", weights="it.safetensors", hint="make it"), "it.safetensors are missing; `make it` makes it"),
        (Base("test_vit", weights="it.safetensors"), "it.safetensors are missing$"),
        (Base("test_vit", weights="../it.safetensors"), r"must name a \.safetensors file in"),
        (Base("test_vit", weights="/it.safetensors"), r"must name a \.safetensors file in"),
        (Base("test_vit", weights="it.pt"), r"must name a \.safetensors file in"),
        (
            Base("test_vit"),
            "pretrained weights of 'test_vit' are not on this machine and could not be fetched .*; take a machine "
            r"that reaches the Hugging Face hub, or Base\(…, weights='random'\), Base\(…, weights='FILE.safetensors'\) "
            r"for a file in .*, or, to load an adapter, a model of your own: load\(path, model=…\)$",
        ),
        (Base("coatnet_0_224"), "timm has no pretrained weights of 'coatnet_0_224'; take another model, or Base"),
    ],
    ids=lambda value: getattr(value, "weights", ""),
)
def test_a_base_that_cannot_be_built_is_refused(base, match):
    assert timm.is_model("test_vit")
    with pytest.raises(ValueError, match=match):
        base.build(5)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vit_small_patch16_224", "trained on other base weights: "),
        ("resnet18", "'blocks.0.attn.qkv', which ResNet lacks"),
    ],
)
def test_a_file_for_another_architecture_names_both(name, why, tmp_path):
    file = written(tmp_path / "it.safetensors", adapted(create("vit_tiny_patch16_224")))
    model = create(name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{why}.*; the file is of vit_tiny_patch16_224, the model a {name}$"):
        cv.load(file, model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="base weights: (?!.*the file is of)"):
        cv.load(file, awaken(create("vit_tiny_patch16_224", seed=3)))


def test_what_building_the_base_refuses_names_the_file(tmp_path):
    file = written(tmp_path / "it.safetensors", base=Base("tst_vit", "random"))
    with pytest.raises(ValueError, match=r"it\.safetensors: unknown timm model 'tst_vit'; did you mean 'test_vit'"):
        cv.load(file)


def test_what_tying_refuses_names_the_file(tmp_path):
    model = tiny_vit()
    cv.tie(model)
    file = written(tmp_path / "it.safetensors", model, base=None)
    with pytest.raises(
        ValueError, match=r"it\.safetensors: no module matches blocks='blocks\.0'; .* the model a resnet18"
    ):
        cv.load(file, create("resnet18"))


SMALL = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
ARGUMENTS = {
    "sizes": ("vit_tiny_patch16_224", SMALL, (32, 32)),
    "an image that is no square": ("vit_tiny_patch16_224", SMALL | {"img_size": (32, 48)}, (32, 48)),
    "pooling": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "class_token": False}, (32, 32)),
    "what no tensor shows": ("test_resnet", {"output_stride": 8}, (64, 64)),
}


@pytest.mark.parametrize("given", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_the_base_are_recorded_and_built_again(tmp_path, given):
    name, kwargs, size = given
    base = Base(name, "random", kwargs=kwargs)
    model, x = adapted(base.build(5)), torch.randn(2, 3, *size)
    path = written(tmp_path / "it.safetensors", model, base=base)
    assert Base(**cv.describe(path)["base"]) == base
    assert torch.equal(outputs(cv.load(path), x), outputs(model, x))


def test_an_image_that_is_no_square_is_derived(tmp_path):
    path = written(tmp_path / "it.safetensors", adapted(create("test_vit", img_size=(32, 48))))
    assert cv.describe(path)["base"]["kwargs"] == {"img_size": [32, 48]}


@pytest.mark.parametrize(
    ("depth", "match"),
    [
        (
            1,
            r"a base of 18 tensors and the model has 30: only this VisionTransformer has blocks\.1\.attn\.proj\.bias; ",
        ),
        (3, r"adapts 'blocks\.2\.attn\.qkv', which VisionTransformer lacks; it was made for vit_tiny_patch16_224; "),
    ],
)
def test_a_base_of_unrecorded_arguments_is_refused_with_the_cure(tmp_path, depth, match):
    model = adapted(tiny_vit(depth=depth))
    path = written(tmp_path / "it.safetensors", model, base=Base("vit_tiny_patch16_224", "random", kwargs=SMALL))
    cure = r"pass it, load\(path, model=…\), or name them to save: base=Base\(…, kwargs={…}\)"
    with pytest.raises(ValueError, match=match + r"create the model with the arguments it had then and " + cure):
        cv.load(path)
    assert torch.equal(outputs(cv.load(path, tiny_vit(depth=depth)), images()), outputs(model, images()))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp"},
        {"pretrained": True},
        {"pretrained_cfg": "hf"},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"features_only": True},
        {"model_cfg": None},
        {"num_classes": 3},
        {"act_layer": nn.ReLU},
        {"depth": [{"a": 1}]},
        ["depth"],
    ],
    ids=str,
)
def test_what_a_file_must_not_ask_of_timm_is_refused(tmp_path, kwargs):
    with pytest.raises(ValueError, match="kwargs"):
        Base("test_vit", "random", kwargs=kwargs)
    if "act_layer" not in kwargs:
        path = written(tmp_path / "it.safetensors", adapted(RANDOM.build(5)), base=RANDOM)
        rewritten(path, lambda m, t: m["base"].update(kwargs=kwargs))
        with pytest.raises(ValueError, match="kwargs"):
            cv.load(path)


def test_an_argument_that_the_architecture_does_not_take_is_refused():
    with pytest.raises(ValueError, match="test_vit takes no argument 'dept'; leave it out of kwargs"):
        Base("test_vit", "random", kwargs={"dept": 2}).build(5)
    with pytest.raises(ValueError, match="kwargs may not hold 'img_size'"):
        Base("test_vit", "random", 96, kwargs={"img_size": 96})


def test_random_weights_depend_on_the_seed_alone():
    first, second = Base("test_vit", "random").build(5), Base("test_vit", "random").build(5)
    other = Base("test_vit", "random", seed=1).build(5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(("name", "takes"), [("test_vit", True), ("test_resnet", False), ("test_convnext", False)])
def test_only_architectures_of_one_input_size_are_told_it(name, takes):
    model = Base(name, "random", img_size=96).build(5)
    assert hasattr(getattr(model, "patch_embed", None), "img_size") == takes
    assert outputs(model, images(96)).shape == (2, 5)


def test_a_copied_model_is_saved_alike(tmp_path):
    model = adapted(tiny_vit())
    first = written(tmp_path / "a.safetensors", model).read_bytes()
    assert written(tmp_path / "b.safetensors", copy.deepcopy(model)).read_bytes() == first


class Sharing(nn.Module):
    """One Linear under two names, as coat's position encodings, and a buffer of infinity, as gemma4's clamps."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.again = nn.ModuleList([self.first])
        self.register_buffer("limit", torch.tensor(float("inf")))

    def forward(self, x):
        return self.head(self.again[0](self.first(x)).clamp(max=self.limit))


def test_a_module_of_two_names_and_an_infinite_buffer_are_no_other_base(tmp_path):
    model = Sharing()
    fresh, x = copy.deepcopy(model), torch.randn(3, 6)
    cv.inject(model, cv.LoRA(rank=2), "first")
    expected = outputs(awaken_deltas(model), x)
    assert_moved(expected, outputs(fresh, x))
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), x), expected)
    with pytest.raises(ValueError, match="other base weights: 2 of 3 tensors differ, first first.bias"):
        cv.load(tmp_path / "it.safetensors", Sharing())
    finite = cv.remove(fresh)
    finite.limit.fill_(3.0)
    with pytest.raises(ValueError, match="other base weights: 1 of 3 tensors differ, first limit"):
        cv.load(tmp_path / "it.safetensors", finite)
