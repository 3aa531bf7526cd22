import base64
import csv
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from vtab import charts, cli, mistakes, plots, report, tables, terminal
from vtab.averages import VTAB, averages
from vtab.evaluate import Accuracy
from vtab.gather import read_all
from vtab.published import choose, published
from vtab.rows import arrange
from vtab.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 1000
PNG = base64.b64decode(  # 1 × 1, black
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)


def fake(root, task, correct, seed=0, name=None, config=(), data=(), **result):
    """A finished run's folder: `correct` of 1,000 test images right."""
    folder = root / (name or f"{task}-{seed}-{len(list(root.glob('*')))}")
    folder.mkdir(parents=True)
    method = {"name": "lora", "rank": 8, "alpha": 8.0, "branches": 1, "density": 1.0, "masks": "random"}
    settings = {"task": task, "model": "vit.a", "weights": "pretrained", "seed": seed, "lr": 1e-3, "method": method}
    settings |= dict(config)
    kind = TASKS[task].group if task in TASKS else "extra"
    data = {"source": "here", "variant": "files" if kind == "extra" else "jpeg", "generated": False, **dict(data)}
    record = {
        "task": task, "split": "test", "stage": "final", "protocol": "honest", "seed": seed, "method": "lora r8",
        "accuracy": 100 * correct / IMAGES, "examples": IMAGES, "examples_in_full_split": IMAGES,
        "trained_parameters": 147_456, "seconds_training": 9.0, "seconds_evaluation": 1.0, "normalization": "model",
        "base": {"model": "vit.a", "weights": "pretrained", "digest": "d1" * 32, "img_size": 224},
        "selection": {"settings": "the command line", "epoch": "the last", "looks_at_test": 1},
        "environment": {"commit": "c0ffee", "torch": "2.15", "gpu": None, "device": "cpu", "peak_memory_mb": 700},
        "data": data, "config": settings, **result,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "result.json").write_text(json.dumps(record))
    rows = [{"epoch": e + 1, "loss": 1.0, "accuracy": 40.0 + 10 * e, "lr": 0.1, "seconds": 1.0} for e in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "predictions.png").write_bytes(PNG)
    labels = np.arange(IMAGES) % 4
    predicted = np.where(np.arange(IMAGES) < correct, labels, (labels + 1) % 4)
    np.savez(folder / "predictions.npz", labels=labels.astype(np.uint16), predicted=predicted.astype(np.uint16))
    return folder


def rows_of(*roots):
    runs, problems = read_all(roots)
    rows, doubled = arrange(runs)
    return rows, [*problems, *doubled]


def refused(capsys, argv):
    """The one line that a stranger sees, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: report.main([str(word) for word in argv]))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def slow_averages(values):
    """Both averages by counting, or None where a task is missing."""
    if set(values) != set(VTAB):
        return None
    sums, counts = {}, {}
    for task, value in values.items():
        group = TASKS[task].group
        sums[group], counts[group] = sums.get(group, 0) + value, counts.get(group, 0) + 1
    assert counts == {"natural": 7, "specialized": 4, "structured": 8}
    return sum(sums[g] / counts[g] for g in sums) / 3, sum(sums.values()) / 19


class Page(html.parser.HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


# ------------------------------------------------------------------------------------------------ published rows


def test_published_averages_are_the_tasks_own():
    headline = {  # group mean, mean of 19, to two decimals
        "LoRA-8 (NOAH)": (74.60, 72.25), "PACE": (79.01, 76.93), "Full fine-tuning": (68.97, 65.57),
        "Convpass": (76.56, 74.45), "LoRA (OSU)": (75.24, 72.91), "Houlsby adapter (OSU)": (76.27, 74.03),
    }  # fmt: skip
    for row in published():
        groups, everything = slow_averages(row.accuracies)
        assert row.averages["groups"].value == pytest.approx(groups)
        assert row.averages["all"].value == pytest.approx(everything)
        assert (row.averages["groups"].count, row.averages["all"].caveat) == (19, "")
        if row.method in headline:
            expected = headline.pop(row.method)
            assert (round(groups, 2), round(everything, 2)) == pytest.approx(expected, abs=0.0101)
    assert not headline


def test_every_published_row_says_where_it_is_from_and_on_what():
    rows = published()
    assert len(rows) == len({row.method for row in rows}) == 31 + 16
    for row in rows:
        assert row.source, row.method
        assert row.data in ("jpeg", "lossless", "unstated")
        assert row.weights in ("orig", "AugReg", "unstated")
        assert all(0 < value <= 100 for value in row.accuracies.values())
    assert [row.method for row in rows if row.weights == "AugReg"] == ["SSF", "GPS", "RLRR"]
    lossless = {row.method for row in rows if row.data == "lossless"}
    assert lossless == {"Full fine-tuning", "Linear", "BitFit", "VPT-Shallow", "VPT-Deep"}
    assert "AugReg weights" in choose("SSF")[0].remark
    assert "lossless images" in choose("VPT-Deep")[0].remark


def test_published_rows_are_chosen_by_name():
    assert len(choose("all")) == 47
    assert choose("none") == []
    with pytest.raises(ValueError, match=r"--beside: no published row 'PACEE'; did you mean 'PACE'"):
        choose("Linear, PACEE")


# ------------------------------------------------------------------------------------------------ figures


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two methods on all 19 tasks, two seeds, and one extra task."""
    root, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    values = {}
    for method, count in (("lora r8", 147_456), ("circulant", 9_216)):
        for task in [*VTAB, "digits"]:
            for seed in (0, 1):
                correct = int(rng.integers(300, 990))
                values[method, task, seed] = correct / 10
                fake(root, task, correct, seed, method=method, trained_parameters=count)
    return root, values


def test_a_cell_is_mean_and_spread_over_seeds_with_the_interval_of_its_images(whole):
    root, values = whole
    rows, problems = rows_of(root)
    assert problems == []
    assert [row.label for row in rows] == ["circulant", "lora r8"]
    for row in rows:
        for task, cell in row.cells.items():
            one, two = (values[row.method, task, seed] for seed in (0, 1))
            assert cell.mean == pytest.approx((one + two) / 2)
            assert cell.std == pytest.approx(abs(one - two) / 2**0.5)  # n - 1
            expected = Accuracy(round((one + two) * 5), IMAGES).interval
            assert cell.interval == pytest.approx(expected, abs=0.11)  # an image more or less, where it is a half


