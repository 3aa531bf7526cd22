"""Runs on a Ray cluster: one task each, with a GPU, a fraction of one, or none.

A worker or a machine that dies loses the runs it had; Ray tries nothing again (max_retries=0), `vtab.work` does. Where
the workers see the sweep's folder, a run trains in it and goes on from its checkpoint elsewhere. Where they do not, it
trains in a temporary folder there, its files come back when it is finished, and a lost one starts anew.
"""

import os
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import capavision as cv
from capavision.files import replacing
from export.cluster import connect
from vtab.data import inside
from vtab.leash import PATIENCE, Task, execute
from vtab.ledger import Run
from vtab.work import Outcome

LARGEST_MB = 1024  # of a run folder that comes back through Ray


@dataclass(frozen=True)
class Returned:
    """What a worker hands back; files and log only where it shares no folder with the driver."""

    status: int
    files: dict[str, bytes]
    log: bytes = b""


def train_there(task: Task, folder: Path, mark: Path, version: str) -> Returned:
    """On the worker: one run, in the sweep's folder if `mark` lies there, else in a temporary one.

    Raises:
        ValueError: the worker has another version of capavision; the run folder is too large to send.
    """
    if cv.__version__ != version:
        raise ValueError(
            f"{os.uname().nodename} has capavision {cv.__version__}, the sweep {version}; install the same"
        )
    if mark.is_file():
        return Returned(execute(task), {})
    with tempfile.TemporaryDirectory(prefix="capavision-") as own:
        out, log = Path(own) / "runs", Path(own) / "log"
        status = execute(replace(task, argv=(*task.argv, "--out", str(out)), log=log))
        return Returned(status, pack(out / folder.name) if status == 0 else {}, log.read_bytes())


def pack(folder: Path) -> dict[str, bytes]:
    """A finished run's files by name.

    Raises:
        ValueError: too much to send through Ray.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    size = sum(path.stat().st_size for path in paths) / 2**20
    if size > LARGEST_MB:
        raise ValueError(f"{folder.name} takes {size:.0f} MB; above {LARGEST_MB}, give --out on a shared file system")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def unpack(files: dict[str, bytes], folder: Path) -> None:
    """Write them, result.json last, as a run at home does.

    Raises:
        ValueError: a name that leads out of the folder; nothing is written.
    """
    paths = {name: inside(folder, name) for name in sorted(files, key=lambda name: name == "result.json")}
    for name, path in paths.items():
        with replacing(path) as temporary:
            temporary.write_bytes(files[name])


class OnRay:
    """The cluster at `address` ("auto": the one that runs here; "local": a new one, on this machine only).

    Raises:
        ValueError: Ray is not installed, no cluster answers, no machine of it can ever hold a run.
    """

    def __init__(self, address: str, gpus: float | None, cpus: float, out: Path) -> None:
        ray = connect(address, "--ray", "ray")
        self.ray, self.cpus = ray, cpus
        self.gpus = (1.0 if ray.cluster_resources().get("GPU") else 0.0) if gpus is None else gpus
        if not self.slots():
            there = {kind: ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU")}
            ray.shutdown()
            raise ValueError(f"no machine of the cluster has {cpus:g} CPUs and {self.gpus:g} GPUs for a run: {there}")
        self.mark = out / f".sweep-{uuid.uuid4().hex}"
        self.mark.touch()
        self.remote = ray.remote(train_there).options(num_cpus=cpus, num_gpus=self.gpus, max_retries=0)

    def slots(self) -> int:
        """How many fit on the machines that are there now."""
        alive = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return sum(
            min(
                int(node.get("CPU", 0) / self.cpus),
                int(node.get("GPU", 0) / self.gpus + 1e-6) if self.gpus else 10**6,
            )
            for node in alive
        )

    def start(self, run: Run) -> tuple[Any, Run]:
        """Hand it to Ray."""
        task = run.task(threads=max(1, int(self.cpus)))
        return self.remote.remote(task, run.folder, self.mark, cv.__version__), run

    def ended(self, handle: tuple[Any, Run]) -> Outcome | None:
        """How it ended, its files in place; None while it runs."""
        reference, run = handle
        if not self.ray.wait([reference], timeout=0)[0]:
            return None
        try:
            returned = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            return Outcome(_first_words(error))
        if returned.log:
            run.log.parent.mkdir(parents=True, exist_ok=True)
            with run.log.open("ab") as log:
                log.write(returned.log)
        unpack(returned.files, run.folder)
        return Outcome.of(returned.status)

    def stop(self, handles: Sequence[tuple[Any, Run]]) -> None:
        """Interrupt the tasks, wait for them, leave the cluster as it was."""
        references = [reference for reference, _ in handles]
        for reference in references:
            self.ray.cancel(reference)
        if references:
            self.ray.wait(references, num_returns=len(references), timeout=PATIENCE + 10)
        self.mark.unlink(missing_ok=True)
        self.ray.shutdown()

    def crowded(self, run: Run) -> None:
        """Ray shares memory out as --gpus-per-run says."""


def _first_words(error: Exception) -> str:
    """Ray's errors bring a page along; the cause, if it is ours, or the first sentence."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, (ValueError, OSError)):
        return str(cause)
    return f"{type(error).__name__}: {' '.join(str(error).split()).partition('. ')[0]}"
