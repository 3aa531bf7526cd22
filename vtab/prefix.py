"""--cache-frozen-prefix: what the backbone computes before its first trained module is computed once for each image.

    y = rest(prefix(x))        prefix holds no trained value, and x never changes: prefix(x) is one tensor an image

How it works: the model runs as ever, but the prefix's last module, the cut, gives the kept outputs of the batch's
images, and modules before it give zeros of their shape. A cut counts only if all that modules after it get and give
stays as it was, bit for bit: a residual that leads past it rules it out, also where a zero hides it from the logits.
Nor may any gradient change, as that of a position embedding would, which is no module's. Of those, the one that spares
most modules is taken. What it gives for an image must not depend on the others in its batch, as behind a batch norm
that is not frozen.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtab.evaluate import autocast

MOST = 4 * 2**30  # bytes to keep
TRIED = 2  # images of the trial


class FrozenPrefix:
    """The prefix's outputs for all training images.

    Args:
        model: injected; in train mode, as it is while it trains.
        images: uint8 (n, H, W, 3), on the model's device.
        normalize: uint8 images to the model's input.
        batch_size: images a forward pass.
        precision: of its products, as in training.

    Raises:
        ValueError: no prefix, one that draws at random, or outputs of more than `MOST` bytes.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        normalize: Callable[[Tensor], Tensor],
        batch_size: int,
        precision: str = "auto",
    ) -> None:
        self.model, self.images, self.normalize, self.precision = model, images, normalize, precision
        model.train()
        self.cut, self.spared = self._found()
        size = self.kept[0].nbytes * len(images)
        if size > MOST:
            raise ValueError(
                f"--cache-frozen-prefix would keep {size / 2**30:.1f} GiB, above {MOST / 2**30:.0f}; lower --img-size, "
                "or leave it out"
            )
        self.kept = torch.cat([self._output(self.cut, some) for some in images.split(batch_size)])

    @contextlib.contextmanager
    def __call__(self, chosen: Tensor) -> Iterator[None]:
        """Within, the model takes the outputs of the images `chosen` for its prefix."""
        zeros = {module: like.new_zeros(len(chosen), *like.shape[1:]) for module, like in self.spared}
        with _instead({**zeros, self.cut: self.kept[chosen]}):
            yield

    def _found(self) -> tuple[nn.Module, list[tuple[nn.Module, Tensor]]]:
        """The cut that spares most, and what need not run before it, with an output of each."""
        some = torch.arange(min(TRIED, len(self.images)), device=self.images.device)
        for plan in self._plans():
            self.cut, self.spared = plan
            self.kept = self._output(self.cut, self.images[some])
            values, gradients = self._after(self.cut, self.images[some])
            with contextlib.suppress(RuntimeError, ValueError, TypeError, AssertionError, IndexError), self(some):
                found, slopes = self._after(self.cut, self.images[some])
                same = len(found) == len(values) and all(map(torch.equal, found, values))
                if same and all(map(_near, slopes, gradients)):
                    break
        else:
            raise ValueError(
                "--cache-frozen-prefix: the first modules are trained themselves, or later ones read what they "
                "compute; name later --targets, or leave it out"
            )
        if self._mixes(self.cut):
            raise ValueError(
                "--cache-frozen-prefix keeps what one image gives, and here the others in its batch change that, as "
                "they do in a batch norm that is not frozen; leave it out"
            )
        return plan

    def _plans(self) -> list[tuple[nn.Module, list[tuple[nn.Module, Tensor]]]]:
        """Cuts with the modules before them, those that spare most first."""
        found, earlier, parent = [], [], self.model
        ran, outputs = self._run()
        while True:
            children = sorted((m for m in parent.children() if m in ran), key=ran.__getitem__)
            frozen = list(itertools.takewhile(lambda m: not _trains(m), children))
            if frozen and frozen[-1] in outputs:
                before = [*earlier, *frozen[:-1]]
                found.append((frozen[-1], [(m, outputs[m]) for m in before if m in outputs]))
            if len(frozen) == len(children):
                return sorted(found, key=lambda plan: -sum(1 for m, _ in plan[1] for _ in m.modules()))
            earlier, parent = earlier + frozen, children[len(frozen)]

    def _run(self) -> tuple[dict[nn.Module, int], dict[nn.Module, Tensor]]:
        """When each module is first called (a mere container: its first link), and the output of those that give one
        tensor, once."""
        ran: dict[nn.Module, int] = {}
        given: dict[nn.Module, list[Any]] = {}

        def note(module: nn.Module, inputs: Any) -> None:
            ran.setdefault(module, len(ran))

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            given.setdefault(module, []).append(output)

        modules = list(self.model.modules())
        hooks = [m.register_forward_pre_hook(note) for m in modules] + [m.register_forward_hook(keep) for m in modules]
        try:
            self._logits(self.images[:1])
        finally:
            for hook in hooks:
                hook.remove()
        for module in reversed(modules):
            inner = [ran[m] for m in module.children() if m in ran]
            if inner and module not in ran:
                ran[module] = min(inner)
        single = {m: each[0] for m, each in given.items() if len(each) == 1 and isinstance(each[0], Tensor)}
        return ran, {m: output for m, output in single.items() if output.dim() and len(output) == 1}

    def _after(self, cut: nn.Module, images: Tensor) -> tuple[list[Tensor], Sequence[Tensor]]:
        """All tensors that modules get and give once `cut` has run, and the logits, as a zero head says nothing; and
        the gradients of a sum of them all."""
        seen: list[Tensor] = []
        done: list[nn.Module] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if cut in done and module not in around:
                seen.extend(each for each in (*inputs, output) if isinstance(each, Tensor))
            done.append(module)

        around = [m for m in self.model.modules() if cut in m.modules()]  # whose inputs may come before the cut
        hooks = [m.register_forward_hook(keep) for m in self.model.modules()]
        try:
            found = [self._logits(images, gradients=True), *seen]
        finally:
            for hook in hooks:
                hook.remove()
        terms = [
            (t * torch.arange(t.numel(), device=t.device).view_as(t).cos()).sum() for t in found if t.requires_grad
        ]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return found, torch.autograd.grad(torch.stack(terms).sum(), trained, materialize_grads=True)

    def _mixes(self, cut: nn.Module) -> bool:
        """Whether `cut` gives something else for an image beside noise."""
        image = self.images[:1]
        noise = (97 * torch.arange(image.numel(), device=image.device) % 256).to(image.dtype).view_as(image)
        twins, beside = (self._output(cut, torch.cat([image, other]))[:1] for other in (image, noise))
        return not _near(beside, twins)

    def _output(self, module: nn.Module, images: Tensor) -> Tensor:
        """What `module` gives within the model, if nothing was drawn at random before."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not all(map(torch.equal, self.undrawn, _generators(images.device))):
                raise ValueError(
                    "--cache-frozen-prefix keeps what never changes, and the blocks before the first adapted one draw "
                    "at random (stochastic depth); pass --drop-path 0"
                )
            kept.append(output)

        hook = module.register_forward_hook(keep)
        try:
            self._logits(images)
        finally:
            hook.remove()
        return kept[0]

    def _logits(self, images: Tensor, gradients: bool = False) -> Tensor:
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices), autocast(images.device, self.precision), torch.set_grad_enabled(gradients):
            torch.manual_seed(0)
            self.undrawn = _generators(images.device)
            logits: Tensor = self.model(self.normalize(images))
        return logits


def _near(one: Tensor, other: Tensor) -> bool:
    """But for the rounding of half precision and of sums in another order."""
    return bool((one - other).float().norm() <= 0.03 * other.float().norm())


def _generators(device: torch.device) -> list[Tensor]:
    """The states of torch's generators, which any draw changes."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@contextlib.contextmanager
def _instead(outputs: dict[nn.Module, Tensor]) -> Iterator[None]:
    """These modules give these tensors, whatever they are given."""
    try:
        for module, output in outputs.items():
            module.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for module in outputs:
            module.__dict__.pop("forward", None)
