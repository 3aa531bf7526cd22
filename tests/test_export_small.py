"""Variants of a package (int8, float16, preprocessing in the graph), its accuracy and its speed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from PIL import Image

import capavision as cv
from export import __main__ as export_command
from export import accuracy, agreement, bench, cli, memory, predict, session, store, variants, verify
from export import package as package_module
from export.graph import to_onnx
from export.half import half
from export.package import Source
from export.preprocess import with_preprocessing
from export.quantize import dense_share, dynamic, static
from export.runtime import Classifier, random_pixels, read_json, relative_error
from export.variants import FILES, KINDS, add_variants, calibration
from export.wanted import Wanted
from tests.conftest import awaken_deltas, create
from vtab import train
from vtab.data import open_task

DIGITS = [str(d) for d in range(10)]
INFO = {"task": "digits", "preprocessing": {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
ALL = ["--quantize", "int8", "--quantize", "int8-static", "--half", "--preprocess"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run folder."""
    out = tmp_path_factory.mktemp("runs")
    settings = "--task digits --model test_vit --weights random --img-size 32 --epochs 8 --lr 5e-3 --drop-path 0"
    train.main([*settings.split(), "--device", "cpu", "--out", str(out), "--name", "mine"])
    return out / "mine"


@pytest.fixture(scope="module")
def package(run, tmp_path_factory):
    """Its package with every variant."""
    folder = tmp_path_factory.mktemp("packages") / "all"
    export_command.main([str(run), "--out", str(folder), *ALL])
    return folder


@pytest.fixture
def copied(package, tmp_path):
    """The package as it was before it got its variants."""
    shutil.copytree(package, tmp_path / "copied")
    for name in FILES.values():
        (tmp_path / "copied" / name).unlink()
    return tmp_path / "copied"


def add(sources, folder, *names, **wanted):
    manifest = manifest_of(folder) | {"graphs": {"float32": "model.onnx"}, "quantization": {}}
    add_variants(sources, folder, manifest, Wanted(names, **wanted))
    return manifest


def bare(path, seed=0, task="digits"):
    """An adapter file without a run around it."""
    base = cv.Base("test_vit", "random", 32, kwargs={"depth": 2})
    model = base.build(len(DIGITS))
    cv.inject(model, cv.LoRA(rank=2))
    awaken_deltas(model, seed)
    cv.save(model, path, base=base, classes=DIGITS, info={**INFO, "task": task})
    return path


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def manifest_of(folder):
    return read_json(folder / "manifest.json")


def one_by_one(runtime, pixels):
    """Top-1; dynamic int8 takes its scales from the batch."""
    return np.array([runtime.logits(image[None])[0].argmax() for image in pixels])


def types(proto):
    return {onnx.TensorProto.DataType.Name(i.data_type) for i in proto.graph.initializer}


def shared_bytes(folder, name):
    return (folder / FILES[name]).stat().st_size / (folder / "model.onnx").stat().st_size


def test_every_variant_is_a_whole_part_of_the_package(package):
    manifest = manifest_of(package)
    assert manifest["graphs"] == {"float32": "model.onnx", **FILES}
    assert set(manifest["quantization"]) == set(KINDS)
    assert verify.main([str(package)]) < 1e-5
    for name in FILES.values():
        assert name in manifest["files"]
        onnx.checker.check_model(str(package / name), full_check=True)
    assert manifest["quantization"]["int8-static"]["calibration"] == {"split": "train", "images": 128, "seed": 0}


def test_no_variant_tells_of_the_machine_that_made_it(package):
    home = str(Path(cv.__file__).parent.parent).encode()
    for name in FILES.values():
        content = (package / name).read_bytes()
        for trace in (home, b"site-packages", b".py", b"/tmp"):
            assert trace not in content, name
        proto = onnx.load(package / name)
        assert not proto.graph.value_info
        assert not any(node.metadata_props for node in proto.graph.node)
        assert "id2label" in {each.key for each in proto.metadata_props}


