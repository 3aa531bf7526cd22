"""What a record says, normalisation, the paper protocol, seeds."""

import json
import math
import statistics

import numpy as np
import pytest
import torch

import capavision as cv
from vtab import checkpoint, cli, plots, protocol, seeds, setup, train
from vtab.config import Config
from vtab.data import open_task
from vtab.evaluate import NORMS, Preprocessing, predict
from vtab.loop import Loop

TINY = ["--task", "digits", "--model", "test_vit", "--weights", "random", "--img-size", "32", "--rank", "2"]
TINY += ["--batch-size", "125", "--epochs", "2", "--test-limit", "60"]
LEARNS = ["--targets", "linear", "--drop-path", "0", "--lr", "5e-3"]
REAL_CURVE = plots.curve
LABEL = "paper protocol: best of 3 looks at the test split, not comparable with honest results"


@pytest.fixture(scope="module", autouse=True)
def drawn():
    """What would be drawn: drawing takes longer than the training here, and is tested with the trainer."""
    calls = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for picture in ("curve", "predictions"):
            monkeypatch.setattr(plots, picture, lambda *args: calls.append(args))
        yield calls


def run(out, *argv):
    return train.main([*TINY, "--out", str(out), *argv])


def refused(argv):
    with pytest.raises(ValueError, match=".") as caught:
        train.main(argv)
    return str(caught.value)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    out = tmp_path_factory.mktemp("honest")
    return out / "a", run(out, "--name", "a", "--norm", "imagenet", "--branches", "2", *LEARNS)


@pytest.fixture(scope="module")
def paper(tmp_path_factory, drawn):
    """Six epochs with a look at every second, the middle one made the best; and what was drawn."""
    out, before, monkeypatch = tmp_path_factory.mktemp("paper"), len(drawn), pytest.MonkeyPatch()
    real = Loop.epoch

    def spoils_the_last_epochs(loop, epoch, bar):
        if epoch == 4:
            loop.model.get_parameter("head.bias").data[0] += 100
        return real(loop, epoch, bar)

    monkeypatch.setattr(Loop, "epoch", spoils_the_last_epochs)
    argv = ["--protocol", "paper", "--test-every", "2", "--epochs", "6", *LEARNS]
    result = run(out, "--name", "a", *argv)
    monkeypatch.undo()
    return out / "a", result, drawn[before:], argv


def test_the_record_has_the_weighty_facts(honest):
    folder, result = honest
    assert (result["stage"], result["protocol"], result["protocol_label"]) == ("final", "honest", None)
    assert (result["recipe"], result["tuning"], result["seed"]) == (None, None, 0)
    assert result["method"] == "capaboost-lora r2 x2 targets=linear"
    assert result["normalization"] == "imagenet"
    assert result["base"].keys() == {"model", "weights", "digest", "img_size"}
    assert (result["base"]["model"], result["base"]["img_size"]) == ("test_vit", 32)
    assert result["environment"]["gpu"] is None
    assert 50 < result["environment"]["peak_memory_mb"] < 1e5
    assert result["selection"] == {"settings": "the command line", "epoch": "the last", "looks_at_test": 1}
    assert json.loads((folder / "config.json").read_text())["norm"] == "imagenet"


def test_predictions_are_kept_in_the_splits_order(honest):
    folder, result = honest
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        labels, predicted = file["labels"], file["predicted"]
    assert labels.dtype == predicted.dtype == np.uint16
    assert np.array_equal(labels, open_task("digits").splits["test"].labels[:60])
    assert 100 * (labels == predicted).mean() == pytest.approx(result["accuracy"])
    assert len(set(predicted.tolist())) > 2, "one class for all images would prove nothing"


def test_an_old_folder_without_the_new_settings_goes_on(honest, tmp_path, capsys):
    folder, result = honest
    young = {"protocol", "test_every", "tune", "optimizer", "schedule", "drop_last", "lr_start", "lr_min", "recipe"}
    written = json.loads((folder / "config.json").read_text())
    assert young < written.keys()
    (tmp_path / "a").mkdir()
    for file in folder.iterdir():
        (tmp_path / "a" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "a" / "config.json").write_text(json.dumps({k: v for k, v in written.items() if k not in young}))
    again = run(tmp_path, "--name", "a", "--norm", "imagenet", "--branches", "2", *LEARNS)
    assert again["accuracy"] == result["accuracy"]
    assert "finished already" in capsys.readouterr().out


def test_the_digest_tells_checkpoints_apart_and_nothing_else():
    model = cv.Base("test_vit", "random", 32).build(3)
    own = setup.digest(model)
    assert own != setup.digest(cv.Base("test_vit", "random", 32, seed=1).build(3))
    model.reset_classifier(7)
    assert setup.digest(model) == own, "the head is no part of the checkpoint"
    with torch.no_grad():
        model.pos_embed.mul_(1 + 1e-6)  # more than resampling on another machine does
        assert setup.digest(model) == own
        model.pos_embed.mul_(1.01)
    assert setup.digest(model) != own