def test_both_averages_against_a_slow_loop(whole):
    root, values = whole
    for row in rows_of(root)[0]:
        by_seed = [slow_averages({task: values[row.method, task, seed] for task in VTAB}) for seed in (0, 1)]
        for place, name in enumerate(("groups", "all")):
            average = row.averages()[name]
            assert average.value == pytest.approx((by_seed[0][place] + by_seed[1][place]) / 2)
            assert average.std == pytest.approx(abs(by_seed[0][place] - by_seed[1][place]) / 2**0.5)
            assert (average.count, average.of, average.caveat) == (19, 19, "")
    assert abs(rows_of(root)[0][0].averages()["groups"].value - rows_of(root)[0][0].averages()["all"].value) > 1e-3


def test_an_average_of_some_tasks_is_called_partial(tmp_path):
    for task in VTAB[:-1]:
        fake(tmp_path, task, 500)
    found = rows_of(tmp_path)[0][0].averages()
    assert found["all"].caveat == found["groups"].caveat == "partial, 18 of 19"
    assert found["structured"].caveat == "partial, 7 of 8"
    assert found["natural"].caveat == ""
    assert averages({})["all"].value is None


def test_seeds_that_differ_between_tasks_give_no_spread_of_the_average(tmp_path):
    fake(tmp_path, "dtd", 500, 0)
    fake(tmp_path, "dtd", 510, 1)
    fake(tmp_path, "kitti", 500, 0)
    (row,) = rows_of(tmp_path)[0]
    assert row.cells["dtd"].std == pytest.approx(0.5**0.5)
    assert row.averages()["all"].std is None
    assert row.seeds() == (1, 2)


def test_confusions_against_a_slow_loop(tmp_path):
    folder = fake(tmp_path, "kitti", 0, accuracy=40.0, examples=5)
    labels, predicted = [0, 0, 1, 3, 3], [0, 1, 1, 0, 2]
    np.savez(folder / "predictions.npz", labels=np.uint16(labels), predicted=np.uint16(predicted))
    shares = charts.confusions(read_all([tmp_path])[0][0])
    assert shares.shape == (4, 4)
    for true in range(4):
        for guess in range(4):
            of_true = [g for t, g in zip(labels, predicted, strict=True) if t == true]
            assert shares[true, guess] == (100 * of_true.count(guess) / len(of_true) if of_true else 0)


# ------------------------------------------------------------------------------------------------ what never mixes

BASE = {"model": "vit.a", "weights": "pretrained", "digest": "d1" * 32, "img_size": 224}
APART = {
    "protocol": ({"protocol": "paper"}, "paper protocol (best of test)"),
    "stage": ({"stage": "tune", "split": "val"}, "judged on val200"),
    "images": ({"data": {"variant": "lossless"}}, "lossless images"),
    "checkpoint": ({"base": BASE | {"model": "vit.b"}}, "vit.b"),
    "digest": ({"base": BASE | {"digest": "e2" * 32}}, "digest e2e2e2e2e2e2"),
    "size": ({"base": BASE | {"img_size": 384}}, "384 px"),
    "normalisation": ({"normalization": "imagenet"}, "normalisation imagenet"),
    "test limit": ({"config": {"test_limit": 1000}, "examples_in_full_split": 10_000}, "first 1,000 test images"),
    "partial": ({"data": {"splits": {"trainval": 900}}}, "partial lists"),
    "recipe": ({"recipe": "noah"}, "recipe noah"),
    "tuned": ({"tuning": {"rule": "halving", "trials": [], "chosen": {"lr": 0.1}}}, "tuned on val200"),
    "settings": ({"config": {"epochs": 7}}, "epochs 7"),
}


@pytest.mark.parametrize("case", APART)
def test_what_does_not_compare_is_a_row_of_its_own_that_says_so(case, tmp_path):
    other, said = APART[case]
    fake(tmp_path, "cifar", 600, 0)
    fake(tmp_path, "cifar", 700, 1)
    fake(tmp_path, "cifar", 900, 2, **other)
    rows, problems = rows_of(tmp_path)
    assert problems == []
    assert sorted(row.cells["cifar"].mean for row in rows) == [65.0, 90.0]
    (apart,) = (row for row in rows if row.cells["cifar"].mean == 90)
    assert said in apart.label
    assert said not in next(row for row in rows if row is not apart).label


def test_jpeg_and_lossless_never_meet_in_one_average(tmp_path):
    fake(tmp_path, "cifar", 600, data={"variant": "lossless"})
    fake(tmp_path, "dtd", 700)
    rows, _ = rows_of(tmp_path)
    assert sorted((row.label, *row.cells) for row in rows) == [
        ("lora r8, jpeg images", "dtd"), ("lora r8, lossless images", "cifar"),
    ]  # fmt: skip


def test_seeds_of_one_setting_are_one_row_also_across_records_of_another_age(tmp_path):
    fake(tmp_path, "cifar", 600, 0, config={"out": "a", "device": "cpu"})
    folder = fake(tmp_path, "cifar", 700, 1, config={"epochs": 100, "out": "b"})  # today's default, written out
    (row,) = rows_of(tmp_path)[0]
    assert row.seeds() == (2, 2)
    old = json.loads((folder / "result.json").read_text())
    for new in ("stage", "protocol", "seed", "method", "normalization", "selection", "environment"):
        del old[new]
    (folder / "result.json").write_text(json.dumps(old))
    (row,) = rows_of(tmp_path)[0]
    assert (row.label, row.seeds()) == ("lora r8", (2, 2))


def test_seeds_that_were_tuned_apart_are_one_row_whatever_each_chose(tmp_path):
    method = {"name": "lora", "rank": 8, "branches": 1, "density": 1.0, "masks": "random"}

    def tuned(seed, task, lr, alpha, tried=(1e-3, 3e-3)):
        trials = [{"settings": {"lr": lr, "alpha": alpha}} for lr in tried for alpha in (0.8, 8.0)]
        config = {"tune": True, "lr": lr, "method": method | {"alpha": alpha}}
        tuning = {"trials": trials, "chosen": {"lr": lr, "alpha": alpha}}
        fake(tmp_path, task, 600 + seed, seed, config=config, tuning=tuning)

    for seed, lr, alpha in ((0, 1e-3, 8.0), (1, 3e-3, 0.8)):
        tuned(seed, "cifar", lr, alpha)
    tuned(0, "dtd", 3e-3, 8.0)
    (row,) = rows_of(tmp_path)[0]
    assert (row.label, len(row.cells["cifar"].runs), len(row.cells["dtd"].runs)) == ("lora r8", 2, 1)
    tuned(0, "cifar", 1e-3, 8.0, tried=(1e-4, 1e-3))  # another grid is another setting
    assert len(rows_of(tmp_path)[0]) == 2


