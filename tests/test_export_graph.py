"""The exported graph: its names, opsets, exporters, sizes and files; and the survey over timm's families."""

import copy
import functools
import getpass
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import capavision as cv
from export import __main__ as export_command
from export import graph, package, sizes, survey, verify
from export.families import FAMILIES, KWARGS
from export.graph import exporter_of, fallback_of, folded, to_onnx
from export.names import nodes
from export.package import Source, build
from export.runtime import Classifier, random_pixels, relative_error, sha256
from export.store import load, save
from tests.conftest import awaken, awaken_deltas, create, images, outputs, twin
from tests.test_export import CLASSES, FAST, INFO, METHODS, refused

VIT = {"img_size": 32, "depth": 1}
NAMED = {"test_vit": VIT, "test_byobnet": {}, "test_convnext": {"depths": (1, 1, 1, 1)}}


def adapter_file(path, name="test_vit", **kwargs):
    base = cv.Base(name, "random", kwargs=kwargs or (VIT if name == "test_vit" else {}))
    model = base.build(len(CLASSES))
    cv.inject(model, METHODS["lora"])
    cv.save(awaken_deltas(model), path, base=base, classes=CLASSES, info=INFO)
    return path


@functools.cache
def named(name, seed=0):
    return awaken(create(name, seed, **NAMED[name]), seed)


@functools.cache
def traced(name, exporter, seed=0):
    """A graph that tests read and never write."""
    return to_onnx(twin(named(name, seed)), NAMED[name].get("img_size", 64), {}, exporter=exporter)


def session(proto):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = proto.SerializeToString() if isinstance(proto, onnx.ModelProto) else str(proto)
    return onnxruntime.InferenceSession(model, options)


def run(proto, x):
    return session(proto).run(["logits"], {"pixel_values": x.numpy()})[0]


def initializers(proto):
    return {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}


def tensors(model):
    return dict(model.state_dict()) | dict(model.named_buffers())


