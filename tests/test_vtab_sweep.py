"""The sweep, mostly with stand-ins for vtab.train that take milliseconds; a few tests run the real thing."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from vtab import cli, grid, leash, ledger, local, setup, sweep, work
from vtab.ledger import Ledger, Run

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "test_vit", "--weights", "random", "--img-size", "32"]
TINY += ["--batch-size", "125", "--test-limit", "100", "--drop-path", "0"]
STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder, deed = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
tries = folder / "tries"
tries.write_text((tries.read_text() if tries.is_file() else "") + os.environ["OMP_NUM_THREADS"] + " ")
n = len(tries.read_text().split())
print("try", n, flush=True)
if deed == "die" or (deed == "die once" and n == 1):
    print("CUDA out of memory", flush=True)
    os.kill(os.getpid(), 9)
if deed == "wait":
    (folder / "waits").touch()
    sys.stdin.read()
    sys.exit(130)
if deed == "refuse":
    sys.exit("error: no such thing")
if deed.startswith("meet"):
    other = folder.parent / deed.split()[1]
    deadline = time.monotonic() + 20
    while not other.is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    if not other.is_dir():
        sys.exit(3)
if deed != "forget":
    (folder / "result.json").write_text(json.dumps({"accuracy": 50.0, "environment": {"peak_memory_mb": 1000}}))
if deed == "die late":
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Children that do what the second word of their command line says."""
    monkeypatch.setattr(leash, "command", lambda: [sys.executable, "-S", "-c", STAND_IN])


def make(out, *deeds):
    return [Run(f"run {i}", (str(out / f"r{i}"), deed), out / f"r{i}") for i, deed in enumerate(deeds)]


def worked(out, *deeds, jobs=1, place=None):
    """The runs after the sweep, and what it said."""
    runs, said = make(out, *deeds), []
    ledger = Ledger(out, runs, said.append)
    work.work(runs, place or local.Local(jobs, runs), ledger)
    summary = sweep.conclude(ledger)
    assert summary == json.loads((out / "sweep.json").read_text())
    return runs, said


