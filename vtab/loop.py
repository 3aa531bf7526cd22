"""The training loop: epochs over images that stay on the device, a checkpoint after each."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import capavision as cv
from vtab import checkpoint, record
from vtab.compiled import forward_of
from vtab.config import Config
from vtab.evaluate import autocast
from vtab.prefix import FrozenPrefix
from vtab.schedule import Schedule, make_optimizer


@dataclass
class Loop:
    """What is trained, on what and how.

    images, labels: all training images, uint8 (n, H, W, 3), and their classes, on the model's device
    normalize: uint8 images to the model's input
    clock: stands around "data", "forward", "backward" and "optimizer" of each step, to measure them
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    normalize: Callable[[Tensor], Tensor]
    config: Config
    clock: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.forward = forward_of(self.model, self.config)
        self.prefix: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
        if self.config.cache_frozen_prefix:
            self.prefix = FrozenPrefix(
                self.model, self.images, self.normalize, self.config.batch_size, self.config.precision
            )
        self.trained = cv.parameters(self.model)
        self.optimizer = make_optimizer(self.model, self.config, fused=self.images.device.type == "cuda")
        self.steps = self.config.steps(len(self.images))
        self.schedule = Schedule(self.optimizer, self.config, self.steps)

    def fit(
        self, folder: Path, watch: Callable[[int], dict[str, float]] = lambda epoch: {}, until: int | None = None
    ) -> list[dict[str, Any]]:
        """All epochs, from the checkpoint in `folder` on if there is one; returns one record an epoch.

        Args:
            watch: more figures for an epoch's record, given its number.
            until: stop after this epoch of the schedule; None is the last.

        Raises:
            DivergedError: the loss is not finite; the checkpoint of the last good epoch stays.
        """
        saved, config = folder / "checkpoint.safetensors", self.config
        history: list[dict[str, Any]] = []
        if saved.is_file():
            history = checkpoint.read(saved, self.model, self.optimizer)["history"]
            record.write_metrics(folder, history)
            print(f"resuming after epoch {len(history)} of {config.epochs}")
        last, seen = until or config.epochs, min(len(self.images), self.steps * config.batch_size)
        done, total = len(history) * seen, last * seen
        with tqdm(total=total, initial=done, unit="img", desc="train", mininterval=0.5) as bar:
            for epoch in range(len(history), last):
                row = self.epoch(epoch, bar)
                bad = row.pop("bad_step")
                if bad is not None:
                    raise checkpoint.DivergedError(
                        f"loss or weights are not finite at step {bad} of epoch {epoch + 1}; {folder} keeps epoch "
                        f"{epoch}; a lower --lr than {config.lr} helps most, then --clip"
                    )
                history.append(row | watch(epoch + 1))
                checkpoint.write(saved, self.model, self.optimizer, {"history": history})
                record.write_metrics(folder, history)
        return history

    def epoch(self, epoch: int, bar: Any) -> dict[str, Any]:
        """One pass over the training images; the losses stay on the device, so that a GPU is never waited for."""
        # Seeded by epoch, so that a resumed run draws what an uninterrupted one would have drawn.
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)
        device, size = self.images.device, self.config.batch_size
        batches = torch.randperm(len(self.images)).to(device).split(size)[: self.steps]
        losses, correct = torch.zeros(self.steps, device=device), torch.zeros((), device=device)
        start, seen = time.perf_counter(), 0
        self.model.train()
        for step, chosen in enumerate(batches):
            self.schedule.step_update(epoch * self.steps + step)
            loss, right = self.step(chosen)
            losses[step] = loss * len(chosen)
            correct += right
            seen += len(chosen)
            # Reading a figure waits for a GPU, so that one is asked at the end alone.
            if step == self.steps - 1 or (step % 8 == 7 and device.type == "cpu"):
                bar.set_postfix(loss=f"{losses.sum().item() / seen:.3f}", acc=f"{100 * correct.item() / seen:.1f} %")
            bar.update(len(chosen))
        return {
            "epoch": epoch + 1,
            "loss": losses.sum().item() / seen,
            "accuracy": 100 * correct.item() / seen,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - start,
            "bad_step": self._bad_step(losses),
        }

    def step(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """One update by the images `chosen`; their mean loss, and how many were right."""
        with self.clock("data"):
            x, y = self.normalize(self.images[chosen]), self.labels[chosen]
        with self.clock("forward"), autocast(self.images.device, self.config.precision), self.prefix(chosen):
            logits = self.forward(x)
            loss = F.cross_entropy(logits, y)
        with self.clock("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with self.clock("optimizer"):
            if self.config.clip:
                nn.utils.clip_grad_norm_(self.trained, self.config.clip)
            self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == y).sum()

    def _bad_step(self, losses: Tensor) -> int | None:
        finite = losses.isfinite()
        if not finite.all():
            return 1 + int(finite.int().argmin())
        if not torch.stack([p.isfinite().all() for p in self.trained]).all():
            return len(losses)
        return None
