"""Runs as Slurm jobs, through submitit; the sweep's folder must be one that the compute nodes see."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtab.leash import execute
from vtab.ledger import Run
from vtab.work import Outcome


class OnSlurm:
    """One job a run, `jobs` in the queue at a time.

    Args:
        settings: of submitit: slurm_partition=gpu,gpus_per_node=1,timeout_min=120; cluster=local needs no Slurm.
        out: the sweep's folder; submitit's own files go below it.
        jobs: how many jobs may wait or run at once.

    Raises:
        ValueError: submitit is not installed, there is no Slurm here, a setting that submitit does not know.
    """

    def __init__(self, settings: dict[str, Any], out: Path, jobs: int) -> None:
        try:
            import submitit
        except ImportError:
            raise ValueError("--slurm needs submitit: pip install 'capavision[slurm]'") from None
        self.jobs, self.failed = jobs, submitit.core.utils.FailedJobError
        kept = dict(settings)
        try:
            self.executor = submitit.AutoExecutor(out / "logs" / "slurm", cluster=kept.pop("cluster", None) or "slurm")
            self.threads = int(kept.setdefault("cpus_per_task", 1))
            self.executor.update_parameters(**kept)
        except (NameError, RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"--slurm: {error}") from error

    def slots(self) -> int:
        """As many as --jobs says; Slurm's queue does the rest."""
        return self.jobs

    def start(self, run: Run) -> Any:
        """Submit it."""
        return self.executor.submit(execute, run.task(self.threads))

    def ended(self, job: Any) -> Outcome | None:
        """How it ended; None while it waits or runs."""
        if not job.done():
            return None
        try:
            return Outcome.of(job.result())
        except Exception as error:  # submitit's own, and whatever the job raised
            return Outcome(" ".join(str(error).split())[:200])

    def stop(self, jobs: Sequence[Any]) -> None:
        """Cancel them."""
        for job in jobs:
            job.cancel()

    def crowded(self, run: Run) -> None:
        """Slurm gives each job what it asked for."""
