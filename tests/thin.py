"""Thinner models than those of export.families, so that the suite can afford every family of timm.

The modules, their order and what joins them stay timm's: widths and depths shrink, by timm's arguments where it has
them, else by taking out blocks that repeat and channels of plain convolutional nets.
"""

from typing import Any

import torch
from torch import Tensor, nn

from export.families import KWARGS, SIZES, built, ready

SMALLER: dict[str, dict[str, Any]] = {
    "byoanet": {"width_factor": 0.5, "self_attn_kwargs": {"block_size": 4, "halo_size": 2}},
    "coat": {"embed_dims": (64, 64, 64, 64), "serial_depths": (1, 1, 1, 1), "parallel_depth": 2},
    "crossvit": {"img_size": 120},
    "csatv2": {"dims": (32, 72, 168, 192), "depths": (1, 1, 2, 2)},
    "davit": {"embed_dims": (24, 48, 96, 192)},
    "densenet": {"growth_rate": 16, "block_config": (2, 4, 4, 2)},
    "dpn": {"k_sec": (2, 2, 2, 2)},
    "efficientformer": {"embed_dims": (24, 48, 96, 192), "depths": (2, 2, 2, 2)},
    "efficientformer_v2": {"embed_dims": (16, 32, 48, 64)},
    "efficientvim": {"embed_dim": (64, 96, 160)},
    "fastvit": {"embed_dims": (24, 48, 96, 192)},
    "focalnet": {"mlp_ratio": 1},
    "gcvit": {"embed_dim": 32},
    "levit": {"embed_dim": (64, 96, 128), "key_dim": 8},
    "lowformer": {"width_list": [8, 16, 32, 64, 128]},
    "mobilenetv5": {"channel_multiplier": 0.125},
    "rdnet": {"num_init_features": 32, "growth_rates": [32, 48, 64, 64, 64, 64, 64], "num_blocks_list": [2] * 7},
    "repvit": {"depth": (2, 2, 2, 2)},
    "resnetv2": {"channels": (32, 64, 96, 128), "layers": [2, 1, 1, 1]},
    "rexnet": {"width_mult": 0.5},
    "senet": {"layers": [2, 1, 1, 1]},
    "shvit": {"embed_dim": (64, 96, 128), "partial_dim": (16, 24, 32)},
    "sknet": {"layers": [2, 1, 1, 1]},
    "tiny_vit": {"embed_dims": [32, 64, 96, 160], "num_heads": [1, 2, 3, 5]},
    "twins": {"depths": [2, 2, 2, 2]},
}
SMALLER_SIZES = {"byoanet": 128}
# Convolutions, batch norms and one Linear are all there is in these: the divisor of their channels.
NARROWER = {
    **dict.fromkeys(("inception_resnet_v2", "inception_v3", "inception_v4", "selecsls", "vgg"), 4),
    **{"hrnet": 2, "pnasnet": 6, "xception": 4, "xception_aligned": 4},
}


def thin_model(family: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """As export.families.small_model."""
    model = built(family, **KWARGS.get(family, {}) | SMALLER.get(family, {}))
    drop_repeats(model)
    if family in NARROWER:
        narrow(model, NARROWER[family])
    return ready(model, SMALLER_SIZES.get(family) or SIZES.get(family, 64), dtype)


def drop_repeats(model: nn.Module) -> None:
    """Take out each block that is like the two before it; two, because shifted windows come in turns."""

    def kind(block: nn.Module) -> tuple[str, list[tuple[str, torch.Size]]]:
        return repr(block), [(name, value.shape) for name, value in block.state_dict().items()]

    for name, chain in list(model.named_modules()):
        # Subclasses, and lists of other names, may join what each of their modules gives.
        if type(chain) is nn.Sequential or (type(chain) is nn.ModuleList and name.rpartition(".")[2] == "blocks"):
            kinds = [kind(block) for block in chain]
            for i in reversed(range(2, len(kinds))):
                if kinds[i][1] and kinds[i - 2] == kinds[i - 1] == kinds[i]:
                    del chain[i]


def narrow(model: nn.Module, divisor: int) -> None:
    """Keep one channel of `divisor`, but for the image's and the classes."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups > 1
            inputs = slice(None) if depthwise or module.in_channels == 3 else slice(None, None, divisor)
            keep(module, "weight", (slice(None, None, divisor), inputs))
            keep(module, "bias", slice(None, None, divisor))
            module.out_channels = len(module.weight)
            module.groups = len(module.weight) if depthwise else 1
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.BatchNorm2d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                keep(module, name, slice(None, None, divisor))
            module.num_features = len(module.weight)
        elif isinstance(module, nn.Linear):
            keep(module, "weight", (slice(None), slice(None, None, divisor)))
            module.in_features = module.weight.shape[1]


def keep(module: nn.Module, name: str, rows: Any) -> None:
    value = getattr(module, name)
    if value is not None:
        value.data = value.data[rows].clone()
