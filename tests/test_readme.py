"""What the README shows is what runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import capavision as cv

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def _examples_register_their_methods_for_one_test_only(monkeypatch):
    monkeypatch.setattr(cv.Method, "known", dict(cv.Method.known))


def test_every_python_block_runs_in_turn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 2
    scope = {"__name__": "__readme__"}
    for block in blocks:
        exec(block, scope)


def test_the_method_in_the_readme_is_the_example_file():
    assert (ROOT / "examples" / "vera.py").read_text().strip() in README


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_every_link_and_picture_is_there(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("line", re.findall(r"^ *python -m ([a-z._]+)", README, flags=re.M))
def test_every_command_is_a_module(line):
    path = ROOT / line.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_a_method_of_ones_own_trains_saves_loads_and_folds(tmp_path):
    vera = runpy.run_path(str(ROOT / "examples" / "vera.py"), run_name="vera")["VeRA"]
    base = cv.Base("test_vit", "random", 32)
    model, x = base.build(3).eval(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    report = cv.inject(model, vera(rank=8))
    assert report.trained == len(report.hosts) * 2 * (8 + 64)  # q and v, each of 64 rows
    assert torch.equal(model(x), plain)
    for p in cv.parameters(model):
        torch.nn.init.normal_(p)
    expected = model(x)
    assert (expected - plain).abs().max() > 1e-2
    cv.save(model, tmp_path / "v.safetensors", base=base)
    assert torch.equal(cv.load(tmp_path / "v.safetensors")(x), expected)
    assert torch.allclose(cv.fold(model)(x), expected, atol=1e-4)
