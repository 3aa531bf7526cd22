"""Is a package whole, and does it still compute what was exported? python -m export.verify DIR"""

from pathlib import Path
from typing import Any

import numpy as np

from export import cli
from export.runtime import Runtime, check_files, read_manifest, relative_error

RUN = {".onnx", ".data", ".onnx_adapter"}  # what a runtime may load


def main(argv: list[str] | None = None) -> float:
    """Check every checksum, run every task's stored probe, and the variants; returns the largest relative error.

    Raises:
        ValueError: a file that is missing, changed or of no task, two tasks with one adapter, or a probe that gives
            other logits; a variant that does not run or gives no numbers.
    """
    parser = cli.Parser(prog="python -m export.verify", description=__doc__)
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    folder = parser.parse_args(argv).package
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    _check_owners(folder, manifest)
    runtime = Runtime(folder)
    worst = max(_probe(runtime, name) for name in runtime.tasks)
    tasks = f"the probes of {len(runtime.tasks)} tasks" if len(runtime.tasks) > 1 else "probe"
    told = {name: _state(folder, name) for name in manifest["graphs"] if name != "float32"}
    others = "".join(f"; {name}: {state}" for name, state in told.items())
    where = " in float32" if others else ""
    print(f"{folder}: {len(manifest['files'])} checksums right, {tasks} within {worst:.1e}{where}{others}")
    return worst


def _check_owners(folder: Path, manifest: Any) -> None:
    """Raise ValueError for a graph or adapter that the manifest does not list, and for an adapter of two tasks."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in RUN}
    if extra := sorted(there - manifest["files"].keys()):
        raise ValueError(f"{folder / extra[0]} is not in the manifest; take it out, or export again with its run")
    owners: dict[str, str] = {}
    for name, task in manifest["tasks"].items():
        if task["adapter"] and (other := owners.setdefault(task["adapter"], name)) != name:
            raise ValueError(f"{folder}: the tasks {other} and {name} share {task['adapter']}; export again")


def _logits(runtime: Runtime, name: str) -> np.ndarray:
    """Of a task's probe."""
    probe = runtime.manifest["tasks"][name]["probe"]
    return runtime.logits(runtime.input.sample(probe["seed"], probe["count"]), name)


def _state(folder: Path, variant: str) -> str:
    """What is known of a variant, of whose logits no probe tells; ValueError unless it gives numbers for every task."""
    if variant == "preprocess":
        return "checksum only"
    runtime = Runtime(folder, variant=variant)
    for name in runtime.tasks:
        if not np.isfinite(_logits(runtime, name)).all():
            raise ValueError(f"{folder}: {variant} gives logits of {name} that are not finite; export again")
    return "logits finite"


def _probe(runtime: Runtime, name: str) -> float:
    task = runtime.manifest["tasks"][name]
    probe, tolerance = task["probe"], task["parity"]["tolerance"]
    found, expected = _logits(runtime, name), np.array(probe["logits"], np.float64)
    if found.shape != expected.shape or found.shape[1:2] != (len(task["labels"]),):
        shapes = f"logits of {found.shape}, its probe {expected.shape}, and it has {len(task['labels'])} labels"
        raise ValueError(f"{runtime.folder}: {name} has {shapes}; export again")
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise ValueError(
            f"{runtime.folder}: the probe of {name} is off by {error:.1e} of its largest logit, above {tolerance:g}"
        )
    return error


if __name__ == "__main__":
    cli.run(main)
