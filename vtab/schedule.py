"""The optimizer and its learning rate by step: timm's cosine with a warm-up, stepped in one of two ways.

    step    lr(i), i = 0 … epochs · steps - 1, set before step i
    epoch   lr(max(e - 1, 0)), e = 0 … epochs - 1: the released code of most papers calls scheduler.step(e) after
            epoch e, so that epochs 0 and 1 both run at the warm-up's start, and the last at the schedule's last but one

Source: timm.scheduler.CosineLRScheduler; JieShibo/PETL-ViT, luogen1996/RepAdapter and ZhangYuanhan-AI/NOAH step it so.
"""

from typing import Any

import torch
from torch import nn

import capavision as cv
from vtab.config import Config

MOMENTUM = 0.9  # of SGD


def make_optimizer(model: nn.Module, config: Config, fused: bool) -> torch.optim.Optimizer:
    """The run's optimizer over all trained parameters; scores of learned masks are a group of their own."""
    groups = cv.parameter_groups(model, config.lr, mask_lr=config.mask_lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)


class Schedule:
    """Sets the learning rate of each group before a step."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, steps: int) -> None:
        from timm.scheduler import CosineLRScheduler

        self.by_epoch, self.steps = config.schedule == "epoch", steps
        total = config.epochs if self.by_epoch else config.epochs * steps
        self.cosine: Any = CosineLRScheduler(
            optimizer,
            t_initial=total,
            warmup_t=round(config.warmup * total),
            warmup_lr_init=config.lr_start,
            lr_min=config.lr_min,
            t_in_epochs=self.by_epoch,
        )

    def step_update(self, step: int) -> None:
        """Call before step `step`, counted over all epochs."""
        if self.by_epoch:
            self.cosine.step(max(step // self.steps - 1, 0))
        else:
            self.cosine.step_update(step)
