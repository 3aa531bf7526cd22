"""Many runs, worked off: each tried twice, the state of all of them in one file, whatever dies on the way.

Where the runs are worked on is a `Place`: this machine (vtab/local.py), a Ray cluster (on_ray.py), Slurm (on_slurm.py).
"""

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vtab.leash import PAUSE, Task, tail
from vtab.textfile import read_json, write

TRIES = 2
LEAST_FREE_MB = 64


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: why it failed, "" where it did not."""

    reason: str = ""

    @classmethod
    def of(cls, status: int) -> "Outcome":
        """From a process's exit status.

        >>> Outcome.of(-9).reason
        'killed by SIGKILL: by hand, or by a machine out of memory'
        """
        if status == 0:
            return cls()
        if status > 0:
            return cls(f"exit status {status}")
        why = ": by hand, or by a machine out of memory" if status == -signal.SIGKILL else ""
        return cls(f"killed by {signal.Signals(-status).name}{why}")


@dataclass(eq=False)
class Run:
    """One command line of vtab.train, and how far it is."""

    label: str  # "digits lora seed 0"
    argv: tuple[str, ...]
    folder: Path
    state: str = "waiting"  # running, done, failed
    attempts: int = 0
    started: float = 0.0
    seconds: float = 0.0  # of the last attempt
    reason: str = ""
    last_lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """Beside the run folders, not in one: there vtab.train wants its own files only."""
        return self.folder.parent / "logs" / f"{self.folder.name}.log"

    def task(self, threads: int) -> Task:
        """What a process needs to know."""
        return Task(self.argv, self.log, threads, os.getcwd())

    def command(self) -> str:
        """As one would type it."""
        return f"python -m vtab.train {shlex.join(self.argv)}"

    def result(self) -> dict[str, Any] | None:
        """result.json; None where there is none, or none that can be read."""
        with contextlib.suppress(OSError, ValueError):
            found = read_json(self.folder / "result.json")
            return found if isinstance(found, dict) else None
        return None

    def peak_memory_mb(self) -> float | None:
        """What the finished run recorded; None before, and on a CPU."""
        peak = (self.result() or {}).get("environment", {}).get("peak_memory_mb")
        return float(peak) if peak else None

    def record(self) -> dict[str, Any]:
        """Its entry in sweep.json."""
        accuracy = (self.result() or {}).get("accuracy") if self.state == "done" else None
        return {
            "run": self.folder.name,
            "label": self.label,
            "state": self.state,
            "accuracy": accuracy,
            "attempts": self.attempts,
            "seconds": round(self.seconds, 1),
            "reason": self.reason,
            "log": f"logs/{self.log.name}",
            "command": self.command(),
        }


class Place(Protocol):
    """Where runs are worked on."""

    def slots(self) -> int:
        """How many may run at once, now."""

    def start(self, run: Run) -> Any:
        """Begin; returns what the other methods call the handle."""

    def ended(self, handle: Any) -> Outcome | None:
        """How it ended; None while it runs."""

    def stop(self, handles: Sequence[Any]) -> None:
        """End these attempts and come back when they have."""

    def crowded(self, run: Run) -> None:
        """Told that a run found no memory."""


class Ledger:
    """The state of every run, written whole to sweep.json at each change."""

    def __init__(self, out: Path, runs: Sequence[Run], say: Callable[[str], None] = print) -> None:
        self.path, self.runs, self.say = out / "sweep.json", runs, say
        self.width = len(str(len(runs)))

    def write(self) -> dict[str, Any]:
        """Write and return it."""
        counts = Counter(run.state for run in self.runs)
        summary = {
            "counts": {state: counts[state] for state in ("done", "failed", "running", "waiting")},
            "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "runs": [run.record() for run in self.runs],
        }
        write(self.path, json.dumps(summary, indent=1))
        return summary

    def tell(self, run: Run, text: str) -> None:
        """One line about a run; the number is that of finished runs."""
        ended = sum(r.state in ("done", "failed") for r in self.runs)
        self.say(f"[{ended:>{self.width}}/{len(self.runs)}] {run.label}: {text}")


def work(runs: Sequence[Run], place: Place, ledger: Ledger) -> None:
    """Work off what is not done; a run that died is tried once more, after all others.

    Raises:
        OSError: the disk is full. Whatever raises, the runs at hand are stopped cleanly first.
    """
    waiting = deque(run for run in runs if run.state == "waiting")
    running: dict[Run, Any] = {}
    told = False
    try:
        ledger.write()
        while waiting or running:
            slots = place.slots()
            while waiting and len(running) < slots:
                _need_disk(ledger.path.parent)
                run = waiting.popleft()
                running[run] = place.start(run)
                run.state, run.attempts, run.started = "running", run.attempts + 1, time.monotonic()
                ledger.write()
            if waiting and not running and not told:
                ledger.say(f"no machine has room for a run now; {len(waiting)} wait for one")
                told = True
            for run, outcome in list(_ended(running, place)):
                del running[run]
                _settle(run, outcome, place, ledger)
                if run.state == "waiting":
                    waiting.append(run)
                ledger.write()
            time.sleep(PAUSE)
    finally:
        place.stop(list(running.values()))
        for run in running:
            run.state = "done" if run.result() else "waiting"
        with contextlib.suppress(OSError):
            ledger.write()


def _ended(running: dict[Run, Any], place: Place) -> Iterator[tuple[Run, Outcome]]:
    for run, handle in running.items():
        outcome = place.ended(handle)
        if outcome is not None:
            yield run, outcome


def _settle(run: Run, outcome: Outcome, place: Place, ledger: Ledger) -> None:
    run.seconds = time.monotonic() - run.started
    result = run.result()
    if result is not None:  # whatever became of the process afterwards
        run.state, run.reason = "done", ""
        ledger.tell(run, f"{result.get('accuracy', float('nan')):.1f} %, {run.seconds:.0f} s")
        return
    run.reason = outcome.reason or "it ended without a result"
    run.last_lines = tail(run.log)
    if run.last_lines and run.last_lines[-1].startswith("error: "):  # vtab.train's one line says it better
        run.reason = run.last_lines[-1]
    if any("out of memory" in line.lower() for line in (run.reason, *run.last_lines)):
        place.crowded(run)
    run.state = "waiting" if run.attempts < TRIES else "failed"
    ledger.tell(
        run, f"{run.reason}; " + ("it gets one more try" if run.state == "waiting" else f"failed, see {run.log}")
    )


def _need_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free / 2**20
    if free < LEAST_FREE_MB:
        raise OSError(
            errno.ENOSPC, f"{free:.0f} MB are free, runs need {LEAST_FREE_MB}; make room and give the command again",
            str(folder),
        )  # fmt: skip
