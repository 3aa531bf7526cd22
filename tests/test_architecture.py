"""The arrows between the packages, read from their imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNNING = {
    "export/runtime.py",
    "export/session.py",
    "export/shape.py",
    "export/pixels.py",
    "export/tokens.py",
    "export/windows.py",
    "export/spans.py",
    "export/squad.py",
    "export/questions.py",
    "export/answerer.py",
    "export/predict.py",
    "export/verify.py",
    "export/cli.py",
    "export/standins.py",
    "export/cluster.py",
    "export/images.py",
    "export/desk.py",
    "export/serve.py",
    "export/__init__.py",
}
SHARED = {"export.cli", "export.cluster", "export.images"}  # light: Pillow and numpy, and Ray inside functions
DOOR = "export/splits.py"  # the only file of export that knows tasks
FORBIDDEN = {
    "capavision": {"vtab", "export", "onnx", "onnxruntime", "torchvision"},
    "vtab": {"export", "onnxruntime"},
    "export": {"vtab"},
}


def imports(path):
    """(module, at the top level of the file?) of every import."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        yield from ((name, id(node) in top) for name in names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        allowed = {"vtab"} if path.relative_to(ROOT).as_posix() == DOOR else set()
        found = {name.partition(".")[0] for name, _ in imports(path) if name not in SHARED}
        heavy = FORBIDDEN[package] & found - allowed
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_the_library_imports_timm_only_when_it_builds_a_model():
    for path in (ROOT / "capavision").rglob("*.py"):
        assert ("timm", True) not in set(imports(path)), path.name


def test_the_running_half_of_export_is_light():
    for name in RUNNING:
        found = {module.partition(".")[0] for module, _ in imports(ROOT / name)}
        assert not found & {"torch", "timm", "onnx", "capavision"}, name


def test_what_all_commands_share_needs_the_standard_library_alone():
    for name in ("cli", "standins"):
        found = {module.partition(".")[0] for module, _ in imports(ROOT / "export" / f"{name}.py")}
        assert found <= sys.stdlib_module_names | {"export"}, name


def test_no_method_knows_another():
    methods = {path.stem for path in (ROOT / "capavision" / "methods").glob("*.py")} - {"__init__"}
    for name in methods:
        found = {module for module, _ in imports(ROOT / "capavision" / "methods" / f"{name}.py")}
        assert not any(f"capavision.methods.{other}" in found for other in methods), name


def test_importing_the_library_imports_neither_timm_nor_torchvision():
    code = "import capavision, sys; print({'timm', 'torchvision', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_pickle_is_ever_loaded():
    for package in FORBIDDEN:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert "torch.load" not in text, path
            assert not {"pickle", "dill", "joblib"} & {name for name, _ in imports(path)}, path