def test_the_accuracies_in_the_manifest_are_those_of_the_validation_images(package, run):
    val, quantization = open_task("digits").splits["val"], manifest_of(package)["quantization"]
    found = {name: one_by_one(Classifier(package, variant=name), val.decode(32)) for name in ("float32", *KINDS)}
    right = {name: 100 * float((top1 == val.labels).mean()) for name, top1 in found.items()}
    assert right["float32"] > 60, "an untrained model's accuracy would prove nothing"
    for name in KINDS:
        about = quantization[name]
        assert about["validation"] == {
            "images": 200,
            "float32": pytest.approx(right["float32"]),
            "quantized": pytest.approx(right[name]),
            "agreement": pytest.approx(100 * float((found[name] == found["float32"]).mean())),
            "seen_in_training": True,
        }
        assert about["bytes"] == (package / FILES[name]).stat().st_size


@pytest.mark.parametrize(("name", "worst"), [("int8", 0.2), ("int8-static", 0.2), ("float16", 0.01)])
def test_a_smaller_graph_computes_nearly_the_same(package, name, worst):
    pixels = open_task("digits").splits["test"].head(32).decode(32)
    expected = Classifier(package).logits(pixels)
    error = relative_error(Classifier(package, variant=name).logits(pixels), expected)
    assert 1e-6 < error < worst
    assert shared_bytes(package, name) < 0.55


def test_int8_covers_every_matmul_and_gemm_with_weights(package):
    plain, small = (onnx.load(package / name) for name in ("model.onnx", FILES["int8"]))
    dynamic(plain)
    assert plain == onnx.load(package / "model.onnx"), "the graph that was given was changed"
    weights = {i.name for i in plain.graph.initializer}
    dense = [n for n in plain.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    found = [n for n in small.graph.node if n.op_type == "MatMulInteger"]
    assert len(found) == len(dense) > 10
    scales = {i.name: i for i in small.graph.initializer if i.name.endswith("_scale")}
    assert all(len(i.dims) == 1 and i.dims[0] > 1 for i in scales.values()), "one scale for a whole matrix"


def test_static_scales_come_from_training_images_drawn_by_the_seed(package):
    data, runtime = open_task("digits"), Classifier(package)
    drawn = calibration(runtime, data, Wanted(calibration_images=20, calibration_seed=3))
    train_images = runtime.normalize(data.splits["train"].decode(32))
    assert len(drawn) == 20
    assert all((image == train_images).all((1, 2, 3)).any() for image in drawn)
    proto = onnx.load(package / "model.onnx")
    first, again, other = (
        static(proto, calibration(runtime, data, Wanted(calibration_images=20, calibration_seed=s))) for s in (3, 3, 4)
    )
    assert first.SerializeToString() == again.SerializeToString() != other.SerializeToString()
    assert proto == onnx.load(package / "model.onnx"), "the graph that was given was changed"


def test_a_convolutional_net_is_pointed_to_static_int8_which_covers_convolutions():
    proto = to_onnx(create("test_resnet", num_classes=4), 32, {}, exporter="legacy")
    assert dense_share(proto) < 0.5
    with pytest.raises(ValueError, match="it is convolutional; --quantize int8-static covers convolutions"):
        dynamic(proto)
    small = static(proto, np.random.default_rng(0).standard_normal((8, 3, 32, 32), np.float32))
    convolutions = [n for n in small.graph.node if n.op_type == "Conv"]
    dequantized = {n.output[0] for n in small.graph.node if n.op_type == "DequantizeLinear"}
    assert convolutions
    assert all(n.input[1] in dequantized for n in convolutions)


def test_half_keeps_float32_inputs_and_outputs(package):
    proto = onnx.load(package / FILES["float16"])
    assert {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)} == {TensorProto.FLOAT}
    assert "FLOAT" not in types(proto)
    original = onnx.load(package / "model.onnx")
    half(original)
    assert original == onnx.load(package / "model.onnx"), "the graph that was given was changed"


def test_weights_beyond_float16_are_refused_and_logits_that_are_not_finite(copied, run):
    proto = onnx.load(copied / "model.onnx")
    weight = next(i for i in proto.graph.initializer if i.name.startswith("head.weight"))
    for factor, message in (
        (1e8, f"--half: {weight.name} holds .*, and float16 ends at 65504"),
        (np.nan, "not finite"),
    ):
        array = onnx.numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        onnx.save(proto, copied / "model.onnx")
        with pytest.raises(ValueError, match=message):
            add({"digits": Source.open(run)}, copied, "float16")


