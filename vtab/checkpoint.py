"""What a run needs to go on after its last finished epoch: one safetensors file, replaced whole at every epoch."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from capavision.files import write_tensors


class DivergedError(ValueError):
    """Training left the finite numbers; the checkpoint is that of the last good epoch."""


def write(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """The trained parameters, the optimizer's state, and `progress` as JSON.

    Raises:
        OSError: the disk is full; the previous checkpoint stays.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    write_tensors(path, tensors, {"progress": json.dumps(progress)})


@torch.no_grad()
def read(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put the checkpoint back into model and optimizer; returns its progress.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to train from the start") from error
    own = dict(model.named_parameters())
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "model":
            own[rest].copy_(tensor)
        else:
            index, _, key = rest.partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return progress
