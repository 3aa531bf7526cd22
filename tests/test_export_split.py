"""Split packages, the runtime that serves their tasks, and delta files."""

import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

import capavision as cv
import export
from capavision.files import cache_dir
from export import __main__ as export_command
from export import delta, predict, session, split, verify
from export.package import Source
from export.runtime import Classifier, random_pixels, read_manifest, relative_error, sha256
from tests import test_export
from tests.conftest import awaken as wake
from tests.conftest import create
from tests.test_export import CLASSES, INFO, adapter_file, awaken, refused

LABELS = {"first": ["ant", "bee", "cow"], "second": ["dog", "elk", "fox", "gnu", "hen"], "third": ["ibis"]}
TINY = test_export.TINY | {"beit_base_patch16_224": {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}}
LORA = cv.LoRA(rank=4, branches=2)


def base_of(name):
    """A base with weights in the cache: random ones would differ with the number of classes."""
    file = Path(cache_dir()) / f"{name}.safetensors"
    if not file.exists():
        size = {} if "resnet" in name else {"img_size": 32}
        model = wake(create(name, num_classes=2, **size, **TINY.get(name, {})))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file)
    return cv.Base(name, file.name, 32, kwargs=TINY.get(name, {}))


def run_file(folder, task, method, name="test_vit", classes=None, seed=0, **kwargs):
    """A trained run of a task on the common base."""
    base, classes = base_of(name), classes or LABELS[task]
    model = base.build(len(classes))
    cv.inject(model, method, seed=seed, **kwargs)
    awaken(model, seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in cv.parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
        for key, buffer in model.named_buffers():
            if not kwargs.get("freeze_norm", True) and key.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=rng))
    path = folder / f"{task}.safetensors"
    cv.save(model, path, base=base, classes=classes, info={**INFO, "task": task})
    return path


@pytest.fixture(scope="module", autouse=True)
def same_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPAVISION_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Runs of three tasks: CapaBoost on q and v, another rank on all layers, a bottleneck beside each MLP."""
    folder = tmp_path_factory.mktemp("runs")
    methods = {"first": LORA, "second": cv.LoRA(rank=1), "third": cv.Adapter(rank=2, branches=2, where="parallel")}
    targets = {"second": {"targets": "all"}}
    return {
        task: run_file(folder, task, method, seed=i, **targets.get(task, {}))
        for i, (task, method) in enumerate(methods.items())
    }


@pytest.fixture(scope="module")
def package(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("split") / "package"
    export_command.main(["--split", *map(str, files.values()), "--out", str(out)])
    return out


@pytest.fixture
def copied(package, tmp_path):
    """A package that a test may spoil."""
    return Path(shutil.copytree(package, tmp_path / "package"))


def spoil(folder, change):
    """Change the manifest, and make every checksum fit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name]["sha256"] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def torch_logits(model, runtime, pixels):
    with torch.inference_mode():
        return model.eval()(torch.from_numpy(runtime.normalize(pixels))).numpy()


# The package ---------------------------------------------------------------------------------------------------------


def test_every_task_computes_what_its_own_unfolded_model_computes(files, package):
    runtime = Classifier(package)
    assert runtime.tasks == tuple(files)
    for task, file in files.items():
        model = cv.load(file)
        for batch in (1, 4):
            pixels = random_pixels(batch, batch, 32)
            expected = torch_logits(model, runtime, pixels)
            plain = torch_logits(cv.remove(cv.load(file)), runtime, pixels)
            assert relative_error(plain, expected) > 1e-2, "the delta moved nothing, so this test would prove nothing"
            assert relative_error(runtime.logits(pixels, task), expected) < 1e-5


def test_without_an_adapter_the_graph_is_the_base_under_the_first_runs_head(files, package):
    runtime, pixels = Classifier(package), random_pixels(9, 3, 32)
    found = runtime.session.run(["logits"], {"pixel_values": runtime.normalize(pixels)})[0]
    assert relative_error(found, torch_logits(cv.remove(cv.load(files["first"])), runtime, pixels)) < 1e-5
    assert read_manifest(package)["base_parity"]["relative_error"].keys() == {"1", "2", "3", "5"}


