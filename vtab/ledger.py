"""The runs of a sweep, and sweep.json: how far each of them is."""

import contextlib
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtab.leash import Task
from vtab.textfile import read_json, write


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
    accuracy: float | None = None

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
            return found if isinstance(found, dict) and isinstance(found.get("accuracy"), int | float) else None
        return None

    def look(self) -> bool:
        """Is it done? Then that is its state, and its accuracy is known."""
        result = self.result()
        if result is not None:
            self.state, self.reason, self.accuracy = "done", "", result["accuracy"]
        return result is not None

    def peak_memory_mb(self) -> float | None:
        """What the finished run recorded; None before, and on a CPU."""
        peak = (self.result() or {}).get("environment", {}).get("peak_memory_mb")
        return float(peak) if peak else None

    def record(self) -> dict[str, Any]:
        """Its entry in sweep.json."""
        return {
            "run": self.folder.name,
            "label": self.label,
            "state": self.state,
            "accuracy": self.accuracy,
            "attempts": self.attempts,
            "seconds": round(self.seconds, 1),
            "reason": self.reason,
            "log": f"logs/{self.log.name}",
            "command": self.command(),
        }


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