def test_values_between_the_layers_beyond_float16_are_refused(copied, run, tmp_path):
    """On the CPU the logits are fine, on a GPU they would be none."""
    proto = onnx.load(copied / "model.onnx")
    fc1, fc2 = (
        next(i for i in proto.graph.initializer if i.name == f"blocks.0.mlp.{n}.weight.T") for n in ("fc1", "fc2")
    )
    factor = 6e4 / np.abs(onnx.numpy_helper.to_array(fc1)).max()
    for weight, by in ((fc1, factor), (fc2, 1 / factor)):
        array = onnx.numpy_helper.to_array(weight) * np.float32(by)
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, copied / "model.onnx")
    for file in (run, bare(tmp_path / "a.safetensors", task="mine")):  # with images, and without
        with pytest.raises(ValueError, match=r"--half: \S+ reaches [\d.e+]+, and float16 ends at 65504: on a GPU"):
            add({"digits": Source.open(file)}, copied, "float16")


def test_a_graph_beyond_2_gb_is_not_halved(copied, monkeypatch):
    proto = onnx.load(copied / "model.onnx")
    monkeypatch.setattr("export.half.LIMIT", 100_000)
    with pytest.raises(ValueError, match="--half: the converter takes no graph of more than 2 GB"):
        half(proto)


def test_without_a_run_the_agreement_on_random_pixels_is_told_and_called_so(copied, tmp_path, capsys):
    source = Source.open(bare(tmp_path / "a.safetensors", task="mine"))
    about = add({"digits": source}, copied, "int8")["quantization"]["int8"]
    assert "validation" not in about
    found = about["agreement_on_random_pixels"]
    pixels = random_pixels(found["seed"], found["images"], 32)
    plain, small = (one_by_one(Classifier(copied, variant=v), pixels) for v in ("float32", "int8"))
    assert found["top1"] == pytest.approx(100 * (plain == small).mean())
    assert "images of random pixels" in capsys.readouterr().out
    with pytest.raises(ValueError, match="task 'mine'.*|.*name their --data-root"):
        add({"mine": source}, copied, "int8-static")