def test_the_manifest_says_what_each_task_is(files, package):
    manifest = read_manifest(package)
    assert manifest["form"] == "split"
    assert len(manifest["base_sha256"]) == 64
    for task, file in files.items():
        told = manifest["tasks"][task]
        assert told["labels"] == LABELS[task]
        assert told["adapter"] == f"adapters/{task}.onnx_adapter"
        assert told["source_sha256"] == sha256(file)
        assert told["parity"]["distance_to_base"] > 1e-2
        read = onnxruntime.AdapterFormat.read_adapter(str(package / told["adapter"]))
        assert sorted(read.get_parameters()) == sorted(manifest["slots"])
    shapes = {i.name: i.type.tensor_type.shape.dim for i in onnx.load(package / "model.onnx").graph.input}
    assert [d.dim_param for d in shapes["pixel_values"]][:1] == ["batch"]
    assert {*manifest["slots"], "pixel_values"} == shapes.keys()
    ranks = [d.dim_param for name, dims in shapes.items() if name.endswith("delta.down") for d in dims][1::2]
    assert len(set(ranks)) == len(ranks) > 8, "one symbol for all ranks would say that they are equal"


def test_a_split_package_verifies_and_holds_no_path_of_this_machine(package, capsys):
    assert verify.main([str(package)]) < 1e-5
    assert "6 checksums right, the probes of 3 tasks within" in capsys.readouterr().out
    home = str(cv.__file__).rsplit("/", 2)[0].encode()
    for path in [p for p in package.rglob("*") if p.is_file()]:
        assert home not in path.read_bytes(), path
        assert b"site-packages" not in path.read_bytes(), path


