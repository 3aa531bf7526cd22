"""Runs on questions exported: the package's answers against the run's own, long contexts, mistakes.

Encoders are tiny and random, tokenizers trained on a miniature of SQuAD: nothing is downloaded.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import capavision as cv
from export import __main__ as export_command
from export import accuracy, agreement, bench, cli, predict, serve, spans, triton, verify
from export.answerer import Answerer
from export.package import write_manifest
from export.runtime import Classifier, Runtime, relative_error, sha256
from export.source import Source
from export.web import __main__ as web

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.utils.logging.disable_progress_bar()

from examples import question_answering  # noqa: E402
from tests import questions  # noqa: E402
from tests.conftest import seeded  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CONTEXT = "The ferry leaves at noon. The mail boat follows an hour later."


def trained(folder, version, *flags):
    """A finished run on the miniature, that judged itself by it too."""
    file = questions.write(folder / "dev.json", version)
    sizes = ["--max-length", "48", "--stride", "16", "--epochs", "24", "--lr", "1e-2", "--rank", "8", "--alpha", "16"]
    argv = ["--train", str(file), "--dev", str(file), "--model", str(folder / "encoder"), *sizes, *flags]
    question_answering.main([*argv, "--targets", "linear", "--batch-size", "4", "--out", str(folder), "--name", "run"])
    return folder / "run"


def exported(run, *flags):
    export_command.main([str(run), "--out", str(run.parent / "package"), *flags])
    return run.parent / "package"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(run, package) with questions that have no answer, and int8."""
    folder = tmp_path_factory.mktemp("bert")
    questions.save_encoder(folder / "encoder")
    run = trained(folder, "2.0", "--null-threshold", "0.5")
    return run, exported(run, "--quantize", "int8", "--data-root", str(folder / "dev.json"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """(run, package) of an encoder without types, whose tokens hold the space before a word; all have an answer."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = questions.bytes_bpe()
    config = transformers.RobertaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **SIZES)
    seeded(lambda: transformers.RobertaForQuestionAnswering(config)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    run = trained(folder, "1.1", "--longest-answer", "6", "--n-best", "5")
    return run, exported(run)


@pytest.fixture(params=["bert", "roberta"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copied(bert, tmp_path):
    return shutil.copytree(bert[1], tmp_path / "copied")


def told(path):
    return json.loads(path.read_text())


def refused(capsys, main, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    return said


def pairs():
    return {key: (question, context) for context, asked in questions.PARAGRAPHS for key, question, _ in asked}


# --- the answers


def test_a_file_gets_the_answers_that_the_run_gave(either, tmp_path, capsys):
    run, package = either
    found = predict.main([str(package), "--file", str(run.parent / "dev.json"), "--json", str(tmp_path / "said.json")])
    expected = told(run / "predictions.json")
    assert told(tmp_path / "said.json") == expected
    assert [answers[0].text for answers in found] == list(expected.values())
    assert len(capsys.readouterr().out.splitlines()) == len(expected)
    assert len(set(expected.values())) > 3, "most questions get one answer, so this proves little"
    assert ("" in expected.values()) == (run / "null_odds.json").exists()


def test_the_best_answers_are_the_runs_with_scores_and_places(either):
    run, package = either
    kept = told(run / "nbest_predictions.json")
    asked = {key: pair for key, pair in pairs().items() if key in kept}
    answerer = Answerer(package)
    found = answerer.answer(list(asked.values()), 100, None if answerer.null_threshold is None else 0.0)
    for (key, (_, context)), answers in zip(asked.items(), found, strict=True):
        assert [(a.text, a.start) for a in answers] == [(entry["text"], entry["start"]) for entry in kept[key]]
        for answer, entry in zip(answers, kept[key], strict=True):
            assert answer.score == pytest.approx(entry["score"], abs=1e-4)
            assert answer.probability == pytest.approx(entry["probability"], abs=1e-4)
            assert answer.text == (context[answer.start : answer.end] if answer.start >= 0 else "")


def test_the_adapter_decided_the_answers(either):
    run, package = either
    source, runtime = Source.open(run), Runtime(package)
    manifest = told(package / "manifest.json")
    assert max(manifest["tasks"]["dev"]["parity"]["relative_error"].values()) < 1e-5
    assert manifest["tasks"]["dev"]["parity"]["distance_to_base"] > 1e-2
    assert source.compared(runtime, 1e-4, False)["padding"]["relative_error"] < 1e-5


def test_a_context_of_100_000_characters_is_read_to_its_end(bert):
    answerer, question = Answerer(bert[1]), "Who lived in the lighthouse?"
    text = ((questions.BEES + " ") * 1200)[: 100_000 - len(questions.HARBOUR)] + questions.HARBOUR
    (answers,) = answerer.answer([(question, text)], top=30)
    assert len(answers) == 21  # n_best, and that there is none
    assert all(text[a.start : a.end] == a.text for a in answers if a.text)
    offsets = [window.offsets[window.offsets[:, 1] > 0] for window in answerer.input.windows([(question, text)])]
    assert (offsets[0][0, 0], offsets[-1][-1, 1]) == (0, 100_000)
    assert all(one[-16:].tolist() == two[:16].tolist() for one, two in itertools.pairwise(offsets))


@pytest.mark.parametrize(("threshold", "none"), [(1e9, 0), (-1e9, 13)])
def test_another_null_threshold_moves_where_no_answer_stands(bert, threshold, none):
    found = Answerer(bert[1]).answer(list(pairs().values()), 3, threshold)
    assert sum(not answers[0].text for answers in found) == none
    assert all(len(answers) == 3 for answers in found)


def test_what_is_given_stands_first_at_every_threshold():
    kept = [spans.Span(2.0, 0, 3, "Tom"), spans.Span(1.0, 4, 9, "Crane")]
    decoded = spans.Decoded(kept, null=2.5)
    for threshold in (None, -9.0, 0.0, 0.499, 0.5, 1.4, 1.5, 9.0):
        ranked = decoded.ranked(threshold)
        assert ranked[0].text == decoded.answer(threshold)
        assert sum(answer.probability for answer in ranked) == pytest.approx(1)
    order = {t: [answer.text for answer in decoded.ranked(t)] for t in (None, 0.0, 1.0, 1.5)}
    assert order == {
        None: ["Tom", "Crane"], 0.0: ["", "Tom", "Crane"], 1.0: ["Tom", "", "Crane"], 1.5: ["Tom", "Crane", ""],
    }  # fmt: skip


def test_a_questions_answer_depends_on_no_other_question(bert):
    every = list(pairs().values())
    for variant in ("float32", "int8"):
        answerer = Answerer(bert[1], variant=variant)
        together = answerer.answer(every)
        for pair, answers in zip(every[:3], together, strict=False):
            (alone,) = answerer.answer([pair])
            assert alone[0].text == answers[0].text
            assert alone[0].score == pytest.approx(answers[0].score, abs=1e-5 if variant == "float32" else 0)


# --- the package


def test_the_graph_takes_tokens_and_gives_start_and_end_logits(either):
    run, package = either
    graph = onnx.load(package / "model.onnx").graph
    types = ["token_type_ids"] if run.parent.name.startswith("bert") else []
    assert [given.name for given in graph.input] == ["input_ids", "attention_mask", *types]
    assert [given.name for given in graph.output] == ["start_logits", "end_logits"]
    for each in (*graph.input, *graph.output):
        assert [d.dim_param for d in each.type.tensor_type.shape.dim] == ["batch", "length"]
    assert told(package / "manifest.json")["form"] == "merged"


def test_the_manifest_says_how_answers_are_chosen(bert, roberta):
    first, second = (told(package / "manifest.json")["input"] for _, package in (bert, roberta))
    assert first["kind"] == "question"
    assert [first[key] for key in ("max_length", "stride", "longest_answer", "n_best", "null_threshold", "null")] == [
        48, 16, 30, 20, 0.5, 2,
    ]  # fmt: skip
    assert [second[key] for key in ("longest_answer", "n_best", "null_threshold", "null")] == [6, 5, None, 0]
    run, package = bert
    assert sha256(package / "tokenizer.json") == sha256(run / "tokenizer.json")
    assert told(package / "manifest.json")["tasks"]["dev"]["labels"] == ["start", "end"]
    assert str(run.parent) not in (package / "manifest.json").read_text()


def test_int8_is_compared_on_questions_of_ones_own(bert):
    _, package = bert
    about = told(package / "manifest.json")["quantization"]["int8"]["agreement_on_questions"]
    one, two = (Answerer(package, variant=variant).answer(list(pairs().values())) for variant in ("float32", "int8"))
    same = sum(a[0].text == b[0].text for a, b in zip(one, two, strict=True))
    assert about == {"questions": 13, "top1": pytest.approx(100 * same / 13)}
    assert same > 6
    taken = Answerer(package).input.sample(9, 8)
    found, expected = (Answerer(package, variant=name).logits(taken) for name in ("int8", "float32"))
    assert found.shape == expected.shape == (8, 2, 48)
    assert 1e-4 < relative_error(found, expected) < 0.5


def test_int8_without_questions_is_compared_on_windows(roberta, tmp_path, monkeypatch, capsys):
    proto = onnx.load(roberta[1] / "model.onnx")
    monkeypatch.setattr("export.text_source.traced", lambda *args, **kwargs: proto)
    manifest = export_command.main([str(roberta[0]), "--out", str(tmp_path / "package"), "--quantize", "int8"])
    found = manifest["quantization"]["int8"]["agreement_on_random_windows"]
    assert found["questions"] == 64
    assert 50 < found["top1"] <= 100
    assert "of 64 windows, every second one of random tokens" in capsys.readouterr().out


def test_verify_passes_and_a_changed_probe_is_caught(copied, capsys):
    assert verify.main([str(copied)]) < 1e-5
    assert "int8: logits finite" in capsys.readouterr().out
    manifest = told(copied / "manifest.json")
    probe = manifest["tasks"]["dev"]["probe"]
    assert np.array(probe["logits"]).shape[:2] == (1, 2)
    probe["logits"][0][1][3] += 1
    write_manifest(copied, manifest)
    assert "the probe of dev is off by" in refused(capsys, verify.main, copied)
    probe["logits"][0][1].pop()
    write_manifest(copied, manifest)
    assert "manifest.json is damaged" in refused(capsys, verify.main, copied)


@pytest.mark.parametrize(
    "change",
    [{"stride": 10**30}, {"stride": -1}, {"longest_answer": 0}, {"n_best": 1.5}, {"null_threshold": "0"}, {"null": -1}],
    ids=str,
)
def test_a_manifest_that_says_what_cannot_be_is_damaged(change, copied, capsys):
    manifest = told(copied / "manifest.json")
    manifest["input"] |= change
    write_manifest(copied, manifest)
    said = refused(capsys, predict.main, copied, "--question", "Who?", "--context", CONTEXT)
    assert "manifest.json is damaged" in said


def without_spans(run, *more):
    """The run as one of before its adapter file said how answers are chosen."""
    file = run / "adapter.safetensors"
    about = cv.describe(file)["info"]
    from export.text import build

    model = cv.load(file, build(about, run))
    for key in ("longest_answer", "n_best", "null_threshold", *more):
        del about["text"][key]
    cv.save(model, file, info=about)


def test_an_older_run_says_it_in_its_record(bert, tmp_path, capsys):
    run = shutil.copytree(bert[0], tmp_path / "run")
    expected = Source.open(run).inputs
    without_spans(run)
    assert Source.open(run).inputs == expected
    record = told(run / "result.json")
    (run / "result.json").write_text("{}")
    out = ["--out", tmp_path / "package"]
    assert "of a run on questions it also says {'stride': 128" in refused(capsys, export_command.main, run, *out)
    (run / "result.json").write_text(json.dumps(record | {"null_threshold": None}))
    assert Source.open(run).inputs == expected | {"null_threshold": None}
    (run / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json is missing; it belongs to" in refused(capsys, export_command.main, run, *out)
    assert not (tmp_path / "package").exists()


# --- the commands


def test_a_question_is_answered_on_the_command_line(bert, capsys):
    _, package = bert
    asked = ["--question", " Who lived\nthere? ", "What is \x1b[2J?", "--context", CONTEXT]
    found = predict.main([str(package), *asked, "--top", "3", "--null-threshold", "1e9"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("Who lived there?  ")
    assert lines[3].startswith("What is \\x1b[2J?  ")
    assert all(line.startswith("    ") for line in lines[1:3] + lines[4:])
    best = found[0][0]
    assert CONTEXT[best.start : best.end] == best.text
    assert lines[0].endswith(
        f"{best.text}  context[{best.start}:{best.end}]  {100 * best.probability:.1f} %, score {best.score:.2f}"
    )
    one_each = ["--question", "Who?", "--question", "Where?", "--context", CONTEXT, "--context", questions.BEES]
    assert predict.main([str(package), *one_each]) == Answerer(package).answer(
        [("Who?", CONTEXT), ("Where?", questions.BEES)]
    )
    predict.main([str(package), "--question", "Who?", "--context", CONTEXT, "--null-threshold=-1e9"])
    assert "Who?  no answer  " in capsys.readouterr().out


ASKED = ["--question", "Who?", "--context", CONTEXT]
HOW = 'takes questions: python -m export.predict {package} --question "…" --context "…", or --file FILE in SQuAD'
WRONG = {
    "nothing": ([], HOW),
    "an image": (["x.png"], HOW),
    "a text": (["--text", "a"], HOW),
    "a context alone": (["--context", CONTEXT], HOW),
    "a question alone": (["--question", "Who?"], HOW),
    "a file too": ([*ASKED, "--file", "x.json"], HOW),
    "empty question": (["--question", " ", "--context", CONTEXT], "question 1 is empty"),
    "empty context": (["--question", "Who?", "--context", ""], "the context of question 1 is empty"),
    "surrogate": (["--question", "Who?", "--context", "caf\udce9"], "the context of question 1 is no Unicode: 'caf"),
    "no token": (["--question", "Who?", "--context", "\u200b"], "finds no token in the context of question 1"),
    "long": (["--question", "who " * 99, "--context", "a"], "question 1 has 99 tokens, which leaves 0 of the 48 of a"),
    "contexts": (["--question", *"abc", "--context", "a", "b"], "3 --question and 2 --context do not fit"),
    "top": ([*ASKED, "--top", "0"], "--top 0 must be at least 1"),
    "threshold": ([*ASKED, "--null-threshold", "nan"], "null_threshold=nan must be a number"),
    "json": ([*ASKED, "--json", "x.json"], "--json is for the questions of --file, which have ids"),
    "no file": (["--file", "nothing.json"], "there is no file nothing.json"),
    "a table": (["--file", "{pairs.tsv}"], "pairs.tsv is no file in SQuAD's format, which is JSON ("),
    "another json": (["--file", "{other.json}"], 'other.json: the file must have "data" (list) and has nothing: not'),
    "an empty context in it": (
        ["--file", "{empty.json}"],
        "question h1 (data[0].paragraphs[0].qas[0]) has an empty co",
    ),
    "variant": ([*ASKED, "--variant", "float16"], "has no variant 'float16'; choose of float32, int8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_question_is_one_line(case, bert, tmp_path, capsys):
    argv, says = WRONG[case]
    (tmp_path / "pairs.tsv").write_text("Who?\tTom Crane lived there.\n")
    (tmp_path / "other.json").write_text('{"version": "v2.0"}')
    content = questions.content()
    content["data"][0]["paragraphs"][0]["context"] = "\n"
    (tmp_path / "empty.json").write_text(json.dumps(content))
    argv = [str(tmp_path / arg[1:-1]) if arg.startswith("{") else arg for arg in argv]
    assert says.format(package=bert[1]) in refused(capsys, predict.main, bert[1], *argv)


def test_of_many_questions_the_one_that_cannot_be_asked_is_named(bert):
    asked = [("Who?", CONTEXT)] * 256 + [("who " * 99, CONTEXT)]
    with pytest.raises(ValueError, match=r"question 257 has 99 tokens"):
        Answerer(bert[1]).answer(asked)


def test_the_answers_do_not_take_the_place_of_the_questions(bert, tmp_path, capsys):
    file = questions.write(tmp_path / "dev.json")
    before = file.read_bytes()
    (tmp_path / "link.json").symlink_to(file)
    said = refused(capsys, predict.main, bert[1], "--file", tmp_path / "link.json", "--json", file)
    assert "dev.json holds the questions; name another file" in said
    assert file.read_bytes() == before


def test_a_file_needs_no_answers_to_be_asked(bert, tmp_path):
    bare = {"paragraphs": [{"context": CONTEXT, "qas": [{"id": 7, "question": "Who?"}]}]}
    (tmp_path / "bare.json").write_text("\ufeff" + json.dumps({"data": [bare]}), "utf-8")
    predict.main([str(bert[1]), "--file", str(tmp_path / "bare.json"), "--json", str(tmp_path / "said.json")])
    assert list(told(tmp_path / "said.json")) == ["7"]


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ("Who?", TypeError, r"write \[\(question, context\)\]"),
        (["Who?"], TypeError, r"question 1 must be a pair of str, \(question, context\), not 'Who\?' \(str\)"),
        ([("a", "b", "c")], TypeError, "question 1 must be a pair"),
        ([("a", CONTEXT), ("a", 3)], TypeError, "question 2 must be a pair"),
        ([("a", CONTEXT), ("", CONTEXT)], ValueError, "question 2 is empty"),
    ],
)
def test_what_is_no_pair_is_named(bert, asked, error, says):
    with pytest.raises(error, match=says):
        Answerer(bert[1]).answer(asked)


def test_a_threshold_has_no_use_where_all_have_an_answer(roberta, capsys):
    with pytest.raises(ValueError, match="null_threshold=1 has no use; leave it out"):
        Answerer(roberta[1]).answer([("Who?", CONTEXT)], null_threshold=1.0)
    assert "has no use; leave it out" in refused(capsys, predict.main, roberta[1], *ASKED, "--null-threshold", "1")


def test_other_kinds_of_packages_and_commands_are_refused_with_the_cure(copied, bert, tmp_path, capsys):
    with pytest.raises(ValueError, match="takes questions; python -m export.predict and export.answerer.Answerer"):
        Classifier(copied)
    assert "takes questions, and the server takes images; python -m export.predict" in refused(
        capsys, serve.main, copied
    )
    others = {agreement.main: [], accuracy.main: ["--run", bert[0]]}
    others |= {triton.main: ["--out", tmp_path / "repo"], web.main: ["--out", tmp_path / "site"]}
    for main, argv in others.items():
        assert "takes questions; python -m export.predict and" in refused(capsys, main, copied, *argv)
    out = ["--out", tmp_path / "x"]
    assert "is of questions; export it by itself" in refused(capsys, export_command.main, "--split", bert[0], *out)
    assert "is of questions; they take --quantize int8" in refused(capsys, export_command.main, bert[0], *out, "--half")
    assert not {"repo", "site", "x"} & {path.name for path in tmp_path.iterdir()}
    manifest = told(copied / "manifest.json")
    manifest["input"]["kind"] = "text"
    write_manifest(copied, manifest)
    with pytest.raises(ValueError, match="takes texts; python -m export.predict and export.runtime.Classifier"):
        Answerer(copied)
    assert "takes texts: python -m export.predict" in refused(capsys, predict.main, copied, *ASKED)
    for flag in (["--null-threshold", "1"], ["--json", "x"]):
        assert f"{flag[0]} is for" in refused(capsys, predict.main, copied, "--text", "a", *flag)


def test_bench_times_the_package_beside_its_base(bert, monkeypatch):
    run, package = bert
    monkeypatch.setattr(bench, "write_base", lambda source, manifest, path: shutil.copy(package / "model.onnx", path))
    flags = ["--rounds", "2", "--threads", "1", "--tokens", "20", "--no-memory"]
    result = bench.main([str(package), "--run", str(run), *flags])
    assert [row["name"] for row in result["rows"]] == ["base", "float32", "int8", "pytorch"]


def test_asking_needs_onnxruntime_numpy_and_tokenizers_alone(bert, tmp_path):
    """The others are made impossible to import."""
    for name in ("torch", "transformers", "PIL", "timm", "capavision", "vtab", "examples", "onnx", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    (tmp_path / "export").symlink_to(Path(__file__).resolve().parent.parent / "export")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for argv in (["export.predict", bert[1], *ASKED], ["export.verify", bert[1]]):
        command = [sys.executable, "-m", *map(str, argv)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout
