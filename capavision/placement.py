"""Where a delta on a block's output stands, and the non-linearity inside it: what every adapter shares.

    pfeiffer   z + Δ(z)         z the output of a block that ends in an MLP          (arXiv 2005.00247)
    houlsby    f + Δ(f)         f the output of each attention and of each MLP       (arXiv 1902.00751)
    parallel   f(x) + Δ(x)      beside each MLP, x its input                         (arXiv 2110.04366)

Houlsby and parallel adapters act where the attention or MLP ends: before a block's layer scale and drop-path. Where
these are no modules of their own (BERT, BART), f is what their last projection returns, and the MLP's x what its first
one is given (`capavision.span`); the host is then the last one, also where targets name it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capavision.blocks import blocks, ends, mlp_ends, spans
from capavision.delta import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
PLACES: dict[str, Callable[[nn.Module], list[str]]] = {
    "pfeiffer": blocks,
    "houlsby": ends,
    "parallel": mlp_ends,
}


def starts(model: nn.Module, where: str) -> dict[str, str]:
    """The hosts there whose x is the input of another module, each with that module."""
    return spans(model) if where == "parallel" else {}


def inputs(site: Site, where: str) -> int:
    """Channels an adapter reads there: those of the block's output, or of its input beside the block.

    Raises:
        ValueError: nothing can run beside a block whose output has another shape than its input.
    """
    n_in = site.n_in if where == "parallel" else site.n_out
    if not n_in:
        raise ValueError(
            "its output has another shape than its input, so nothing can run beside it; name other targets, or "
            "where='pfeiffer' or 'houlsby'"
        )
    return n_in