def test_the_checkpoints_tag_is_named_where_timm_chose_it(monkeypatch):
    class Model:
        pretrained_cfg = {"tag": "augreg2_in21k_ft_in1k"}  # noqa: RUF012

    monkeypatch.setattr(setup, "digest", lambda model: "0")
    named = setup.identify(cv.Base("vit_base_patch16_224"), Model(), 224)
    assert named["model"] == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    full = "vit_base_patch16_224.orig_in21k"
    assert setup.identify(cv.Base(full), Model(), 224)["model"] == full
    assert setup.identify(cv.Base("test_vit", "random"), Model(), 32)["model"] == "test_vit"


@pytest.mark.parametrize("norm", ["model", *NORMS])
def test_pixels_are_normalised_as_named(norm):
    model, base = cv.Base("test_resnet", "random").build(2), cv.Base("test_resnet", "random", 8)
    model.pretrained_cfg["mean"], model.pretrained_cfg["std"] = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    mean, std = {
        "model": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "inception": ((0.5,) * 3, (0.5,) * 3),
        "none": ((0.0,) * 3, (1.0,) * 3),
    }[norm]
    image = torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8)
    found = Preprocessing.of(model, base, norm).normalize(image).flatten().tolist()
    assert found == pytest.approx([(v / 255 - m) / s for v, m, s in zip((0, 127, 255), mean, std, strict=True)])


def test_an_export_normalises_as_the_run_did(honest, tmp_path):
    pytest.importorskip("onnxruntime")
    from export.__main__ import main as export
    from export.runtime import Classifier

    folder, _ = honest
    export([str(folder), "--out", str(tmp_path / "package")])
    said = json.loads((tmp_path / "package" / "preprocessor_config.json").read_text())
    assert said["image_mean"] == list(NORMS["imagenet"][0]) != [0.5, 0.5, 0.5]
    runtime, test = Classifier(tmp_path / "package"), open_task("digits").splits["test"].head(60)
    pixels = test.decode(32)
    logits = runtime.logits(pixels)
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        assert np.array_equal(logits.argmax(1), file["predicted"])
    model = cv.load(folder / "adapter.safetensors")
    wrong = predict(model, test, Preprocessing(32, *NORMS["inception"]))
    right = predict(model, test, Preprocessing(32, *NORMS["imagenet"]))
    assert np.abs(wrong - right).max() > 1e-3, "the normalisation changes nothing, so this test would prove nothing"


def test_the_paper_protocol_reports_the_best_look_and_its_weights(paper):
    folder, result, _, _ = paper
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = {row["epoch"]: row["test_accuracy"] for row in rows if "test_accuracy" in row}
    assert list(looks) == [2, 4, 6]
    assert looks[4] > max(looks[2], looks[6]), "the best look must lie in the middle"
    assert result["accuracy"] == looks[4]
    assert result["selection"]["epoch"] == "4, the best of 3 looks at the test split"
    assert result["selection"]["looks_at_test"] == 3
    test = open_task("digits").splits["test"].head(60)
    found = predict(cv.load(folder / "adapter.safetensors"), test, Preprocessing(32, *NORMS["inception"]))
    assert 100 * (found.argmax(1) == test.labels).mean() == pytest.approx(looks[4])


def test_the_paper_protocol_is_labelled_wherever_its_figure_appears(paper, capsys):
    folder, result, drawn, argv = paper
    assert (result["protocol"], result["protocol_label"]) == ("paper", LABEL)
    assert json.loads((folder / "config.json").read_text())["protocol"] == "paper"
    info = cv.describe(folder / "adapter.safetensors")["info"]
    assert (info["protocol"], info["epoch"]) == (LABEL, 4)
    assert all(LABEL in args[-1] for args in drawn)
    assert len(drawn) == 2
    assert drawn[0][2] == ("test, best of 3 looks", 4, result["accuracy"])
    run(folder.parent, "--name", "b", *argv[:4], "--epochs", "6", "--seeds", "0,")
    assert capsys.readouterr().out.count(LABEL) == 2  # before training, and under the result
    summary = seeds.summarise([result])
    assert LABEL in seeds.told(Config(task="digits", protocol="paper", test_every=2, epochs=6), summary)


def test_the_first_of_equal_looks_counts():
    history = [{"epoch": e, "test_accuracy": a} for e, a in ((1, 50.0), (2, 70.0), (3, 70.0), (4, 60.0))]
    assert protocol.judged([*history, {"epoch": 5}]) == 2
    assert protocol.judged([{"epoch": 1}, {"epoch": 2}]) == 2


def test_a_paper_run_killed_between_a_look_and_its_checkpoint_ends_the_same(paper, tmp_path, monkeypatch):
    """Without the spoiling of the fixture; the interruption comes after the adapter of the first look is written."""
    argv = ["--protocol", "paper", "--test-every", "1", "--epochs", "2", *LEARNS]
    whole = run(tmp_path / "whole", "--name", "a", *argv)
    real, calls = checkpoint.write, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(checkpoint, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "--name", "a", *argv)
    assert (tmp_path / "cut" / "a" / "adapter.safetensors").is_file()
    assert not (tmp_path / "cut" / "a" / "checkpoint.safetensors").is_file()
    assert run(tmp_path / "cut", "--name", "a", *argv)["accuracy"] == whole["accuracy"]


