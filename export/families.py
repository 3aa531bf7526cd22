"""One small model of each of timm's 98 families, with random weights in which nothing is silent.

Silent parameters are awakened and batch norms calibrated, so that zero heads, layer scales of 1e-5 and vanishing
signals hide no mistake.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES: dict[str, str] = json.loads((Path(__file__).parent / "timm_families.json").read_text())
# The side of the input in pixels, 64 where none is given.
SIZES = {
    **dict.fromkeys(("inception_resnet_v2", "inception_v3", "inception_v4"), 80),
    **{"byoanet": 256, "deepseek_vit": 56, "efficientformer": 224, "iformer": 128, "levit": 224},
    **{"mambaout": 96, "maxxvit": 160},
}
# Built for 64 pixels too, where the architecture is told its input size.
SIZED = (
    "beit", "cait", "coat", "convit", "deit", "efficientformer_v2", "gcvit", "hiera", "mlp_mixer", "nest", "pit",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tnt", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "visformer", "vitamin", "volo",
)  # fmt: skip
# And the large ones, cut down.
SMALL = {"embed_dim": 192, "num_heads": 3, "depth": 2}
KWARGS: dict[str, dict[str, Any]] = {
    **{family: {"img_size": 64} for family in SIZED},
    **dict.fromkeys(("deepseek_vit", "gemma4_vit", "naflexvit", "qwen3_vit", "vision_transformer_sam"), SMALL),
    "beit": {"img_size": 64, **SMALL},
    "davit": {"embed_dims": (48, 96, 192, 384)},
    **{f"swin_transformer{version}": {"img_size": 64, "embed_dim": 48} for version in ("", "_v2", "_v2_cr")},
    "hiera": {"img_size": 64, "embed_dim": 48},
    "hieradet_sam2": {"embed_dim": 48},
    "mobilenetv5": {"channel_multiplier": 0.5},
    "nasnet": {"num_features": 672, "stem_size": 16},
    "res2net": {"layers": (2, 1, 1, 2)},
    "sequencer": {"embed_dims": (48, 96, 96, 96)},
    "tresnet": {"width_factor": 0.5},
    "twins": {"embed_dims": (32, 64, 128, 256)},
    "vgg": {"mlp_ratio": 1 / 16},
}


def small_model(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The family's model with 5 classes, in eval, and images of its size: one where they are large, else two."""
    return ready(built(family, **KWARGS.get(family, {})), SIZES.get(family, 64), dtype)


def built(family: str, **kwargs: Any) -> nn.Module:
    """The family's model with 5 classes, as timm makes it."""
    import timm

    return seeded(lambda: timm.create_model(FAMILIES[family], pretrained=False, num_classes=5, **kwargs))


def ready(model: nn.Module, size: int, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The model with nothing silent in it, in eval, and images of that many pixels a side."""
    count = 1 if size == 256 else 2
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # a block that is skipped by chance gets no gradient
    return calibrated(awaken(model.eval()).to(dtype), x), x


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    """What `build` makes when torch's global generator starts from `seed`; the generator is then as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def awaken(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Random values for every parameter that is silent: zero heads, layer scales of 1e-5, B, U and biases."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point() and p.numel() and p.abs().max() < 1e-3:
                p.copy_(torch.randn(p.shape, generator=rng) * std)
    return module


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics of batch norms as of `x`, or the signal dies away in a deep net of random weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        usual = {norm: norm.momentum for norm in norms}
        for norm in norms:
            norm.momentum = None  # the mean of all batches seen, that is of this one
        with torch.no_grad():
            seeded(lambda: model.train()(x))
        for norm in norms:
            norm.momentum = usual[norm]
    return model.eval()