def test_images_that_went_away_leave_a_note_and_other_classes_are_refused(copied, run, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    settings = read_json(run / "config.json") | {"task": "", "data_root": str(tmp_path / "gone")}
    (moved / "config.json").write_text(json.dumps(settings))
    (moved / "adapter.safetensors").write_bytes((run / "adapter.safetensors").read_bytes())
    source = Source.open(moved)
    assert "agreement_on_random_pixels" in add({"digits": source}, copied, "float16")["quantization"]["float16"]
    assert "the run's images do not open" in capsys.readouterr().err
    with pytest.raises(ValueError, match="gone is not a folder"):
        add({"digits": source}, copied, "float16", data_root=tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(settings | {"task": "dsprites_loc", "data_root": None}))
    classes = re.escape("dsprites_loc has the classes column 0, column 1, column 2 … (16), the package 0, 1, 2 … (10)")
    with pytest.raises(ValueError, match=classes):
        add({"digits": source}, copied, "int8-static")


@pytest.fixture(scope="module")
def split_package(tmp_path_factory):
    """(its runs, folder) of two tasks, with variants."""
    folder = tmp_path_factory.mktemp("split")
    files = [bare(folder / f"{task}.safetensors", seed=9 * i, task=task) for i, task in enumerate(("one", "two"))]
    argv = [
        "--split",
        *map(str, files),
        "--out",
        str(folder / "package"),
        "--quantize",
        "int8",
        "--half",
        "--preprocess",
    ]
    export_command.main(argv)
    return files, folder / "package"


def test_the_variants_of_a_split_package_serve_every_task(split_package):
    out = split_package[1]
    manifest = manifest_of(out)
    assert set(manifest["quantization"]["int8"]["tasks"]) == {"one", "two"}
    pixels, plain = random_pixels(5, 8, 32), Classifier(out)
    one, two = (plain.logits(pixels, task) for task in ("one", "two"))
    assert relative_error(one, two) > 0.1, "the tasks are alike, so this test would prove nothing"
    for name, worst in (("int8", 0.1), ("float16", 0.01)):
        small = Classifier(out, variant=name)
        assert relative_error(small.logits(pixels, "one"), one) < worst
        assert relative_error(small.logits(pixels, "two"), two) < worst
    session = agreement.opened(out, manifest)
    for task in ("one", "two"):
        plain.switch(task)
        pillow, graph = agreement.both(plain, session, Image.fromarray(random_pixels(6, 1, 50)[0]))
        assert np.abs(pillow - graph).max() < 1e-2
    assert set(manifest["slots"]) <= {i.name for i in onnx.load(out / FILES["int8"]).graph.initializer}


@pytest.mark.parametrize("kind", ["dynamic size", "external data"])
def test_every_variant_of_a_graph_of_any_size_and_of_a_large_one(kind, tmp_path, monkeypatch):
    if kind == "external data":
        for module in (package_module, variants):
            monkeypatch.setattr(module, "save", lambda proto, path: store.save(proto, path, large=1000))
    out = tmp_path / "package"
    flags = ["--dynamic-size"] if kind == "dynamic size" else ["--exporter", "legacy"]
    file = bare(tmp_path / "a.safetensors")
    argv = [str(file), "--out", str(out), "--quantize", "int8", "--half", "--preprocess", *flags]
    manifest = export_command.main(argv)
    assert ("model_int8.onnx.data" in manifest["files"]) == (kind == "external data")
    assert verify.main([str(out)]) < 1e-5
    pixels, plain = random_pixels(5, 8, 32), Classifier(out)
    static_int8 = static(store.load(out / "model.onnx"), plain.normalize(pixels))
    found = session.plain(static_int8.SerializeToString()).run(None, {"pixel_values": plain.normalize(pixels)})
    assert np.isfinite(found[0]).all()
    assert found[0].shape == (8, 10)
    for name, worst in (("int8", 0.2), ("float16", 0.01)):
        small = Classifier(out, variant=name)
        assert relative_error(small.logits(pixels), plain.logits(pixels)) < worst
        if kind == "dynamic size":
            assert small.logits(random_pixels(5, 2, 64)).shape == (2, 10)
    both = agreement.both(plain, agreement.opened(out, manifest), Image.fromarray(random_pixels(6, 1, 50)[0]))
    assert np.abs(both[0] - both[1]).max() < 1e-2


def test_the_graph_resizes_as_pillow_does_to_one_grey_level():
    preprocessor = {"size": {"height": 24, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    identity = onnx.helper.make_graph(
        [onnx.helper.make_node("Flatten", ["pixel_values"], ["logits"])],
        "identity",
        [onnx.helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 24, 16])],
        [onnx.helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3 * 24 * 16])],
    )
    proto = onnx.helper.make_model(identity, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    joined = with_preprocessing(proto, preprocessor)
    joined.graph.output.append(onnx.helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(joined.SerializeToString(), providers=["CPUExecutionProvider"])
    mean, std = (np.array(preprocessor[key], np.float32) for key in ("image_mean", "image_std"))
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 90), (90, 1), (24, 16), (25, 16), (24, 17), (300, 20), (54, 31), (55, 31), (20, 300), (7, 9)]
    for height, width in sizes:
        image = rng.choice(np.array([0, 255], np.uint8), (height, width, 3))  # overshoots everywhere
        found = session.run(["pixel_values"], {"image": image})[0][0].transpose(1, 2, 0) * std + mean
        expected = np.asarray(Image.fromarray(image).resize((16, 24), Image.Resampling.BICUBIC))
        assert np.abs(found * 255 - expected).max() < 1.01, (height, width)
    assert [d.dim_param for d in joined.graph.input[0].type.tensor_type.shape.dim[:2]] == ["height", "width"]
    proto.opset_import[0].version = 17
    with pytest.raises(ValueError, match="--preprocess needs opset 18 or newer"):
        with_preprocessing(proto, preprocessor)


