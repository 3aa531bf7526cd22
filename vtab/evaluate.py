"""One pass over a split: predictions, top-1 accuracy and its 95 % interval."""

import functools
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

import capavision as cv
from vtab.data import Split

# Mean and standard deviation by name; "model" is the checkpoint's own, whichever it was trained with
NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Preprocessing:
    """What turns an image into the model's input: the whole image squashed to size × size, bicubic, then normalised."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: str = "model"

    @classmethod
    def of(cls, model: nn.Module, base: cv.Base, norm: str = "model") -> "Preprocessing":
        """As the model's own timm configuration has it, at the size it was built for, or as `norm` says."""
        cfg: Any = model.pretrained_cfg
        mean, std = NORMS.get(norm, (cfg["mean"], cfg["std"]))
        return cls(base.img_size or cfg["input_size"][-1], tuple(mean), tuple(std), norm)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) to float32 (B, 3, H, W): (x / 255 - mean) / std."""
        mean, std = _constants(self.mean, self.std, images.device)
        return (images.movedim(-1, 1).float() / 255 - mean) / std

    def record(self) -> dict[str, Any]:
        """As JSON, for the adapter file and every result."""
        geometry = {"size": self.size, "resize": "squash, bicubic"}
        return geometry | {"mean": list(self.mean), "std": list(self.std), "normalization": self.norm}


@functools.lru_cache
@torch.inference_mode(False)  # cached, so also met in training
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """On the device once: copying them there for every batch would make the host wait."""
    first, second = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return first, second


@dataclass(frozen=True)
class Accuracy:
    """Top-1 in percent with its 95 % Wilson interval, which says what the number of test images can tell apart."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        low, high = binomtest(self.correct, self.total).proportion_ci(method="wilson")
        return 100 * low, 100 * high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f} % ({low:.1f} … {high:.1f}, n = {self.total:,})"


PRECISIONS = ("auto", "float32", "bfloat16")


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """torch's context in which products run in `precision`; "auto" is bfloat16 on a GPU that has it, else float32."""
    fit = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" or (precision == "auto" and fit))


@torch.inference_mode()
def predict(
    model: nn.Module, split: Split, preprocessing: Preprocessing, batch_size: int = 256, precision: str = "auto"
) -> np.ndarray:
    """Class probabilities (n, classes) for a split; images are decoded piece by piece.

    What a batch gave is fetched when the next one is on its way, so that a GPU computes while the host decodes.
    """
    model.eval()
    device = next(model.parameters()).device
    waiting, fetched = deque[Tensor](), list[np.ndarray]()
    with tqdm(total=len(split), desc="evaluate", unit="img", leave=False) as bar:
        for images, _ in split.batches(preprocessing.size, batch_size):
            x = to_device(torch.from_numpy(images), device)
            with autocast(device, precision):
                waiting.append(model(preprocessing.normalize(x)))
            if len(waiting) > 1:
                fetched.append(_probabilities(waiting.popleft()))
            bar.update(len(images))
    fetched += map(_probabilities, waiting)
    return np.concatenate(fetched)


def _probabilities(logits: Tensor) -> np.ndarray:
    return np.asarray(logits.float().softmax(-1).cpu())


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy that a GPU makes when it comes to it: from pinned memory, the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Top-1 of predictions.

    >>> accuracy(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0])).percent
    50.0
    """
    return Accuracy(int((probabilities.argmax(1) == labels).sum()), len(labels))
