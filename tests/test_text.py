"""Text encoders of transformers, randomly initialised: prefixes against the equation, adapters, LoRA, padded batches.

Their parents pass hidden_states by name in places, q, k and v are Linears of their own, and a batch is a mapping.
"""

import math

import pytest
import torch

import capavision as cv
from capavision.attention import classifier
from tests.conftest import assert_moved, assert_unchanged, awaken, awaken_deltas, deltas, seeded, snapshot, twin

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
ENCODERS = {
    "bert": ("BertConfig", "BertModel", SMALL),
    "bert with a classifier": ("BertConfig", "BertForSequenceClassification", SMALL),
    "roberta": ("RobertaConfig", "RobertaModel", SMALL),
    "distilbert": ("DistilBertConfig", "DistilBertModel", DISTIL),
    "clip": ("CLIPTextConfig", "CLIPTextModel", SMALL),  # causal, and passes hidden_states by name
}
METHODS = {
    "LoRA": (cv.LoRA(rank=2, branches=2), None),
    "circulant": (cv.Circulant(), None),
    "prefix": (cv.Prefix(length=3, branches=2), None),
    "houlsby adapter": (cv.Adapter(rank=4, where="houlsby", activation="silu"), None),
    "adapter after layers": (cv.Adapter(rank=4, activation="gelu"), "*layer*.?"),
    "adapter beside attention": (cv.Adapter(rank=4, where="parallel", activation="gelu"), "attention"),
}


def encoder(name="bert", attention="sdpa"):
    config, model, sizes = ENCODERS[name]
    config = getattr(transformers, config)(vocab_size=50, max_position_embeddings=20, initializer_range=0.3, **sizes)
    config._attn_implementation = attention
    return seeded(lambda: awaken(getattr(transformers, model)(config))).double().eval()


def batch(filling=5):
    """Two sentences of 7 and 4 tokens, padded to 7."""
    ids = torch.tensor([[9, 8, 7, 6, 5, 4, 2], [4, 5, 6, 2, *[filling] * 3]])
    return {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4]])).long()}


def run(model, tokens):
    with torch.no_grad():
        return model(**tokens)[0]


def by_hand(q, keys, values, seen):
    """softmax(q kᵀ / √d) v of one query over the keys it may see."""
    scores = [float(q @ key) / math.sqrt(len(q)) for key in keys]
    weights = [math.exp(score) if there else 0.0 for score, there in zip(scores, seen, strict=True)]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("branches", [1, 2])
def test_a_prefix_of_bert_is_seen_by_every_query_and_padding_by_none(branches):
    model, tokens = encoder(), batch()
    report = cv.inject(model, cv.Prefix(length=3, branches=branches), example=tokens)
    assert report.hosts == tuple(f"encoder.layer.{i}.attention.self" for i in (0, 1))
    awaken_deltas(model)
    attention, calls = model.encoder.layer[1].attention.self, []
    attention.register_forward_hook(lambda _, args, output: calls.append((args[0], output[0])))
    run(model, tokens)
    (x, found), delta = calls[0], attention.delta
    views = [[P.value * P.mask[i] for i in range(branches)] if branches > 1 else [P.value] for P in (delta.K, delta.V)]
    P_k, P_v = (torch.cat(masked).detach() for masked in views)
    q, k, v = (x @ p.weight.T + p.bias for p in (attention.query, attention.key, attention.value))
    for sentence in range(2):
        seen = [1] * len(P_k) + tokens["attention_mask"][sentence].tolist()
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            keys, values = (torch.cat([P[:, part], y[sentence][:, part]]) for P, y in ((P_k, k), (P_v, v)))
            for token in range(7):
                expected = by_hand(q[sentence, token, part], keys, values, seen)
                torch.testing.assert_close(found[sentence, token, part], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_are_adapted_saved_folded_and_restored(name, method, tmp_path):
    model, tokens = encoder(name), batch()
    fresh, before, plain = twin(model), snapshot(model), run(model, tokens)
    assert len(cv.inject(model, *METHODS[method], example=tokens).hosts) >= 2
    if method != "prefix":
        assert torch.equal(run(model, tokens), plain)
    awaken_deltas(model)
    expected = run(model, tokens)
    assert_moved(expected, plain)
    if "layers" not in method and "classifier" not in name:  # a padded token's own output is free to differ
        kept = tokens["attention_mask"].bool()
        torch.testing.assert_close(run(model, batch(filling=8))[kept], expected[kept], rtol=1e-9, atol=1e-9)
    model.train()(**tokens)[0].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for delta in deltas(model).values() for p in delta.parameters())
    cv.save(model.eval(), tmp_path / "it.safetensors")
    assert torch.equal(run(cv.load(tmp_path / "it.safetensors", fresh), tokens), expected)
    torch.testing.assert_close(run(cv.fold(fresh), tokens), expected, rtol=1e-9, atol=1e-9)
    cv.remove(model)
    assert_unchanged(model, before)
    assert torch.equal(run(model, tokens), plain)


def test_houlsbys_places_in_bert_by_name():
    """After the projections that end attention and MLP, before the residual sum and its norm."""
    model = encoder()
    report = cv.inject(model, cv.Adapter(where="houlsby"), "encoder.*output.dense", example=batch())
    ends = ("attention.output.dense", "output.dense")
    assert report.hosts == tuple(f"encoder.layer.{i}.{end}" for i in (0, 1) for end in ends)


def test_the_head_of_a_text_classifier_is_trained():
    model = encoder("bert with a classifier")
    cv.inject(model, cv.LinearProbe())
    assert list(classifier(model)) == ["classifier"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_an_eager_attention_is_refused_with_the_cure():
    model = encoder(attention="eager")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"computes its softmax in a way of .*set_attn_implementation\('sdpa'\)"):
        cv.inject(model, cv.Prefix(), example=batch())
    assert_unchanged(model, before)
    model.set_attn_implementation("sdpa")
    assert cv.inject(model, cv.Prefix(), example=batch()).hosts


def test_a_batch_by_name_serves_as_the_example_and_one_by_place_does():
    tokens, sizes = batch(), []
    for example in (tokens, tokens["input_ids"], transformers.BatchEncoding(tokens)):
        model = encoder()
        cv.inject(model, cv.Adapter(where="houlsby"), example=example)
        sizes.append([tuple(p.shape) for delta in deltas(model).values() for p in delta.parameters()])
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_lora_of_bert_goes_to_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokens = encoder("bert with a classifier"), batch()
    theirs, again = twin(model), twin(model)
    plain = run(model, tokens)
    cv.inject(model, cv.LoRA(rank=2, branches=2))
    expected = run(awaken_deltas(model), tokens)
    assert_moved(expected, plain)
    cv.to_peft(model, tmp_path / "adapter", example=tokens)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").double().eval()
    torch.testing.assert_close(run(theirs, tokens), expected, rtol=1e-6, atol=1e-6)  # PEFT makes its layers in float32
    again = cv.from_peft(tmp_path / "adapter", again, example=tokens)
    torch.testing.assert_close(run(again, tokens), expected, rtol=1e-6, atol=1e-6)