def refused(capsys, argv):
    """The one line that a stranger sees, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: sweep.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def planned(text, *rest):
    args, rest = sweep.parser().parse_known_args([*text.split(), *rest])
    return sweep.plan(args, rest)


# What is to be run


def test_a_sweep_is_tasks_times_methods_times_seeds():
    runs, configs = planned("--tasks all --methods lora,capaboost-lora,full --seeds 0,1,2 --out r --epochs 3")
    assert len(runs) == 19 * 3 * 3 == len({run.folder for run in runs})
    assert [config.seed for config in configs] == sorted(config.seed for config in configs)
    boosted = configs[1].method
    assert (boosted.name, boosted.branches, boosted.masks) == ("lora", 2, "complementary")
    assert {config.epochs for config in configs} == {3}
    assert runs[0].command().startswith("python -m vtab.train --task cifar --method lora --epochs 3 --seed 0")


def test_each_planned_folder_is_the_one_that_vtab_train_takes():
    from vtab.config import parse

    for run in planned("--tasks builtin --methods lora:rank=4,lr=0.003,prefix --out r")[0]:
        assert parse(list(run.argv)).folder() == run.folder


@pytest.mark.parametrize("name", grid.SETTINGS)
def test_every_named_setting_is_a_command_line_of_vtab_train(name):
    assert len(planned(f"--tasks digits --methods {name} --out r")[0]) == 1


def test_a_methods_own_settings_win_over_those_of_all():
    _, configs = planned("--tasks digits --methods lora,lora:rank=4,branches=2,capaboost-lora:rank=2 --rank 16 --out r")
    assert [(c.method.rank, c.method.branches) for c in configs] == [(16, 1), (4, 2), (2, 2)]


def test_one_run_under_two_names_runs_once():
    runs, _ = planned("--tasks digits,digits,builtin --methods lora,lora:rank=8 --out r")
    assert [run.label for run in runs] == [f"{t} lora seed 0" for t in ("digits", "dsprites_loc", "dsprites_ori")]


@pytest.mark.parametrize(("text", "seeds"), [("3", [0, 1, 2]), ("7,", [7]), ("18,45,25", [18, 45, 25])])
def test_seeds_are_a_count_or_a_list(text, seeds):
    assert [config.seed for config in planned(f"--tasks digits --seeds {text} --out r")[1]] == seeds


def test_groups_and_aliases_name_tasks():
    assert len(grid.expand_tasks("natural,specialized,structured")) == 19
    assert grid.expand_tasks("pets,cifar100") == ["oxford_iiit_pet", "cifar"]
    assert set(grid.expand_tasks("builtin")) == {"digits", "dsprites_loc", "dsprites_ori"}


REFUSED = {
    "task": ("--tasks digit", "unknown task 'digit'; did you mean 'digits'"),
    "group": ("--tasks structred", "did you mean 'structured'"),
    "no task": ("--methods lora", "name the tasks: --tasks all"),
    "method": ("--tasks digits --methods capabost-lora", "did you mean 'capaboost-lora'"),
    "no method": ("--tasks digits --methods ,", "name the methods"),
    "setting": (
        "--tasks digits --methods lora:rnak=4",
        "method lora:rnak=4: unrecognized arguments: --rnak 4; did you",
    ),
    "value": ("--tasks digits --methods lora:rank=four", "argument --rank: invalid int value: 'four'"),
    "rank": ("--tasks digits --methods lora:rank=0", "rank=0 must be a whole number"),
    "reserved setting": ("--tasks digits --methods lora:seed=4", "seed is the sweep's to set"),
    "reserved flag": ("--tasks digits --task svhn", "--task is the sweep's to set"),
    "flag": ("--tasks digits --ephocs 3", "did you mean '--epochs'"),
    "own flag": ("--tasks digits --jops 3", "or, of the sweep: did you mean '--jobs'"),
    "method flag": ("--tasks digits --methods lora,bitfit --rank 4", "--rank is of adapter, ldr, lora"),
    "model": ("--tasks digits --model vit_tinny_patch16_224", "did you mean 'vit_tiny_patch16_224'"),
    "targets": ("--tasks digits --model test_vit --weights random --targets qkw", "did you mean 'qkv'"),
    "seeds": ("--tasks digits --seeds a", "must be a count, such as 3, or a list, such as 0,1,2"),
    "no seed": ("--tasks digits --seeds 0", "--seeds 0 must name 1 to"),
    "seed": ("--tasks digits --seeds 99999999999,", "must lie in [0, 2147483648)"),
    "jobs": ("--tasks digits --jobs 0", "--jobs 0 must be a number of at least 1, or auto"),
    "ray and jobs": ("--tasks digits --ray --jobs 2", "--jobs has no use with --ray"),
    "ray and slurm": ("--tasks digits --ray --slurm", "choose one"),
    "gpus": ("--tasks digits --gpus-per-run 0.5", "--gpus-per-run has no use without --ray"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_before_anything_starts(case, tmp_path, capsys):
    line, expected = REFUSED[case]
    assert expected in refused(capsys, [*line.split(), "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_missing_tasks_are_told_all_at_once_before_anything_starts(tmp_path, capsys):
    (tmp_path / "data" / "dtd").mkdir(parents=True)
    (tmp_path / "data" / "dtd" / "train800.txt").write_text("images/absent.jpg 3\n")
    argv = ["--tasks", "dtd,svhn,kitti", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), *TINY]
    said = refused(capsys, argv)
    assert "3 of 3 tasks cannot be opened, nothing was started" in said
    assert all(name in said for name in ("dtd/val200.txt is missing", "svhn", "kitti"))
    said = refused(capsys, ["--tasks", "dtd,digits,svhn", "--out", str(tmp_path / "runs"), *TINY])
    assert "2 of 3 tasks cannot be opened, nothing was started: dtd, svhn: task 'TASK' needs its images" in said
    assert said.count("--data-root") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("package", "flag"), [("ray", "--ray"), ("submitit", "--slurm")])
def test_an_absent_extra_is_one_line(package, flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capsys, ["--tasks", "digits", *TINY, flag, "--out", str(tmp_path)])
    assert "pip install 'capavision[" in said


# The runs themselves


def test_a_run_that_died_is_tried_once_more_after_the_others(tmp_path, stand_in):
    runs, said = worked(tmp_path, "die once", "go", "go")
    assert [(run.state, run.attempts) for run in runs] == [("done", 2), ("done", 1), ("done", 1)]
    assert "run 0: killed by SIGKILL: by hand, or by a machine out of memory; it gets one more try" in said[0]
    assert [line.partition(":")[0][-5:] for line in said[:4]] == ["run 0", "run 1", "run 2", "run 0"]
    assert runs[0].log.read_text().count("try") == 2


def test_what_fails_twice_is_reported_with_the_end_of_its_log_and_loses_no_other(tmp_path, stand_in):
    runs, said = worked(tmp_path, "die", "refuse", "forget", "go", jobs=2)
    assert [(run.state, run.attempts) for run in runs] == [("failed", 2)] * 3 + [("done", 1)]
    assert [run.reason for run in runs[1:3]] == ["error: no such thing", "it ended without a result"]
    told = "\n".join(said)
    assert "run 0 failed 2 times (killed by SIGKILL" in told
    assert "    try 2\n    CUDA out of memory" in told
    assert "1 of 4 runs are done, 3 failed" in told
    assert json.loads((tmp_path / "sweep.json").read_text())["counts"] == {
        "done": 1, "failed": 3, "running": 0, "waiting": 0,
    }  # fmt: skip


def test_a_run_that_dies_after_its_result_counts(tmp_path, stand_in):
    runs, _ = worked(tmp_path, "die late")
    assert (runs[0].state, runs[0].attempts) == ("done", 1)


def test_runs_go_side_by_side_and_share_the_cores(tmp_path, stand_in, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    runs, _ = worked(tmp_path, "meet r1", "meet r0", jobs=2)
    assert [run.state for run in runs] == ["done", "done"], "each waits for the other, so both ran at once"
    assert (tmp_path / "r0" / "tries").read_text() == "3 "


def test_one_job_is_one_at_a_time(tmp_path, stand_in):
    runs, _ = worked(tmp_path, "go", "go")
    assert runs[1].started >= runs[0].started + runs[0].seconds


def test_auto_starts_with_one_run_and_then_fills_the_gpu(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(local, "free_memory_mb", lambda device: 9200.0)
    monkeypatch.setattr(local, "cores", lambda: 16)
    runs = make(tmp_path, *["go"] * 9)
    place = local.Local(None, runs)
    assert place.slots() == 1
    work.work(runs[:1], place, Ledger(tmp_path, runs, str))
    assert place.slots() == 4  # 9,200 MB hold four times 1.25 · 1,000 + 1,024
    place.crowded(runs[1])
    assert place.slots() == 3


def test_auto_without_a_gpu_is_one_at_a_time(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(local, "free_memory_mb", lambda device: None)
    runs = make(tmp_path, "go")
    place = local.Local(None, runs)
    work.work(runs, place, Ledger(tmp_path, runs, str))
    assert place.slots() == 1


def test_ctrl_c_stops_the_children_and_the_same_command_goes_on(tmp_path, stand_in):
    runs = make(tmp_path, "go", "wait", "wait", "go")
    children = []

    class Interrupted(local.Local):
        def start(self, run):
            children.append(super().start(run))
            return children[-1]

        def ended(self, child):
            if all((tmp_path / name / "waits").is_file() for name in ("r1", "r2")):
                raise KeyboardInterrupt
            return super().ended(child)

    with pytest.raises(KeyboardInterrupt):
        work.work(runs, Interrupted(2, runs), Ledger(tmp_path, runs, str))
    assert [child.poll() for child in children] == [0, 130, 130]
    assert [run["state"] for run in json.loads((tmp_path / "sweep.json").read_text())["runs"]] == [
        "done", "waiting", "waiting", "waiting",
    ]  # fmt: skip


@pytest.mark.parametrize("moment", ["before", "in the middle"])
def test_a_full_disk_stops_the_sweep_in_one_line_and_nothing_is_lost(moment, tmp_path, stand_in, monkeypatch):
    runs = make(tmp_path, "wait" if moment == "in the middle" else "go", "go")
    original = ledger.write

    def full(path, text):
        if (tmp_path / "r0" / "waits").is_file() or moment == "before":
            raise OSError(28, "No space left on device", str(path))
        original(path, text)

    if moment == "before":
        monkeypatch.setattr(work.shutil, "disk_usage", lambda path: argparse.Namespace(free=10 * 2**20))
        expected = "10 MB are free, runs need 64"
    else:
        monkeypatch.setattr(ledger, "write", full)
        expected = "No space left on device"
    children = []

    class Watched(local.Local):
        def start(self, run):
            children.append(super().start(run))
            return children[-1]

    with pytest.raises(OSError, match=expected):
        work.work(runs, Watched(2, runs), Ledger(tmp_path, runs, str))
    assert all(child.poll() is not None for child in children)
    monkeypatch.undo()
    monkeypatch.setattr(leash, "command", lambda: [sys.executable, "-S", "-c", STAND_IN])
    again, _ = worked(tmp_path, "go", "go")
    assert [run.state for run in again] == ["done", "done"]


def test_a_child_stops_when_the_other_end_of_its_leash_is_gone(tmp_path):
    """Closing the pipe is what a killed starter looks like to the child; one that does not listen is ended."""
    code = "import signal, sys, time; from vtab import leash; leash.PATIENCE = {}\n"
    code += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a script's & leaves it
    code += "try:\n    leash.obey()\n    time.sleep(60)\n"
    code += "except KeyboardInterrupt:\n    {}"
    for patience, then, status in ((60, "sys.exit(7)", 7), (1, "time.sleep(60)", leash.STOPPED)):
        child = subprocess.Popen(
            [sys.executable, "-c", code.format(patience, then)],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        child.stdin.close()
        assert child.wait(60) == status


def test_a_child_waits_for_the_lock_of_the_one_before_it(tmp_path):
    lock = FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.5, lock.release).start()
    start = time.monotonic()
    leash._wait_for_predecessor(tmp_path / ".lock")
    assert time.monotonic() - start > 0.4
    leash._wait_for_predecessor(tmp_path / "absent" / ".lock")
    assert not (tmp_path / "absent").exists()


def test_two_sweeps_in_one_folder_are_refused(tmp_path, capsys):
    with FileLock(tmp_path / ".sweep.lock"):
        said = refused(capsys, ["--tasks", "digits", *TINY, "--out", str(tmp_path)])
    assert "another sweep works in" in said
    assert {path.name for path in tmp_path.iterdir()} <= {".sweep.lock"}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A finished real sweep of two runs side by side."""
    out = tmp_path_factory.mktemp("sweep")
    argv = ["--tasks", "digits", "--methods", "lora:rank=2,bitfit", "--epochs", "1", *TINY, "--out", str(out)]
    return out, argv, sweep.main([*argv, "--jobs", "2"])


