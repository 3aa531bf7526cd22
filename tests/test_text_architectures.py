"""Encoders and decoders of transformers, tiny and random: default hosts, heads, and the promises of every method.

The chain is that of tests/families.py: inject, one training step, save, load on a fresh base, remove, fold.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import capavision as cv
from benchmarks import text_architectures
from benchmarks.text_architectures import ARCHITECTURES, build
from capavision.attention import classifier, query_value_hosts
from capavision.blocks import ends, spans
from capavision.inject import injections
from tests.conftest import (
    answer,
    assert_moved,
    assert_unchanged,
    awaken,
    awaken_deltas,
    deltas,
    outputs,
    seeded,
    snapshot,
    twin,
)
from tests.families import chain
from tests.test_text import batch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@dataclass(frozen=True)
class Case:
    """A tiny configuration, and in its first block, by names relative to it: attention, q and v, houlsby's places."""

    sizes: dict
    block: str
    attention: str
    qv: list[str]
    ends: list[str]
    refused: list[str] = field(default_factory=list)
    head: list[str] = field(default_factory=lambda: ["classifier"])
    parts: str | None = None
    hosts: int = 2  # attentions, q and v of which are adapted


BERT = {
    "attention": "attention.self",
    "qv": ["query", "value"],
    "ends": ["attention.output.dense", "output.dense"],
}
CLIP = {"attention": "self_attn", "qv": ["q_proj", "v_proj"], "ends": ["self_attn", "mlp"], "head": []}
VIT = {"attention": "attention", "qv": ["q_proj", "v_proj"], "ends": ["attention", "mlp"]}
LLAMA = CLIP | {"head": ["score"]}
WHOLE = {"qv": ["query_key_value"], "head": ["score"]}

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SMALL | SPECIAL | {"vocab_size": 50, "max_position_embeddings": 20}
NARROW = TEXT | {"embedding_size": 16}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
DEBERTA = TEXT | {
    "relative_attention": True,
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
DISTIL = SPECIAL | {"vocab_size": 50, "max_position_embeddings": 20, "dim": 32, "n_layers": 2, "n_heads": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {"vocab_size": 50, "max_position_embeddings": 20, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
BART |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")} | SPECIAL
BART |= {f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")}
GPT2 = SPECIAL | {"vocab_size": 50, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
BLOOM = SPECIAL | {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}

CASES = {
    "bert": Case(TEXT, "bert.encoder.layer.0", **BERT),
    "roberta": Case(TEXT, "roberta.encoder.layer.0", **BERT),
    "xlm-roberta": Case(TEXT, "roberta.encoder.layer.0", **BERT),
    "deberta-v2": Case(
        DEBERTA,
        "deberta.encoder.layer.0",
        "attention.self",
        ["query_proj", "value_proj"],
        BERT["ends"],
        ["prefix"],
        ["classifier", "pooler"],
    ),
    "distilbert": Case(
        DISTIL | {"hidden_dim": 64},
        "distilbert.transformer.layer.0",
        "attention",
        ["q_lin", "v_lin"],
        ["attention", "ffn"],
        head=["classifier", "pre_classifier"],
    ),
    "albert": Case(
        NARROW,
        "albert.encoder.albert_layer_groups.0.albert_layers.0",
        "attention",
        ["query", "value"],
        ["attention", "ffn_output"],
        hosts=1,
    ),
    "electra": Case(NARROW, "electra.encoder.layer.0", **BERT),
    "mpnet": Case(
        TEXT,
        "mpnet.encoder.layer.0",
        "attention.attn",
        ["q", "v"],
        ["attention.attn", "output.dense"],
        ["prefix"],
    ),
    "modernbert": Case(
        TEXT | {"cls_token_id": 1, "sep_token_id": 2}, "model.layers.0", "attn", ["Wqkv"], ["attn", "mlp"], parts="qv"
    ),
    "t5": Case(
        T5,
        "encoder.block.0",
        "layer.0.SelfAttention",
        ["q", "v"],
        ["layer.0.SelfAttention", "layer.1.DenseReluDense"],
        head=[],
    ),
    "bart": Case(
        BART,
        "model.encoder.layers.0",
        "self_attn",
        ["q_proj", "v_proj"],
        ["self_attn", "fc2"],
        head=["classification_head"],
        hosts=6,  # a decoder's layer has two
    ),
    "clip_text_model": Case(TEXT, "encoder.layers.0", **CLIP),
    "clip_vision_model": Case(IMAGE, "encoder.layers.0", **CLIP),
    "siglip_text_model": Case(TEXT, "encoder.layers.0", **CLIP | {"head": ["head"]}),
    "siglip_vision_model": Case(IMAGE, "encoder.layers.0", **CLIP | {"head": ["head"]}),
    "siglip": Case(
        {"vision_config": IMAGE, "text_config": TEXT},
        "vision_model.encoder.layers.0",
        **CLIP | {"head": ["classifier"]},
    ),
    "vit": Case(IMAGE, "vit.layers.0", **VIT),
    "dinov2": Case(IMAGE | {"mlp_ratio": 2}, "dinov2.encoder.layer.0", **VIT),
    "llama": Case(GROUPED, "model.layers.0", **LLAMA),
    "mistral": Case(GROUPED, "model.layers.0", **LLAMA),
    "qwen2": Case(GROUPED, "model.layers.0", **LLAMA),
    "qwen3": Case(GROUPED, "model.layers.0", **LLAMA),
    "phi3": Case(GROUPED, "model.layers.0", **LLAMA | {"qv": ["qkv_proj"]}),
    "gpt_neox": Case(TEXT, "gpt_neox.layers.0", "attention", ends=["attention", "mlp"], **WHOLE),
    "falcon": Case(TEXT, "transformer.h.0", "self_attention", ends=["self_attention", "mlp"], **WHOLE),
    "bloom": Case(
        BLOOM, "transformer.h.0", "self_attention", ends=["self_attention", "mlp"], refused=["prefix"], **WHOLE
    ),
    "gpt2": Case(GPT2, "transformer.h.0", "attn", [], ["attn", "mlp"], ["LoRA"], ["score"]),
}
KINDS = ARCHITECTURES | {"bart": "BartForSequenceClassification"}
WIDE = {"initializer_range": 0.3, "initializer_factor": 3.0}  # far from 0, as awake as trained weights


def tiny(name):
    model = seeded(lambda: awaken(build(KINDS[name], **WIDE | CASES[name].sizes)))
    return model.double().eval()


def example(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": seeded(lambda: torch.randn(2, 3, 16, 16, dtype=torch.float64))}
    return batch(filling=0)


METHODS = {
    "LoRA": (cv.LoRA(rank=2, branches=2), None),
    "LoRA of every Linear": (cv.LoRA(rank=2, branches=2), "linear"),
    "pfeiffer": (cv.Adapter(rank=4, branches=2, activation="gelu"), None),
    "houlsby": (cv.Adapter(rank=4, branches=2, activation="silu", where="houlsby"), None),
    "parallel": (cv.Adapter(rank=4, branches=2, activation="gelu", where="parallel"), None),
    "parallel, structured": (cv.Toeplitz(where="parallel"), None),
    "prefix": (cv.Prefix(length=3, branches=2), None),
}
REFUSED = {
    "LoRA": "GPT2ForSequenceClassification has no default host for LoRA, only Conv1D; put nn.Linears that compute the",
    "LoRA of every Linear": "'linear' matches no Linear .*, only Conv1D; put nn.Linears that compute the same",
    "prefix": r"computes its softmax in a way of its own \(no scaled_dot_product_attention in its forward\)",
}


def test_the_classifiers_own_mlp_takes_no_adapter():
    model = tiny("siglip_vision_model")
    assert "mlp" in dict(model.head.named_children())
    for where in ("pfeiffer", "houlsby", "parallel"):
        report = cv.inject(twin(model), cv.Adapter(rank=4, where=where), example=example(model))
        assert all(host.startswith("encoder.layers.") for host in report.hosts)


def test_every_architecture_of_the_document_is_tested():
    assert CASES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("name", CASES)
def test_q_and_v_the_head_and_the_ends_are_found(name):
    case, model = CASES[name], tiny(name)
    hosts, block = query_value_hosts(model), f"{case.block}."
    first = [host for host in hosts if host.startswith(block)]
    assert sorted(first) == [f"{block}{case.attention}.{projection}" for projection in case.qv]
    assert len(hosts) == case.hosts * len(case.qv)
    assert set(hosts.values()) <= {case.parts}
    assert list(classifier(model)) == case.head
    assert [end for end in ends(model) if end.startswith(block)] == [block + end for end in case.ends]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_the_promises_are_kept(name, method, tmp_path):
    model, (settings, targets) = tiny(name), METHODS[method]
    if any(method.startswith(refused) for refused in CASES[name].refused):
        before = snapshot(model)
        with pytest.raises(ValueError, match=REFUSED[method]):
            cv.inject(model, settings, targets, example=example(model))
        assert_unchanged(model, before)
        return
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    inside = {m for head in classifier(model).values() for m in head.modules()}
    expected = len(settings.targets(model)) if targets is None else len(set(linears) - inside)
    outcome = chain(model, example(model), settings, targets, tmp_path / "it.safetensors")
    assert outcome.hosts == expected
    assert not outcome.unused or "siglip" in name  # whose pooling may not reach the output


class Softmax(TorchFunctionMode):
    """Keeps q, k, v and the mask of every call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.calls.append([named.get(part) for part in ("query", "key", "value", "attn_mask")])
        return func(*args, **(kwargs or {}))


def first_softmax(model):
    with Softmax() as softmax:
        outputs(model, example(model))
    return softmax.calls[0]


WHOLE_HOSTS = ["phi3", "gpt_neox", "falcon", "bloom"]
OWN_SOFTMAX = [name for name, case in CASES.items() if "prefix" in case.refused]
SEPARATE = [name for name in CASES if name not in [*WHOLE_HOSTS, *OWN_SOFTMAX, "gpt2"]]


@pytest.mark.parametrize("name", SEPARATE)
def test_the_default_moves_q_and_v_and_leaves_k(name):
    """Seen where the first attention calls its softmax, behind heads, norms and rotations."""
    model = tiny(name)
    q, k, v, _ = first_softmax(model)
    cv.inject(model, cv.LoRA(rank=2))
    adapted = first_softmax(awaken_deltas(model))
    assert torch.equal(adapted[1], k)
    assert_moved(adapted[0], q)
    assert_moved(adapted[2], v)


@pytest.mark.parametrize("name", WHOLE_HOSTS)
def test_rows_that_lie_head_by_head_are_adapted_whole(name):
    model = tiny(name)
    cv.inject(model, cv.LoRA(rank=2))
    hosts = injections(model)[0].hosts
    assert list(hosts.values()) == [{}, {}]
    with pytest.raises(ValueError, match="not known to hold q"):
        cv.inject(cv.remove(model), cv.LoRA(rank=2), list(hosts), "q")


@pytest.mark.parametrize(
    ("kind", "sizes", "fused"),
    [
        ("GPTBigCodeModel", GPT2 | {"multi_query": True}, "h.0.attn.c_attn"),
        ("GPTBigCodeModel", GPT2 | {"multi_query": False}, "h.0.attn.c_attn"),
        ("CodeGenModel", GPT2 | {"rotary_dim": 4}, "h.0.attn.qkv_proj"),
        ("MiniMaxModel", TEXT | {"num_local_experts": 2}, "layers.1.self_attn.qkv_proj"),
    ],
)
def test_rows_of_the_shape_of_q_k_v_but_head_by_head_are_adapted_whole(kind, sizes, fused):
    assert query_value_hosts(build(kind, **sizes)).get(fused, "not a host") is None


def test_the_one_layer_of_albert_is_adapted_at_every_depth():
    model, calls = tiny("albert"), []
    (query, _) = cv.inject(model, cv.LoRA(rank=2)).hosts
    model.get_submodule(query).register_forward_hook(lambda *_: calls.append(1))
    outputs(model, example(model))
    assert len(calls) == model.config.num_hidden_layers == 2


def test_gpt2_with_linears_in_the_places_of_its_own_class_is_adapted_at_q_and_v():
    model = tiny("gpt2")
    x, plain, (q, k, v, _) = example(model), outputs(model, example(model)), first_softmax(model)
    with pytest.raises(ValueError, match="'c_attn' matches no Linear .*, only Conv1D; put nn.Linears that compute the"):
        cv.inject(model, cv.LoRA(), "c_attn")
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":
            linear = nn.Linear(*layer.weight.shape, dtype=torch.float64)
            linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
            model.set_submodule(name, linear)
    torch.testing.assert_close(outputs(model, x), plain, rtol=1e-10, atol=1e-10)
    cv.inject(model, cv.LoRA(rank=2))
    assert injections(model)[0].hosts["transformer.h.0.attn.c_attn"] == {"q": (0, 32), "v": (64, 96)}
    adapted = first_softmax(awaken_deltas(model))
    torch.testing.assert_close(adapted[1], k, rtol=1e-10, atol=1e-10)
    assert_moved(adapted[0], q)
    assert_moved(adapted[2], v)


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deberta-v2", "distilbert"])
def test_what_stands_before_the_classifier_is_trained_and_saved_with_it(name, tmp_path):
    """A fresh base has another pooler, as random as its classifier."""
    model, other = tiny(name), CASES[name].head[1]
    fresh = twin(model)
    for part in fresh.get_submodule(other).parameters():
        nn.init.normal_(part)
    cv.inject(model, cv.LoRA(rank=2), "linear")
    assert all(p.requires_grad for p in model.get_submodule(other).parameters())
    expected = outputs(awaken_deltas(model), example(model))
    assert_moved(outputs(fresh, example(model)), expected)
    cv.save(model, tmp_path / "it.safetensors")
    assert torch.equal(outputs(cv.load(tmp_path / "it.safetensors", fresh), example(model)), expected)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("BertForQuestionAnswering", ["qa_outputs"]),
        ("DebertaV2ForQuestionAnswering", ["qa_outputs"]),
        ("T5ForSequenceClassification", ["classification_head"]),
        ("BertForMaskedLM", []),
        ("BertModel", []),  # whose pooler is its own
        ("LlamaForCausalLM", ["lm_head"]),
    ],
)
def test_the_head_of_a_model_of_transformers(kind, head):
    with torch.device("meta"):
        assert list(classifier(build(kind))) == head


# Adapters ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The parts of a layer that ends in LayerNorm(MLP + residual), by name, and each place's hosts: norm by norm."""

    out: str
    norm: str
    up: str
    down: str
    last: str
    places: dict[str, tuple[str, ...]]


OF_BERT = Layer(
    out="attention.output.dense",
    norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    last="output.LayerNorm",
    places={
        "pfeiffer": ("",),
        "houlsby": ("attention.output.dense", "output.dense"),
        "parallel": ("output.dense",),
    },
)
OF_DISTILBERT = Layer(
    out="attention.out_lin",
    norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    last="output_layer_norm",
    places={"pfeiffer": ("",), "houlsby": ("attention", "ffn"), "parallel": ("ffn",)},
)
LAYERS = dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "deberta-v2"], OF_BERT)
LAYERS |= {"distilbert": OF_DISTILBERT}


def bottleneck(delta, h):
    """Σ_i (U ⊙ M_i) gelu((D ⊙ N_i) h + b_D) + b_U, branch by branch."""
    D, U = delta.D, delta.U
    branches = [(D.value * D.mask[i], U.value * U.mask[:, i]) for i in (0, 1)]
    return sum(F.gelu(h @ down.T + delta.b_D) @ up.T for down, up in branches) + delta.b_U


def layer_by_hand(layer, names, place, x, context):
    """The layer's output from its input and from what its heads read, concatenated."""

    def linear(name, x):
        part = layer.get_submodule(name)
        return x @ part.weight.T + part.bias

    def norm(name, x):
        part = layer.get_submodule(name)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + part.eps).sqrt() * part.weight + part.bias

    hosts = [layer.get_submodule(host).delta for host in names.places[place]]
    attended = linear(names.out, context)
    if place == "houlsby":
        attended = attended + bottleneck(hosts[0], attended)
    middle = norm(names.norm, x + attended)
    mlp = linear(names.down, F.gelu(linear(names.up, middle)))
    if place == "houlsby":
        mlp = mlp + bottleneck(hosts[1], mlp)
    if place == "parallel":
        mlp = mlp + bottleneck(hosts[0], middle)
    y = norm(names.last, middle + mlp)
    return y + bottleneck(hosts[0], y) if place == "pfeiffer" else y


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, names in LAYERS.items() for place in names.places])
def test_adapters_stand_where_the_papers_have_them(name, place):
    model, names, block = tiny(name), LAYERS[name], CASES[name].block
    plain = outputs(model, example(model))
    report = cv.inject(model, cv.Adapter(rank=4, branches=2, activation="gelu", where=place), example=example(model))
    mine = tuple(host for host in report.hosts if f"{host}.".startswith(f"{block}."))
    assert set(mine) == {f"{block}.{host}".rstrip(".") for host in names.places[place]}
    assert_moved(outputs(awaken_deltas(model), example(model)), plain)
    layer, seen = model.get_submodule(block), {}
    layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y[0] if isinstance(y, tuple) else y))
    layer.get_submodule(names.out).register_forward_pre_hook(lambda _, args: seen.update(context=args[0]))
    outputs(model, example(model))
    with torch.no_grad():
        expected = layer_by_hand(layer, names, place, seen["x"], seen["context"])
    torch.testing.assert_close(seen["y"], expected, rtol=1e-10, atol=1e-10)