def test_seeds_are_runs_of_their_own_and_their_spread_is_the_samples(tmp_path, capsys):
    summary = run(tmp_path, "--seeds", "0,3,5", "--name", "a", *LEARNS)
    folders = [tmp_path / f"a-s{seed}" for seed in (0, 3, 5)]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert [r["seed"] for r in results] == [r["config"]["seed"] for r in results] == [0, 3, 5]
    found = [r["accuracy"] for r in results]
    assert len(set(found)) > 1, "equal accuracies would prove nothing"
    mean = sum(found) / 3
    assert summary["accuracies"] == found
    assert summary["mean"] == pytest.approx(mean)
    assert summary["std"] == pytest.approx(math.sqrt(sum((a - mean) ** 2 for a in found) / 2))
    said = capsys.readouterr().out
    assert f"{mean:.2f} % ± {statistics.stdev(found):.2f}, mean and standard deviation of 3 seeds" in said
    low, high = results[1]["interval95"]
    assert f"seed 3: test {found[1]:.1f} % ({low:.1f} … {high:.1f}, n = 60)" in said


def test_one_seed_has_no_spread():
    summary = seeds.summarise([{"accuracy": 50.0, "task": "dtd", "method": "lora r8", "seed": 1, "protocol": "honest"}])
    assert (summary["mean"], summary["std"]) == (50.0, None)


@pytest.mark.parametrize(
    ("text", "found"), [("3", [0, 1, 2]), ("1", [0]), ("42,44,82", [42, 44, 82]), ("7,", [7]), (" 1, 2", [1, 2])]
)
def test_seeds_are_a_count_or_a_list(text, found):
    assert seeds.parse(text) == found


REFUSED = {
    "seeds text": (["--seeds", "a few"], "--seeds 'a few' must be a count, such as 3, or a list"),
    "no seeds": (["--seeds", "0"], "--seeds 0 must name 1 to 100 seeds"),
    "many seeds": (["--seeds", "100000000000"], "must name 1 to 100 seeds"),
    "same seeds": (["--seeds", "1,1"], "--seeds 1,1 names a seed twice"),
    "negative": (["--seeds", "0,-1"], "--seed -1 must lie in [0, 2147483648)"),
    "seed too": (["--seeds", "2", "--seed", "1"], "--seeds says which seeds there are; leave --seed out"),
    "paper tune": (["--stage", "tune", "--protocol", "paper"], "which --stage tune never touches; leave one out"),
    "looks": (["--test-every", "2"], "--test-every has no use without --protocol paper"),
    "no look": (
        ["--epochs", "9", "--protocol", "paper"],
        "looks at the test split after every 10 epochs, and this run",
    ),
    "tune tune": (["--stage", "tune", "--tune"], "leave --stage tune out"),
    "tune seed": (["--tune-seed", "3"], "--tune-seed has no use without --tune"),
    "grid": (["--tune", "--tune-lr", "1,x"], "--tune-lr '1,x' must be positive numbers with commas between them"),
    "zero": (["--tune", "--tune-scale", "0,1"], "--tune-scale '0,1' must be positive numbers"),
    "one point": (["--tune", "--tune-lr", "1", "--tune-scale", "1"], "--tune has one point to choose from"),
    "low": (["--tune", "--lr-min", "5e-4"], "--lr-min 0.0005 is above the peak, --lr 0.0003"),
    "bad target": (["--tune", "--targets", "qkw"], "no module matches 'qkw'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused_and_leave_nothing(case, tmp_path):
    argv, message = REFUSED[case]
    base = ["--task", "digits", "--model", "test_vit", "--weights", "random", "--img-size", "32"]
    assert message in refused([*base, "--out", str(tmp_path), *argv])
    assert list(tmp_path.iterdir()) == []


def test_a_curve_shows_every_look(tmp_path):
    import matplotlib.pyplot as plt

    history = [{"epoch": e, "loss": 1.0, "accuracy": 50.0} for e in range(1, 5)]
    for epoch, found in ((2, 61.0), (4, 60.0)):
        history[epoch - 1]["test_accuracy"] = found
    shown = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(plots, "_write", lambda figure, path: shown.append(figure))
        REAL_CURVE(tmp_path / "curve.png", history, ("test, best of 2 looks", 2, 61.0), LABEL)
    lines = {line.get_label(): line.get_xydata().tolist() for line in shown[0].axes[1].lines}
    assert lines["test"] == [[2, 61.0], [4, 60.0]]
    assert lines["test, best of 2 looks: 61.0 %"] == [[2, 61.0]]
    assert shown[0].get_suptitle() == LABEL
    plt.close(shown[0])


def test_the_flags_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.run(lambda: train.main(["--help"]))
    said = capsys.readouterr().out
    for flag in ("--norm", "--recipe", "--protocol", "--tune", "--seeds", "--drop-last"):
        assert flag in said
