"""Adapters beside an MLP that is two modules: BERT's intermediate.dense and output.dense, ALBERT's, BART's."""

import gc
import io
import json
import math
import threading
import weakref
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import capavision as cv
from capavision.blocks import spans
from capavision.channels import measure
from capavision.inject import injections
from export.graph import folded, traced
from export.runtime import relative_error
from export.session import plain as session
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
    twin,
)
from tests.test_adapter import drawn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64
BESIDE = cv.Adapter(rank=4, branches=2, activation="gelu", where="parallel")
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"vocab_size": 20, "max_position_embeddings": 16, "initializer_range": 0.4}
FIRST = "bert.encoder.layer.0"
STARTS = {f"bert.encoder.layer.{i}.output.dense": f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)}


def bert(kind="Bert", **sizes):
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    return awaken(model).double().eval()


def base(kind="Bert", **sizes):
    return seeded(lambda: bert(kind, **sizes))


def ids(seed=0, length=6):
    return {"input_ids": seeded(lambda: torch.randint(3, 20, (2, length)), seed)}


def beside(model, method=BESIDE, targets=None):
    cv.inject(model, method, targets, example=ids())
    return awaken_deltas(model)


@pytest.fixture
def model():
    return beside(base())


# The equation --------------------------------------------------------------------------------------------------------


def gelu(z):
    return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))


def affine(W, b, x):
    return [sum(w * c for w, c in zip(row, x, strict=True)) + shift for row, shift in zip(W, b, strict=True)]


def token_by_hand(parts, delta, x):
    """LayerNorm(W_2 gelu(W_1 x + b_1) + b_2 + Δ(x) + x) of one token, every sum a loop."""
    y = affine(*parts["down"], [gelu(z) for z in affine(*parts["up"], x)])
    for o in range(len(y)):
        total = delta["b_U"][o]
        for N, M in zip(delta["N"], delta["M"], strict=True):
            for k in range(len(delta["D"])):
                inner = sum(delta["D"][k][c] * N[k][c] * x[c] for c in range(len(x))) + delta["b_D"][k]
                total += delta["U"][o][k] * M[o][k] * gelu(inner)
        y[o] += delta["scale"] * total + x[o]
    mean = sum(y) / len(y)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in y) / len(y) + parts["eps"])
    gain, shift = parts["norm"]
    return [g * (v - mean) / deviation + s for g, v, s in zip(gain, y, shift, strict=True)]


@pytest.mark.parametrize(
    "method",
    [
        cv.Adapter(rank=3, activation="gelu", where="parallel", scale=0.7),
        cv.Adapter(rank=4, branches=2, activation="gelu", where="parallel"),
        cv.Adapter(rank=4, branches=2, masks="complementary", activation="gelu", where="parallel", scale=2.0),
    ],
    ids=str,
)
def test_every_entry_of_berts_layer_is_the_equations(method):
    model = base()
    unadapted = outputs(model, ids())
    assert_moved(outputs(beside(model, method), ids()), unadapted)
    layer, seen = model.get_submodule(FIRST), {}
    layer.attention.register_forward_hook(lambda _, args, output: seen.update(x=output[0]))
    layer.output.register_forward_hook(lambda _, args, output: seen.update(y=output))
    outputs(model, ids())
    lists = lambda m: (m._parameters["weight"].tolist(), m.bias.tolist())  # noqa: E731
    norm, delta = layer.output.LayerNorm, layer.output.dense.delta
    parts = {"up": lists(layer.intermediate.dense), "down": lists(layer.output.dense), "norm": lists(norm)}
    name = f"{FIRST}.output.dense"
    values = {
        "D": delta.D.value.tolist(),
        "U": delta.U.value.tolist(),
        "b_D": delta.b_D.tolist(),
        "b_U": delta.b_U.tolist(),
        "N": drawn(method, "D", (method.rank, 8), name).tolist(),
        "M": drawn(method, "U", (8, method.rank), name).tolist(),
        "scale": method.scale,
    }
    rows = [token_by_hand(parts | {"eps": norm.eps}, values, x) for x in seen["x"].flatten(0, 1).tolist()]
    torch.testing.assert_close(seen["y"], torch.tensor(rows, dtype=torch.float64).view_as(seen["y"]), **EXACT)


@pytest.mark.parametrize("kind", ["Bert", "Albert"])
def test_a_forward_by_chunks_gives_the_same(kind):
    whole = beside(base(kind))
    chunked = beside(base(kind, chunk_size_feed_forward=2))
    calls = []
    next(iter(deltas(chunked).values())).register_forward_hook(lambda _, args, y: calls.append(y.shape))
    found = outputs(chunked, ids())
    assert [shape[1] for shape in calls] == [2] * len(calls)
    assert len(calls) == 3 * (2 if kind == "Albert" else 1)
    torch.testing.assert_close(found, outputs(whole, ids()), **EXACT)
    assert_moved(found, outputs(base(kind), ids()))