def test_what_int8_predicts_of_an_image_depends_on_no_other(package):
    images, runtime = list(open_task("digits").splits["test"].head(12).decode(32)), Classifier(package, variant="int8")
    alone = [runtime.predict([image])[0] for image in images]
    assert runtime.predict(images) == alone
    together, one = runtime.logits(np.stack(images)), runtime.logits(images[0][None])
    assert relative_error(together[:1], one) > 1e-4, "its scales are of an image, so this test would prove nothing"


def test_many_images_are_predicted_in_bounded_batches_and_one_is_no_list(package, monkeypatch):
    runtime, pixels = Classifier(package), random_pixels(4, 5, 32)
    expected = runtime.predict(list(pixels))
    sizes = []
    monkeypatch.setattr("export.runtime.BATCH", 2)
    normalize = runtime.input.normalize
    monkeypatch.setattr(runtime.input, "normalize", lambda given: sizes.append(len(given)) or normalize(given))
    for found, wanted in zip(runtime.predict(pixels), expected, strict=True):
        assert [label for label, _ in found] == [label for label, _ in wanted]
        assert [p for _, p in found] == pytest.approx([p for _, p in wanted], abs=1e-6)
    assert sizes == [2, 2, 1]
    for image in ("cat.jpg", b"", Path("cat.jpg"), pixels[0], Image.fromarray(pixels[0])):
        with pytest.raises(TypeError, match=r"predict takes a list of images, and this is one \w+: write \[image\]"):
            runtime.predict(image)


def test_a_changed_preprocess_graph_is_not_run(copied, package):
    shutil.copy(package / FILES["preprocess"], copied)
    assert agreement.opened(copied, manifest_of(copied))
    content = bytearray((copied / FILES["preprocess"]).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / FILES["preprocess"]).write_bytes(content)
    with pytest.raises(ValueError, match=r"model_preprocess\.onnx was changed after the export"):
        agreement.opened(copied, manifest_of(copied))


def test_preprocessing_in_the_graph_decides_as_pillow_does(package, tmp_path, capsys):
    result = agreement.main([str(package), "--images", "90", "--json", str(tmp_path / "a.json")])
    assert result == json.loads((tmp_path / "a.json").read_text())
    assert result["images"] == 90
    assert result["top1"] >= 99.5
    assert result["median_difference"] < 1e-3
    assert "get the same top-1" in capsys.readouterr().out


def test_the_exported_model_is_as_right_as_pytorch_was(package, run, tmp_path, capsys):
    recorded = read_json(run / "result.json")
    result = accuracy.main([str(package), "--run", str(run), "--json", str(tmp_path / "a.json")])
    assert result["images"] == recorded["examples"] == 797
    assert result["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.2)
    assert result["pytorch"]["same_class"] >= 795
    assert result["interval95"][0] < result["accuracy"] < result["interval95"][1]
    assert "digits (scikit-learn digits), test: float32 in ONNX Runtime" in capsys.readouterr().out
    for variant in ("int8", "preprocess"):
        other = accuracy.main([str(package), "--task", "digits", "--variant", variant, "--test-limit", "100"])
        assert other["pytorch"] is None
        assert other["images"] == 100
        assert other["accuracy"] == pytest.approx(recorded["accuracy"], abs=12)


def test_accuracy_refuses_a_run_or_data_that_does_not_belong(package, tmp_path, capsys):
    assert "was not made of" in refused(capsys, accuracy.main, package, "--run", tmp_path)
    assert "the package 0, 1, 2" in refused(capsys, accuracy.main, package, "--task", "dsprites_loc")
    assert "--test-limit 0 must be" in refused(capsys, accuracy.main, package, "--test-limit", "0")
    assert "has no variant 'int4'" in refused(capsys, accuracy.main, package, "--variant", "int4")
    (tmp_path / "manifest.json").write_text("[]")
    assert "manifest.json is damaged" in refused(capsys, accuracy.main, tmp_path)


def test_bench_sets_every_graph_beside_the_base_and_pytorch(package, run, tmp_path, capsys):
    threads = torch.get_num_threads()
    argv = ["--run", str(run), "--batches", "1,2", "--threads", "1", "--rounds", "4", "--no-memory"]
    result = bench.main([str(package), *argv, "--json", str(tmp_path / "b.json")])
    torch.set_num_threads(threads)
    assert result == json.loads((tmp_path / "b.json").read_text())
    names = ["base", "float32", *FILES, "pytorch"]
    assert [row["name"] for row in result["rows"]] == names + [n for n in names if n != "preprocess"]
    assert result["graphs"]["base"]["nodes"] == result["graphs"]["float32"]["nodes"]
    for row in result["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"])
        low, high = row["ratio"]["interval95"]
        assert low <= row["ratio"]["median"] <= high
    assert {"cpu", "cores", "onnxruntime", "torch"} <= result["machine"].keys()
    assert "ratios to base" in capsys.readouterr().out


