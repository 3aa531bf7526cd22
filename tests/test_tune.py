"""Successive halving on known objectives, and --tune end to end: what survives, what it costs, what it leaves."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vtab import checkpoint, plots, setup, train, tune
from vtab.config import Config, parse
from vtab.data import Data, Split

TINY = ["--task", "digits", "--model", "test_vit", "--weights", "random", "--img-size", "32", "--rank", "2"]
TINY += ["--batch-size", "200", "--epochs", "4", "--test-limit", "40", "--targets", "linear", "--drop-path", "0"]
TUNE = [*TINY, "--lr", "5e-3", "--tune", "--tune-lr", "0.1,0.3,1", "--tune-scale", "1"]


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take longer than the training here, and have tests of their own."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for picture in ("curve", "predictions"):
            monkeypatch.setattr(plots, picture, lambda path, *args: None)
        yield


GRID = [
    (["--lr", "1e-3"], {"lr": [0.0003, 0.001, 0.003], "alpha": [0.8, 8.0, 80.0]}),
    (["--method", "adapter", "--scale", "0.5"], {"lr": [0.0003, 0.001, 0.003], "scale": [0.05, 0.5, 5.0]}),
    (["--method", "bitfit", "--tune-lr", "3,1,1"], {"lr": [0.001, 0.003]}),
    (["--method", "circulant", "--tune-lr", "1"], {"lr": [0.001], "alpha": [3.0, 30.0, 300.0]}),
]


@pytest.mark.parametrize(("argv", "axes"), GRID, ids=lambda value: str(value)[:40])
def test_the_grid_is_all_pairs_of_rate_and_scale(argv, axes):
    points = tune.grid(parse(["--task", "dtd", *argv]))
    assert points == [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


RUNGS = [
    ((9, 100, 0.1), [(20, 3), (50, 2), (100, 1)]),
    ((3, 100, 0.1), [(20, 2), (100, 1)]),
    ((2, 100, 0.1), [(100, 1)]),
    ((15, 100, 0.1), [(20, 5), (50, 3), (100, 1)]),
    ((9, 100, 0.3), [(60, 2), (100, 1)]),  # never judged within the warm-up
    ((9, 100, 1.0), [(100, 1)]),
    ((9, 1, 0.1), [(1, 1)]),
    ((9, 2, 0.1), [(1, 2), (2, 1)]),
]


@pytest.mark.parametrize(("case", "plan"), RUNGS, ids=str)
def test_the_rungs_come_after_the_warm_up_and_end_with_the_run(case, plan):
    assert tune.rungs(*case) == plan


def plays(points, plan, score):
    """The chosen point, which were measured at each rung, and which were dropped."""
    measured, dropped = {}, []

    def measure(point, epochs):
        measured.setdefault(epochs, []).append(point)
        return score(point, epochs)

    return tune.halve(points, plan, measure, dropped.append), measured, dropped


def test_the_best_third_then_the_best_half_go_on():
    points = [{"lr": lr, "alpha": alpha} for lr in (1, 2, 3) for alpha in (10, 20, 30)]
    plan = tune.rungs(9, 100, 0.1)

    def score(point, epochs):
        # alpha 20 is ahead at first; of the three rates with it, the slowest one wins in the end
        return (50 if point["alpha"] == 20 else 10) + (point["lr"] if epochs < 100 else -point["lr"])

    chosen, measured, dropped = plays(points, plan, score)
    assert {epochs: len(who) for epochs, who in measured.items()} == {20: 9, 50: 3, 100: 2}
    assert [p["lr"] for p in measured[50]] == [3, 2, 1]
    assert [p["lr"] for p in measured[100]] == [3, 2]
    assert chosen == {"lr": 2, "alpha": 20}
    assert len(dropped) == 8
    assert chosen not in dropped
    trained = 20 * 9 + 30 * 3 + 50 * 2  # each goes on from where it stands
    assert trained == 370 < 9 * 100


def test_ties_go_to_the_smaller_rate_then_to_the_smaller_scale():
    points = [{"lr": lr, "alpha": alpha} for lr in (3, 1, 2) for alpha in (30, 10, 20)]
    chosen, measured, _ = plays(points, tune.rungs(9, 100, 0.1), lambda point, epochs: 50.0)
    assert measured[50] == [{"lr": 1, "alpha": 10}, {"lr": 1, "alpha": 20}, {"lr": 1, "alpha": 30}]
    assert chosen == {"lr": 1, "alpha": 10}


def test_a_trial_that_diverges_is_out_and_the_others_go_on():
    points = [{"lr": lr} for lr in (1, 2, 3, 4, 5, 6)]
    plan = tune.rungs(6, 100, 0.1)
    chosen, measured, dropped = plays(points, plan, lambda p, e: None if p["lr"] > 1 else 10.0)
    assert chosen == {"lr": 1}
    assert len(dropped) == 5
    assert measured[100] == [{"lr": 1}]
    with pytest.raises(ValueError, match="the loss of all 6 trials of --tune became infinite; lower --lr"):
        plays(points, plan, lambda p, e: None)


def fake(log, score, fail=None):
    """An `attempt` that trains nothing: it remembers who was asked for how many epochs."""

    def attempt(config, place, epochs):
        if fail and fail(len(log)):
            raise KeyboardInterrupt
        log.append((config.lr, config.method.alpha, epochs))
        found = score(config)
        if found is None:
            raise checkpoint.DivergedError("not finite")
        place.mkdir(parents=True, exist_ok=True)
        (place / "checkpoint.safetensors").write_text("weights")
        return [{"val_accuracy": found, "seconds": 1.5}] * epochs

    return attempt


def test_a_search_killed_anywhere_goes_on_and_does_nothing_twice(tmp_path):
    config = Config(task="digits", tune=True, seed=4)

    def score(trial):
        assert (trial.stage, trial.tune, trial.protocol, trial.seed) == ("tune", False, "honest", 4)
        return None if trial.lr == 0.003 and trial.method.alpha == 80 else 40 + 1e3 * trial.lr + trial.method.alpha / 8

    whole, cut = [], []
    expected = tune.search(config, tmp_path / "whole", fake(whole, score))
    assert len(whole) == 9 + 3 + 2
    for stop in range(1, len(whole)):
        with pytest.raises(KeyboardInterrupt):
            tune.search(config, tmp_path / "cut", fake(cut, score, lambda done, stop=stop: done == stop))
    found = tune.search(config, tmp_path / "cut", fake(cut, score))
    assert cut == whole
    assert found == expected
    assert found["chosen"] == {"lr": 0.001, "alpha": 80.0}
    written = json.loads((tmp_path / "cut" / "tuning.json").read_text())
    assert written["epochs_trained"] == 20 * 8 + 30 * 3 + 50 * 2 < written["epochs_of_the_whole_grid"] == 900
    diverged = [trial for trial in written["trials"] if trial["diverged"]]
    assert [trial["settings"] for trial in diverged] == [{"lr": 0.003, "alpha": 80.0}]
    assert not list(tmp_path.rglob("checkpoint.safetensors")), "weights of trials are of no more use"
    assert tune.search(config, tmp_path / "cut", fake(cut, score)) == written
    assert cut == whole


def test_the_final_run_takes_what_was_chosen_and_no_more():
    config = Config(task="digits", tune=True, epochs=7)
    made = tune.chosen(config, {"chosen": {"lr": 0.003, "alpha": 0.8}})
    assert (made.lr, made.method.alpha, made.method.rank, made.epochs, made.tune) == (0.003, 0.8, 8, 7, True)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A real search with a guard on the test split, then the final run."""
    out, looks, monkeypatch = tmp_path_factory.mktemp("tuned"), [], pytest.MonkeyPatch()
    original = setup.open_task

    def open_watched(*args, **kwargs):
        data = original(*args, **kwargs)
        test = data.splits["test"]

        def read(index):
            looks.append(not (out / "a" / "tuning.json").is_file() or chosen(out) is None)
            return test.read(index)

        splits = {**data.splits, "test": Split(test.labels, read, test.names)}
        return Data(data.task, data.classes, splits, data.source, data.facts)

    monkeypatch.setattr(setup, "open_task", open_watched)
    result = train.main([*TUNE, "--out", str(out), "--name", "a"])
    monkeypatch.undo()
    return out / "a", result, looks


