import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import capavision as cv
from export import __main__ as export_command
from export import cli, predict, verify
from export import source as source_module
from export.graph import folded, to_onnx
from export.package import Source, build
from export.runtime import Classifier, random_pixels, relative_error, sha256
from tests.conftest import full_disk
from vtab.data import file_split

METHODS = {
    "lora": cv.LoRA(rank=4, branches=2),
    "adapter": cv.Adapter(rank=4, branches=2, masks="complementary"),
    "parallel adapter": cv.Adapter(rank=4, where="parallel", activation="gelu"),
}
TINY = {"test_vit": {"depth": 2}}
INFO = {"task": "toy", "preprocessing": {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
CLASSES = ["ant", "bee", "cow"]
FAST = "legacy"  # 20 times; for what no exporter has a part in


def awaken(model, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for p in cv.parameters(model):
        if p.abs().max() < 1e-3:
            torch.nn.init.normal_(p.data, std=0.1, generator=rng)


def adapter_file(path, method, name="test_vit", trained=True):
    base = cv.Base(name, "random", 32, kwargs=TINY.get(name, {}))
    model = base.build(len(CLASSES))
    cv.inject(model, method)
    if trained:
        awaken(model)
    cv.save(model, path, base=base, classes=CLASSES, info=INFO)
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Makes (adapter file, package) of a method; once."""

    @functools.cache
    def make(method):
        folder = tmp_path_factory.mktemp(method)
        file = adapter_file(folder / "adapter.safetensors", METHODS[method])
        export_command.main([str(file), "--out", str(folder / "package")])
        return file, folder / "package"

    return make


@pytest.fixture(params=METHODS)
def package(request, packages):
    """(adapter file, package) of each method."""
    return packages(request.param)


@pytest.fixture
def merged(packages):
    return packages("lora")


@pytest.fixture
def copied(merged, tmp_path):
    """A package that a test may spoil."""
    for path in merged[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def test_the_package_computes_what_the_unfolded_model_computes(package):
    file, folder = package
    model, runtime = cv.load(file).eval(), Classifier(folder)
    base = cv.remove(cv.load(file)).eval()
    for batch in (1, 2, 7):
        pixels = random_pixels(40 + batch, batch, 32)
        with torch.inference_mode():
            expected, plain = (m(torch.from_numpy(runtime.normalize(pixels))).numpy() for m in (model, base))
        assert relative_error(plain, expected) > 1e-2, "the delta moved nothing, so this test would prove nothing"
        assert relative_error(runtime.logits(pixels), expected) < 1e-5


def test_a_run_that_is_not_there_names_those_near_it(tmp_path, capsys):
    for run in ("mine", "other"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "adapter.safetensors").touch()
    (tmp_path / "runs" / "half").mkdir()
    (tmp_path / "runs" / "half" / "config.json").touch()
    (tmp_path / "runs" / "one.safetensors").touch()
    for given, meant in {
        "deeper/and/deeper": "'mine' or 'one.safetensors' or 'other'",
        "nofile.safetensors": "'one.safetensors'",
        "mime": "'mine'",
    }.items():
        said = refused(capsys, export_command.main, tmp_path / "runs" / given, "--out", tmp_path / "package")
        assert f"{given} is not there; in {tmp_path / 'runs'}, did you mean {meant}?" in said
    said = refused(capsys, export_command.main, tmp_path / "runs" / "half", "--out", tmp_path / "package")
    assert "half holds no adapter.safetensors; finish the run first" in said
    said = refused(capsys, export_command.main, tmp_path / "runs", "--out", tmp_path / "package")
    assert "runs holds runs: mine, other; name one" in said
    said = refused(capsys, export_command.main, tmp_path, "--out", tmp_path / "package")
    assert f"{tmp_path} is no run's folder" in said


TIMM = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
UNFIT = {
    "classes": (None, INFO, "does not say its classes"),
    "nothing": (CLASSES, {}, "does not say its preprocessing"),
    "timm's": (CLASSES, {"preprocessing": TIMM}, "preprocessing is {'input_size': [3, 32, 32], "),
    "one mean": (CLASSES, {"preprocessing": {**INFO["preprocessing"], "mean": 0.5}}, "'mean': 0.5"),
    "no size": (CLASSES, {"preprocessing": {**INFO["preprocessing"], "size": "32"}}, "'size': '32'"),
    "std 0": (CLASSES, {"preprocessing": {**INFO["preprocessing"], "std": [0, 1, 1]}}, "'std': [0, 1, 1]"),
    "cropped": (CLASSES, {"preprocessing": {**INFO["preprocessing"], "resize": "crop"}}, "'resize': 'crop'"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_without_what_a_package_needs_says_what_to_save_and_how(case, tmp_path, capsys):
    classes, info, says = UNFIT[case]
    base = cv.Base("test_vit", "random", 32, kwargs=TINY["test_vit"])
    model = base.build(len(CLASSES))
    cv.inject(model, METHODS["lora"])
    awaken(model)
    file = tmp_path / "it.safetensors"
    cv.save(model, file, base=base, classes=classes, info=info)
    said = refused(capsys, export_command.main, file, "--out", tmp_path / "package")
    assert says in said
    written = re.search(r"save it with (classes=.*}}): the whole", said)[1]
    given = eval(f"dict({written})".replace("…", "'bee', 'cow'"))
    given["info"]["preprocessing"]["size"] = 32
    cv.save(model, file, base=base, **given)
    build(Source.open(file), tmp_path / "package", exporter=FAST)


def test_a_file_from_anyone_is_refused_in_one_line(tmp_path, capsys):
    file = adapter_file(tmp_path / "a.safetensors", METHODS["lora"])
    with safe_open(file, "np") as opened:
        about, tensors = json.loads(opened.metadata()["capavision"]), {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    pre = INFO["preprocessing"]
    cases = {
        "does not say its classes": [{"classes": None}],
        "are no names of its 3 logits": [{"classes": c} for c in ([1, 2, 3], ["a", {}, "c"], ["a", "b"], [])],
        "does not say its preprocessing": [{"info": {}}],
        "which no package does": [
            {"info": {"preprocessing": p}}
            for p in (
                [],
                "x",
                {**pre, "size": 10**6},
                {**pre, "mean": [float("nan"), 0, 0]},
                {**pre, "std": [1, 1, True]},
            )
        ],
    }
    for message, changes in cases.items():
        for change in changes:
            save_file(tensors, file, {"capavision": json.dumps({**about, **change})})
            assert message in refused(capsys, export_command.main, file, "--out", tmp_path / "package")
    for key in ("classes", "info"):
        save_file(tensors, file, {"capavision": json.dumps({k: v for k, v in about.items() if k != key})})
        assert "does not say its" in refused(capsys, export_command.main, file, "--out", tmp_path / "package")
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_traced(merged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source_module, "to_onnx", lambda *args, **kwargs: pytest.fail("minutes were lost"))
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, export_command.main, merged[0], "--out", tmp_path / "file" / "package")


def test_of_two_exports_to_one_folder_the_first_to_end_stays(merged, tmp_path):
    out = tmp_path / "package"

    def other(folder, manifest):
        out.mkdir()
        (out / "theirs").touch()

    with pytest.raises(ValueError, match="package exists; name another folder"):
        build(Source.open(merged[0]), out, exporter=FAST, then=other)
    assert [path.name for path in tmp_path.rglob("*")] == ["package", "theirs"]


def test_a_lora_merges_into_the_plain_models_graph(merged):
    file, folder = merged
    plain = to_onnx(cv.remove(cv.load(file)).float().eval(), 32, {})
    graph = onnx.load(folder / "model.onnx").graph
    assert [n.op_type for n in graph.node] == [n.op_type for n in plain.graph.node]


def test_an_adapter_folds_into_one_bottleneck_of_width_branches_times_rank(packages):
    file, folder = packages("adapter")
    dense = folded(cv.load(file))
    widths = {name: p.shape for name, p in dense.named_parameters() if ".delta." in name}
    assert widths["blocks.0.delta.D.value"] == (8, 64)
    assert widths["blocks.0.delta.U.value"] == (64, 8)
    proto = onnx.load(folder / "model.onnx")
    assert not {"Where", "Cast"} & {n.op_type for n in proto.graph.node}, "a mask stayed in the graph"


def test_the_package_is_complete_and_says_what_it_is(package):
    file, folder = package
    assert {p.name for p in folder.iterdir()} == {
        "model.onnx", "config.json", "preprocessor_config.json", "manifest.json",
    }  # fmt: skip
    config, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "manifest"))
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cow"}
    assert manifest["schema_version"] == 2
    assert manifest["form"] == ("merged" if file.parent.name.startswith("lora") else "folded")
    (task,) = manifest["tasks"].values()
    assert manifest["tasks"].keys() == {"toy"}
    assert task["labels"] == CLASSES
    assert task["adapter"] is None
    assert task["source_sha256"] == sha256(file)
    assert set(task["parity"]["relative_error"]) == {"1", "2", "3", "5"}
    assert task["parity"]["distance_to_base"] > 1e-3
    proto = onnx.load(folder / "model.onnx")
    assert [i.name for i in proto.graph.input] == ["pixel_values"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_verify_passes_and_predict_agrees_with_pytorch(package, tmp_path, capsys):
    file, folder = package
    assert verify.main([str(folder)]) < 1e-5
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(3)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (50, 40, 3), np.uint8)).save(tmp_path / name)
    found = predict.main([str(folder), *[str(tmp_path / name) for name in names], "--top", "3"])
    assert "ant" in capsys.readouterr().out
    model, size = cv.load(file).eval(), 32
    pixels = file_split(tmp_path, names, [0, 0, 0]).decode(size)  # as the trainer decodes
    mean, std = (torch.tensor(INFO["preprocessing"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        expected = model((torch.from_numpy(pixels).movedim(-1, 1) / 255 - mean) / std).softmax(-1)
    for row, p in zip(found, expected, strict=True):
        assert [label for label, _ in row] == [CLASSES[i] for i in p.argsort(descending=True)]
        assert [q for _, q in row] == pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("module", ["predict", "verify"])
def test_running_a_package_never_imports_torch(merged, tmp_path, module):
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    images = f", {str(tmp_path / 'x.png')!r}" if module == "predict" else ""
    code = (
        f"import sys; from export import {module}; {module}.main([{str(merged[1])!r}{images}]); "
        "heavy = {'torch', 'timm', 'capavision', 'vtab'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "preprocessor_config.json"])
def test_a_flipped_byte_in_any_file_is_caught_before_anything_runs(copied, name, capsys):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(bytes(content))
    for command in ([verify.main, copied], [predict.main, copied, "x.png"]):
        assert f"{name} was changed after the export; export again" in refused(capsys, *command)
    (copied / name).unlink()
    assert f"{name} is missing; export again" in refused(capsys, predict.main, copied, "x.png")


def make_the_checksum_fit(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.onnx"]["sha256"] = sha256(folder / "model.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_verify_catches_weights_that_compute_something_else(copied, capsys):
    """The checksums are made to fit, so only the probe can tell."""
    proto = onnx.load(copied / "model.onnx")
    weight = max(proto.graph.initializer, key=lambda i: len(i.raw_data))
    array = onnx.numpy_helper.to_array(weight) * 1.5
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, copied / "model.onnx")
    make_the_checksum_fit(copied)
    assert "the probe of toy is off by" in refused(capsys, verify.main, copied)


def test_a_failed_gate_names_batch_and_error_and_writes_nothing(merged, tmp_path, capsys):
    out = tmp_path / "package"
    said = refused(capsys, export_command.main, merged[0], "--out", out, "--tolerance", "1e-12", "--exporter", FAST)
    assert "at batch 1 ONNX Runtime and PyTorch differ by " in said
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_adapter_is_not_exported(tmp_path, capsys):
    file = adapter_file(tmp_path / "a.safetensors", METHODS["lora"], trained=False)
    said = refused(capsys, export_command.main, file, "--out", tmp_path / "package", "--exporter", FAST)
    assert "as if untrained" in said
    assert not (tmp_path / "package").exists()


def test_a_convolutional_net_exports(tmp_path):
    file = adapter_file(tmp_path / "a.safetensors", cv.LoRA(rank=2, branches=2), name="test_resnet")
    manifest = build(Source.open(file), tmp_path / "package")
    assert max(manifest["tasks"]["toy"]["parity"]["relative_error"].values()) < 1e-5


def test_a_linear_probe_exports(tmp_path):
    file = adapter_file(tmp_path / "a.safetensors", cv.LinearProbe())
    manifest = build(Source.open(file), tmp_path / "package", exporter=FAST)
    assert manifest["tasks"]["toy"]["parity"]["distance_to_base"] is None


REFUSED = {
    "no run": (lambda f, t: [export_command.main, t, "--out", t / "p"], "holds no adapter.safetensors"),
    "nothing": (lambda f, t: [export_command.main], "give one of RUN_DIR, --split RUN1 RUN2 … and --delta RUN; see"),
    "no out": (lambda f, t: [export_command.main, f], "name what to write: --out DIR"),
    "a run to verify": (lambda f, t: [verify.main, f.parent], "is a run; python -m export"),
    "a graph to verify": (
        lambda f, t: [verify.main, f.parent / "package" / "model.onnx"],
        "model.onnx is a file; name",
    ),
    "variant": (lambda f, t: [predict.main, f.parent / "package", "x.png", "--variant", "int8"], "no variant 'int8'"),
    "out exists": (lambda f, t: [export_command.main, f, "--out", t], "exists; name another --out"),
    "shortened flag": (
        lambda f, t: [export_command.main, f, "--out", t / "p", "--tol", "1"],
        "arguments: --tol 1; see",
    ),
    "no package": (lambda f, t: [predict.main, t, "x.png"], "is no exported package: manifest.json is missing"),
    "no package to verify": (lambda f, t: [verify.main, t], "is no exported package"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_that_names_the_cure(case, merged, tmp_path, capsys):
    call, message = REFUSED[case]
    assert message in refused(capsys, *call(merged[0], tmp_path))


def test_bad_images_are_named(merged, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (("absent.png", "is not a file"), ("cut.png", "does not decode"), ("text.jpg", "not decode")):
        said = refused(capsys, predict.main, merged[1], tmp_path / name)
        assert name in said
        assert message in said


def test_a_newer_package_says_to_upgrade(copied, capsys):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    assert "upgrade capavision" in refused(capsys, predict.main, copied, "x.png")
    (copied / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 1}))
    assert "has format 1, this runtime reads 2; export again" in refused(capsys, predict.main, copied, "x.png")
    (copied / "manifest.json").write_text("{}")
    assert "manifest.json is damaged" in refused(capsys, verify.main, copied)


def test_a_graph_that_onnxruntime_refuses_is_one_line(copied, capsys):
    content = (copied / "model.onnx").read_bytes()
    (copied / "model.onnx").write_bytes(content[: len(content) // 2])
    make_the_checksum_fit(copied)
    assert "model.onnx does not load" in refused(capsys, predict.main, copied, "x.png")


def test_a_full_disk_leaves_no_half_written_package(merged, tmp_path, capsys):
    """The graph does not fit."""
    with full_disk(100_000):
        said = refused(capsys, export_command.main, merged[0], "--out", tmp_path / "package")
    assert said.startswith("error: ")
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


# Packages that are not installed


@pytest.mark.parametrize(
    ("name", "extra", "argv"),
    [
        ("onnxruntime", "export", "export.predict"),
        ("onnx", "export", "export.delta"),
        ("safetensors", "", "export.delta"),
        ("filelock", "vtab", "vtab.sweep"),
        ("sklearn", "vtab", "vtab.data write --task digits --out x"),
        ("torch", "", "vtab.train"),
    ],
)
def test_a_package_that_is_not_installed_is_one_line(name, extra, argv, tmp_path):
    """Also where the command's own module cannot be imported."""
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", *argv.split()]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    brings = f"'capavision[{extra}]'" if extra else "capavision"
    assert ended.stderr == f"error: {name} is not installed; pip install {brings}\n"
    assert ended.returncode == 2


def test_a_module_that_no_extra_brings_is_a_defect_and_keeps_its_traceback():
    def main():
        raise ModuleNotFoundError("No module named 'export.nothing'", name="export.nothing")

    with pytest.raises(ModuleNotFoundError, match=r"export\.nothing"):
        cli.run(main)


def test_what_each_extra_brings_is_what_pyproject_says():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    other = {"PIL": "pillow", "sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}
    for extra, names in cli.EXTRAS.items():
        brought = {re.match(r"[\w-]+", line)[0] for line in lists[extra]}
        assert {other.get(name, name) for name in names} <= brought, extra


def test_without_onnxscript_nothing_degrades_to_the_legacy_exporter(merged, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = refused(capsys, export_command.main, merged[0], "--out", tmp_path / "package")
    assert said == "error: onnxscript is not installed; pip install 'capavision[export]'"
    assert list(tmp_path.iterdir()) == []
