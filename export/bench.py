"""Latency of a package in ONNX Runtime beside its model in PyTorch: python -m export.bench DIR --run RUN_DIR

Rounds alternate between the two, so that whatever else the machine does meets both; the ratio is of medians.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from export import cli


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call: median and quartiles over `rounds` alternating rounds, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    quartiles = {name: np.percentile(values, [25, 50, 75]) for name, values in times.items()}
    return {name: {"median": q[1], "low": q[0], "high": q[2]} for name, q in quartiles.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Time both, print the table, return it."""
    parser = cli.Parser(prog="python -m export.bench", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="the run it was made of")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images a call (default: 1)")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="timed rounds (default: 50)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of both (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    for flag in ("batch", "rounds", "threads"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be at least 1")
    import torch

    from export.graph import folded
    from export.package import Source
    from export.runtime import Classifier, random_pixels, sha256

    runtime, source = Classifier(args.package, threads=args.threads), Source.open(args.run)
    if sha256(source.path) != runtime.manifest["tasks"][runtime.task]["source_sha256"]:
        raise ValueError(f"{args.package} was not made of {args.run}; name the run it was exported from")
    torch.set_num_threads(args.threads)
    model = folded(source.model)
    pixels = runtime.normalize(random_pixels(0, args.batch, runtime.preprocessor["size"]["height"]))
    tensor = torch.from_numpy(pixels)

    def eager() -> Any:
        with torch.inference_mode():
            return model(tensor)

    calls = {"onnxruntime": lambda: runtime.session.run(["logits"], {"pixel_values": pixels}), "pytorch": eager}
    figures = interleaved(calls, args.rounds)
    result = {"milliseconds": figures, "ratio": figures["onnxruntime"]["median"] / figures["pytorch"]["median"]}
    result |= {"batch": args.batch, "threads": args.threads, "rounds": args.rounds}
    for name, ms in figures.items():
        print(f"{name:<12} {ms['median']:8.2f} ms  (quartiles {ms['low']:.2f} … {ms['high']:.2f})")
    print(f"ratio {result['ratio']:.2f} at batch {args.batch}, {args.threads} threads, {args.rounds} rounds")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    cli.run(main)