KINDS = {
    "weights read by their parent": ("beit_base_patch16_224", LORA, cv.LoRA(rank=1), {"targets": "qkv"}),
    "convs and batch norms": ("test_resnet", LORA, cv.LoRA(rank=2), {"freeze_norm": False}),
    "biases, prefixes, a delta on the head": ("test_vit", cv.BitFit(), cv.Prefix(length=3, branches=2), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_runs_share_a_graph(kind, tmp_path):
    name, method, other, kwargs = KINDS[kind]
    files = {
        "first": run_file(tmp_path, "first", method, name),
        "second": run_file(tmp_path, "second", other, name, seed=1, **kwargs),
    }
    if "head" in kind:
        targets = ["head", "blocks.0.attn.qkv"]
        files["third"] = run_file(tmp_path, "third", cv.LoRA(rank=2), name, seed=2, targets=targets)
    split.build({task: Source.open(file) for task, file in files.items()}, tmp_path / "package")
    runtime, pixels = Classifier(tmp_path / "package"), random_pixels(3, 3, 32)
    for task, file in files.items():
        expected = torch_logits(cv.load(file), runtime, pixels)
        assert relative_error(runtime.logits(pixels, task), expected) < 1e-5
    assert verify.main([str(tmp_path / "package")]) < 1e-5


# The runtime ---------------------------------------------------------------------------------------------------------


def test_a_task_brings_its_labels_and_a_call_may_name_another(package, capsys, tmp_path):
    runtime = Classifier(package, "second")
    image = random_pixels(1, 1, 32)[0]
    assert (runtime.task, runtime.labels) == ("second", LABELS["second"])
    here = runtime.predict([runtime_image(image)], top=9)
    runtime.switch("first")
    assert runtime.labels == LABELS["first"]
    there = runtime.predict([runtime_image(image)], top=9, task="second")
    assert runtime.task == "first"
    assert here == there
    assert {label for label, _ in here[0]} == set(LABELS["second"])
    assert {label for label, _ in runtime.predict([runtime_image(image)])[0]} == set(LABELS["first"])
    assert runtime.predict([]) == []
    runtime_image(image).save(tmp_path / "x.png")
    predict.main([str(package), str(tmp_path / "x.png"), "--task", "third"])
    assert "third: ibis 100.0 %" in capsys.readouterr().out
    for wrong in (lambda: runtime.switch("fifth"), lambda: runtime.logits(image[None], "fifth")):
        with pytest.raises(ValueError, match="has no task 'fifth'; choose of first, second, third"):
            wrong()
    assert runtime.task == "first"
    assert "has no task 'x'" in refused(capsys, predict.main, package, tmp_path / "x.png", "--task", "x")


def runtime_image(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


def test_eight_threads_on_two_tasks_get_what_one_gets(package):
    runtime, pixels = Classifier(package, threads=1), random_pixels(5, 2, 32)
    expected = {task: runtime.logits(pixels, task) for task in ("first", "second")}
    start = threading.Barrier(8)

    def work(number):
        task = ("first", "second")[number % 2]
        start.wait()
        for turn in range(25):
            if turn % 5 == number % 5:
                runtime.switch(task)  # the others' calls must not notice
            assert np.array_equal(runtime.logits(pixels, task), expected[task])
            assert len(runtime.predict([runtime_image(pixels[0])])[0]) in (3, 5)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_one_session_serves_all_who_ask_for_the_same_bytes_and_settings(package, copied):
    one, other = Classifier(package, threads=1), Classifier(copied, "second", threads=1)
    assert one.session is other.session
    assert Classifier(package, threads=2).session is not one.session
    number = len(session._sessions)
    del one, other
    gc.collect()
    assert len(session._sessions) < number


def test_a_provider_is_taken_by_what_there_is(package, monkeypatch):
    assert Classifier(package).providers == ["CPUExecutionProvider"]
    with pytest.raises(ValueError, match="provider 'cuda' is not offered by this ONNX Runtime; choose of cpu"):
        Classifier(package, providers=["cuda"])
    offered = ["CPUExecutionProvider", "TensorrtExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    assert session.providers() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert session.providers(["tensorrt"]) == ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CoreMLExecutionProvider", offered[0]])
    assert session.providers() == ["CoreMLExecutionProvider", "CPUExecutionProvider"]
    assert session.providers(["cpu"]) == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    "pixels",
    [
        random_pixels(0, 1, 32).astype(np.float32),
        random_pixels(0, 1, 32).transpose(0, 3, 1, 2),
        random_pixels(0, 1, 32)[0],
        random_pixels(0, 1, 16),
        random_pixels(0, 1, 32)[:0],
        random_pixels(0, 1, 32).tolist(),
    ],
    ids=["float", "channels first", "no batch", "another size", "no image", "a list"],
)
def test_an_array_of_another_type_or_layout_is_refused(package, pixels):
    with pytest.raises(ValueError, match=r"pixels must be uint8 \(n, 32, 32, 3\), and are "):
        Classifier(package).logits(pixels)


def test_an_unknown_variant_is_refused(package):
    with pytest.raises(ValueError, match="has no variant 'int4'; choose of float32"):
        Classifier(package, variant="int4")


def test_two_active_adapters_are_what_onnxruntime_takes_silently_and_the_runtime_never_gives(package):
    """One of the two wins, without a word: so a task is one adapter, and nothing else may be asked for."""
    runtime, pixels = Classifier(package), random_pixels(2, 1, 32)
    options = onnxruntime.RunOptions()
    for task in ("first", "second"):
        options.add_active_adapter(runtime._adapters[task])
    found = runtime.session.run(["logits"], {"pixel_values": runtime.normalize(pixels)}, options)[0]
    assert any(np.array_equal(found, runtime.logits(pixels, task)) for task in ("first", "second"))
    with pytest.raises(ValueError, match="has no task"):
        runtime.logits(pixels, ("first", "second"))


def test_nothing_ever_adds_an_initializer_to_a_session():
    """It would come after constant folding, and be ignored without a word."""
    for path in Path(export.__file__).parent.rglob("*.py"):
        assert "add_initializer" not in path.read_text(), path
        assert "add_external_initializers" not in path.read_text(), path


# Trust ---------------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_any_file_is_caught(copied, capsys):
    names = list(read_manifest(copied)["files"])
    assert len(names) == 6
    for name in names:
        whole = (copied / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(flipped) // 2] ^= 1
        (copied / name).write_bytes(flipped)
        for command in ([verify.main, copied], [predict.main, copied, "x.png"]):
            assert f"{name} was changed after the export; export again" in refused(capsys, *command)
        (copied / name).unlink()
        assert f"{name} is missing; export again" in refused(capsys, verify.main, copied)
        (copied / name).write_bytes(whole)


def adapter_values(path):
    read = onnxruntime.AdapterFormat.read_adapter(str(path))
    return {name: value.numpy().copy() for name, value in read.get_parameters().items()}


def test_an_adapter_must_be_of_this_base_and_fill_every_slot_once(copied, capsys):
    """The checksums are made to fit, so only the file itself can tell."""
    path = copied / "adapters" / "first.onnx_adapter"
    values, base = adapter_values(path), read_manifest(copied)["base_sha256"]
    cases = {
        "was made for another base graph": (values, "0" * 64),
        "leaves out head.bias": ({k: v for k, v in values.items() if k != "head.bias"}, base),
        "fills extra": ({**values, "extra": values["head.bias"]}, base),
    }
    for message, (content, sha) in cases.items():
        split.write_adapter(path, content, sha)
        spoil(copied, lambda manifest: None)
        assert message in refused(capsys, verify.main, copied)
    path.write_bytes(path.read_bytes()[:1000])
    spoil(copied, lambda manifest: None)
    assert "first.onnx_adapter does not load" in refused(capsys, verify.main, copied)


def test_a_base_graph_of_another_package_is_refused(copied, capsys):
    proto = onnx.load(copied / "model.onnx")
    next(prop for prop in proto.metadata_props if prop.key == "base_sha256").value = "0" * 64
    onnx.save(proto, copied / "model.onnx")
    spoil(copied, lambda manifest: None)
    assert "has the base graph of another package" in refused(capsys, verify.main, copied)


def test_tasks_and_adapters_belong_together(copied, capsys):
    adapters = copied / "adapters"
    shutil.copy(adapters / "first.onnx_adapter", adapters / "fourth.onnx_adapter")
    assert "fourth.onnx_adapter is not in the manifest; take it out" in refused(capsys, verify.main, copied)
    (adapters / "fourth.onnx_adapter").unlink()

    def share(manifest):
        manifest["tasks"]["second"]["adapter"] = manifest["tasks"]["first"]["adapter"]

    whole = (copied / "manifest.json").read_text()
    spoil(copied, share)
    assert "first and second share adapters/first.onnx_adapter" in refused(capsys, verify.main, copied)

    def swap(manifest):
        tasks = manifest["tasks"]
        tasks["first"]["adapter"], tasks["second"]["adapter"] = (tasks[t]["adapter"] for t in ("second", "first"))

    (copied / "manifest.json").write_text(whole)
    spoil(copied, swap)
    assert "first has logits of (1, 5), its probe (1, 3), and it has 3 labels" in refused(capsys, verify.main, copied)
    (copied / "manifest.json").write_text(whole)
    path = adapters / "second.onnx_adapter"
    values = adapter_values(path)
    values["head.weight"] *= 1.5
    split.write_adapter(path, values, read_manifest(copied)["base_sha256"])
    spoil(copied, lambda manifest: None)
    assert "the probe of second is off by" in refused(capsys, verify.main, copied)


def test_a_damaged_manifest_is_one_line(copied, capsys):
    def outside(manifest):
        manifest["files"]["../x"] = {"sha256": "", "bytes": 0}

    def lacks(manifest):
        del manifest["files"]["adapters/first.onnx_adapter"]

    def bare(manifest):
        del manifest["tasks"]["first"]["probe"]

    def shapeless(manifest):
        manifest["tasks"]["first"] = "first"

    def formless(manifest):
        del manifest["form"]

    def baseless(manifest):
        del manifest["base_sha256"]

    whole = (copied / "manifest.json").read_text()
    for change in (outside, lacks, bare, shapeless, formless, baseless):
        spoil(copied, change)
        assert "manifest.json is damaged; export again" in refused(capsys, verify.main, copied)
        (copied / "manifest.json").write_text(whole)


JUNK = (None, [], {}, 1, -1, "x", 1e999, [["x"]], 10**400)
TOLD = {"versions", "base", "base_parity", "methods", "opset", "exporter", "fallback", "quantization", "relative_error"}


def branches(node, path=()):
    """The paths to all values of a JSON file, of long lists to the first two, and none into what no runtime reads."""
    yield path
    if TOLD & {*path}:
        return
    items = node.items() if isinstance(node, dict) else enumerate(node[:2]) if isinstance(node, list) else ()
    for key, value in items:
        yield from branches(value, (*path, key))


def spoilt(whole):
    """Every way to put junk in the place of a value."""
    for path in branches(whole):
        for junk in JUNK:
            copy = {"": json.loads(json.dumps(whole))}
            *above, last = ("", *path)
            node = copy
            for key in above:
                node = node[key]
            if node[last] != junk:
                node[last] = junk
                yield (*path, junk), copy[""]


SAYS = "damaged|does not load|has format|has no task|off by|logits of|unlike what|is missing|pixels must be"


def taken(call):
    """Whether junk was let in; what refuses it says why."""
    try:
        call()
    except ValueError as error:
        said = str(error)
    else:
        return True
    assert re.search(SAYS, said), said
    return False


def test_junk_anywhere_in_a_manifest_is_refused_or_never_read(copied):
    kept, path = Classifier(copied), copied / "manifest.json"
    let_in = []
    for what, manifest in spoilt(json.loads(path.read_text())):
        path.write_text(json.dumps(manifest))
        if taken(lambda: verify.main([str(copied)])):
            let_in.append(what)
    assert kept.tasks
    unread = TOLD | {"bytes", "source_sha256", "tolerance", "distance_to_base"}
    for what in let_in:
        assert unread & {*what[:-1]} or (what[2:3], what[-1]) == (("labels",), "x"), what


def test_junk_anywhere_in_the_preprocessing_is_refused_or_never_read(copied):
    path = copied / "preprocessor_config.json"
    for what, preprocessor in spoilt(json.loads(path.read_text())):
        path.write_text(json.dumps(preprocessor))
        spoil(copied, lambda manifest: None)
        let_in = taken(lambda: Classifier(copied).predict([random_pixels(0, 1, 32)[0]]))
        assert not let_in or what[0].startswith(("do_", "re")) or what[-1] in (1, -1), what


def test_a_manifest_nested_beyond_reason_is_one_line(copied, capsys):
    (copied / "manifest.json").write_text("[" * 200_000)
    assert "manifest.json is damaged" in refused(capsys, verify.main, copied)


def test_an_adapter_whose_values_do_not_fit_the_graph_is_one_line(copied, capsys):
    path = copied / "adapters" / "first.onnx_adapter"
    values = adapter_values(path)
    name = next(name for name in values if name.endswith("delta.down") and values[name].shape[1] > 1)
    for wrong in (values[name][:, :1], values[name].astype(np.float16), values[name][None]):
        split.write_adapter(path, {**values, name: np.ascontiguousarray(wrong)}, read_manifest(copied)["base_sha256"])
        spoil(copied, lambda manifest: None)
        assert "float32 does not run for first" in refused(capsys, verify.main, copied)


def test_labels_that_are_not_as_many_as_the_logits_are_refused(copied):
    spoil(copied, lambda manifest: manifest["tasks"]["second"]["labels"].pop())
    with pytest.raises(ValueError, match=r"second has logits of \(1, 5\), and 4 labels; export again"):
        Classifier(copied, "second").predict([random_pixels(1, 1, 32)[0]])


def test_many_images_take_no_more_memory_than_a_batch(package, monkeypatch):
    runtime, images = Classifier(package), list(random_pixels(1, 10, 32))
    one_by_one = [runtime.predict([image])[0] for image in images]
    sizes = []
    normalize = runtime.input.normalize
    monkeypatch.setattr(runtime.input, "normalize", lambda pixels: sizes.append(len(pixels)) or normalize(pixels))
    monkeypatch.setattr("export.runtime.BATCH", 4)
    found = runtime.predict(images)
    assert sizes == [4, 4, 2]
    for row, expected in zip(found, one_by_one, strict=True):
        assert [label for label, _ in row] == [label for label, _ in expected]
        assert [p for _, p in row] == pytest.approx([p for _, p in expected], abs=1e-5)


# What is refused -----------------------------------------------------------------------------------------------------


REFUSED = {
    "no low-rank factors": (cv.Circulant(), {"targets": "blocks.*.attn.proj"}, "which is no product of thin matrices"),
    "all of the base": (cv.Full(), {}, "fourth trained most of the base"),
    "another activation": (cv.Adapter(rank=2, where="parallel", activation="gelu"), {}, "activation='gelu'"),
    "another place": (cv.Adapter(rank=2, where="houlsby"), {}, "where='houlsby'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_that_no_slot_serves_is_refused_by_name(case, files, tmp_path, capsys):
    method, kwargs, message = REFUSED[case]
    other = run_file(tmp_path, "fourth", method, classes=CLASSES, **kwargs)
    said = refused(capsys, export_command.main, "--split", files["third"], other, "--out", tmp_path / "package")
    assert message in said
    assert "fourth" in said
    assert not (tmp_path / "package").exists()


def test_runs_that_differ_below_the_deltas_are_refused_by_name(files, tmp_path, capsys):
    resnet = run_file(tmp_path, "resnet", LORA, "test_resnet", classes=CLASSES)
    random = adapter_file(tmp_path / "random.safetensors", LORA)
    cases = {resnet: "resnet has base model test_resnet", random: "toy has base weights random, "}
    model, base = cv.load(files["first"]), base_of("test_vit")
    grey = {**INFO, "task": "grey", "preprocessing": {**INFO["preprocessing"], "mean": [0.5] * 3}}
    cv.save(model, tmp_path / "grey.safetensors", base=base, classes=CLASSES, info=grey)
    cases[tmp_path / "grey.safetensors"] = "grey has preprocessing"
    for file, message in cases.items():
        said = refused(capsys, export_command.main, "--split", files["first"], file, "--out", tmp_path / "package")
        assert message in said
        assert "seed" not in said, "what both have in common is told"
        assert "export it to a package of its own" in said


def test_other_weights_under_the_same_base_are_refused(files):
    first, second = (Source.open(files[task]) for task in ("first", "second"))
    with torch.no_grad():
        second.model.cls_token += 1
    with pytest.raises(ValueError, match="first and second were trained on other base weights: cls_token differs"):
        split._common_base({"first": first, "second": second})


def test_tasks_are_told_apart_by_names_that_files_can_have(files, tmp_path, capsys):
    first, out = files["first"], tmp_path / "package"
    said = refused(capsys, export_command.main, "--split", first, first, "--out", out)
    assert f"is the second run of task first; tell them apart: --split NAME={first}" in said
    for name in ("a/b", "..", "a" * 201, "ö" * 101, "a\nb", ""):
        said = refused(capsys, export_command.main, "--split", f"{name}={first}", "--out", out)
        assert "cannot name a file" in said
    assert list(split.named([str(first), f"again={first}"])) == ["first", "again"]


def test_a_failed_gate_names_the_task_and_writes_nothing(tmp_path, capsys):
    probe = run_file(tmp_path, "first", cv.LinearProbe())
    argv = ["--split", probe, "--out", tmp_path / "package", "--tolerance", "1e-12"]
    said = refused(capsys, export_command.main, *argv)
    assert "error: first: at batch " in said
    assert "ONNX Runtime and PyTorch differ by" in said
    assert list(tmp_path.iterdir()) == [probe]


def test_flags_that_do_not_go_together_are_refused(files, package, tmp_path, capsys):
    run, out = files["first"], ["--out", tmp_path / "x"]
    cases = {
        "give one of RUN_DIR, --split RUN1 RUN2 … and --delta RUN": [[run, "--delta", run, "--base", package], []],
        "--delta and --base belong together": [["--delta", run], [run, "--base", package]],
        "--exporter and --dynamic-size are for RUN_DIR alone": [["--split", run, "--dynamic-size"]],
        "--opset is for packages; a delta takes that of its base": [
            ["--delta", run, "--base", package, "--opset", "18"]
        ],
        "must be a positive number": [[run, "--tolerance", x] for x in ("nan", "inf", "0", "-1")],
    }
    for message, lines in cases.items():
        for argv in lines:
            assert message in refused(capsys, export_command.main, *argv, *out)


# Delta files ---------------------------------------------------------------------------------------------------------

DELTAS = {
    "vit lora": ("test_vit", LORA, {}, True),
    "vit circulant, legacy": ("test_vit", cv.Circulant(), {"targets": "blocks.*.attn.proj"}, False),
    "resnet lora": ("test_resnet", cv.LoRA(rank=2), {}, True),
    "resnet circulant, legacy": ("test_resnet", cv.Circulant(), {"targets": "layer4.0.conv2"}, False),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Makes a package of a base, by dynamo or by legacy, which is faster; once."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name, exporter="dynamo"):
        out = folder / f"{name}-{exporter}"
        if not out.exists():
            file = run_file(folder, f"{name}-{exporter}-run", cv.LinearProbe(), name, classes=LABELS["third"])
            export_command.main([str(file), "--out", str(out), "--exporter", exporter])
        return out

    return make


@pytest.fixture(scope="module")
def delta_file(files, bases, tmp_path_factory):
    file = tmp_path_factory.mktemp("delta") / "it.delta"
    export_command.main(["--delta", str(files["first"]), "--base", str(bases("test_vit")), "--out", str(file)])
    return file


@pytest.mark.parametrize("case", DELTAS)
def test_a_delta_applied_offline_gives_the_merged_package_byte_for_byte(case, bases, files, delta_file, tmp_path):
    name, method, kwargs, low_rank = DELTAS[case]
    exporter = "legacy" if "legacy" in case else "dynamo"
    base, made = bases(name, exporter), delta_file
    if case == "vit lora":
        run = files["first"]
    else:
        run, made = run_file(tmp_path, "first", method, name, **kwargs), tmp_path / "it.delta"
        export_command.main(["--delta", str(run), "--base", str(base), "--out", str(made)])
    export_command.main([str(run), "--out", str(tmp_path / "merged"), "--exporter", exporter])
    delta.main(["apply", str(made), "--base", str(base), "--out", str(tmp_path / "applied")])
    for file in ("model.onnx", "config.json", "preprocessor_config.json"):
        assert (tmp_path / "applied" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes(), file
    plain, merged = ((folder / "model.onnx").read_bytes() for folder in (base, tmp_path / "merged"))
    assert plain != merged, "the run changed nothing, so this test would prove nothing"
    assert verify.main([str(tmp_path / "applied")]) < 1e-5
    _, tensors = delta._read(made)
    factors = [tensor for key, tensor in tensors.items() if key.endswith("/down")]
    assert bool(factors) == low_rank
    if low_rank:
        assert max(map(len, factors)) <= 2 * 2 * 4  # branches, q and v, rank
        assert made.stat().st_size < 0.5 * len(merged)


@pytest.mark.parametrize("shape", [(40, 30), (24, 12, 3, 3), (7,)])
@pytest.mark.parametrize("rank", [0, 2, 100])
def test_what_is_stored_gives_every_bit_back(shape, rank):
    rng = np.random.default_rng(len(shape) + rank)
    base = rng.normal(size=shape).astype(np.float32)
    rest = int(np.prod(shape[1:]))
    change = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, rest))
    merged = base + change.reshape(shape).astype(np.float32)
    merged.flat[0], base.flat[1] = -0.0, -1e-42
    found = delta.added(base, delta.difference(base, merged))
    assert found.tobytes() == merged.tobytes()


def test_applying_a_delta_never_imports_torch(bases, delta_file, tmp_path):
    argv = ["apply", str(delta_file), "--base", str(bases("test_vit")), "--out", str(tmp_path / "applied")]
    code = (
        f"import sys; from export import delta; delta.main({argv!r}); "
        "heavy = {'torch', 'timm', 'capavision', 'vtab'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_delta_is_refused_by_name_where_it_does_not_fit(bases, files, delta_file, package, tmp_path, capsys):
    run, file = files["first"], delta_file
    make = ["--delta", run, "--out", tmp_path / "new"]
    assert "is a split package" in refused(capsys, export_command.main, *make, "--base", package)
    said = refused(capsys, export_command.main, *make, "--base", bases("test_resnet"))
    assert re.search("has model test_resnet, .*, the run has model test_vit, .*; name a package of the same base", said)
    assert "seed" not in said, "what both have in common is told"

    vit = bases("test_vit")

    def apply(base=vit, out=tmp_path / "out", file=file):
        return refused(capsys, delta.main, "apply", file, "--base", base, "--out", out)

    assert "was made for another base package" in apply(bases("test_resnet"))
    assert "exists; name another folder" in apply(out=tmp_path)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    said = apply(file=tmp_path / "flipped")
    assert "make it again" in said
    (tmp_path / "cut").write_bytes(content[:1000])
    assert "is damaged or no safetensors file" in apply(file=tmp_path / "cut")
    assert "but not one that python -m export --delta wrote" in apply(file=run)
    assert not (tmp_path / "out").exists()


def rewritten(file, out, tensors=None, **about):
    """A delta file with other contents."""
    old, stored = delta._read(file)
    stored |= tensors or {}
    save_numpy({k: np.ascontiguousarray(v) for k, v in stored.items()}, out, {delta.KEY: json.dumps({**old, **about})})
    return out


def bomb(size):
    stream = zlib.compressobj()
    block = bytes(1 << 20)
    return np.frombuffer(b"".join([stream.compress(block) for _ in range(size >> 20)] + [stream.flush()]), np.uint8)


def test_a_hostile_delta_is_one_line_and_takes_no_memory(bases, delta_file, tmp_path, capsys):
    _, tensors = delta._read(delta_file)
    down = next(name for name in tensors if name.endswith("/down"))
    up, residual = (f"{down.rpartition('/')[0]}/{part}" for part in ("up", "residual"))
    texts = delta._read(delta_file)[0]["texts"]
    manifest = json.loads(texts["manifest.json"])
    float32 = np.float32
    skeleton = onnx.ModelProto.FromString(zlib.decompress(tensors["graph"].tobytes()))

    def graph(change):
        proto = onnx.ModelProto()
        proto.CopyFrom(skeleton)
        change(proto.graph)
        return {"graph": np.frombuffer(zlib.compress(proto.SerializeToString()), np.uint8)}

    def elsewhere(graph):
        for tensor in graph.initializer:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="../outside")

    def many(graph):
        largest = max(graph.initializer, key=lambda tensor: np.prod(tensor.dims))
        graph.initializer.extend([largest] * 100)

    cases = {
        "graph bomb": {"tensors": {"graph": bomb(1 << 28)}},
        "residual bomb": {"tensors": {residual: bomb(1 << 28)}},
        "cut": {"tensors": {residual: tensors[residual][:-3]}},
        "flat": {"tensors": {down: tensors[down].ravel()}},
        "empty": {"tensors": {down: np.zeros((2, 0), float32)}},
        "narrow": {"tensors": {up: tensors[up][:, :1]}},
        "elsewhere": {"tensors": graph(elsewhere)},
        "many": {"tensors": graph(many)},
        "no graph": {"tensors": {"graph": np.zeros(9, np.uint8)}},
        "unknown": {"same": {"a": "b", **dict.fromkeys([t.name for t in skeleton.graph.initializer], "b")}},
        "nothing checked": {"texts": {**texts, "manifest.json": json.dumps({**manifest, "files": {}})}},
        "no manifest": {"texts": {**texts, "manifest.json": "[]"}},
        "more files": {"texts": {**texts, "../outside": "x"}},
        **{
            f"{key} {junk!r}": {key: junk}
            for key in ("format", "base", "same", "texts")
            for junk in (None, [], {}, "x")
        },
        **{f"text {junk!r}": {"texts": {**texts, "config.json": junk}} for junk in (None, [], 1)},
    }
    for case, change in cases.items():
        file = rewritten(delta_file, tmp_path / "it.delta", **change)
        if case == "more files":
            delta.main(["apply", str(file), "--base", str(bases("test_vit")), "--out", str(tmp_path / "out")])
            shutil.rmtree(tmp_path / "out")
            capsys.readouterr()
        else:
            tracemalloc.start()
            argv = ["apply", file, "--base", bases("test_vit"), "--out", tmp_path / "out"]
            said = refused(capsys, delta.main, *argv)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1e8, f"{case}: {peak:,} bytes"
            assert "it.delta" in said, case
            assert said.endswith(("make it again", "python -m export --delta wrote", "name that one")), case
        assert {path.name for path in tmp_path.iterdir()} == {"it.delta"}, case
