"""The gate: does the exported graph compute what PyTorch does?

The reference is the model as trained, masks and all, so the comparison covers folding and exporting at once. The gate
is relative: the largest difference over the largest logit, at batches 1, 2, 3 and 5, with equal top-1.
"""

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import capavision as cv
from capavision.inject import injections
from export.graph import outputs
from export.runtime import Runtime, relative_error

BATCHES = (1, 2, 3, 5)
WARN = 1e-5
PROBE = {"seed": 20240701, "count": 1}


def measure(tasks: dict[str, Any], models: Mapping[str, nn.Module], runtime: Runtime, tolerance: float) -> None:
    """Compare every task with its own model as trained, and note the figures and a probe in a manifest's `tasks`.

    Raises:
        ValueError: a task that differs by more than `tolerance`, or whose adapter changes nothing.
    """
    for name, model in models.items():
        try:
            tasks[name]["parity"] = parity(functools.partial(runtime.logits, task=name), model, runtime, tolerance)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        probe = runtime.input.sample(PROBE["seed"], PROBE["count"])
        tasks[name]["probe"] = {**PROBE, "logits": reference(model, runtime, probe).tolist()}


def parity(
    exported: Callable[[Any], np.ndarray], model: nn.Module, runtime: Runtime, tolerance: float
) -> dict[str, Any]:
    """Relative error by batch size, and how far the adapted logits lie from the base's.

    Raises:
        ValueError: an error above `tolerance`, another top-1, or an adapter that changes nothing.
    """
    errors = {}
    for batch in BATCHES:
        sample = runtime.input.sample(batch, batch)
        found, expected = exported(sample), reference(model, runtime, sample)
        errors[str(batch)] = error = relative_error(found, expected)
        if not error <= tolerance:
            raise ValueError(
                f"at batch {batch} ONNX Runtime and PyTorch differ by {error:.1e} of the largest logit, above "
                f"{tolerance:g}; nothing was written"
            )
        if (found.argmax(-1) != expected.argmax(-1)).any():
            raise ValueError(f"at batch {batch} ONNX Runtime and PyTorch disagree on top-1; nothing was written")
        if error > WARN:
            print(f"warning: at batch {batch} the relative error is {error:.1e}", file=sys.stderr)
    distance = _distance(model, runtime, max(errors.values()))
    return {"relative_error": errors, "tolerance": tolerance, "distance_to_base": distance}


def _distance(model: nn.Module, runtime: Runtime, error: float) -> float | None:
    """How far the deltas move the logits: parity would prove nothing of deltas that do not."""
    if not any(plan.hosts or plan.trained for plan in injections(model)):
        return None
    sample = runtime.input.sample(BATCHES[-1], BATCHES[-1])
    base = cv.remove(copy.deepcopy(model))
    distance = relative_error(reference(base, runtime, sample), reference(model, runtime, sample))
    if distance <= 10 * error:
        raise ValueError(f"the adapter moves the logits by {distance:.1e} only, as if untrained; nothing was written")
    return distance


@torch.inference_mode()
def reference(model: nn.Module, runtime: Runtime, sample: Any) -> np.ndarray:
    """PyTorch's logits for the same images, texts or questions."""
    given = runtime.input.feeds(sample)
    found = outputs(model, {name: torch.from_numpy(x) for name, x in given.items()})
    return runtime.input.joined([each.numpy() for each in found], given)