SPANNED = {
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "deberta-v2", "electra", "mpnet"], "intermediate.dense"),
    **{"albert": "ffn", "bart": "fc1"},
}


@pytest.mark.parametrize("name", CASES)
def test_an_mlp_that_is_no_module_is_spanned_and_trains(name):
    """From the first of its layers to the second, in the encoders where it is two."""
    model, case = tiny(name), CASES[name]
    assert spans(model).get(f"{case.block}.{case.ends[-1]}") == (
        f"{case.block}.{SPANNED[name]}" if name in SPANNED else None
    )
    if name not in SPANNED:
        assert not spans(model)
        return
    cv.inject(model, METHODS["parallel"][0], example=example(model))
    assert injections(model)[0].starts == spans(model)
    goal = seeded(lambda: torch.randn_like(outputs(model, example(model))))
    optimizer = torch.optim.Adam([p for delta in deltas(model).values() for p in delta.parameters()], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(F.mse_loss(answer(model, example(model)), goal))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


# Prefixes ------------------------------------------------------------------------------------------------------------


def test_a_prefix_whose_softmax_never_comes_by_is_refused(tmp_path):
    """Else a switch to eager attention, or an eager base, would drop it silently."""
    model = tiny("bert")
    eager = twin(model)
    cv.inject(model, cv.Prefix(), example=example(model))
    cv.save(model, tmp_path / "it.safetensors")
    eager.set_attn_implementation("eager")
    cv.load(tmp_path / "it.safetensors", eager)
    model.set_attn_implementation("eager")
    for each in (model, eager):
        with pytest.raises(ValueError, match=r"BertSelfAttention .*set_attn_implementation\('sdpa'\).*do nothing"):
            outputs(each, example(model))
    model.set_attn_implementation("sdpa")
    outputs(model, example(model))


READERS = ["bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "modernbert", "t5", "clip_text_model"]


@pytest.mark.parametrize("name", [*READERS, "bart", "llama"])
def test_a_prefix_stands_before_the_keys_and_no_mask_hides_it(name):
    """Masked views one after the other, the attention's own keys and their mask of padding or positions as before."""
    model = tiny(name)
    q, k, v, mask = first_softmax(model)
    first = cv.inject(model, cv.Prefix(length=3, branches=2), example=example(model)).hosts[0]
    delta, found = model.get_submodule(first).delta, first_softmax(awaken_deltas(model))
    assert torch.equal(found[0], q)
    for factor, (before, after) in zip((delta.K, delta.V), ((k, found[1]), (v, found[2])), strict=True):
        views = torch.cat([factor.value * factor.mask[i] for i in (0, 1)])
        prefix = torch.stack(views.split(before.shape[-1], dim=1))  # heads first
        assert torch.equal(after[:, :, :6], prefix.expand(2, -1, -1, -1))
        assert torch.equal(after[:, :, 6:], before)
    assert mask is not None
    there = True if mask.dtype is torch.bool else 0
    assert (found[3][..., :6] == there).all()
    assert torch.equal(found[3][..., 6:], mask)


@pytest.mark.parametrize("name", READERS)
def test_behind_a_prefix_padding_is_not_seen(name):
    model = tiny(name)
    plain = outputs(model, batch())
    cv.inject(model, cv.Prefix(length=3, branches=2), example=batch())
    found, other = (outputs(awaken_deltas(model), batch(filling)) for filling in (5, 8))
    if found.ndim > 2:  # a padded token's own output is free to differ
        found, other, plain = (y[batch()["attention_mask"].bool()] for y in (found, other, plain))
    torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10)
    assert_moved(found, plain)


# The document --------------------------------------------------------------------------------------------------------


def test_the_document_says_what_was_chosen_and_where_peft_differs(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "text_architectures.md"
    rows = text_architectures.main(["--architectures", "distilbert,gpt2", "--out", str(out)])
    found = {(row.architecture, row.method): row for row in rows}
    assert found["distilbert", "LoRA"].which == "`distilbert.transformer.layer.*.attention.{q_lin,v_lin}`"
    assert found["distilbert", "LoRA"].trained == 6 * 2 * 8 * (768 + 768)
    assert found["gpt2", "LoRA"].which.startswith("refused: GPT2ForSequenceClassification has no default host")
    assert found["gpt2", "Prefix"].trained == 12 * 10 * 2 * 768
    written, printed = out.read_text(), capsys.readouterr().out
    assert f"transformers {transformers.__version__}" in written
    for text in (written, printed):
        assert "| none | `classifier`, `pre_classifier` | `classifier`, `pre_classifier` | all |" in text
        assert "| refused | `transformer.h.*.attn.c_attn` | `score` | `score` | all but LoRA |" in text


@pytest.mark.parametrize(("name", "trained"), [("deberta-v2", ["classifier"]), ("bart", [])])
def test_peft_leaves_heads_of_other_names_at_their_random_start(name, trained):
    pytest.importorskip("peft")
    assert text_architectures.peft_choice(tiny(name), [], CASES[name].head)[1] == trained


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="--architectures: 'berd' is unknown; did you mean 'bert'"):
        text_architectures.main(["--architectures", "berd"])