def test_bench_runs_a_split_package_with_an_adapter_of_its(split_package, monkeypatch):
    """Its slots are empty otherwise, and the graph faster than any task."""
    (_, two), out = split_package
    found = {}

    def once(calls, rounds):
        found.update({name: call() for name, call in calls.items()})
        return dict.fromkeys(calls, np.ones(rounds))

    monkeypatch.setattr(bench, "interleaved", once)
    monkeypatch.setattr(bench, "write_base", lambda source, manifest, path: shutil.copy(out / "model.onnx", path))
    runtime = Classifier(out)
    given = bench.feeds(runtime.session, 1)
    logits = {t: runtime.session.run(["logits"], given, runtime.run_options(t))[0] for t in runtime.tasks}
    assert relative_error(logits["one"], logits["two"]) > 0.1, "the tasks are alike, so this test would prove nothing"
    for flags, task in (([], "one"), (["--run", str(two)], "two")):
        bench.main([str(out), "--threads", "1", "--rounds", "1", "--no-memory", *flags])
        assert relative_error(found["float32"][0], logits[task]) < 1e-5
    assert relative_error(found["base"][0], logits["two"]) > 0.1


def test_bench_keeps_its_times_where_memory_cannot_be_measured(package, monkeypatch, tmp_path, capsys):
    def killed(*args):
        raise ValueError("model.onnx does not run by itself (killed)")

    monkeypatch.setattr(memory, "peak", killed)
    path = tmp_path / "new" / "folder" / "b.json"
    bench.main([str(package), "--rounds", "1", "--threads", "1", "--json", str(path)])
    kept = json.loads(path.read_text())
    assert kept["rows"][0]["p50_ms"] > 0
    assert set(kept["peak_memory_mb"].values()) == {None}
    assert [each.name for each in path.parent.iterdir()] == ["b.json"]
    assert "does not run by itself (killed)" in capsys.readouterr().err


def test_bench_takes_another_programs_graph_of_the_same_inputs(package, tmp_path, capsys):
    graph, quick = onnx.load(package / "model.onnx"), ["--rounds", "2", "--threads", "1", "--no-memory", "--beside"]
    onnx.save(graph, tmp_path / "theirs.onnx")
    result = bench.main([str(package), *quick, str(tmp_path / "theirs.onnx")])
    assert [row["name"] for row in result["rows"]][-1] == "beside"
    assert result["graphs"]["beside"]["nodes"] == len(graph.graph.node)
    graph.graph.input[0].name = "pixels"
    for node in graph.graph.node:
        node.input[:] = ["pixels" if name == "pixel_values" else name for name in node.input]
    onnx.save(graph, tmp_path / "theirs.onnx")
    said = refused(capsys, bench.main, package, *quick, tmp_path / "theirs.onnx")
    assert "theirs.onnx takes pixels, tensor(float), the package pixel_values, tensor(float); export it" in said
    (tmp_path / "theirs.onnx").write_bytes(b"junk")
    assert "theirs.onnx does not load" in refused(capsys, bench.main, package, *quick, tmp_path / "theirs.onnx")
    assert "there is no file nowhere.onnx" in refused(capsys, bench.main, package, *quick, "nowhere.onnx")


