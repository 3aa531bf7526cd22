"""All or nothing: what a failure in the middle of a change gives back."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def undone_on_error(model: nn.Module, values: Collection[Tensor] = ()) -> Iterator[None]:
    """Should the block of code fail, give `model` back what it had before; Ctrl-C counts as failure.

    Given back are the classes and attributes of all modules, which modules, parameters and buffers they hold, and what
    is trainable; of the `values`, which the block may write in place, every bit.

    >>> model = nn.Linear(2, 1)
    >>> with contextlib.suppress(KeyError), undone_on_error(model):
    ...     model.weight = nn.Parameter(torch.ones(3, 3))
    ...     raise KeyError
    >>> tuple(model.weight.shape)
    (1, 2)
    """
    modules = [(module, type(module), _attributes(module)) for module in model.modules()]
    parameters = (p for _, _, attributes in modules for p in attributes["_parameters"].values() if p is not None)
    trainable = [(p, p.requires_grad) for p in parameters]
    copies = [(value, value.detach().clone()) for value in values]
    try:
        yield
    except BaseException:
        for module, kind, attributes in modules:
            module.__class__ = kind
            _put_back(module, attributes)
        for p, flag in trainable:
            p.requires_grad_(flag)
        with torch.no_grad():
            for value, copy in copies:
                value.copy_(copy)
        raise


def _attributes(module: nn.Module) -> dict[str, Any]:
    attributes = dict(vars(module))
    return attributes | {name: dict(attributes[name]) for name in _REGISTRIES}


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    own = vars(module)
    for name in _REGISTRIES:  # the dicts themselves stay: a compiled graph may hold on to them
        own[name].clear()
        own[name].update(attributes[name])
    kept = {name: own[name] for name in _REGISTRIES}
    own.clear()
    own.update(attributes | kept)