def test_random_bases_are_one_row_although_each_seed_draws_its_own(tmp_path):
    for seed in (0, 1):
        base = BASE | {"weights": "random", "digest": f"{seed}" * 64}
        fake(tmp_path, "cifar", 600, seed, base=base)
    assert len(rows_of(tmp_path)[0]) == 1


def test_the_same_run_given_twice_counts_once(tmp_path):
    folder = fake(tmp_path, "cifar", 600, name="one")
    shutil.copytree(folder, tmp_path / "two")
    rows, problems = rows_of(tmp_path, tmp_path / "one")
    assert rows[0].seeds() == (1, 1)
    assert [problem.folder.name for problem in problems] == ["two"]
    assert "the same run as" in problems[0].text


def test_only_honest_rows_can_be_best_and_only_over_the_same_images(tmp_path):
    fake(tmp_path, "cifar", 900, protocol="paper")
    fake(tmp_path, "cifar", 600)
    fake(tmp_path, "cifar", 700, method="circulant")
    fake(tmp_path, "dtd", 600)
    limited = {"config": {"test_limit": 500}, "examples": 500, "accuracy": 70.0}
    fake(tmp_path, "dtd", 0, method="circulant", **limited)
    table = {line.label: line for line in tables.lines(rows_of(tmp_path)[0], [])}
    best = [(label, name) for label, line in table.items() for name, figure in line.figures.items() if figure.best]
    assert best == [("circulant", "cifar")]
    fake(tmp_path, "cifar", 800, 1, method="circulant")
    assert not any(f.best for line in tables.lines(rows_of(tmp_path)[0], []) for f in line.figures.values())


# ------------------------------------------------------------------------------------------------ bad folders


def broken_result(change):
    def damage(folder):
        record = json.loads((folder / "result.json").read_text())
        change(record)
        (folder / "result.json").write_text(json.dumps(record))

    return damage