def classified(names, model):
    """The names that are parameters' and those that are not; every name must be one or the other."""
    known = tensors(model)
    ours = {name for name in names if name.removesuffix(".T").removesuffix(".reshape") in known}
    fused = {name for name in names - ours if name.endswith(".bias") and f"{name[:-4]}weight" in known}
    return ours | fused, names - ours - fused


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
@pytest.mark.parametrize("name", NAMED)
def test_every_initializer_has_its_pytorch_name(name, exporter):
    model, x, proto = named(name), images(NAMED[name].get("img_size", 64)), traced(name, exporter)
    onnx.checker.check_model(proto, full_check=True)
    assert relative_error(run(proto, x), outputs(model, x).numpy()) < 1e-5
    found, known = initializers(proto), {key: t.numpy() for key, t in tensors(model).items()}
    ours, others = classified(set(found), model)
    modules = {key for key, _ in model.named_modules()}
    for other in others:
        module, op, formal = f".{other}".rsplit(".", 2)
        assert module[1:] in modules, other
        assert formal.partition("_")[0] in {i.name for i in onnx.defs.get_schema(op).inputs}, other
    normed = {key for key, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    exact = 0
    for key in ours:
        param = key.removesuffix(".T").removesuffix(".reshape")
        if param in known:
            value = known[param].T if key.endswith(".T") else known[param]
            same = np.array_equal(found[key].ravel(), value.ravel())
            assert same or normed, key  # a batch norm was folded into it
            exact += same
    assert exact >= len(ours) - 2 * len(normed)
    read = {name for node in nodes(proto.graph) for name in node.input}
    assert set(found) <= read, "an initializer was renamed, and its readers were not"
    for key, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert {f"{key}.weight", f"{key}.weight.T"} & set(found), key


def test_names_do_not_hang_on_the_weights_nor_parameters_on_the_exporter():
    model, found = named("test_vit"), set(initializers(traced("test_vit", "dynamo")))
    assert found == set(initializers(traced("test_vit", "dynamo", seed=1)))
    legacy = set(initializers(traced("test_vit", "legacy")))
    assert classified(found, model)[0] == classified(legacy, model)[0]


class Twins(nn.Module):
    """`second` is used first, and both hold the same values; their biases of zero are merged, their weights are not."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 5)
        self.second.load_state_dict(self.first.state_dict())
        for layer in (self.first, self.second):
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        x = x.mean((2, 3)).repeat(1, 16)[:, None]
        return self.head(self.first(self.second(x).relu()).relu())[:, 0]


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_equal_values_take_the_first_name_in_state_dict_order(exporter):
    model, x = Twins().eval(), images(8)
    proto = to_onnx(model, 8, {}, exporter=exporter)
    found = initializers(proto)
    biases = [name for name in found if name in ("first.bias", "second.bias")]
    assert biases == ["first.bias"] if len(biases) == 1 else sorted(biases) == ["first.bias", "second.bias"]
    weights = {name for name in found if "weight" in name}
    assert {"first.weight.T", "head.weight.T"} <= weights <= {"first.weight.T", "second.weight.T", "head.weight.T"}
    if "second.weight.T" in weights:
        first = next(node for node in proto.graph.node if set(node.input) & {"first.weight.T", "second.weight.T"})
        assert "second.weight.T" in first.input, "two initializers of one value were mixed up"
    np.testing.assert_allclose(run(proto, x), outputs(model, x).numpy(), rtol=1e-5, atol=1e-6)


class Clash(nn.Module):
    """A parameter with the name of an output of the graph."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return x.mean((2, 3)) @ self.logits


def test_a_parameter_called_like_the_output_gets_a_name_of_its_own():
    model, x = Clash().eval(), images(8)
    proto = to_onnx(model, 8, {})
    assert "logits_2" in initializers(proto)
    np.testing.assert_allclose(run(proto, x), outputs(model, x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_folded_adapters_bottlenecks_have_names_too():
    model = create("test_vit", **VIT)
    cv.inject(model, METHODS["adapter"])
    found = set(initializers(to_onnx(folded(awaken_deltas(model)), 32, {})))
    assert {"blocks.0.delta.D.value.T", "blocks.0.delta.U.value.T"} <= found


# Opsets and exporters ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return adapter_file(tmp_path_factory.mktemp("run") / "adapter.safetensors")


@pytest.mark.parametrize("opset", graph.OPSETS)
def test_every_opset_computes_the_same(opset, file, tmp_path):
    manifest = export_command.main([str(file), "--out", str(tmp_path / "package"), "--opset", str(opset)])
    proto = onnx.load(tmp_path / "package" / "model.onnx")
    assert manifest["opset"] == opset == proto.opset_import[0].version
    (task,) = manifest["tasks"].values()
    assert max(task["parity"]["relative_error"].values()) < 1e-5
    assert (manifest["exporter"], exporter_of(proto)) == ("dynamo", "dynamo")


def test_the_opset_is_onnxs_own_whatever_others_come_first(file):
    proto = onnx.ModelProto(
        opset_import=[onnx.helper.make_opsetid("com.microsoft", 1), onnx.helper.make_opsetid("", 18)]
    )
    assert package.head_of("merged", proto, {"toy": Source.open(file)})["opset"] == 18


def test_the_legacy_exporter_on_request(file, tmp_path):
    manifest = export_command.main([str(file), "--out", str(tmp_path / "package"), "--exporter", "legacy"])
    assert (manifest["exporter"], manifest["opset"]) == ("legacy", 20)
    assert exporter_of(onnx.load(tmp_path / "package" / "model.onnx")) == "legacy"


REFUSED = {
    "opset": (["--opset", "19"], "opset 19 is none of 18, 20, 23"),
    "exporter": (["--exporter", "script"], "exporter 'script' is none of dynamo, legacy"),
    "both": (["--exporter", "legacy", "--opset", "23"], "the legacy exporter writes no opset above 20, so not 23"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_exporter_does_is_refused_with_the_choices(case, file, tmp_path, capsys):
    flags, message = REFUSED[case]
    assert message in refused(capsys, export_command.main, file, "--out", tmp_path / "package", *flags)
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """Asks for a value of its input, which dynamo cannot know and legacy takes from the example."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(x) if x.abs().max() < 1e9 else x


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x.mean((2, 3)))


def test_legacy_takes_over_where_dynamo_fails_and_says_so(capsys):
    model, x = Branching().eval(), images(8, 3)
    proto = to_onnx(model, 8, {})
    assert exporter_of(proto) == "legacy"
    said = capsys.readouterr().err
    assert re.fullmatch(r"warning: Branching: dynamo: .+; taken: legacy\n", said)
    assert fallback_of(proto) in said
    np.testing.assert_allclose(run(proto, x), outputs(model, x).numpy(), rtol=1e-5, atol=1e-6)
    for flags in ({"exporter": "dynamo"}, {"dynamic_size": True}, {"opset": 23}):
        with pytest.raises(ValueError, match=r"^Branching does not export \(dynamo: [^;]*\)$"):
            to_onnx(model, 8, {}, **flags)


class Padded(nn.Module):
    """As in hgnet: PyTorch fuses the Pad into the conv, ONNX Runtime into the pool, where zero is not -infinity."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 2), nn.Linear(7, 5)

    def forward(self, x):
        x = F.pad(x - 5, (0, 1, 0, 1))
        return self.head(torch.cat([self.conv(x), F.max_pool2d(x, 2, 1)], 1).mean((2, 3)))


class Clipped(nn.Module):
    """As in gemma4_vit: the optimizer joins the two clamps of each branch and loses the bounds of all but one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(9, 5)
        for name in ("low", "high"):
            self.register_buffer(name, torch.tensor(0.4 if name == "high" else -0.4))

    def forward(self, x):
        x = x.mean((2, 3)) * 9
        once = x.clamp(-1, 1)
        return self.head(torch.cat([once.clamp(self.low, self.high), once.clamp(self.low, self.high * 2), once], 1))


@pytest.mark.parametrize("kind", [Padded, Clipped])
def test_what_the_optimizer_gets_wrong_is_not_what_we_export(kind):
    model, x = kind().eval(), images(8, 3)
    np.testing.assert_allclose(run(to_onnx(model, 8, {}), x), outputs(model, x).numpy(), rtol=1e-4, atol=1e-5)


def wrong_weights(proto):
    for tensor in proto.graph.initializer:
        if onnx.numpy_helper.to_array(tensor).dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(tensor), tensor.name))


def no_weights(proto):
    del proto.graph.initializer[:]


SPOILT = {
    wrong_weights: r"ONNX Runtime computes something else, \d",
    no_weights: "Nodes in a graph must be topologically",
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_graph_that_is_refused_or_wrong_is_its_exporters_failure(spoil, monkeypatch, capsys):
    def spoilt(model, request):
        proto = graph._dynamo(model, request)
        spoil(proto)
        return proto

    monkeypatch.setitem(graph.ATTEMPTS, "dynamo", spoilt)
    model, x = Twins().eval(), images(8)
    proto = to_onnx(model, 8, {})
    assert re.match(rf"dynamo: {SPOILT[spoil]}.*; taken: dynamo, unoptimized$", fallback_of(proto))
    assert exporter_of(proto) == "dynamo"
    assert fallback_of(proto) in capsys.readouterr().err
    np.testing.assert_allclose(run(proto, x), outputs(model, x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_model_that_neither_traces_is_refused_with_both_reasons(capfd):
    with pytest.raises(ValueError, match=r"Unknown does not export \(dynamo: .+; legacy: .*bessel_j0"):
        to_onnx(Unknown().eval(), 8, {})
    assert capfd.readouterr().out == "", "legacy prints the graph, with paths"


def test_without_a_standard_output_legacy_exports_all_the_same():
    kept = os.dup(1)
    os.close(1)
    try:
        proto = to_onnx(Twins().eval(), 8, {}, exporter="legacy")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert exporter_of(proto) == "legacy"


# No trace of this machine --------------------------------------------------------------------------------------------

ABSOLUTE = rb"(?:[A-Z]:\\|/)(?:home|Users|root|usr|opt|tmp|var|work|mnt|srv|builds?|private)[/\\]"


@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_no_path_no_user_and_no_stack_trace_is_in_any_exported_byte(exporter, file, tmp_path):
    build(Source.open(file), tmp_path / "package", exporter=exporter)
    here = {file.parent, tmp_path, Path.cwd(), Path.home(), Path(cv.__file__).parent, Path(torch.__file__).parent}
    for path in (tmp_path / "package").iterdir():
        whole = path.read_bytes()
        for folder in {*here, Path(sys.prefix)} - {Path("/")}:
            assert f"{folder}/".encode() not in whole, path.name
        assert b"site-packages" not in whole
        assert b"Traceback" not in whole
        if path.suffix == ".onnx":  # what is short may stand in the weights by chance
            proto = onnx.load(path)
            for tensor in proto.graph.initializer:
                tensor.ClearField("raw_data")
            whole = proto.SerializeToString()
        assert not re.search(ABSOLUTE, whole), path.name
        assert b".py" not in whole
        assert f"/{getpass.getuser()}/".encode() not in whole
        assert b'File "' not in whole


def test_the_scan_above_would_find_what_dynamo_leaves(monkeypatch):
    monkeypatch.setattr(graph, "_clean", lambda proto: None)
    whole = to_onnx(Twins().eval(), 8, {}).SerializeToString()
    assert re.search(rb"/[^\s]+\.py", whole)


# External data -------------------------------------------------------------------------------------------------------


def test_weights_above_the_threshold_lie_beside_the_graph(tmp_path):
    proto, x = traced("test_vit", "legacy"), images(32, 3)
    save(proto, tmp_path / "small.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    path, data = tmp_path / "large.onnx", tmp_path / "large.onnx.data"
    for _ in range(2):  # a second time, the file beside it is there
        save(copy.deepcopy(proto), path, large=100_000)
        assert data.stat().st_size + path.stat().st_size < 1.1 * (tmp_path / "small.onnx").stat().st_size
    assert path.stat().st_size < 0.3 * data.stat().st_size
    assert [i.name for i in onnx.load(path, load_external_data=False).graph.initializer] == list(initializers(proto))
    np.testing.assert_array_equal(run(path, x), run(tmp_path / "small.onnx", x))


def test_a_large_package_is_whole_and_a_flipped_byte_in_its_data_is_caught(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(package, "save", lambda proto, path: save(proto, path, large=1000))
    manifest = build(Source.open(file), tmp_path / "package", exporter=FAST)
    assert {"model.onnx", "model.onnx.data"} <= manifest["files"].keys()
    assert verify.main([str(tmp_path / "package")]) < 1e-5
    data = tmp_path / "package" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "model.onnx.data was changed" in refused(capsys, verify.main, tmp_path / "package")


def test_weights_outside_the_package_are_refused(file, tmp_path, monkeypatch, capsys):
    """The checksums are made to fit."""
    monkeypatch.setattr(package, "save", lambda proto, path: save(proto, path, large=1000))
    folder = tmp_path / "package"
    build(Source.open(file), folder, exporter=FAST)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../outside.data" if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "outside.data").write_bytes((folder / "model.onnx.data").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["sha256"] = sha256(folder / "model.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "model.onnx does not load" in refused(capsys, verify.main, folder)
    with pytest.raises(ValueError, match="model.onnx does not load"):
        load(folder / "model.onnx")


@pytest.mark.skipif(
    not os.environ.get("CAPAVISION_LARGE"), reason="takes 6 GB of memory and minutes; CAPAVISION_LARGE=1 runs it"
)
@pytest.mark.parametrize("exporter", ["dynamo", "legacy"])
def test_a_model_above_2_gb(exporter, tmp_path):
    model = create("vit_tiny_patch16_224", img_size=32, embed_dim=2048, num_heads=16, depth=11)
    cv.inject(model, cv.LoRA(rank=2))
    awaken_deltas(model)
    expected = outputs(model, x := images(32, 3)).numpy()
    cv.fold(model)
    proto = to_onnx(model.eval(), 32, {}, exporter=exporter)
    del model
    save(proto, tmp_path / "model.onnx")
    del proto
    size = (tmp_path / "model.onnx.data").stat().st_size
    assert size > 2**31
    error = relative_error(run(tmp_path / "model.onnx", x), expected)
    print(f"{exporter}: {size:,} bytes of data, relative error {error:.1e}")
    assert error < 1e-5


# Height and width ----------------------------------------------------------------------------------------------------


def test_a_net_that_takes_any_size_does_so_exported(tmp_path, capsys):
    file = adapter_file(tmp_path / "a.safetensors")
    manifest = export_command.main([str(file), "--out", str(tmp_path / "package"), "--dynamic-size"])
    assert "merged into the plain graph, height and width open, within" in capsys.readouterr().out
    assert manifest["dynamic_size"].keys() == {"32×32", "64×32"}
    assert max(manifest["dynamic_size"].values()) < 1e-5
    path = tmp_path / "package" / "model.onnx"
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 3, "height", "width"]
    x = torch.randn(3, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    assert relative_error(run(path, x), outputs(cv.load(file), x).numpy()) < 1e-5
    assert len(Classifier(tmp_path / "package").logits(random_pixels(0, 2, 32))) == 2


@pytest.mark.parametrize("exporter", [None, "legacy"])
def test_a_convolutional_net_takes_any_size(exporter, tmp_path):
    model = twin(named("test_byobnet"))
    sizes.refuse_fixed(model, 64)
    save(to_onnx(model, 64, {}, exporter=exporter, dynamic_size=True), tmp_path / "model.onnx")
    found = sizes.compare(tmp_path / "model.onnx", model, 64, 1e-5)
    assert found.keys() == {"64×64", "128×64"}


def test_a_net_of_one_size_is_refused_by_name(tmp_path, capsys):
    kwargs = {"img_size": 32, "depth": 1, "embed_dim": 48}
    file = adapter_file(tmp_path / "a.safetensors", "vit_tiny_patch16_224", **kwargs)
    said = refused(capsys, export_command.main, file, "--out", tmp_path / "package", "--dynamic-size")
    assert "vit_tiny_patch16_224 (VisionTransformer) takes images of 32 × 32 only (Input height (64)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


class Sized(nn.Module):
    """Its head depends on the height in a way that legacy takes for a constant."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        return self.head(x.mean((2, 3))) * float(x.shape[2])


def test_a_size_baked_into_the_graph_is_found_by_comparing(tmp_path):
    model = Sized().eval()
    sizes.refuse_fixed(model, 8)
    save(to_onnx(model, 8, {}, exporter="legacy", dynamic_size=True), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"Sized, traced with a dynamic size: at 16 × 8, they differ from PyTorch by"):
        sizes.compare(tmp_path / "model.onnx", model, 8, 1e-4)
    save(to_onnx(model, 8, {}), tmp_path / "fixed.onnx")
    with pytest.raises(ValueError, match=r"at 16 × 8, ONNX Runtime refuses them; export without --dynamic-size"):
        sizes.compare(tmp_path / "fixed.onnx", model, 8, 1e-4)


# The survey ----------------------------------------------------------------------------------------------------------

SAMPLE = ("beit", "byobnet", "convnext", "mambaout")  # fused attention with a bias, batch norms, a conv net, gated


def test_a_sample_of_the_families_exports(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(KWARGS, "convnext", NAMED["test_convnext"])
    out = tmp_path / "survey.md"
    rows = survey.main(["--families", ",".join(SAMPLE), "--out", str(out)])
    assert [row.family for row in rows] == list(SAMPLE)
    for row in rows:
        assert (row.result, row.remark) == ("ok", ""), row
        assert row.error < survey.BAR
        assert (row.exporter, row.opset) == ("dynamo", 20)
        assert row.nodes > 10
    assert survey.table(rows) in out.read_text()
    assert survey.table(rows) in capsys.readouterr().out
    assert "4 of 4 export, 4 by dynamo and 0 by legacy: 4 are ok, 0 as near as PyTorch; 0 do not." in out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["survey.md"]


def test_a_survey_goes_on_where_it_stopped_and_tells_failures(tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "survey.md", []

    def measure(family, opset=None):
        calls.append(family)
        if family == "cait":
            raise RuntimeError("no such op in /usr/lib/python/site-packages/x.py | there\nand more")
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"result": "ok", "error": 1e-7, "exporter": "legacy", "opset": 20, "nodes": 9, "megabytes": 1.0,
                "remark": "BEiT does not export"}  # fmt: skip

    monkeypatch.setattr(survey, "measure", measure)
    argv = ["--families", "beit,cait,coat,deit", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        survey.main(argv)
    assert not out.exists()
    survey.main(argv)
    assert calls == ["beit", "cait", "coat", "coat", "deit"]
    text = out.read_text()
    assert "| cait | cait_xxs24_224 | FAILED: RuntimeError: no such op in …/x.py \\| there |" in text
    assert "| beit | beit_base_patch16_224 | ok (BEiT does not export) | 1.0e-07 | legacy | 20 | 9 | 1.0 |" in text
    assert "3 of 4 export, 0 by dynamo and 3 by legacy: 3 are ok, 0 as near as PyTorch; 1 do not." in text
    assert [path.name for path in tmp_path.iterdir()] == ["survey.md"]

    part = tmp_path / "survey.md.part.jsonl"
    part.write_text("{}\n")
    assert "survey.md.part.jsonl does not go on (it is of {}," in refused(capsys, survey.main, *argv)
    part.write_text(json.dumps({"torch": 1})[:-2])
    assert "delete it to start anew" in refused(capsys, survey.main, *argv)
    assert "'beid' is unknown; did you mean 'beit'?" in refused(capsys, survey.main, "--families", "beid")


def test_a_delta_that_moves_nothing_is_no_agreement(monkeypatch):
    monkeypatch.setattr(survey, "awaken", lambda module, **kwargs: module)
    row = survey.survey("vision_transformer")
    assert row.result.startswith("FAILED: ValueError: the deltas moved the logits by ")


@pytest.mark.parametrize(("own", "result"), [(1e-4, survey.AS_PYTORCH), (1e-6, "above 1e-05")])
def test_above_the_bar_it_tells_rounding_from_a_wrong_graph(own, result, monkeypatch):
    right, kept = survey.logits, []

    def off(by):
        return lambda found: {n: y + by * np.abs(y).max() for n, y in found.items()}

    def logits(each, pixels):
        found = right(each, pixels)
        return found if next(each.parameters()).dtype is torch.float64 else off(own)(found)

    monkeypatch.setattr(survey, "logits", logits)
    monkeypatch.setattr(survey, "run", lambda proto, pixels: (off(-5e-5)(right(kept[0], pixels)), 1.0))
    monkeypatch.setattr(survey, "folded", lambda model: kept.append(model) or folded(model))
    monkeypatch.setattr(survey, "to_onnx", lambda *args: traced("test_byobnet", "legacy"))
    row = survey.survey("byobnet")
    assert row.result == result, row
    assert "off float64 by 5.0e-05, PyTorch's float32 by 1." in row.remark


def test_the_families_are_98_and_the_settings_are_theirs():
    assert len(FAMILIES) == 98
    assert KWARGS.keys() <= FAMILIES.keys()


def test_the_list_of_families_is_shipped():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert 'export = ["timm_families.json", ' in text
