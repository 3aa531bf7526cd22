"""A training run in a process of its own, on a leash: it stops when whoever started it is gone.

The starter holds the other end of the child's standard input. When that closes, because the starter closes it or
because it was killed (kill -9 too), the run stops as with Ctrl-C: after the step at hand, its last epoch on disk. So
nothing trains on unseen, and the same run can be started again, here or on another machine.
"""

import _thread
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 30.0  # seconds a run gets to end by itself
SHOWN = 5  # lines of a log that a report of failure shows
PAUSE = 0.2
STOPPED = 130  # what shells report for Ctrl-C


@dataclass(frozen=True)
class Task:
    """What to run and where: the one thing that a local process, a Ray worker and a Slurm job are all given."""

    argv: tuple[str, ...]  # of vtab.train
    log: Path
    threads: int = 1
    cwd: str | None = None  # where relative paths start; ignored on a machine that has no such folder


class Child:
    """The starter's end."""

    def __init__(self, task: Task) -> None:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        cwd = task.cwd if task.cwd and Path(task.cwd).is_dir() else None
        with task.log.open("ab") as log:
            log.write(f"$ python -m vtab.train {shlex.join(task.argv)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                [*command(), *task.argv],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(task.threads), "PYTHONUNBUFFERED": "1"},
                cwd=cwd,
                start_new_session=True,  # Ctrl-C is the starter's to pass on
            )

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self.process.poll()

    def let_go(self) -> None:
        """Ask it to stop."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        """Wait until it has stopped; kill it if it does not."""
        self.let_go()
        try:
            self.process.wait(PATIENCE + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def command() -> list[str]:
    """The child's command line, before the flags of vtab.train."""
    return [sys.executable, "-m", "vtab.leash"]


def execute(task: Task) -> int:
    """Run to the end; the exit status. Whatever interrupts this stops the run too."""
    child = Child(task)
    try:
        while (status := child.poll()) is None:
            time.sleep(PAUSE)
    finally:
        child.end()
    return status


def tail(log: Path, lines: int = SHOWN) -> list[str]:
    """The log's last lines, of a progress bar only its last state.

    >>> import tempfile; file = Path(tempfile.mkdtemp()) / "log"
    >>> _ = file.write_text("one\\ntrain:  0%\\rtrain: 50%\\nerror: no\\n", newline="")
    >>> tail(file, 2)
    ['train: 50%', 'error: no']
    """
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        text = file.read().decode(errors="replace")
        found = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return [line for line in found if line][-lines:]
    return []


def main(argv: Sequence[str]) -> None:
    """The child's end: vtab.train, stopped when standard input closes."""
    try:
        obey()
        from vtab import cli, train
        from vtab.config import parse

        def wait_and_train() -> None:
            _wait_for_predecessor(parse(list(argv)).folder() / ".lock")
            train.main(list(argv))

        cli.run(wait_and_train)
    except KeyboardInterrupt:  # stopped before it began
        sys.exit(STOPPED)


def obey() -> None:
    """From now on KeyboardInterrupt reaches this process when standard input closes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a script started the sweep with &
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while os.read(0, 1024):
        pass
    if hasattr(signal, "pthread_kill"):  # a true signal wakes the main thread from whatever it waits for
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()
    time.sleep(PATIENCE)
    os._exit(STOPPED)  # stuck where no KeyboardInterrupt arrives


def _wait_for_predecessor(lock: Path) -> None:
    """A killed worker's run lets its folder go a moment after the worker died; do not take that for a rival."""
    from filelock import FileLock, Timeout

    if lock.is_file():
        with contextlib.suppress(OSError, Timeout), FileLock(lock, timeout=2 * PATIENCE):
            pass


if __name__ == "__main__":
    main(sys.argv[1:])