def chosen(out):
    return json.loads((out / "a" / "tuning.json").read_text())["chosen"]


def test_tuning_looks_at_the_test_split_once_at_the_very_end(tuned):
    _, result, looks = tuned
    assert result["selection"]["looks_at_test"] == 1
    assert len(looks) >= 40
    assert not any(looks), "the test split was read before the search had chosen"
    assert result["selection"]["settings"].startswith("val200: successive halving by val200 accuracy; ties go to")


def test_every_trial_is_recorded_in_the_run(tuned):
    folder, result, _ = tuned
    written = json.loads((folder / "tuning.json").read_text())
    assert result["tuning"]["trials"] == written["trials"]
    assert [trial["settings"] for trial in written["trials"]] == [
        {"lr": lr, "alpha": 8.0} for lr in (0.0005, 0.0015, 0.005)
    ]
    for trial in written["trials"]:
        place = folder / "trials" / f"lr{trial['settings']['lr']:g}-alpha{trial['settings']['alpha']:g}"
        rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == trial["epochs"]
        assert rows[-1]["val_accuracy"] == trial["val_accuracy"]
        assert trial["seconds"] > 0
        assert json.loads((place / "config.json").read_text())["stage"] == "tune"
        assert not (place / "checkpoint.safetensors").exists()
    finals = [t for t in written["trials"] if t["epochs"] == 4]
    best = max(finals, key=lambda t: (t["val_accuracy"], -t["settings"]["lr"], -t["settings"]["alpha"]))
    assert written["chosen"] == best["settings"]
    assert len({t["val_accuracy"] for t in written["trials"]}) > 1, "a grid of equals would prove nothing"
    assert (result["config"]["lr"], result["config"]["method"]["alpha"]) == tuple(written["chosen"].values())
    assert json.loads((folder / "config.json").read_text())["lr"] == 0.005  # as asked: the same command goes on
    assert result["split"] == "test"
    assert result["method"] == "lora r2 targets=linear"