def test_the_one_layer_of_albert_reads_its_own_input_at_every_depth():
    model = beside(base("Albert"))
    (delta,) = deltas(model).values()
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    read, attended = [], []
    delta.register_forward_hook(lambda _, args, y: read.append(args[0]))
    layer.attention.register_forward_hook(lambda _, args, y: attended.append(y[0]))
    outputs(model, ids())
    assert len(read) == 2
    assert all(map(torch.equal, read, attended))
    assert_moved(*read)


# What may come between -----------------------------------------------------------------------------------------------


def gradients(model):
    model.zero_grad()
    loss = seeded(lambda: model.train()(**ids())[0].square().sum())
    backward = threading.Thread(target=loss.backward)  # a GPU's runs in a thread of its own, too
    backward.start()
    backward.join()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(forward, reentrant):
    return lambda *args, **kwargs: checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["Bert", "Albert"])
def test_gradient_checkpointing_passes_x_again(kind, reentrant):
    """An x of the first pass would lead no gradient below it."""
    model = beside(base(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    expected = gradients(model)
    model.enable_input_require_grads()
    for layer in [m for m in model.modules() if type(m).__name__ in ("BertLayer", "AlbertLayer")]:
        layer.forward = checkpointed(layer.forward, reentrant)
    calls = []
    for delta in deltas(model).values():
        delta.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model)
    assert len(calls) == 4, "nothing was computed again, so this test would prove nothing"
    assert found.keys() >= expected.keys()
    assert any(name.endswith("delta.D.value") for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT)


def test_threads_that_share_a_model_do_not_share_its_x(model):
    """Both stand between the two modules before either goes on."""
    batches = [ids(seed) for seed in (0, 1)]
    expected = [outputs(model, batch) for batch in batches]
    assert_moved(*expected)
    barrier, found = threading.Barrier(2, timeout=20), {}

    def wait(*_):
        barrier.wait()

    def run(at):
        with torch.no_grad():
            found[at] = model(**batches[at])[0]

    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(wait)
    threads = [threading.Thread(target=run, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[at], expected[at]) for at in (0, 1))


def test_after_an_error_between_the_two_the_next_forward_is_right(model):
    expected, seen = outputs(model, ids(1)), []
    intermediate = model.get_submodule(FIRST).intermediate

    def fail(_, args, y):
        seen.append(weakref.ref(args[0]))
        raise MemoryError

    hook = intermediate.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        outputs(model, ids())
    hook.remove()
    assert torch.equal(outputs(model, ids(1)), expected)
    gc.collect()
    assert seen[0]() is None


@pytest.mark.parametrize("training", [False, True])
def test_no_x_is_kept_behind_a_forward(model, training):
    seen = []
    for layer in model.bert.encoder.layer:
        layer.attention.register_forward_hook(lambda _, args, y: seen.append(weakref.ref(y[0])))
    if training:
        model.train()(**ids())[0].sum().backward()
    else:
        outputs(model, ids())
    gc.collect()
    assert len(seen) == 2
    assert all(x() is None for x in seen)


def test_the_end_alone_is_refused(model):
    end = model.get_submodule(FIRST).output.dense
    with pytest.raises(ValueError, match=r"0\.output\.dense ran, and bert.*0\.intermediate\.dense, whose input its"):
        end(torch.zeros(1, 12).double())
    outputs(model, ids())
    with pytest.raises(ValueError, match="not before it in this thread; run both, as the model does"):
        end(torch.zeros(1, 12).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(dtype):
    exact = beside(base())
    model = beside(base().to(dtype))
    assert all(p.dtype is torch.float32 for delta in deltas(model).values() for p in delta.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        found = outputs(model, ids())
    expected, plain = outputs(exact, ids()), outputs(base(), ids())
    assert (found - expected).norm() < 0.2 * (expected - plain).norm()


@pytest.mark.parametrize("part", [None, "intermediate", "output"])
def test_a_compiled_model_computes_the_same(model, part):
    expected = outputs(model, ids())
    if part is None:
        model = torch.compile(model, backend="eager", fullgraph=True)
    else:
        for layer in model.bert.encoder.layer:
            layer.get_submodule(part).compile(backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(outputs(model, ids()), expected, **EXACT)


def test_copies_and_pickles_have_an_x_of_their_own(model):
    expected, file = outputs(model, ids()), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied, loaded = twin(model), torch.load(file, weights_only=False)

    def run_another(*_):
        outputs(copied, ids(1))

    model.get_submodule(FIRST).intermediate.register_forward_hook(run_another)
    for each in (copied, loaded, model):
        assert torch.equal(outputs(each, ids()), expected)
    with torch.no_grad():
        next(iter(deltas(copied).values())).U.value.mul_(2)
    assert_moved(outputs(copied, ids()), expected)
    assert torch.equal(outputs(model, ids()), expected)


# Hosts ---------------------------------------------------------------------------------------------------------------


def test_the_hosts_are_the_ends_and_the_report_says_where_x_is_from():
    model = base()
    report = cv.inject(model, BESIDE, example=ids())
    assert report.hosts == tuple(STARTS)
    assert injections(model)[0].starts == spans(model) == STARTS
    assert report.trained == 2 * (4 * (8 + 8 + 1) + 8)
    assert "2 ×        76  Linear, x of intermediate.dense" in str(report)


@pytest.mark.parametrize(
    ("targets", "hosts"),
    [
        ("mlp", list(STARTS)),
        (f"{FIRST}.output.dense", [f"{FIRST}.output.dense"]),
        ("*.0*output.dense", [f"{FIRST}.attention.output.dense", f"{FIRST}.output.dense"]),
    ],
)
def test_an_end_that_is_named_is_the_same_host(targets, hosts):
    model, default = base(), beside(base())
    cv.inject(model, BESIDE, targets, example=ids())
    assert sorted(injections(model)[0].hosts) == sorted(hosts)
    assert injections(model)[0].starts == {name: start for name, start in STARTS.items() if name in hosts}
    state = {name: value for name, value in default.state_dict().items() if name.startswith(f"{FIRST}.output.dense")}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def test_group_mlp_is_both_layers_for_a_delta_on_weights():
    report = cv.inject(base(), cv.LoRA(rank=2), "mlp")
    assert sorted(report.hosts) == sorted([*STARTS, *STARTS.values()])


def test_other_places_read_what_they_did():
    """Houlsby's y is the end's output; a start that is named alone has an adapter beside itself."""
    model = base()
    cv.inject(model, cv.Adapter(rank=2, where="houlsby"), "mlp", example=ids())
    assert injections(model)[0].starts == {}
    assert set(injections(model)[0].axes.values()) == {(8, 12, -1)}
    cv.remove(model)
    cv.inject(model, BESIDE, "*intermediate.dense", example=ids())
    assert injections(model)[0].starts == {}
    assert injections(model)[0].axes == dict.fromkeys(STARTS.values(), (12, 8, -1))


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ((), (BESIDE, "dense"), r"intermediate\.dense and bert.*output\.dense are one MLP, beside which bert.*leave"),
        ((cv.LoRA(rank=2), "*intermediate.dense"), (BESIDE, None), r"intermediate\.dense already carries a delta"),
        ((BESIDE, None), (cv.LoRA(rank=2), list(STARTS.values())), r"gives its input to the adapter of bert.*output"),
        ((BESIDE, None), (cv.LoRA(rank=2), list(STARTS)), r"output\.dense already carries a delta"),
    ],
)
def test_what_cannot_stand_together_is_refused(first, second, match):
    model = base()
    if first:
        cv.inject(model, *first, example=ids())
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        cv.inject(model, *second, example=ids())
    assert_unchanged(model, before)


class Twisted(nn.Module):
    """A layer that goes through its two Linears in some order."""

    def __init__(self, order):
        super().__init__()
        self.a, self.b, self.order = nn.Linear(4, 4), nn.Linear(4, 4), order

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(
    ("order", "match"),
    [("ba", "b ran, and a, whose input its adapter reads, not before it"), ("aab", "a runs twice before b")],
)
def test_two_modules_that_run_in_another_order_are_refused(order, match):
    with pytest.raises(ValueError, match=match):
        measure(Twisted(order), ["b"], torch.zeros(1, 4), starts={"b": "a"})
    assert measure(Twisted("abab"), ["b"], torch.zeros(1, 4), starts={"b": "a"}) == {"b": (4, 4, -1)}


def test_a_model_without_an_mlp_says_so():
    with pytest.raises(ValueError, match=r"ResNet .*\(where='parallel'\), for no MLP is found in it; take where='pfei"):
        cv.inject(create("resnet18"), BESIDE, example=images())


# Files, folds and graphs ---------------------------------------------------------------------------------------------


def test_a_file_names_the_starts_and_brings_all_back(model, tmp_path):
    path, other = tmp_path / "it.safetensors", beside(base(), cv.Adapter(rank=2, where="houlsby"))
    before, expected = snapshot(base()), outputs(model, ids())
    assert_moved(outputs(base(), ids()), expected)
    cv.save(model, path)
    assert cv.describe(path)["injections"][0]["starts"] == STARTS
    fresh, swapped = cv.load(path, base()), cv.load(path, other)
    for loaded in (fresh, swapped, cv.load(path, fresh)):
        assert torch.equal(outputs(loaded, ids()), expected)
        assert injections(loaded)[0].starts == STARTS
    cv.save(fresh, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    cv.remove(fresh)
    assert {name: type(m) for name, m in fresh.named_modules()} == before["classes"]
    assert snapshot(fresh)["attributes"] == before["attributes"]
    assert torch.equal(outputs(fresh, ids()), outputs(base(), ids()))


def test_other_files_name_none(tmp_path):
    cv.save(beside(base(), cv.Adapter(where="houlsby")), tmp_path / "it.safetensors")
    assert "starts" not in cv.describe(tmp_path / "it.safetensors")["injections"][0]


LIES = {
    "a start that is not there": (lambda name: "bert.nowhere", r"adapts 'bert\.nowhere', which BertFor.* lacks"),
    "a start that is the host": (lambda name: name, r"damaged .*cannot be where the x of"),
    "one start for two": (lambda name: f"{FIRST}.intermediate.dense", r"damaged .*cannot be where the x of"),
    "a start that is no name": (lambda name: 3, r"damaged .*in the place of names"),
}


@pytest.mark.parametrize("lie", [*LIES, "a start of no host", "no names at all", "a start of a LoRA"])
def test_a_file_that_lies_about_its_starts_is_refused(model, lie, tmp_path):
    path, fresh = tmp_path / "it.safetensors", base()
    if "LoRA" in lie:
        cv.inject(cv.remove(model), cv.LoRA(rank=2), list(STARTS))
    cv.save(model, path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["capavision"])
    plan = metadata["injections"][0]
    if lie in LIES:
        plan["starts"] = {name: LIES[lie][0](name) for name in STARTS}
    else:
        others = {"a start of no host": {"bert.pooler": "bert.embeddings"}, "a start of a LoRA": STARTS}
        plan["starts"] = others.get(lie, [1])
    save_file(load_file(path), path, {"capavision": json.dumps(metadata)})
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=LIES.get(lie, ("", "damaged"))[1]):
        cv.load(path, fresh)
    assert_unchanged(fresh, before)


def test_a_start_that_carries_a_delta_of_a_fold_is_refused(model, tmp_path):
    cv.save(model, tmp_path / "it.safetensors")
    other = cv.fold(beside(base(), targets="*intermediate.dense"))
    with pytest.raises(ValueError, match=r"intermediate\.dense already carries a delta"):
        cv.load(tmp_path / "it.safetensors", other)


def test_a_start_that_was_replaced_is_noticed(model, tmp_path):
    intermediate = model.get_submodule(FIRST).intermediate
    intermediate.dense = twin(base().get_submodule(FIRST).intermediate.dense)
    with pytest.raises(ValueError, match="whose input its adapter reads, not before it"):
        outputs(model, ids())
    with pytest.raises(ValueError, match=r"intermediate\.dense has lost its link to the adapter of bert.*was replaced"):
        cv.save(model, tmp_path / "it.safetensors")


def test_a_fold_is_dense_and_the_fold_comes_off(model):
    expected, before = outputs(model, ids()), snapshot(base())
    cv.fold(model)
    torch.testing.assert_close(outputs(model, ids()), expected, **EXACT)
    assert all(delta.D.mask is None and len(delta.D.value) == 8 for delta in deltas(model).values())
    torch.testing.assert_close(outputs(twin(model), ids()), expected, **EXACT)
    cv.remove(model)
    assert {name: type(m) for name, m in model.named_modules()} == before["classes"]
    assert torch.equal(outputs(model, ids()), outputs(base(), ids()))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids).logits


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_the_graph_computes_the_same(model, exporter):
    model.float()
    expected = outputs(model, ids(1, 9)).numpy()
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1, max=16)}
    given = {"input_ids": (ids()["input_ids"], axes)}
    proto = traced(Logits(folded(model)).eval(), given, {"0": "a", "1": "b"}, exporter=exporter)
    found = session(proto.SerializeToString()).run(["logits"], {"input_ids": ids(1, 9)["input_ids"].numpy()})[0]
    assert relative_error(found, expected) < 1e-5
    assert relative_error(outputs(base().float(), ids(1, 9)).numpy(), expected) > 1e-2
