"""The example's own way: four arms from scratch, one table each; the equilibrium really is one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from capavision.tying import tied
from tests.conftest import images

PATH = Path(__file__).resolve().parent.parent / "examples" / "weight_tied.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("weight_tied", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_four_arms_train_and_are_tabled(example, tmp_path):
    pytest.importorskip("torchdeq")
    argv = ["--tasks", "digits", "--epochs", "1", "--seeds", "1", "--limit", "60", "--out", str(tmp_path / "t.md")]
    text = example.main(argv)
    assert (tmp_path / "t.md").read_text() == text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [row[0] for row in cells[2:]] == list(example.ARMS)
    untied, one, masked, twin = (int(row[2].replace(",", "")) for row in cells[2:])
    block = sum(p.numel() for p in example.build("untied", 10, 0).blocks[0].parameters())
    assert untied - one == (example.DEPTH - 1) * block
    assert masked == one
    assert twin == one + 2 * example.WIDTH
    assert all(0 <= float(row[4]) <= 100 for row in cells[2:])


def test_without_torchdeq_three_arms_run_and_a_sentence_says_so(example, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchdeq" else real(name))
    text = example.main(["--tasks", "dsprites_loc", "--epochs", "1", "--seeds", "1", "--limit", "20"])
    assert "pip install torchdeq" in text
    assert "tied + masks" in text
    assert "| equilibrium" not in text


def test_the_equilibrium_is_a_fixed_point_and_its_gradient_the_implicit_one(example, monkeypatch):
    pytest.importorskip("torchdeq")
    tight = {"f_max_iter": 200, "f_tol": 1e-10}, {"b_max_iter": 200, "b_tol": 1e-10}
    monkeypatch.setattr(example, "SOLVER", example.SOLVER | tight[0])
    monkeypatch.setattr(example, "IMPLICIT", example.IMPLICIT | tight[1])
    model = example.build("equilibrium", 5, 0).double()
    layer, x = model.blocks[0], torch.randn(1, 2, 96, dtype=torch.float64)
    z = layer(x)
    step = layer.norm(layer.block(z + x))
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(step, z, rtol=1e-7, atol=1e-7)
    parameter = layer.block.mlp.fc2.bias
    (found,) = torch.autograd.grad(z.square()[0, 0, :3].sum(), parameter)
    at = z.detach().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda z: layer.norm(layer.block(z + x)), at).view(192, 192)
    dl_dz = torch.autograd.grad(at.square()[0, 0, :3].sum(), at)[0].flatten()
    adjoint = torch.linalg.solve((torch.eye(192, dtype=torch.float64) - jacobian).T, dl_dz)
    (expected,) = torch.autograd.grad(layer.norm(layer.block(at + x)).flatten() @ adjoint, parameter)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_the_arms_of_a_seed_start_alike(example):
    models = {arm: example.build(arm, 5, 3) for arm in ("untied", "tied")}
    state, other = (models[arm].state_dict() for arm in models)
    assert torch.equal(state["blocks.0.attn.qkv.weight"], other["blocks.5.attn.qkv.weight"])
    assert torch.equal(state["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    assert tied(models["tied"])
    assert models["tied"](images(64)).shape == (2, 5)


def test_what_makes_no_run_is_refused(example):
    with pytest.raises(ValueError, match="--limit 0 must be at least 1"):
        example.main(["--limit", "0"])
    with pytest.raises(ValueError, match="digits and dsprites_loc"):
        example.main(["--tasks", "cifar"])
    with pytest.raises(ValueError, match="choose final or tune"):
        example.main(["--stage", "fast"])