def test_the_final_run_is_the_one_that_the_settings_alone_give(tuned, tmp_path):
    _, result, _ = tuned
    picked = result["tuning"]["chosen"]
    argv = [*TINY, "--lr", str(picked["lr"]), "--alpha", str(picked["alpha"]), "--out", str(tmp_path), "--name", "a"]
    assert train.main(argv)["accuracy"] == result["accuracy"]


def test_a_trial_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    config = parse([word for word in TINY if word not in ("--test-limit", "40")] + ["--stage", "tune", "--lr", "5e-3"])
    in_one = train.attempt(config, tmp_path / "one", 4)
    train.attempt(config, tmp_path / "two", 1)
    in_two = train.attempt(config, tmp_path / "two", 4)
    assert [row["loss"] for row in in_two] == [row["loss"] for row in in_one]
    assert in_two[3]["val_accuracy"] == in_one[3]["val_accuracy"]
    assert [set(row) & {"val_accuracy"} for row in in_two] == [{"val_accuracy"}, set(), set(), {"val_accuracy"}]


def test_a_tuned_run_killed_with_sigkill_ends_as_if_it_never_stopped(tuned, tmp_path):
    _, result, _ = tuned
    command = [sys.executable, "-m", "vtab.train", *TUNE, "--out", str(tmp_path), "--name", "a"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    file, deadline = tmp_path / "a" / "tuning.json", time.monotonic() + 120
    while not file.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(file.read_text())["chosen"] is None, "not killed in the middle, so this test would prove nothing"
    began = {trial["settings"]["lr"]: trial["looks"] for trial in json.loads(file.read_text())["trials"]}
    again = train.main([*TUNE, "--out", str(tmp_path), "--name", "a"])
    assert began
    assert again["accuracy"] == result["accuracy"]
    assert again["tuning"]["chosen"] == result["tuning"]["chosen"]
    looks = [[trial["looks"] for trial in r["tuning"]["trials"]] for r in (again, result)]
    assert looks[0] == looks[1]


def test_seeds_are_tuned_once_and_say_so(tmp_path, capsys):
    argv = [*TUNE, "--tune-lr", "0.1,1", "--epochs", "1", "--seeds", "5,6", "--out", str(tmp_path), "--name", "a"]
    summary = train.main(argv)
    first, second = (json.loads((tmp_path / f"a-s{s}" / "result.json").read_text()) for s in (5, 6))
    assert first["tuning"]["seed"] == second["tuning"]["seed"] == 5
    assert first["tuning"]["trials"] == second["tuning"]["trials"]
    assert first["config"]["tune_seed"] == second["config"]["tune_seed"] == 5
    assert not (tmp_path / "a-s6" / "trials").exists()
    assert (tmp_path / "a-s6" / "tuning.json").is_file()
    assert summary["seeds"] == [5, 6]
    said = capsys.readouterr().out
    assert "tuned once, with seed 5" in said
    assert said.count("trial lr") == 2
