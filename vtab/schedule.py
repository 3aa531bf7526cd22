"""The optimizer and its learning rate by step: timm's cosine or a line, with a warm-up, stepped in one of two ways.

    step    lr(i), i = 0 … epochs · steps - 1, set before step i
    epoch   lr(max(e - 1, 0)), e = 0 … epochs - 1: the released code of most papers calls scheduler.step(e) after
            epoch e, so that epochs 0 and 1 both run at the warm-up's start, and the last at the schedule's last but one

Source: timm.scheduler.CosineLRScheduler; JieShibo/PETL-ViT, luogen1996/RepAdapter and ZhangYuanhan-AI/NOAH step it so.
"""

from typing import Any

import torch
from torch import nn

import capavision as cv
from vtab.training import Training

MOMENTUM = 0.9  # of SGD
SHORTEST = 2  # of one step timm warns that its rate never falls; the first of two has the same


def make_optimizer(model: nn.Module, config: Training, fused: bool) -> torch.optim.Optimizer:
    """The run's optimizer over all trained parameters; scores of learned masks are a group of their own."""
    groups = cv.parameter_groups(model, config.lr, mask_lr=config.mask_lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)


class Schedule:
    """Sets the learning rate of each group before a step.

    Raises:
        ValueError: a warm-up that is longer than the schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Training, steps: int) -> None:
        self.by_epoch, self.steps = config.schedule == "epoch", steps
        total = config.epochs if self.by_epoch else config.epochs * steps
        warmup = round(config.warmup * (total if config.warmup <= 1 else 1))
        if warmup > total:
            raise ValueError(
                f"--warmup {warmup} is longer than the whole schedule, {total} {config.schedule}s; pass a share, such "
                "as 0.1, or train for more epochs"
            )
        self.decay = _decay(optimizer, config, total, warmup)

    def step_update(self, step: int) -> None:
        """Call before step `step`, counted over all epochs."""
        if self.by_epoch:
            self.decay.step(max(step // self.steps - 1, 0))
        else:
            self.decay.step_update(step)


def _decay(optimizer: torch.optim.Optimizer, config: Training, total: int, warmup: int) -> Any:
    """timm's scheduler. The cosine starts with the schedule, the line where the warm-up ends, as in transformers."""
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler

    rise = {"warmup_t": warmup, "warmup_lr_init": config.lr_start, "t_in_epochs": config.schedule == "epoch"}
    if config.decay == "cosine":
        return CosineLRScheduler(optimizer, t_initial=max(total, SHORTEST), lr_min=config.lr_min, **rise)
    falling = max(total - warmup, SHORTEST)
    return PolyLRScheduler(optimizer, falling, power=1.0, lr_min=config.lr_min, warmup_prefix=True, **rise)
