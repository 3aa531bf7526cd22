"""Many runs, worked off: each tried twice, whatever dies on the way.

Where the runs are worked on is a `Place`: this machine (vtab/local.py), a Ray cluster (on_ray.py), Slurm (on_slurm.py).
"""

import contextlib
import errno
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vtab.leash import PAUSE, tail
from vtab.ledger import Ledger, Run

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
            if not run.look():
                run.state = "waiting"
        with contextlib.suppress(OSError):
            ledger.write()


def _ended(running: dict[Run, Any], place: Place) -> Iterator[tuple[Run, Outcome]]:
    for run, handle in running.items():
        outcome = place.ended(handle)
        if outcome is not None:
            yield run, outcome


def _settle(run: Run, outcome: Outcome, place: Place, ledger: Ledger) -> None:
    run.seconds = time.monotonic() - run.started
    if run.look():  # whatever became of the process afterwards
        ledger.tell(run, f"{run.accuracy:.1f} %, {run.seconds:.0f} s")
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
