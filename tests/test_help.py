"""Help is made without torch and its like, and says word for word what it says with them."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from export import cli, standins

ROOT = Path(__file__).resolve().parent.parent
FILES = [path for package in ("vtab", "export", "benchmarks", "examples") for path in (ROOT / package).rglob("*.py")]
COMMANDS = sorted(set(re.findall(r'prog="python -m ([a-z_.]+)"', "".join(path.read_text() for path in FILES))))
ASKED = [(command, "--help") for command in COMMANDS] + [
    ("vtab.train", "-h"),
    ("vtab.train", "--method", "adapter", "--help"),
    ("vtab.train", "--help", "--lr", "1e-3", "--method", "linear-probe"),
    ("vtab.train", "--recipe", "noah-lora", "--help"),
    ("vtab.train", "--method", "nope", "--help"),  # refused, as without --help
    ("vtab.train", "--recipe", "nope", "--help"),
    ("vtab.train", "--epochs", "few", "--help"),
    ("vtab.backbones", "--help"),
    ("vtab.data", "fetch", "--help"),
    ("vtab.data", "nope", "--help"),
    ("export.delta", "apply", "--help"),
]


@pytest.fixture(scope="module")
def barred(tmp_path_factory):
    """An environment in which none of the packages can be imported."""
    folder = tmp_path_factory.mktemp("barred")
    for name in ["google", *(name for names in cli.EXTRAS.values() for name in names)]:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('barred', name={name!r})\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "80"}


def shell(command, *flags, env=None, cwd=ROOT):
    line = [sys.executable, "-m", command, *flags]
    done = subprocess.run(line, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def here(command, *flags, monkeypatch, capsys):
    """In this process, where the packages are imported and sys.argv does not start with -m."""
    monkeypatch.setattr(sys, "argv", [command, *flags])
    monkeypatch.setattr(standins.Meta, "sealed", False)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command, run_name="__main__")
    return ended.value.code, *capsys.readouterr()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of runpy, for modules that are imported already
@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
def test_help_needs_none_of_the_packages_and_says_the_same(asked, barred, monkeypatch, capsys):
    expected = here(*asked, monkeypatch=monkeypatch, capsys=capsys)
    assert expected[0] in (0, 2)
    assert shell(*asked, env=barred) == expected


def test_every_command_of_the_readme_is_among_them():
    named = set(
        re.findall(r"python -m ((?:vtab|export|benchmarks|examples)[a-z_.]*[a-z])", (ROOT / "README.md").read_text())
    )
    assert named <= {*COMMANDS, "vtab.backbones"}
    assert len(COMMANDS) > 20


@pytest.fixture
def with_vera(tmp_path):
    """A copy of our packages with a method more; gives its file."""
    for name in ("capavision", "vtab", "export"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return Path(shutil.copy(ROOT / "examples" / "vera.py", tmp_path / "capavision" / "methods"))


def test_a_method_dropped_into_the_package_is_a_flag_of_the_trainer(with_vera, barred, tmp_path):
    code, shown, _ = shell("vtab.train", "--method", "vera", "--help", env=barred, cwd=tmp_path)
    assert code == 0
    assert "method vera:" in shown
    assert "--rank INT            rows of A; costs one trained value each (default: 64)" in shown


@pytest.mark.parametrize(
    ("default", "why"),
    [
        ("int((np.arange(5) * 5)[4])", "TypeError: unsupported operand"),
        ("np.int64(20)", "RuntimeError: numpy.int64 was"),
    ],
    ids=["at import", "in the help"],
)
def test_what_a_stand_in_cannot_do_the_packages_do(with_vera, tmp_path, default, why):
    text = with_vera.read_text().replace("rank: int = 64", f"rank: int = {default}")
    with_vera.write_text(text.replace("import torch\n", "import numpy as np\nimport torch\n"))
    tell = os.environ | {"CAPAVISION_TRACEBACK": "1"}
    code, shown, complaints = shell("vtab.train", "--method", "vera", "--help", env=tell, cwd=tmp_path)
    assert code == 0
    assert "(default: 20)" in shown
    assert why in complaints


@pytest.mark.parametrize("flags", [["-m", "vtab.train"], ["-mvtab.train"], ["-Xutf8", "-Bm", "vtab.train"]], ids=str)
def test_help_needs_no_package_however_python_is_told(flags, barred):
    line = [sys.executable, *flags, "--help"]
    done = subprocess.run(line, env=barred, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: python -m vtab.train" in done.stdout


def test_commands_of_others_that_import_us_get_the_packages(tmp_path):
    """Nobody knows what they do when they are asked for help, and with a stand-in they would do it wrongly."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("import vtab\n")
    work = "import numpy as np\nfound = np.ones(3) is np.ones(3)\nprint(found)\n"
    (tmp_path / "theirs" / "command.py").write_text(work)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    assert shell("theirs.command", "--help", env=env, cwd=tmp_path) == (0, "False\n", "")


@pytest.fixture
def absent(monkeypatch):
    """A package that nobody has, of which stand-ins are imported."""
    monkeypatch.setattr(sys, "meta_path", [standins.Importer(["absent"]), *sys.meta_path])
    monkeypatch.setattr(standins.Meta, "sealed", False)
    yield importlib.import_module("absent")
    for name in [name for name in sys.modules if name.partition(".")[0] == "absent"]:
        del sys.modules[name]


def test_stand_ins_do_what_files_do_with_packages_while_they_are_imported(absent):
    import absent.nn.functional as F
    from absent import Tensor, nn

    class Delta(nn.Module, ABC):
        @abstractmethod
        def weight(self) -> Tensor | None: ...

    class Layer(Delta, nn.Linear):
        @absent.no_grad()
        def forward(self, x: list[Tensor], kind: type[nn.Module] | nn.Linear[int] = nn.Linear) -> Tensor:
            """Documented."""

    assert absent.nn.functional is F
    assert nn.Linear is absent.nn.Linear
    assert {nn.Linear: 1, nn.Conv2d: 2, F.relu: 3}[nn.Conv2d] == 2
    assert Layer.forward.__doc__ == "Documented."
    assert absent.compile(Layer) is Layer
    assert absent.zeros(3) is not None


QUESTIONS = [
    *(bool, str, "{}".format, len, list, float, lambda it: it + 1, lambda it: it > 1, lambda it: 1 in it),
    *(lambda it: isinstance(1, it), lambda it: issubclass(int, it), lambda it: it.__version__),
]


@pytest.mark.parametrize("ask", QUESTIONS)
def test_stand_ins_have_no_answers(absent, ask):
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        ask(absent.thing)


def test_once_the_command_runs_no_stand_in_is_called(absent):
    class Layer(absent.nn.Module):
        pass

    standins.seal()
    for call in (absent.zeros, absent.nn.Linear, Layer):
        with pytest.raises(RuntimeError, match="was to do work, and a stand-in was there"):
            call(3)


def test_running_a_command_seals(monkeypatch):
    monkeypatch.setattr(standins.Meta, "sealed", False)
    found = []
    cli.run(lambda: found.append(standins.Meta.sealed))
    assert found == [True]
