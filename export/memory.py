"""Peak memory of one model in a process of its own: the proportional set size (PSS), Python and libraries included.

PSS counts a page that n processes share as one n-th; Linux tells it in /proc, sampled here while the model is loaded
and run. Elsewhere there is no figure.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path

from export import cli

SMAPS = Path("/proc/self/smaps_rollup")
EVERY = 0.005  # seconds between two samples
RUNS = 3


def peak(kind: str, path: Path, batch: int, threads: int, tokens: int = 1) -> float | None:
    """MB at the peak, measured in a fresh process; None where the system does not tell.

    Args:
        kind: "onnx" for a graph, "torch" for a run's folded model.
        path: the graph, or the run.
        batch: images or texts a call.
        threads: of the runtime.
        tokens: of a text.

    Raises:
        ValueError: the process failed.
    """
    if not SMAPS.is_file():
        return None
    command = [sys.executable, "-m", "export.memory", kind, str(path), *map(str, (batch, threads, tokens))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{path} does not run by itself ({(done.stderr.strip().splitlines() or ['killed'])[-1]})")
    return float(json.loads(done.stdout.splitlines()[-1]))


def pss() -> float:
    """This process's proportional set size in MB."""
    line = next(line for line in SMAPS.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024 / 1e6


class Sampler(threading.Thread):
    """Notes the largest PSS until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(EVERY):
            self.largest = max(self.largest, pss())

    def stop(self) -> float:
        """The largest so far."""
        self.done.set()
        self.join()
        return max(self.largest, pss())


def main(kind: str, path: str, batch: str, threads: str, tokens: str) -> None:
    """Load, run, print the peak."""
    sampler = Sampler()
    sampler.start()
    if kind == "onnx":
        from export.bench import feeds, opened

        session = opened(Path(path), int(threads))
        given = feeds(session, int(batch), int(tokens))
        for _ in range(RUNS):
            session.run(None, given)
    else:
        import torch

        from export.graph import folded, outputs
        from export.source import Source

        torch.set_num_threads(int(threads))
        source = Source.open(Path(path))
        model, example = folded(source.model), source.example(int(batch), int(tokens))
        with torch.inference_mode():
            for _ in range(RUNS):
                outputs(model, example)
    print(sampler.stop())


if __name__ == "__main__":
    cli.run(lambda: main(*sys.argv[1:]))
