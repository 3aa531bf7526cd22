"""Height and width left open: refused where the architecture fixes them, compared with PyTorch at two sizes."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from export.cli import first_line
from export.runtime import relative_error
from export.session import plain


def other(size: int) -> tuple[int, int]:
    """A size that is not square, and a multiple of whatever `size` is one of."""
    return 2 * size, size


def refuse_fixed(model: nn.Module, size: int) -> None:
    """Raise ValueError, with the architecture's name, if the model takes images of one size only."""
    height, width = other(size)
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, height, width))
    except Exception as error:  # architectures raise what they like
        raise ValueError(
            f"{architecture(model)} takes images of {size} × {size} only ({first_line(error)}); export without "
            "--dynamic-size"
        ) from error


def compare(path: Path, model: nn.Module, size: int, tolerance: float) -> dict[str, float]:
    """Relative errors of the graph at `path` by "height×width": at the traced size and at another.

    Raises:
        ValueError: one above `tolerance`, or a size that the graph does not take.
    """
    session, errors = plain(path), {}
    for height, width in ((size, size), other(size)):
        pixels = np.random.default_rng(height).normal(size=(2, 3, height, width)).astype(np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(pixels)).numpy()
        try:
            found = session.run(["logits"], {"pixel_values": pixels})[0]
        except Exception as error:  # onnxruntime raises classes of its own
            raise ValueError(_unfit(model, height, width, "ONNX Runtime refuses them")) from error
        errors[f"{height}×{width}"] = difference = relative_error(found, expected)
        if not difference <= tolerance:
            raise ValueError(_unfit(model, height, width, f"they differ from PyTorch by {difference:.1e}"))
    return errors


def architecture(model: nn.Module) -> str:
    """timm's name of the model, else its class's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = type(model).__name__
    return f"{config['architecture']} ({name})" if config.get("architecture") else name


def _unfit(model: nn.Module, height: int, width: int, what: str) -> str:
    traced = f"{architecture(model)}, traced with a dynamic size"
    return f"{traced}: at {height} × {width}, {what}; export without --dynamic-size"
