"""The sweep on Ray and through submitit; what needs either is skipped where it is absent."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import capavision as cv
from vtab import leash, on_ray, sweep, work
from vtab.leash import Task
from vtab.ledger import Ledger, Run

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", "test_vit", "--weights", "random", "--img-size", "32"]
TINY += ["--batch-size", "125", "--test-limit", "100", "--drop-path", "0"]
STAND_IN = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--out") + 1]) / "mine"
(folder / "sub").mkdir(parents=True)
(folder / "result.json").write_text('{"accuracy": 50.0}')
(folder / "sub" / "data").write_bytes(bytes(1000))
(folder / ".lock").touch()
print("trained in", folder)
"""


# What a worker without our disk does, without Ray


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(leash, "command", lambda: [sys.executable, "-S", "-c", STAND_IN])


def test_without_a_shared_disk_the_run_folder_comes_back_as_bytes(tmp_path, stand_in):
    there, here = tmp_path / "there", tmp_path / "here"
    returned = on_ray.train_there(Task((), there / "log"), there / "mine", there / "no mark", cv.__version__)
    assert (returned.status, set(returned.files)) == (0, {"result.json", "sub/data"})
    assert b"trained in" in returned.log
    assert not there.exists(), "the worker wrote where the driver's folder would be"
    on_ray.unpack(returned.files, here)
    assert json.loads((here / "result.json").read_text()) == {"accuracy": 50.0}
    assert (here / "sub" / "data").read_bytes() == bytes(1000)


def test_with_a_shared_disk_nothing_is_sent(tmp_path, stand_in):
    (tmp_path / "mark").touch()
    task = Task(("--out", str(tmp_path)), tmp_path / "log")
    returned = on_ray.train_there(task, tmp_path / "mine", tmp_path / "mark", cv.__version__)
    assert (returned.status, returned.files) == (0, {})
    assert (tmp_path / "mine" / "result.json").is_file()


@pytest.mark.parametrize("name", ["../stolen", "/stolen", "sub/../../stolen"])
def test_a_name_that_leads_out_of_the_run_folder_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="leads out of"):
        on_ray.unpack({"a": b"", name: b"x"}, tmp_path / "run")
    assert not list(tmp_path.rglob("*"))


def test_a_run_folder_too_large_to_send_says_so(tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(on_ray, "LARGEST_MB", 0.0001)
    with pytest.raises(ValueError, match="give --out on a shared file system"):
        on_ray.train_there(Task((), tmp_path / "log"), tmp_path / "mine", tmp_path / "no mark", cv.__version__)


def test_another_version_on_a_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has capavision .*, the sweep 0\.0; install the same"):
        on_ray.train_there(Task((), tmp_path / "log"), tmp_path / "mine", tmp_path / "no mark", "0.0")


# Ray itself


@pytest.fixture(scope="module")
def cluster():
    """Two machines with one core each, as two raylets on this one's loopback address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # 127.0.0.1, not the machine's outer address
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'capavision[ray]'")
        from ray.cluster_utils import Cluster

        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.second = made.add_node(**node)
        yield made
        made.shutdown()


def children(out):
    """(process, its parent, the parent's parent) of each run that trains below `out`."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (entry / "cmdline").read_text().split("\0")
            if "vtab.leash" in words and words[words.index("--out") + 1] == str(out):
                yield int(entry.name), parent(int(entry.name)), parent(parent(int(entry.name))), words


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def until(find, seconds=200):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := find():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain")


def key(words):
    return words[words.index("--method") + 1], words[words.index("--seed") + 1]


def test_a_sweep_survives_a_killed_worker_and_a_lost_machine(cluster, tmp_path, capsys):
    raylet = cluster.second.all_processes["raylet"][0].process.pid
    hit = []

    def strike():
        until(lambda: list(tmp_path.glob("*/metrics.jsonl")))  # one has finished an epoch
        victim, worker, _, words = until(lambda: next(children(tmp_path), None))
        os.kill(worker, signal.SIGKILL)
        hit.append(key(words))
        until(lambda: not Path(f"/proc/{victim}").exists(), 2 * leash.PATIENCE)  # its leash was cut
        there = lambda: next((c for c in children(tmp_path) if c[2] == raylet and key(c[3]) not in hit), None)  # noqa: E731
        hit.append(key(until(there)[3]))
        cluster.remove_node(cluster.second, allow_graceful=False)
        hit.append("machine lost")

    thread = threading.Thread(target=strike)
    thread.start()
    argv = ["--tasks", "digits", "--methods", "lora:rank=2,bitfit", "--seeds", "0,1", "--epochs", "15", *TINY]
    argv += ["--out", str(tmp_path), "--ray", cluster.address]
    summary = sweep.main(argv)
    thread.join()
    said = capsys.readouterr().out
    assert len(hit) == 3, "nothing was struck, so this test would prove nothing"
    assert summary["counts"]["done"] == 4, said
    assert sum(row["attempts"] for row in summary["runs"]) == 6, said
    assert said.count("it gets one more try") == 2
    for row in summary["runs"]:
        assert len((tmp_path / row["run"] / "metrics.jsonl").read_text().splitlines()) == 15
    assert not list(tmp_path.glob(".sweep-*"))
    assert not list(children(tmp_path))


def test_a_worker_that_shares_no_disk_sends_its_run(cluster, tmp_path):
    argv = ("--task", "digits", *TINY, "--epochs", "1", "--out", str(tmp_path / "runs"))
    from vtab.config import parse

    run = Run("digits", argv, parse(list(argv)).folder())
    place = on_ray.OnRay(cluster.address, None, 1.0, tmp_path)
    place.mark.unlink()
    work.work([run], place, Ledger(tmp_path, [run], str))
    assert run.state == "done", (run.reason, run.last_lines)
    assert {"config.json", "result.json", "adapter.safetensors"} <= {path.name for path in run.folder.iterdir()}
    assert "test top-1" in run.log.read_text()


def test_no_cluster_and_no_room_are_one_line(cluster, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no machine of the cluster has 1 CPUs and 0.25 GPUs for a run"):
        on_ray.OnRay(cluster.address, 0.25, 1.0, tmp_path)
    with pytest.raises(ValueError, match="ray start --head begins one"):
        on_ray.OnRay("127.0.0.1:1", None, 1.0, tmp_path)


# Slurm, which submitit plays on this machine


def test_a_sweep_goes_through_submitit(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'capavision[slurm]'")
    argv = ["--tasks", "digits", "--methods", "bitfit", "--epochs", "1", *TINY, "--out", str(tmp_path)]
    summary = sweep.main([*argv, "--slurm", "cluster=local,timeout_min=5"])
    assert summary["counts"]["done"] == 1
    assert "test top-1" in (tmp_path / summary["runs"][0]["log"]).read_text()


def test_a_setting_that_submitit_does_not_know_is_one_line(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'capavision[slurm]'")
    from vtab.on_slurm import OnSlurm

    with pytest.raises(ValueError, match="--slurm: .*gpuz"):
        OnSlurm({"cluster": "local", "gpuz": 1}, tmp_path, 1)
    with pytest.raises(ValueError, match="--slurm: "):
        OnSlurm({}, tmp_path, 1)
