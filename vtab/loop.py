"""The training loop: epochs over images that stay on the device, a checkpoint after each."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import capavision as cv
from vtab import checkpoint, record
from vtab.compiled import forward_of
from vtab.evaluate import autocast
from vtab.prefix import FrozenPrefix
from vtab.schedule import Schedule, make_optimizer
from vtab.training import Training


@dataclass
class Loop:
    """What is trained, on what and how.

    inputs, labels: all training images, uint8 (n, H, W, 3), and their classes, on the model's device
    normalize: uint8 images to the model's input
    clock: stands around "data", "forward", "backward" and "optimizer" of each step, to measure them
    """

    model: nn.Module
    inputs: Any
    labels: Tensor
    normalize: Callable[[Tensor], Tensor]
    config: Training
    clock: Callable[[str], AbstractContextManager[Any]] = nullcontext
    unit: ClassVar[str] = "img"

    def __post_init__(self) -> None:
        self.forward, self.prefix = self.passes()
        self.trained = cv.parameters(self.model)
        self.optimizer = make_optimizer(self.model, self.config, fused=self.inputs.device.type == "cuda")
        self.steps = self.config.steps(len(self.inputs))
        self.schedule = Schedule(self.optimizer, self.config, self.steps)

    def passes(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], AbstractContextManager[Any]]]:
        """The model's forward pass, and what stands around it for a batch."""
        config: Any = self.config
        prefix: Callable[[Any], AbstractContextManager[Any]] = nullcontext
        if config.cache_frozen_prefix:
            prefix = FrozenPrefix(self.model, self.inputs, self.normalize, config.batch_size, config.precision)
        return forward_of(self.model, config), prefix

    def draw(self) -> Sequence[Any]:
        """The batches of an epoch in a new order, each whatever `batch` understands."""
        order = torch.randperm(len(self.inputs)).to(self.inputs.device)
        return order.split(self.config.batch_size)[: self.steps]

    def batch(self, chosen: Any) -> tuple[Any, Tensor]:
        """The model's input and the labels."""
        return self.normalize(self.inputs[chosen]), self.labels[chosen]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What is minimised: of a classifier the cross entropy."""
        return F.cross_entropy(outputs, labels)

    def right(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """How many of a batch are right; None where there is no right and wrong."""
        return (outputs.argmax(1) == labels).sum()

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
        last, seen = until or config.epochs, min(len(self.inputs), self.steps * config.batch_size)
        done, total = len(history) * seen, last * seen
        with tqdm(total=total, initial=done, unit=self.unit, desc="train", mininterval=0.5) as bar:
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
        device, batches = self.inputs.device, self.draw()
        losses, correct = torch.zeros(self.steps, device=device), torch.zeros((), device=device)
        start, seen = time.perf_counter(), 0
        self.model.train()
        for step, chosen in enumerate(batches):
            self.schedule.step_update(epoch * self.steps + step)
            loss, right = self.step(chosen)
            losses[step] = loss * len(chosen)
            correct = None if right is None else correct + right
            seen += len(chosen)
            # Reading a figure waits for a GPU, so that one is asked at the end alone.
            if step == self.steps - 1 or (step % 8 == 7 and device.type == "cpu"):
                bar.set_postfix({name: f"{value:.4g}" for name, value in _means(losses, correct, seen).items()})
            bar.update(len(chosen))
        return {
            "epoch": epoch + 1,
            **_means(losses, correct, seen),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - start,
            "bad_step": self._bad_step(losses),
        }

    def step(self, chosen: Any) -> tuple[Tensor, Tensor | None]:
        """One update by the batch `chosen`; its mean loss, and how many were right."""
        with self.clock("data"):
            x, y = self.batch(chosen)
        with self.clock("forward"), autocast(self.inputs.device, self.config.precision), self.prefix(chosen):
            outputs = self.forward(x)
            loss = self.loss(outputs, y)
        with self.clock("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with self.clock("optimizer"):
            if self.config.clip:
                nn.utils.clip_grad_norm_(self.trained, self.config.clip)
            self.optimizer.step()
        return loss.detach(), self.right(outputs.detach(), y)

    def _bad_step(self, losses: Tensor) -> int | None:
        finite = losses.isfinite()
        if not finite.all():
            return 1 + int(finite.int().argmin())
        if not torch.stack([p.isfinite().all() for p in self.trained]).all():
            return len(losses)
        return None


def _means(losses: Tensor, correct: Tensor | None, seen: int) -> dict[str, float]:
    """Mean loss, and the share of the right ones in percent."""
    found = {"loss": losses.sum().item() / seen}
    return found if correct is None else found | {"accuracy": 100 * correct.item() / seen}
