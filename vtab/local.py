"""Runs side by side on this machine."""

import os
import subprocess
import sys
from collections.abc import Sequence

from vtab.leash import Child
from vtab.ledger import Run
from vtab.work import Outcome

MARGIN, CONTEXT_MB = 1.25, 1024  # over a run's recorded peak: fragments, and what CUDA itself takes in each process


class Local:
    """`jobs` processes at a time; None: as many as fit the GPU's free memory, by the peak that finished runs recorded.

    Until one has finished there is no such figure, so one runs alone; on a CPU it stays at one.
    """

    def __init__(self, jobs: int | None, runs: Sequence[Run], device: str | None = None) -> None:
        self.jobs, self.runs = jobs, runs
        self.cores = int(os.environ.get("OMP_NUM_THREADS") or cores())
        self.free_mb = free_memory_mb(device) if jobs is None else None
        self.most = len(runs)
        self.peaks: dict[Run, float] = {}

    def slots(self) -> int:
        """How many fit now."""
        if self.jobs is not None:
            return min(self.jobs, len(self.runs))
        for run in self.runs:
            if run.state == "done" and run not in self.peaks:  # each file is read once
                self.peaks[run] = run.peak_memory_mb() or 0.0
        peak = max(self.peaks.values(), default=0.0)
        if not peak or self.free_mb is None:
            return 1
        fit = int(self.free_mb // (peak * MARGIN + CONTEXT_MB))
        return max(1, min(fit, cores(), self.most))

    def start(self, run: Run) -> Child:
        """A process for this run, with its share of the cores."""
        return Child(run.task(threads=max(1, self.cores // self.slots())))

    def ended(self, child: Child) -> Outcome | None:
        """How it ended; None while it runs."""
        status = child.poll()
        return None if status is None else Outcome.of(status)

    def stop(self, children: Sequence[Child]) -> None:
        """Let all go at once, then wait for each."""
        for child in children:
            child.let_go()
        for child in children:
            child.end()

    def crowded(self, run: Run) -> None:
        """A run ran out of memory: one fewer at a time from now on, where the number is ours to choose."""
        self.most = max(1, self.slots() - 1)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory_mb(device: str | None) -> float | None:
    """Free memory of the GPU that vtab.train would take; None without one.

    Asked in a process of its own, since asking takes half a gigabyte there for as long as the process lives.
    """
    if device is not None and not device.startswith("cuda"):
        return None
    code = f"import torch; print(torch.cuda.mem_get_info({device or 'cuda'!r})[0] / 2**20)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(asked.stdout) if asked.returncode == 0 else None