def test_bench_without_a_run_compares_with_float32(package, capsys):
    result = bench.main([str(package), "--rounds", "2", "--threads", "1", "--no-memory"])
    assert result["rows"][0]["name"] == "float32"
    assert result["rows"][0]["ratio"]["median"] == 1
    assert "ratios to float32 (--run brings the plain base)" in capsys.readouterr().out
    assert "name it with --run" in refused(capsys, bench.main, package, "--compile")
    assert "--batches 0 must be" in refused(capsys, bench.main, package, "--batches", "0")
    assert "'1;8' must be whole numbers with commas" in refused(capsys, bench.main, package, "--batches", "1;8")


@pytest.mark.skipif(not memory.SMAPS.is_file(), reason="only Linux tells the proportional set size")
def test_peak_memory_grows_with_the_batch(package):
    one, many = (memory.peak("onnx", package / "model.onnx", batch, 1) for batch in (1, 600))
    assert 10 < one < many - 7  # 600 images of 32 × 32 are 7 MB as they come in
    with pytest.raises(ValueError, match="does not run by itself"):
        memory.peak("onnx", package / "config.json", 1, 1)


def test_flags_of_variants_that_make_no_sense_are_refused(run, tmp_path, capsys):
    for flags, message in {
        ("--quantize", "int4"): "int4",
        ("--calibration-images", "0"): "--calibration-images 0 must be at least 1",
        ("--calibration-seed", "-1"): "--calibration-seed -1 must not be negative",
        ("--calibration-images", "9"): "--calibration-images has no use without --quantize int8-static; add that",
        ("--calibration-seed", "9", "--quantize", "int8"): "--calibration-seed has no use without",
        ("--data-root", "x", "--preprocess"): "--data-root has no use without --quantize or --half",
    }.items():
        assert message in refused(capsys, export_command.main, run, "--out", tmp_path / "p", *flags)
    assert list(tmp_path.iterdir()) == []


def test_more_calibration_images_than_there_are_is_all_of_them_and_said_so(copied, run, capsys):
    manifest = add({"digits": Source.open(run)}, copied, "int8-static", calibration_images=10**6)
    assert manifest["quantization"]["int8-static"]["calibration"]["images"] == 800
    said = capsys.readouterr().out
    assert said.endswith("of 200 validation images (the run trained on them); scales from 800 training images\n")


def test_any_variant_but_the_preprocessing_one_predicts(package, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / "x.png")
    for name in ("float32", "int8", "float16"):
        found = predict.main([str(package), str(tmp_path / "x.png"), "--variant", name])
        assert found == Classifier(package, variant=name).predict([tmp_path / "x.png"])
        assert found == Classifier(package).predict([tmp_path / "x.png"]) or name != "float32"
    said = refused(capsys, predict.main, package, tmp_path / "x.png", "--variant", "preprocess")
    assert "model_preprocess.onnx takes image uint8 (H, W, 3) and gives probabilities" in said
    assert "choose of float32, int8, int8-static, float16" in said
    with pytest.raises(ValueError, match="top=0 must be at least 1"):
        Classifier(package).predict([tmp_path / "x.png"], top=0)


def test_verify_says_what_it_knows_of_each_variant(package, tmp_path, capsys):
    verify.main([str(package)])
    told = (
        "in float32; int8: logits finite; int8-static: logits finite; float16: logits finite; preprocess: checksum only"
    )
    assert told in capsys.readouterr().out
    spoilt = Path(shutil.copytree(package, tmp_path / "spoilt"))
    proto = onnx.load(spoilt / FILES["float16"])
    bias = next(i for i in proto.graph.initializer if i.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, np.nan, np.float16), bias.name))
    onnx.save(proto, spoilt / FILES["float16"])
    package_module.write_manifest(spoilt, manifest_of(spoilt))
    assert "float16 gives logits of digits that are not finite" in refused(capsys, verify.main, spoilt)


def test_accuracy_names_the_flag_where_the_images_went_away(package, run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    settings = read_json(run / "config.json") | {"task": "mine", "data_root": str(tmp_path / "gone")}
    (moved / "config.json").write_text(json.dumps(settings))
    said = refused(capsys, accuracy.main, package, "--run", moved)
    assert said.endswith("gone is not a folder; if the images lie elsewhere now, name --data-root")
