"""A circulant update of one Linear, dense against FFT: python -m benchmarks.structured.

    dense    F.linear(x, W + C(c))             C(c) built once a step, one product
    fft      F.linear(x, W) + irfft(rfft(c) rfft(x))

Forward and backward (gradients of x and c) over the tokens of 64 images of a ViT-B/16, float32, interleaved rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tables import check_counts, table
from capavision.structured import circulant
from vtab.cli import Parser, run
from vtab.setup import pick_device


def dense(x: Tensor, W: Tensor, c: Tensor) -> Tensor:
    """One product with W + C(c)."""
    return F.linear(x, W + circulant(c))


def fft(x: Tensor, W: Tensor, c: Tensor) -> Tensor:
    """The plain product, and C(c) x as a product of spectra."""
    return F.linear(x, W) + torch.fft.irfft(torch.fft.rfft(c) * torch.fft.rfft(x), n=len(c))


def seconds(forward: Callable[..., Tensor], x: Tensor, W: Tensor, c: Tensor) -> float:
    """One step."""
    start = time.perf_counter()
    forward(x, W, c).backward(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Print the medians and the ratio's spread for each width."""
    parser = Parser(prog="python -m benchmarks.structured", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64 * 197)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best this machine has)")
    options = check_counts(parser.parse_args(argv), "rounds", "tokens")
    options.device = pick_device(options.device)
    rows = []
    for n in (384, 768, 1024):
        x = torch.randn(options.tokens, n, device=options.device, requires_grad=True)
        W, c = torch.randn(n, n, device=options.device), torch.randn(n, device=options.device, requires_grad=True)
        torch.testing.assert_close(dense(x[:8], W, c), fft(x[:8], W, c), rtol=1e-3, atol=1e-2)
        rounds = [(seconds(dense, x, W, c), seconds(fft, x, W, c)) for _ in range(options.rounds + 1)][1:]
        ratios = sorted(b / a for a, b in rounds)
        medians = [f"{1e3 * statistics.median(side):.1f}" for side in zip(*rounds, strict=True)]
        rows.append((n, *medians, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"))
    print(table(("n", "dense, ms", "FFT, ms", "FFT / dense"), rows))


if __name__ == "__main__":
    run(main)
