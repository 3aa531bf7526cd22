"""What a run trains on and with: data, an injected model on its device, and the checkpoint underneath."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import capavision as cv
from capavision.base import AbsentWeightsError, fingerprint
from vtab import backbones, cache
from vtab.config import Config
from vtab.data import Data, Split, open_task
from vtab.evaluate import Preprocessing, predict


@dataclass(frozen=True)
class Setup:
    """A run that is ready to train."""

    config: Config
    data: Data
    base: cv.Base
    checkpoint: dict[str, Any]  # which weights are underneath, for the record
    model: nn.Module
    report: cv.Report
    preprocessing: Preprocessing

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def judge(self) -> str:
        """The split that judges the run."""
        return "val" if self.config.stage == "tune" else "test"

    @property
    def judged(self) -> Split:
        """Its images, the first --test-limit of them."""
        return self.data.splits[self.judge].head(self.config.test_limit)

    def predict(self, split: Split) -> np.ndarray:
        """Class probabilities (n, classes), in the run's precision."""
        return predict(self.model, split, self.preprocessing, precision=self.config.precision)


def prepare(config: Config) -> Setup:
    """Data opened, model built and injected: everything that can be refused is refused here.

    Raises:
        ValueError: settings, data and model that do not fit each other.
    """
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    data = cache.attach(open_data(config), config.cache)
    base = backbones.resolve(config.model, config.weights, config.img_size, config.seed)
    model = build(base, len(data.classes), config)
    preprocessing = Preprocessing.of(model, base, config.norm)
    example = torch.zeros(1, 3, preprocessing.size, preprocessing.size)
    try_size(model, example, config.model)
    checkpoint = identify(base, model, preprocessing.size)
    report = cv.inject(model, config.method, config.patterns, config.parts, seed=config.seed, example=example)
    return Setup(config, data, base, checkpoint, model.to(device), report, preprocessing)


def open_data(config: Config) -> Data:
    """The run's task.

    Raises:
        ValueError: no such task; data that is not there, or does not fit.
    """
    return open_task(
        config.task, config.data_root, seed=config.seed, partial=config.partial, split_file=config.split_file
    )


def build(base: cv.Base, num_classes: int, config: Config) -> nn.Module:
    """The backbone with the run's stochastic depth."""
    try:
        return base.build(num_classes, **({"drop_path_rate": config.drop_path} if config.drop_path else {}))
    except AbsentWeightsError as error:
        raise ValueError(
            f"{error.told}, or --weights FILE.safetensors, --weights random, --model demo (weights from a package)"
        ) from error
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(f"{config.model} has no stochastic depth; pass --drop-path 0") from error


def try_size(model: nn.Module, example: Tensor, name: str) -> None:
    """One forward pass before anything is written.

    Raises:
        ValueError: the architecture cannot take images of this size.
    """
    try:
        with torch.inference_mode():
            model.eval()(example)
    except (RuntimeError, AssertionError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{name} cannot take images of {example.shape[-1]} pixels; choose another --img-size"
        ) from error


def identify(base: cv.Base, model: nn.Module, size: int) -> dict[str, Any]:
    """The checkpoint: timm's name with the tag that was loaded, and a digest that tells it from another one."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    tag = cfg.get("tag") if base.weights == "pretrained" else None
    name = base.model if "." in base.model or not tag else f"{base.model}.{tag}"
    return {"model": name, "weights": base.weights, "digest": digest(model), "img_size": size}


def digest(model: nn.Module) -> str:
    """16 hex digits of the norms of all base tensors.

    To 5 digits: the same checkpoint gives the same digest on any machine, also where timm resampled its position
    embedding, which the bits would not; another checkpoint differs in nearly all tensors.
    """
    norms = {name: f"{norm:.5g}" for name, norm in fingerprint(model).items()}
    return hashlib.sha256(json.dumps(norms, sort_keys=True).encode()).hexdigest()[:16]


def pick_device(name: str | None) -> torch.device:
    """The named device, else CUDA, Apple's GPU or the CPU, whichever is there.

    Raises:
        ValueError: a device that this machine does not have.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, found in there.items() if found]
    if name is None:
        return torch.device(here[0])
    try:
        if name.partition(":")[0] not in here:
            raise RuntimeError
        device = torch.device(name)
        torch.empty(0, device=device)
    except RuntimeError:
        raise ValueError(f"--device {name} is not on this machine; here: {', '.join(here)}") from None
    return device
