"""Structured updates of one Linear, and other ways than the dense one: python -m benchmarks.structured --tokens 1576

A circulant's step, forward and backward (gradients of x and c):

    dense    F.linear(x, W + C(c))             C(c) built once a step, one product
    fft      F.linear(x, W) + irfft(rfft(c) rfft(x))

The gradients of the trained values alone, by the dense gᵀx and by the method's contraction; beside them the ratio that
`capavision.merged.contractions_pay` counts on. Float32, interleaved rounds; ratios of a round's two times.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import capavision as cv
from benchmarks.tables import check_counts, table
from capavision import merged
from capavision.structured import circulant
from export.bench import Call, interleaved
from vtab.cli import Parser, run
from vtab.setup import pick_device

METHODS = (cv.Circulant(), cv.Toeplitz(), cv.Kronecker())
SIDES = ((192, 192), (768, 192), (192, 768), (384, 384), (1536, 384), (768, 768), (3072, 768))


def dense(x: Tensor, W: Tensor, c: Tensor) -> Tensor:
    """One product with W + C(c)."""
    return F.linear(x, W + circulant(c))


def fft(x: Tensor, W: Tensor, c: Tensor) -> Tensor:
    """The plain product, and C(c) x as a product of spectra."""
    return F.linear(x, W) + torch.fft.irfft(torch.fft.rfft(c) * torch.fft.rfft(x), n=len(c))


def compared(way: Call, other: Call, device: torch.device, rounds: int) -> tuple[str, str, str]:
    """Milliseconds of either, and their ratio, other / way: median (quartiles)."""

    def whole(call: Call) -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = interleaved({"way": partial(whole, way), "other": partial(whole, other)}, rounds)
    low, median, high = np.percentile(times["other"] / times["way"], [25, 50, 75])
    medians = (f"{np.median(times[name]):.1f}" for name in ("way", "other"))
    return *medians, f"{median:.2f} ({low:.2f} … {high:.2f})"


def step(n: int, tokens: int, device: torch.device, rounds: int) -> tuple[object, ...]:
    """A row of the first table."""
    x, c = (torch.randn(*shape, n, device=device, requires_grad=True) for shape in ((tokens,), ()))
    W = torch.randn(n, n, device=device)
    torch.testing.assert_close(dense(x[:8], W, c), fft(x[:8], W, c), rtol=1e-3, atol=1e-2)
    ways = (lambda: dense(x, W, c).backward(x), lambda: fft(x, W, c).backward(x))
    return n, *compared(*ways, device, rounds)


def gradients(
    method: cv.Method, sides: tuple[int, int], tokens: int, device: torch.device, rounds: int
) -> list[object]:
    """A row of the second."""
    n_out, n_in = sides
    host = nn.Sequential(nn.Linear(n_in, n_out, device=device))
    cv.inject(host, method, "0")
    x, g, trained = (
        torch.randn(tokens, n_in, device=device),
        torch.randn(tokens, n_out, device=device),
        cv.parameters(host),
    )
    weight, ways = host[0].weight, host[0].delta.contractions()
    both = (F.linear(x, weight), merged.contracted(x, weight, None, ways))
    calls = (partial(torch.autograd.grad, y, list(trained), g, retain_graph=True) for y in both)
    counted = sum(way.cost for way in ways) / weight.numel()
    return [method.name, f"{n_in} → {n_out}", *compared(*calls, device, rounds), f"{counted:.2f}"]


def main(argv: list[str] | None = None) -> None:
    """Print both tables."""
    parser = Parser(prog="python -m benchmarks.structured", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64 * 197)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best this machine has)")
    options = check_counts(parser.parse_args(argv), "rounds", "tokens", "threads")
    torch.set_num_threads(options.threads)
    common = options.tokens, pick_device(options.device), options.rounds
    print(table(("n", "dense, ms", "FFT, ms", "FFT / dense"), [step(n, *common) for n in (384, 768, 1024)]), "\n")
    rows = [gradients(method, sides, *common) for method in METHODS for sides in SIDES]
    print(table(("gradients of", "host", "dense, ms", "contracted, ms", "contracted / dense", "counted"), rows))


if __name__ == "__main__":
    run(main)