def test_a_real_sweep_leaves_a_result_and_a_log_for_every_run(real):
    out, _, summary = real
    assert summary["counts"] == {"done": 2, "failed": 0, "running": 0, "waiting": 0}
    for row in summary["runs"]:
        result = json.loads((out / row["run"] / "result.json").read_text())
        assert result["accuracy"] == row["accuracy"]
        assert "test top-1" in (out / row["log"]).read_text()


def test_what_is_done_is_skipped(real, monkeypatch, capsys):
    _, argv, summary = real
    monkeypatch.setattr(sweep, "place", None)
    monkeypatch.setattr(setup, "open_task", None)
    assert sweep.main(argv)["counts"] == summary["counts"]
    assert "2 of them done already" in capsys.readouterr().out
    sweep.main([*argv, "--dry-run", "--seeds", "0,1"])
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("# done: python -m vtab.train") for line in said] == [True, True, False, False]


def test_a_sweep_killed_in_the_middle_leaves_nothing_training(tmp_path):
    """kill -9 of the sweep: its child stops after the step at hand, keeps its epochs and frees its folder."""
    argv = ["--tasks", "digits", "--methods", "bitfit", "--epochs", "5000", *TINY, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen([sys.executable, "-m", "vtab.sweep", *argv], env=environment, stdout=subprocess.DEVNULL)
    metrics = wait_for(tmp_path, "*/metrics.jsonl", driver)
    driver.kill()
    driver.wait()
    with FileLock(metrics.parent / ".lock", timeout=leash.PATIENCE / 2):
        assert 0 < len(metrics.read_text().splitlines()) < 5000
    assert (metrics.parent / "checkpoint.safetensors").is_file()
    [log] = (tmp_path / "logs").iterdir()
    assert leash.tail(log)[-1].startswith("stopped; the same command goes on")


def wait_for(folder, pattern, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := list(folder.glob(pattern))) and time.monotonic() < deadline:
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.05)
    assert found, pattern
    return found[0]