DAMAGE = {
    "cut": (lambda f: (f / "result.json").write_text('{"task": "cif'), "result.json is damaged"),
    "empty": (lambda f: (f / "result.json").write_bytes(b""), "result.json is damaged"),
    "binary": (lambda f: (f / "result.json").write_bytes(b"\xff\xfe\x00"), "result.json is no text file"),
    "nested": (lambda f: (f / "result.json").write_text("[" * 200_000), "result.json is damaged"),
    "endless": (lambda f: (f / "result.json").write_text(" " * (64 << 20) + "{}"), "which makes no sense"),
    "a list": (lambda f: (f / "result.json").write_text("[1]"), "no record of a run"),
    "a folder": (lambda f: ((f / "result.json").unlink(), (f / "result.json").mkdir()), "unfinished, 3 epochs done"),
    "no accuracy": (broken_result(lambda r: r.pop("accuracy")), "no valid 'accuracy': None"),
    "text": (broken_result(lambda r: r.update(accuracy="90")), "no valid 'accuracy': '90'"),
    "nan": (broken_result(lambda r: r.update(accuracy=float("nan"))), "accuracy nan %"),
    "too good": (broken_result(lambda r: r.update(accuracy=101.0)), "accuracy 101.0 %"),
    "no whole number": (broken_result(lambda r: r.update(accuracy=50.05)), "no whole number of images"),
    "both words": (broken_result(lambda r: r.update(images=1000, examples="9")), "no valid 'examples': '9'"),
    "no images": (broken_result(lambda r: r.update(examples=0)), "over 0 images"),
    "no method": (broken_result(lambda r: r["config"].pop("method")), "no valid 'config.method': None"),
    "endless number": (broken_result(lambda r: r.update(examples=10**40)), "a number of 41 digits"),
    "full split": (
        broken_result(lambda r: r.update(examples_in_full_split=[1])),
        "no valid 'examples_in_full_split': [1]",
    ),
    "source": (broken_result(lambda r: r["data"].update(source=7)), "no valid 'data.source': 7"),
    "splits": (broken_result(lambda r: r["data"].update(splits=["train"])), "no valid 'data.splits'"),
    "differs": (broken_result(lambda r: r.update(recipe_differs=1)), "no valid 'recipe_differs': 1"),
    "chosen": (broken_result(lambda r: r.update(tuning={"chosen": "x"})), "no valid 'tuning.chosen': 'x'"),
    "trials": (broken_result(lambda r: r.update(tuning={"trials": [{}]})), "trials of --tune without settings"),
    "negative": (broken_result(lambda r: r.update(trained_parameters=-5)), "has -5 trained parameters"),
    "half a character": (broken_result(lambda r: r.update(method="lora \ud800")), "half a surrogate pair"),
    "steering": (broken_result(lambda r: r.update(method="lora \x1b[2J")), "holds control characters"),
    "unfinished": (lambda f: (f / "result.json").unlink(), "unfinished, 3 epochs done"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_named_and_the_others_count(case, tmp_path):
    damage, said = DAMAGE[case]
    fake(tmp_path, "cifar", 600, 0)
    damage(fake(tmp_path, "cifar", 700, 1, name="bad one"))
    rows, problems = rows_of(tmp_path)
    assert [row.seeds() for row in rows] == [(1, 1)]
    assert [(problem.folder.name, said in problem.text) for problem in problems] == [("bad one", True)]


def test_what_is_not_counted_is_named_in_the_terminal_and_on_the_page(tmp_path, capsys):
    fake(tmp_path, "cifar", 600, 0)
    (fake(tmp_path, "cifar", 700, 1, name="bad one") / "result.json").write_text("{")
    cli.run(lambda: report.main([str(tmp_path), "--beside", "none"]))  # no SystemExit
    assert "bad one: result.json is damaged" in " ".join(capsys.readouterr().out.split())
    assert "bad one" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\udcffb", "a\u202eb"])
def test_a_folders_name_neither_steers_the_terminal_nor_ends_the_report(name, tmp_path, capsys):
    fake(tmp_path, "cifar", 600, 0)
    (fake(tmp_path, "cifar", 700, 1, name="bad one") / "result.json").write_text("{")
    (tmp_path / "bad one").rename(tmp_path / name)
    fake(tmp_path, "films", 700, method="of right \u202e to left")
    cli.run(lambda: report.main([str(tmp_path), "--beside", "none"]))  # no SystemExit
    out, page = capsys.readouterr().out, (tmp_path / "report" / "report.html").read_text()
    assert all(letter == "\n" or letter.isprintable() for letter in out)
    assert repr(name)[1:-1] in "".join(out.split())
    assert repr(name)[1:-1] in page


def test_folders_of_a_records_name_are_none(tmp_path):
    fake(tmp_path, "cifar", 600)
    (tmp_path / "other" / "config.json").mkdir(parents=True)
    (tmp_path / "third" / "result.json").mkdir(parents=True)
    rows, problems = rows_of(tmp_path)
    assert len(rows) == 1
    assert not problems


def test_a_method_without_a_name_is_a_line_too(tmp_path, capsys):
    fake_texts(tmp_path, "films", 700, method=" ")
    assert "70.0" in reported(tmp_path, capsys)["terminal"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["result.json", "config.json", "metrics.jsonl", "predictions.npz", "predictions.csv"])
def test_a_pipe_in_the_place_of_a_file_does_not_keep_the_report_waiting(name, tmp_path):
    fake(tmp_path, "cifar", 600)
    folder = fake(tmp_path, "cifar", 700, seed=1)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    reading = threading.Thread(target=report.main, args=([str(tmp_path)],), daemon=True)
    reading.start()
    reading.join(60)
    assert not reading.is_alive()


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def other_predictions(folder):
    np.savez(folder / "predictions.npz", labels=np.zeros(IMAGES, np.uint16), predicted=np.zeros(IMAGES, np.uint16))


def predictions_of(folder, classes):
    np.savez_compressed(folder / "predictions.npz", labels=classes, predicted=classes)


def pickled_predictions(folder):
    np.savez(folder / "predictions.npz", labels=np.array([{}]), predicted=np.array([{}]))


LESS = {
    "metrics": (cut("metrics.jsonl", 100), "no learning curve"),
    "metrics of other things": (lambda f: (f / "metrics.jsonl").write_text("[1]\n"), "no learning curve"),
    "nested metrics": (lambda f: (f / "metrics.jsonl").write_text("[" * 200_000), "no learning curve"),
    "endless epoch": (lambda f: (f / "metrics.jsonl").write_text('{"epoch": 1000000, "accuracy": 1}'), "out of range"),
    "no percent": (lambda f: (f / "metrics.jsonl").write_text('{"epoch": 1, "accuracy": NaN}'), "out of range"),
    "many classes": (lambda f: predictions_of(f, np.arange(IMAGES) * 64), "classes are 0 … 4999 at most"),
    "many names": (broken_result(lambda r: r.update(text={"labels": ["a"] * 100_000})), "classes are 0 … 4999 at most"),
    "bomb": (lambda f: predictions_of(f, np.zeros(1 << 25)), "it unpacks to 536,871,"),
    "predictions": (cut("predictions.npz", 90), "no confusion matrix"),
    "predictions of another run": (other_predictions, "it holds 100.0 %"),
    "pickled predictions": (pickled_predictions, "no confusion matrix"),
    "predictions without labels": (lambda f: np.savez(f / "predictions.npz", a=1), "no confusion matrix"),
}


@pytest.mark.parametrize("case", LESS)
def test_a_run_with_a_damaged_extra_counts_without_it(case, tmp_path):
    damage, said = LESS[case]
    damage(fake(tmp_path, "cifar", 600, name="bad one"))
    rows, problems = rows_of(tmp_path)
    assert rows[0].cells["cifar"].mean == 60
    assert said in problems[0].text


def test_predictions_of_a_paper_run_must_be_those_of_its_figure_too(tmp_path):
    other_predictions(fake(tmp_path, "cifar", 600, protocol="paper"))
    assert "it holds 100.0 %" in rows_of(tmp_path)[1][0].text


class Trap:
    """Unpickled, it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_predictions_are_never_unpickled(tmp_path):
    folder, sprung = fake(tmp_path, "cifar", 600), tmp_path / "sprung"
    np.savez(folder / "predictions.npz", labels=np.array([Trap(sprung)]), predicted=np.array([Trap(sprung)]))
    assert "no confusion matrix" in rows_of(tmp_path)[1][0].text
    assert not sprung.exists()


def test_a_run_of_nothing_but_its_result_has_a_page(tmp_path):
    folder = fake(tmp_path, "cifar", 600)
    for name in ("metrics.jsonl", "predictions.npz"):
        (folder / name).unlink()
    (folder / "predictions.png").write_text("no picture")
    assert report.main([str(tmp_path)]).problems == []
    said = (tmp_path / "report" / "report.html").read_text()
    assert "No predictions.png" in said
    assert "No predictions.npz" in said
    assert "Learning curves" not in said


def test_where_there_is_nothing_to_report_it_says_so(tmp_path, capsys):
    assert "nowhere is no folder" in refused(capsys, [tmp_path / "nowhere"])
    assert "no finished run in" in refused(capsys, [tmp_path])
    (fake(tmp_path / "runs", "cifar", 600, name="bad one") / "result.json").write_text("{")
    assert "bad one: result.json is damaged" in refused(capsys, [tmp_path / "runs"])
    fake(tmp_path / "runs", "cifar", 600)
    (tmp_path / "file").write_text("mine")
    assert "is a file; name a folder" in refused(capsys, [tmp_path / "runs", "--out", tmp_path / "file"])
    assert "no published row 'PACEE'" in refused(capsys, [tmp_path / "runs", "--beside", "PACEE"])
    assert not (tmp_path / "report").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_configs_of_other_programs_are_no_runs(tmp_path):
    fake(tmp_path, "cifar", 600)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{")
    assert rows_of(tmp_path)[1] == []
    (tmp_path / "half" / "checkpoint.safetensors").write_text("")
    assert [problem.folder.name for problem in rows_of(tmp_path)[1]] == ["half"]


def test_the_trials_of_a_search_are_part_of_their_run(tmp_path):
    folder = fake(tmp_path, "cifar", 600)
    (fake(folder / "trials", "cifar", 700, name="lr0.1") / "result.json").unlink()
    fake(tmp_path / "trials", "cifar", 800, 1)  # no run's: only a folder of that name
    rows, problems = rows_of(tmp_path)
    assert (rows[0].seeds(), problems) == ((2, 2), [])


def test_a_report_without_vtab_tasks_shows_no_published_rows(tmp_path, capsys):
    fake(tmp_path, "digits", 600)
    report.main([str(tmp_path)])
    for said in (capsys.readouterr().out, (tmp_path / "report" / "table.tex").read_text()):
        assert "digits" in said
        assert "PACE" not in said
    assert "<h2>VTAB-1k</h2>" not in (tmp_path / "report" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------ texts


def fake_texts(root, task, correct, seed=0, text=(), **result):
    """A finished run on texts; with a metric, one without classes."""
    classes = {} if "metric" in result else {"labels": ["sad", "glad", "warm", "dull"]}
    about = {"max_length": 64, **classes, **dict(text)}
    base = {"model": "minilm", "weights": "pretrained", "digest": "e3" * 32}
    result = {"unit": "texts", "text": about, "base": base, **result}
    folder = fake(root, task, correct, seed, **result)
    (folder / "predictions.png").unlink()
    if "metric" in result:
        (folder / "predictions.npz").unlink()
    return folder


def answered(root, task, score, **result):
    """A finished run on questions."""
    interval = [score - 2.0, score + 3.0]
    return fake_texts(root, task, 500, metric="f1", score=score, score_interval95=interval, unit="questions", **result)


def reported(root, capsys, *argv):
    """What a report says in each form; of the page, what is seen."""
    report.main([str(root), *argv])
    out = root / "report"
    seen = " ".join(Page((out / "report.html").read_text()).text)
    return {
        "terminal": capsys.readouterr().out,
        "page": " ".join(seen[seen.index("</style>") if "</style>" in seen else seen.rindex("}") :].split()),
        "latex": (out / "table.tex").read_text(),
        "csv": (out / "table.csv").read_text(),
    }


def test_a_report_on_texts_says_nothing_of_images_or_vtab(tmp_path, capsys):
    for seed in (0, 1):
        fake_texts(tmp_path, "films", 700 + seed, seed)
    fake_texts(tmp_path, "films", 800, method="full", trained_parameters=9)
    for name, said in reported(tmp_path, capsys).items():
        plain = said.replace("vtab.report", "").replace(str(tmp_path), "")
        for word in (
            "VTAB",
            "vtab",
            "mage",
            "top-1",
            "PACE",
            "ublished",
            "Groups",
            "dSprites",
            "natural",
            "No predict",
        ):
            assert word not in plain, (name, word)
        if name != "csv":
            assert "Texts, accuracy in percent" in said, name
    header = next(csv.reader(io.StringIO((tmp_path / "report" / "table.csv").read_text())))
    assert header == [
        "method", "origin", "films", "films_std", "films_low95", "films_high95",
        "trained_parameters", "seeds", "remark", "judged_on",
    ]  # fmt: skip
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<title>Report on films, 3 runs</title>" in page
    assert "test, 1,000 texts" in page


def test_published_rows_stand_beside_texts_only_where_they_are_asked_for(tmp_path, capsys):
    fake_texts(tmp_path, "films", 700)
    for name, said in reported(tmp_path, capsys, "--beside", "PACE").items():
        assert "PACE" in said, name
        assert "films" in said, name
    assert "<h1>Report on films</h1>" in (tmp_path / "report" / "report.html").read_text()


def test_each_kind_of_example_has_a_table_of_its_own(tmp_path, capsys):
    fake(tmp_path, "cifar", 600)
    fake(tmp_path, "digits", 900)
    fake_texts(tmp_path, "films", 700)
    fake_texts(tmp_path, "stars", 0, metric="pearson+spearman", score=-40.0)
    answered(tmp_path, "squad", 88.0)
    rows, _ = rows_of(tmp_path)
    assert [row.label for row in rows] == ["lora r8"] * 3  # that they differ in what they are judged on says nothing
    found = {block.heading: (block.tasks, len(block.lines)) for block in tables.blocks(rows, [])}
    assert found == {
        "VTAB-1k, top-1 accuracy in percent": (VTAB, 1),
        "Images outside VTAB-1k, top-1 accuracy in percent": (["digits"], 1),
        "Texts, score in percent": (["films", "stars (pearson+spearman)"], 1),
        "Questions, f1 in percent": (["squad (f1)"], 1),
    }
    said = reported(tmp_path, capsys)
    for heading in found:
        for name in ("terminal", "page", "latex"):
            assert heading in said[name], (heading, name)
    assert "PACE" in said["csv"]
    ours = [line for line in csv.DictReader(io.StringIO(said["csv"])) if line["origin"] == "ours"]
    figures = {line["judged_on"]: (line["cifar"], line["films"], line["squad (f1)"]) for line in ours}
    assert figures == {
        "images": ("60.0000", "", ""), "texts": ("", "70.0000", ""), "questions": ("", "", "88.0000"),
    }  # fmt: skip
    assert "No predictions" not in said["page"]
    assert "Learning curves: questions" in said["page"]
    assert said["terminal"].count("± is the standard deviation") == 0  # one seed has no spread


def test_what_judges_a_run_has_its_own_interval(tmp_path):
    answered(tmp_path, "squad", 80.0)
    answered(tmp_path, "squad", 84.0, seed=1)
    (row,) = rows_of(tmp_path)[0]
    assert row.cells["squad (f1)"].interval == (80.0, 85.0)
    old = answered(tmp_path, "older", 70.0)
    record = json.loads((old / "result.json").read_text())
    for broken, said in ((None, None), ([1], "score_interval95"), (["a", 2], "score_interval95"), ("x", "score_inter")):
        record["score_interval95"] = broken
        if broken is None:
            del record["score_interval95"]
        (old / "result.json").write_text(json.dumps(record))
        rows, problems = rows_of(tmp_path)
        if said:
            assert said in problems[0].text
        else:
            assert {task: cell.interval for row in rows for task, cell in row.cells.items()}["older (f1)"] is None


def test_older_records_count_images_whatever_they_are(tmp_path):
    for root, make in ((tmp_path / "images", fake), (tmp_path / "texts", fake_texts)):
        folder = make(root, "mine", 600)
        record = json.loads((folder / "result.json").read_text())
        record |= {"images": record.pop("examples"), "images_in_full_split": record.pop("examples_in_full_split")}
        record.pop("unit", None)
        (folder / "result.json").write_text(json.dumps(record))
        (row,) = rows_of(root)[0]
        assert (row.unit, row.cells["mine"].examples, row.cells["mine"].mean) == (root.name, IMAGES, 60.0)
        assert row.cells["mine"].interval == Accuracy(600, 1000).interval


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"a/train.json": 0, "b/train.json": 1}, {"train in a", "train in b"}),
        ({"train.json": 0, "b/train.json": 1}, {"train, data d00000", "train, data d11111"}),
        ({"x/a/train.json": 0, "y/a/train.json": 1}, {"train, data d00000", "train, data d11111"}),
        ({"a/train.json": 0, "b/train.json": 0, "c/train.json": 1}, {"train, data d00000", "train, data d11111"}),
    ],
    ids=["folders", "no folder", "folders of one name", "copies"],
)
def test_two_files_of_one_name_are_two_tasks(files, names, tmp_path):
    for seed, (file, number) in enumerate(files.items()):
        fake_texts(tmp_path, "train", 600, seed, config={"train": file}, data={"digest": "d" + 9 * str(number)})
    rows, _ = rows_of(tmp_path)
    assert {task for row in rows for task in row.cells} == names


def test_one_file_is_one_task_wherever_it_lies_and_its_older_runs_too(tmp_path):
    for seed, file in enumerate(("a/train.json", "b/train.json")):
        fake_texts(tmp_path, "train", 600, seed, config={"train": file}, data={"digest": "d1"})
    fake_texts(tmp_path, "train", 600, 2, config={"train": "c/train.json"})
    assert {task for row in rows_of(tmp_path)[0] for task in row.cells} == {"train"}


def test_one_file_is_one_row_wherever_it_lies(tmp_path):
    for seed, place in enumerate(("/home/a", "/home/b")):
        config = {"data": f"{place}/films.csv", "contents": f"films.csv {seed}"}
        fake_texts(tmp_path, "films", 600 + 100 * seed, seed, config=config, data={"digest": "d1", "test_digest": "t1"})
    (row,) = rows_of(tmp_path)[0]
    assert (row.cells["films"].mean, len(row.runs)) == (65.0, 2)
    fake_texts(tmp_path, "films", 900, 2, config=config, data={"digest": "d1", "test_digest": "t2"})
    assert {row.label.rpartition(", ")[2]: row.cells["films"].mean for row in rows_of(tmp_path)[0]} == {
        "test data t1": 65.0, "test data t2": 90.0,
    }  # fmt: skip


def test_two_folders_of_images_of_one_name_are_two_tasks(tmp_path):
    for seed, (place, correct) in enumerate((("a", 900), ("b", 300))):
        data = {"digest": f"{seed}{seed}", "test_digest": "t"}
        fake(tmp_path, "photos", correct, seed, config={"data_root": f"{place}/photos"}, data=data)
    (row,) = rows_of(tmp_path)[0]
    assert {task: cell.mean for task, cell in row.cells.items()} == {"photos in a": 90.0, "photos in b": 30.0}


@pytest.mark.parametrize("key", ["task", "data", "train"])
def test_an_unfinished_run_is_told_whatever_it_trains_on(key, tmp_path):
    fake(tmp_path, "photos", 600)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(json.dumps({key: "mine", "method": {"name": "lora"}}))
    (problem,) = rows_of(tmp_path)[1]
    assert "unfinished, 0 epochs done" in problem.text


@pytest.mark.parametrize("name", ["all", "natural", "groups"])
def test_a_folder_that_is_called_like_a_mean_keeps_its_figure(name, tmp_path, capsys):
    fake(tmp_path, "dtd", 500)
    fake(tmp_path, name, 900)
    (table,) = csv.DictReader(io.StringIO(reported(tmp_path, capsys, "--beside", "none")["csv"]))
    assert (table[f"{name} (images)"], table[name]) == ("90.0000", "50.0000")


def test_figures_over_other_test_texts_are_not_ranked(tmp_path):
    for method, correct, digest in (("lora r8", 600, "d1"), ("full", 700, "d1")):
        fake_texts(tmp_path, "films", correct, method=method, data={"test_digest": digest})
    assert [line.figures["films"].best for line in tables.lines(rows_of(tmp_path)[0], [])] == [True, False]
    fake_texts(tmp_path, "films", 900, method="head", data={"test_digest": "d2"})
    assert not any(line.figures["films"].best for line in tables.lines(rows_of(tmp_path)[0], []))


OF_CLASSES, OF_NUMBERS = ["text", "label", "predicted", "probability"], ["text", "label", "predicted"]
SURE, SURER = "sure\x85 and\rwrong", "surer, wrong"
PREDICTIONS = {
    "classes": (
        [OF_CLASSES, [SURE, "a", "b", 0.9], ["right", "a", "a", 1.0], [SURER, "b", "a", 0.95]],
        ([SURER, SURE], 2),
    ),
    "numbers": ([OF_NUMBERS, ["near", 1, 1.5], ["far", 1, -3], ["exact", 2, 2]], (["far", "near"], 2)),
    "ragged": ([OF_NUMBERS, ["near", 1]], None),
    "no label": ([["text", "predicted"], ["near", 1]], None),
    "no numbers": ([OF_NUMBERS, ["near", "a", "b"]], None),
}


@pytest.mark.parametrize("case", PREDICTIONS)
def test_the_worst_mistakes_come_first(case, tmp_path):
    rows, expected = PREDICTIONS[case]
    with (tmp_path / "predictions.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
    found = mistakes.of(tmp_path)
    assert (found and ([row[0] for row in found.rows], found.total)) == expected


def test_mistakes_are_on_the_page_and_damaged_ones_are_left_out(tmp_path):
    folder = answered(tmp_path, "squad", 80.0)
    path, page = folder / "wrong_answers.csv", tmp_path / "report" / "report.html"
    path.write_text('"id","question","expected","given","f1"\n"q1","Who <b>?","the ' + "long " * 99 + '","",0.0\n')
    report.main([str(tmp_path)])
    assert "Who &lt;b&gt;?" in page.read_text()
    assert "1 of 1 mistakes" in page.read_text()
    assert "long " * 70 not in page.read_text()
    path.write_text('"id","question","expected","given","f1"\n')
    report.main([str(tmp_path)])
    assert "No mistakes." in page.read_text()
    for content in (b"\xff", b'"id","question\n', b""):
        path.write_bytes(content)
        report.main([str(tmp_path)])
        assert "mistakes, the worst first" not in page.read_text()


def test_a_curve_shows_whatever_of_a_run_is_known(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: shown.append(figure))
    history = [{"epoch": 1, "loss": 4.0, "val_score": -30.0}, {"epoch": 2, "loss": 3.0, "val_score": -20.0}]
    lines = {"accuracy": "training", "val_score": "val"}
    plots.curve(tmp_path, history, ("val", 2, -20.0), "stars", "pearson", "mean squared error", lines)
    left, right = shown[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in right.lines} == {
        "val": [[1, -30], [2, -20]], "val: -20.0 %": [[2, -20]],
    }  # fmt: skip
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss (mean squared error)", "pearson (%)")
    assert right.get_ylim()[0] < -30
    plt.close(shown[0])


def test_names_with_dollars_are_no_formulas(tmp_path):
    names = ["$5", "$10 to $20", "$\\frac$", "\\"]
    fake_texts(tmp_path, "$a$b_{.csv", 700, text={"labels": names}, method="lora $r$ x^{")
    report.main([str(tmp_path)])
    history = [{"epoch": 1, "loss": 1.0}]
    plots.curve(tmp_path / "curve.png", history, ("test", 1, 50.0), "$a$b_{.csv")
    image = np.zeros((2, 4, 4, 3), np.uint8)
    plots.predictions(tmp_path / "a.png", image, np.array([0, 1]), np.array([[0.1, 0.9]] * 2), names, "$a_{$")
    assert (tmp_path / "a.png").is_file()


def test_the_confusions_of_texts_have_the_names_of_their_classes(tmp_path, monkeypatch):
    fake_texts(tmp_path, "films", 700)
    seen = []
    monkeypatch.setattr(charts, "_svg", lambda figure: seen.extend(figure.axes[0].get_yticklabels()) or b"")
    charts.confusion(rows_of(tmp_path)[0][0].runs[0])
    assert [label.get_text() for label in seen] == ["sad", "glad", "warm", "dull"]


def test_the_axes_keep_their_height_below_a_long_legend(tmp_path, monkeypatch, recwarn):
    heights = []

    def measured(figure):
        figure.draw_without_rendering()
        heights.append(figure.axes[0].bbox.height)

    monkeypatch.setattr(charts, "_svg", measured)
    for count in (1, 24):
        for number in range(count):
            fake_texts(tmp_path / str(count), "films", 700, method=f"lora r{number}")
        charts.curves(rows_of(tmp_path / str(count))[0])
    assert heights[1] > 0.9 * heights[0]
    assert not [warning for warning in recwarn if "layout" in str(warning.message)]


# ------------------------------------------------------------------------------------------------ outputs


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    """Every output of a report on whole runs, a generated task, and names that would break a careless page."""
    root, out = tmp_path_factory.mktemp("more"), tmp_path_factory.mktemp("out")
    nasty = "<script>alert('1')</script> & 50% of a_b"
    fake(root, "dsprites_loc", 500, data={"generated": True, "variant": "generated"}, method=nasty)
    fake(root, "photos <b>of</b> mine", 400, method=nasty)
    fake(root, "dtd", 950, method="lora r8", protocol="paper")
    fake(root, "dtd", 450, method="lora r8", stage="tune", split="val")
    made = report.main([str(whole[0]), str(root), "--out", str(out)])
    texts = {path.name: path.read_text() for path in out.iterdir()}
    assert set(texts) == {"report.html", "table.csv", "table.tex"}
    return made, texts, nasty


def test_the_csv_holds_every_figure(written, whole):
    made, texts, nasty = written
    lines = {(line["method"], line["origin"]): line for line in csv.DictReader(io.StringIO(texts["table.csv"]))}
    assert len(lines) == len(made.rows) + len(made.beside)
    assert list(next(iter(lines.values())))[2::4][:19] == VTAB
    ours = lines["lora r8", "ours"]
    values = whole[1]
    for task in [*VTAB, "digits"]:
        assert float(ours[task]) == pytest.approx((values["lora r8", task, 0] + values["lora r8", task, 1]) / 2)
        assert float(ours[f"{task}_low95"]) < float(ours[task]) < float(ours[f"{task}_high95"])
    groups, everything = slow_averages({task: float(ours[task]) for task in VTAB})
    assert (float(ours["groups"]), float(ours["all"])) == pytest.approx((groups, everything), abs=1e-4)
    assert (ours["all_complete"], ours["trained_parameters"], ours["seeds"]) == ("yes", "147456", "2")
    partial = lines[nasty, "ours"]
    assert (partial["dsprites_loc"], partial["dtd"], partial["all_complete"]) == ("50.0000", "", "no")
    assert "generated, not dSprites" in partial["remark"]
    assert lines["LoRA-8 (NOAH)", "published"]["cifar"] == "67.1000"
    assert any("paper protocol" in method for method, _ in lines)
    assert any("judged on val200" in method for method, _ in lines)


def test_the_latex_has_whole_rows_and_bold_best_figures(written):
    made, texts, _ = written
    first = texts["table.tex"].split(r"\end{tabular}")[0]
    body = [line for line in first.splitlines() if line.endswith(r"\\") and line.count("&") > 10]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {19 + 5 + 1}
    assert len(body) == 1 + len(made.rows) + len(made.beside)
    assert "LoRA-8 (NOAH): jpeg images; best of the test evaluations." in texts["table.tex"]
    assert all(rule in first for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\cmidrule(lr){2-8}"))
    assert r"alert('1')</script> \& 50\% of a\_b" in first
    assert not re.search(r"(?<!\\)[%_#](?!\s*needs)", "\n".join(body))
    assert texts["table.tex"].count(r"\begin{tabular}") == 2  # the extra tasks have a block of their own
    assert r"photos <b>of</b> mine" in texts["table.tex"].split(r"\end{tabular}")[1]
    by_label = {line.split(" & ")[0]: line.split(" & ") for line in body}
    for column, task in enumerate(VTAB, 1):
        shown = {
            row.label: round(row.cells[task].mean, 1) for row in made.rows if row.label in ("lora r8", "circulant")
        }
        for label, value in shown.items():
            bold = by_label[label][column].startswith(r"\textbf{")
            if task not in ("dtd", "dsprites_loc"):
                assert bold == (value == max(shown.values())), (label, task)


def test_names_of_any_letters_stay_in_their_cell_in_latex(tmp_path, capsys):
    for index, name in enumerate(["[2pt] x", "*z", "a\n\nb"]):
        fake_texts(tmp_path, "films", 700 + index, method=name)
    latex = reported(tmp_path, capsys)["latex"]
    assert [line.partition(" & ")[0] for line in latex.splitlines() if " & " in line][1:] == [
        "{*}z",
        "{[}2pt] x",
        "a b",
    ]


def test_the_page_needs_nothing_else_and_escapes_every_name(written):
    _, texts, nasty = written
    page = Page(texts["report.html"])
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    assert len(page.links) > 10
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "url(" not in texts["report.html"]
    assert "@import" not in texts["report.html"]
    for link in page.links:
        if link.startswith("data:"):
            head, _, content = link.partition(",")
            content = base64.b64decode(content, validate=True)
            assert content.startswith(b"\x89PNG" if "png" in head else b"<?xml"), head
            assert b"<script" not in content
    assert nasty in page.text
    assert "photos <b>of</b> mine" in page.text
    assert "alert('1')</script>" not in texts["report.html"]


def test_the_page_tells_what_stands_behind_each_row(written):
    made, texts, _ = written
    said = " ".join(Page(texts["report.html"]).text)
    for row in made.rows:
        assert row.label in said
    for fact in (
        "d1" * 32,
        "vit.a, weights pretrained",
        "c0ffee",
        "torch 2.15",
        "here, jpeg",
        "looks at test: 1",
        "700",
    ):
        assert fact in said, fact
    for one in published():
        assert one.source in said, one.method
    assert "here, generated, not dSprites" in said
    assert "PAPER PROTOCOL" in said


def test_generated_sprites_stand_beside_published_ones_only_with_the_words(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(charts, "_svg", lambda figure: titles.extend(a.get_title("left") for a in figure.axes) or b"")
    fake(tmp_path, "dsprites_loc", 500, data={"generated": True, "variant": "generated"})
    rows, _ = rows_of(tmp_path)
    charts.bars(rows, choose())
    assert titles == [f"{tables.paper_name('dsprites_loc')}\nours: generated, not dSprites"]
    assert rows[0].averages()["all"].caveat == "partial, 1 of 19; 1 generated"
    assert str(tables.lines(rows, [])[0].figures["dsprites_loc"]) == "50.0g"


def test_published_rows_join_neither_means_nor_bars_of_other_tasks(whole, monkeypatch):
    rows, _ = rows_of(whole[0])
    assert tables.lines(rows, choose("all"))[:2] == tables.lines(rows, [])
    widths = []
    monkeypatch.setattr(charts, "_svg", lambda figure: widths.extend(len(a.patches) for a in figure.axes) or b"")
    charts.bars(rows, choose("PACE, Linear"))
    assert widths[:20] == [4] * 19 + [2]  # digits has no published row


def test_lines_of_the_terminal_are_whole_at_any_width(whole, monkeypatch, capsys):
    rows, problems = rows_of(whole[0])
    table = tables.lines(rows, choose())
    for width in (80, 120, 260):
        monkeypatch.setenv("COLUMNS", str(width))
        terminal.show(tables.blocks(rows, choose()), problems)
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= width
        for line in table:
            for task in [*VTAB, "digits"] if line.ours else VTAB:
                assert f"{line.figures[task].value:.1f}" in said, (width, line.label, task)


LONG = "capaboost-lora r2 x2 masks=complementary, first 2,000 test texts"
NAMES = ["rte", "reviews-of-films.csv (pearson+spearman)", "glue/mnli, data 1a2b3c", "rotten_tomatoes"]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize("count", [1, 3, 8, 19])
def test_every_table_of_the_terminal_names_its_methods_in_whole_words(count, width, monkeypatch, capsys):
    tasks = [f"{NAMES[i % 4]}" if i < 4 else f"{'t' * (i % 9)}{i}" for i in range(count)]
    lines = []
    for number, label in enumerate(("lora r8", LONG)):
        figures = {task: tables.Figure(10 * number + i + 0.5, 1.25) for i, task in enumerate(tasks)}
        lines.append(tables.Line(label, True, figures, "22,713,216", "5", ""))
    monkeypatch.setenv("COLUMNS", str(width))
    terminal.show([tables.Block("Texts", "accuracy", "texts", {"": tasks}, {}, lines)], [])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    parts = re.split("Texts, accuracy in percent.*\n", said)[1:]
    for part in parts:
        assert "lora r8" in part
        assert set(LONG.split()) <= set(part.split())
    cells = Counter(re.findall(r"(?<!±)\b\d+\.\d\b", said))
    assert cells == Counter(f"{figure.value:.1f}" for line in lines for figure in line.figures.values())
    assert said.count("22,713,216") == 2


def test_a_heading_wider_than_the_terminal_is_folded_beside_the_method(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [tables.Line("lora r8", True, {"n" * 200: tables.Figure(61.5)}, "9", "1", "")]
    terminal.show([tables.Block("Texts", "accuracy", "texts", {"": ["n" * 200]}, {}, lines)], [])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("n" * 40) >= 2
    assert re.search("lora r8 +61.5", said)


def test_the_same_runs_give_the_same_pictures(tmp_path):
    fake(tmp_path, "cifar", 600)
    rows, _ = rows_of(tmp_path)
    assert charts.against_parameters(rows, choose()) == charts.against_parameters(rows, choose())


def test_other_figures_keep_their_style(tmp_path):
    import matplotlib as mpl

    fake(tmp_path, "cifar", 600)
    before = dict(mpl.rcParams)
    charts.curves(rows_of(tmp_path)[0])
    assert dict(mpl.rcParams) == before


def test_template_and_figures_are_installed(tmp_path):
    """In a wheel, and where the package lies now."""
    for name in ("report.html.j2", "published.csv"):
        assert (resources.files("vtab") / name).is_file()
    pytest.importorskip("setuptools", "77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("capavision", "vtab", "export"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    assert {"vtab/report.html.j2", "vtab/published.csv"} <= set(zipfile.ZipFile(wheel).namelist())
