import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import capavision as cv
from tests.conftest import full_disk
from vtab import cli, evaluate, limits, loop, record, setup, train
from vtab.config import Config, parse
from vtab.data import Data, Split
from vtab.evaluate import accuracy
from vtab.loop import Loop

pytestmark = pytest.mark.usefixtures("no_pictures")  # only of `finished` they are drawn
TINY = ["--model", "test_vit", "--weights", "random", "--img-size", "32"]
TINY += ["--epochs", "2", "--batch-size", "125", "--rank", "2"]
FILES = {"config.json", "metrics.jsonl", "adapter.safetensors", "curve.png", "predictions.png", "predictions.npz"}
FILES |= {"result.json", ".lock"}


def run(out, *argv):
    return train.main(["--task", "digits", *TINY, "--out", str(out), *argv])


def refused(capsys, argv):
    """The one line that a stranger sees, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run and its result."""
    out = tmp_path_factory.mktemp("runs")
    return out / "a", run(out, "--name", "a", "--branches", "2")


def test_a_run_leaves_every_file_and_nothing_else(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    for picture in ("curve.png", "predictions.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_in_bfloat16_training_and_the_test_run_rounded_products(tmp_path, monkeypatch):
    """The dtype of the logits in both says so; parameters stay float32."""
    seen = {"loss": set(), "test": set()}
    losses, tests = nn.functional.cross_entropy, evaluate._probabilities
    monkeypatch.setattr(loop.F, "cross_entropy", lambda x, y: seen["loss"].add(x.dtype) or losses(x, y))
    monkeypatch.setattr(evaluate, "_probabilities", lambda x: seen["test"].add(x.dtype) or tests(x))
    for precision, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        run(tmp_path, "--precision", precision, "--device", "cpu", "--epochs", "1", "--name", precision)
        assert seen == {"loss": {dtype}, "test": {dtype}}
        [each.clear() for each in seen.values()]
    assert {p.dtype for p in cv.load(tmp_path / "bfloat16" / "adapter.safetensors").parameters()} == {torch.float32}


def test_the_record_says_what_was_done(finished):
    _, result = finished
    assert result["split"] == "test"
    assert result["examples"] == result["examples_in_full_split"] == 797
    assert result["selection"] == {"settings": "the command line", "epoch": "the last", "looks_at_test": 1}
    assert result["data"]["splits"] == {"train": 800, "val": 200, "trainval": 1000, "test": 797}
    assert result["config"]["method"] == {
        "name": "lora", "branches": 2, "density": 0.5, "masks": "random", "rank": 2, "alpha": 8.0,
    }  # fmt: skip
    assert result["interval95"][0] < result["accuracy"] < result["interval95"][1]
    assert result["environment"]["torch"] == torch.__version__


def test_the_adapter_file_gives_back_the_tested_model(finished):
    folder, result = finished
    from vtab.data import open_task
    from vtab.evaluate import Preprocessing, predict

    model, about = cv.load(folder / "adapter.safetensors"), cv.describe(folder / "adapter.safetensors")
    facts = about["info"]["preprocessing"]
    test = open_task("digits").splits["test"]
    found = predict(model, test, Preprocessing(facts["size"], tuple(facts["mean"]), tuple(facts["std"])))
    assert accuracy(found, test.labels).percent == result["accuracy"]
    assert about["classes"] == [str(d) for d in range(10)]


def test_a_finished_run_is_not_trained_again(finished, capsys):
    folder, result = finished
    before = (folder / "adapter.safetensors").stat().st_mtime_ns
    again = run(folder.parent, "--name", "a", "--branches", "2")
    assert again == json.loads(json.dumps(result))
    assert (folder / "adapter.safetensors").stat().st_mtime_ns == before
    assert "finished already" in capsys.readouterr().out


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    folder, _ = finished
    said = refused(capsys, ["--task", "digits", *TINY, "--out", str(folder.parent), "--name", "a", "--lr", "0.5"])
    assert "holds a run with branches 2 instead of 1, density 0.5 instead of 1.0, lr 0.001 instead of 0.5; give" in said


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    said = refused(capsys, ["--task", "digits", *TINY, "--out", str(tmp_path), "--name", "mine"])
    assert "exists and is no run of ours" in said
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(finished, tmp_path):
    _, result = finished
    same = run(tmp_path, "--name", "a", "--branches", "2")
    other = run(tmp_path, "--name", "b", "--branches", "2", "--seed", "1")
    one, two, three = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished[0], tmp_path / "a", tmp_path / "b")
    )
    assert one == two
    assert same["accuracy"] == result["accuracy"]
    assert one != three
    assert other["config"]["seed"] == 1


def test_tuning_never_reads_a_test_image(tmp_path, monkeypatch):
    def open_guarded(*args, **kwargs):
        data = original(*args, **kwargs)

        def read(index):
            raise AssertionError("the test split was read")

        test = data.splits["test"]
        return Data(data.task, data.classes, {**data.splits, "test": Split(test.labels, read, test.names)}, data.source)

    original = setup.open_task
    monkeypatch.setattr(setup, "open_task", open_guarded)
    result = run(tmp_path, "--stage", "tune", "--name", "a")
    assert result["split"] == "val"
    assert result["examples"] == 200
    assert result["selection"]["looks_at_test"] == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_accuracy"] == result["accuracy"]
    with pytest.raises(AssertionError, match="the test split was read"):  # the guard itself works
        run(tmp_path, "--name", "b")


def test_training_learns_and_beats_the_head_alone(tmp_path):
    settings = ["--epochs", "6", "--batch-size", "50", "--lr", "5e-3", "--drop-path", "0", "--test-limit", "200"]
    adapted = run(tmp_path, *settings, "--targets", "linear", "--name", "lora")
    argv = ["--task", "digits", "--model", "test_vit", "--weights", "random", "--img-size", "32", *settings]
    head = train.main([*argv, "--method", "linear_probe", "--out", str(tmp_path), "--name", "head"])
    assert adapted["accuracy"] > head["accuracy"] + 5
    assert head["trained_parameters"] == 0


def test_a_run_killed_at_any_epoch_ends_as_if_it_never_stopped(tmp_path, capsys):
    """A real process, killed with SIGKILL in the middle, then the same command again."""
    argv = ["--task", "digits", *TINY, "--epochs", "6", "--batch-size", "25", "--test-limit", "50"]
    train.main([*argv, "--out", str(tmp_path / "whole"), "--name", "a"])
    command = [sys.executable, "-m", "vtab.train", *argv, "--out", str(tmp_path / "killed"), "--name", "a"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "a" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(metrics.read_text().splitlines())
    assert 0 < done < 6, "the process was not killed in the middle, so this test would prove nothing"
    capsys.readouterr()
    train.main([*argv, "--out", str(tmp_path / "killed"), "--name", "a"])
    assert "resuming after epoch" in capsys.readouterr().out
    whole, killed = (json.loads((tmp_path / name / "a" / "result.json").read_text()) for name in ("whole", "killed"))
    assert whole["accuracy"] == killed["accuracy"]
    losses = [
        [json.loads(row)["loss"] for row in (tmp_path / name / "a" / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    files = [tmp_path / name / "a" / "adapter.safetensors" for name in ("whole", "killed")]
    models = [cv.load(file) for file in files]
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two), name
    assert {path.name for path in (tmp_path / "killed" / "a").iterdir()} == FILES


def test_ctrl_c_stops_with_a_line_and_the_run_goes_on_later(tmp_path, monkeypatch, capsys):
    original = Loop.epoch

    def interrupted(self, epoch, bar):
        if epoch == 1:
            raise KeyboardInterrupt
        return original(self, epoch, bar)

    argv = ["--task", "digits", *TINY, "--out", str(tmp_path), "--name", "a"]
    monkeypatch.setattr(Loop, "epoch", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.main(argv))
    assert stop.value.code == 130
    assert "the same command goes on, a training run" in capsys.readouterr().err
    monkeypatch.setattr(Loop, "epoch", original)
    assert train.main(argv)["examples"] == 797
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(tmp_path, monkeypatch, capsys):
    argv = ["--task", "digits", *TINY, "--epochs", "3", "--out", str(tmp_path), "--name", "a"]
    original, calls = loop.F.cross_entropy, []

    def breaks_in_the_second_epoch(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 8 + 3 else 1)

    monkeypatch.setattr(loop.F, "cross_entropy", breaks_in_the_second_epoch)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "not finite at step 3 of epoch 2" in said
    assert "keeps epoch 1" in said
    monkeypatch.undo()
    train.main(argv)
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_loses_no_epoch(tmp_path, capsys):
    """The second checkpoint does not fit."""
    argv = ["--task", "digits", *TINY, "--rank", "64", "--out", str(tmp_path), "--name", "a"]
    with full_disk(50_000), pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.main(argv))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said
    assert not list((tmp_path / "a").glob(".*.part*"))
    assert train.main(argv)["examples"] == 797


def test_two_processes_cannot_train_in_one_folder(tmp_path, capsys):
    from filelock import FileLock

    argv = ["--task", "digits", *TINY, "--out", str(tmp_path), "--name", "a"]
    (tmp_path / "a").mkdir()
    with FileLock(tmp_path / "a" / ".lock"):
        assert "another process trains in" in refused(capsys, argv)


REFUSED = {
    "no task": ([], "name a task"),
    "task": (["--task", "digit"], "unknown task 'digit'; did you mean 'digits'"),
    "model": (["--task", "digits", "--model", "vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'"),
    "task like no other": (["--task", "nope"], "those that need no data: dsprites_loc, dsprites_ori, digits (your own"),
    "a sweep's name": (
        ["--method", "propetl-adapter"],
        "propetl-adapter is --method adapter --masks learned --rank 64",
    ),
    "method": (["--task", "digits", "--method", "lorra"], "unknown method 'lorra'; did you mean 'lora'?"),
    "target": (["--task", "digits", "--targets", "qkw"], "no module matches 'qkw'; did you mean 'qkv'"),
    "rank": (["--task", "digits", "--rank", "0"], "rank=0 must be a whole number of at least 1"),
    "density": (["--task", "digits", "--branches", "2", "--density", "-0.5"], "density=-0.5 must lie in (0, 1]"),
    "2:4 branches": (["--task", "digits", "--branches", "3", "--masks", "2:4"], "branches is 1 or even, not 3"),
    "2:4 rank": (["--task", "digits", "--branches", "2", "--masks", "2:4", "--rank", "6"], "blocks.0.attn.qkv"),
    "epochs": (["--task", "digits", "--epochs", "0"], "--epochs 0 must be at least 1"),
    "lr": (["--task", "digits", "--lr", "-1"], "--lr -1.0 must lie in"),
    "stage": (["--task", "digits", "--stage", "test"], "choose final or tune"),
    "test limit": (["--task", "digits", "--stage", "tune", "--test-limit", "5"], "--test-limit has no use with"),
    "device": (["--task", "digits", "--device", "tpu"], "--device tpu is not on this machine; here: "),
    "flag": (["--task", "digits", "--rnak", "4"], "unrecognized arguments: --rnak 4; did you mean '--rank'"),
    "flag of others": (
        ["--task", "digits", "--method", "adapter", "--alpha", "3"],
        "--alpha 3; adapter has --branches, --density, --masks, --rank, --where, --activation, --scale; --alpha is of "
        "circulant, kronecker, ldr, lora, toeplitz",
    ),
    "flag of others, =": (
        ["--task", "digits", "--method", "bitfit", "--length=3"],
        "bitfit has no flags of its own; --length is of prefix",
    ),
    "value": (["--task", "digits", "--rank", "four"], "argument --rank: invalid int value: 'four'; see python -m"),
    "alpha": (["--task", "digits", "--alpha", "0"], "alpha=0.0 must be a finite int or float other than 0"),
    "seed": (["--task", "digits", "--seed", str(10**20)], "must lie in [0, 2147483648)"),
    "tag": (["--task", "digits", "--model", "vit_tiny_patch16_224.foo"], "has no weights tagged 'foo'; did you mean"),
    "size": (["--task", "digits", "--img-size", "8"], "test_vit cannot take images of 8 pixels; choose another"),
    "drop path": (["--task", "digits", "--model", "vgg11"], "vgg11 has no stochastic depth; pass --drop-path 0"),
    "demo size": (["--task", "digits", "--model", "demo", "--img-size", "50"], "choose a multiple"),
    "complementary": (["--task", "digits", "--masks", "complementary"], "branches is at least 2, not 1"),
    "demo weights": (
        ["--task", "digits", "--model", "demo", "--weights", "a.safetensors"],
        "--weights a.safetensors needs its timm model's name",
    ),
    "weights": (["--task", "digits", "--weights", "model.pt"], "not a .safetensors file here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_one_line_that_names_the_cure(case, tmp_path, capsys):
    argv, message = REFUSED[case]
    defaults = [] if "--model" in argv else ["--model", "test_vit"]
    defaults += [] if "--img-size" in argv else ["--img-size", "32"]
    defaults += [] if "--weights" in argv else ["--weights", "random"]
    assert message in refused(capsys, [*argv, *defaults, "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [], "a refused command left something behind"


def test_absent_pretrained_weights_name_the_choices(tmp_path, capsys, monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(timm, "create_model", offline)
    said = refused(capsys, ["--task", "digits", "--model", "vit_tiny_patch16_224", "--out", str(tmp_path)])
    for choice in ("reaches the Hugging Face hub", "--weights FILE", "--weights random", "--model demo"):
        assert choice in said
    assert "Base(" not in said, "advice for Python"


def test_a_model_that_nobody_pretrained_names_the_choices(tmp_path, capsys):
    said = refused(capsys, ["--task", "digits", "--model", "coatnet_0_224", "--out", str(tmp_path)])
    assert "error: timm has no pretrained weights of 'coatnet_0_224'; take another model, or --weights FILE" in said


def test_a_command_line_is_the_dataclasses(tmp_path):
    config = parse(["--task", "digits", "--method", "adapter", "--rank", "4", "--where", "houlsby", "--scale", "2"])
    assert config.method == cv.Adapter(rank=4, where="houlsby", scale=2.0)
    assert config.epochs == Config(task="digits").epochs
    with pytest.raises(ValueError, match="unrecognized arguments: --rank 4"):
        parse(["--task", "digits", "--method", "linear_probe", "--rank", "4"])


@pytest.mark.parametrize("config", [Config, *cv.Method.known.values()], ids=lambda c: c.__name__)
def test_every_field_is_explained_so_that_it_is_a_flag(config):
    from dataclasses import fields

    explained = cli.field_docs(config)
    assert {f.name for f in fields(config)} - {"method"} == explained.keys() - {"method"}


def test_the_help_names_the_choices_of_each_flag_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for flag in ("--stage {final,tune}", "--norm {model,imagenet,inception,none}", "--cache {none,train,all}",
                 "--protocol {honest,paper}", "--optimizer {adamw,sgd}", "--schedule {step,epoch}"):  # fmt: skip
        assert flag in said
    assert "--seed INT of initial values, masks, data order and drop-path (default: 0)" in said
    told = ("--task STR a VTAB-1k", "--protocol {honest,paper} honest", "--epochs INT passes")
    assert sorted(told, key=said.index) == list(told), "its own first"


@pytest.mark.parametrize("field", limits.CHOICES)
def test_each_choice_of_the_help_is_one_that_a_run_takes(field):
    made = {parse(["--task", "digits", f"--{field}", choice]) for choice in limits.CHOICES[field]}
    assert {getattr(config, field) for config in made} == set(limits.CHOICES[field])


def test_the_interval_is_wilsons():
    score = accuracy(np.eye(2)[[0] * 90 + [1] * 10], np.zeros(100, int))
    assert score.percent == 90
    assert score.interval == pytest.approx((82.56, 94.48), abs=0.01)  # Wilson (1927) at n = 100, p = 0.9


def test_own_weights_are_taken_from_a_safetensors_file(tmp_path):
    from safetensors.torch import save_file

    source = cv.Base("test_vit", "random", 32, seed=5).build(3)
    save_file(
        {k: v for k, v in source.state_dict().items() if not k.startswith("head.")}, tmp_path / "mine.safetensors"
    )
    run(tmp_path, "--name", "a", "--weights", str(tmp_path / "mine.safetensors"), "--test-limit", "5")
    model = cv.load(tmp_path / "a" / "adapter.safetensors")
    assert torch.equal(cv.remove(model).blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_weights_of_another_architecture_are_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file(cv.Base("test_resnet", "random").build(3).state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_text("no tensors")
    argv = ["--task", "digits", *TINY, "--out", str(tmp_path / "runs"), "--weights"]
    assert "does not fit test_vit" in refused(capsys, [*argv, str(tmp_path / "other.safetensors")])
    assert "damaged or no safetensors file" in refused(capsys, [*argv, str(tmp_path / "junk.safetensors")])


def test_weights_that_are_not_finite_are_not_checkpointed(tmp_path, monkeypatch, capsys):
    """The loss of the last step was still finite; its update was not."""
    argv = ["--task", "digits", *TINY, "--clip", "0", "--out", str(tmp_path), "--name", "a"]
    original, calls = torch.optim.AdamW.step, []

    def spoils_the_last_step_of_the_second_epoch(optimizer, *args):
        original(optimizer, *args)
        calls.append(1)
        if len(calls) == 16:
            optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoils_the_last_step_of_the_second_epoch)
    with pytest.raises(ValueError, match="not finite at step 8 of epoch 2"):
        train.main(argv)
    monkeypatch.undo()
    assert train.main(argv)["examples"] == 797
    assert "resuming after epoch 1 of 2" in capsys.readouterr().out


def test_a_process_killed_while_it_wrote_the_settings_leaves_a_usable_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".config.json.x.part.json").write_text("{")
    assert run(tmp_path, "--name", "a", "--test-limit", "5")["examples"] == 5
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES


def test_a_named_vtab_task_never_falls_back_to_class_folders(tmp_path, capsys):
    for task in ("cifar", "svhn"):
        (tmp_path / task / "images").mkdir(parents=True)
    said = refused(capsys, ["--task", "dtd", *TINY, "--data-root", str(tmp_path), "--out", str(tmp_path / "runs")])
    assert "holds no dtd/train800.txt" in said
    assert not list(tmp_path.glob("*.json"))


def test_compile_takes_whole_batches_through_the_compiler_and_changes_no_number(tmp_path, monkeypatch):
    seen = []

    def compiler(function, *, dynamic):
        assert not dynamic
        return lambda x: seen.append(len(x)) or function(x)

    plain = run(tmp_path, "--name", "plain", "--batch-size", "300")
    monkeypatch.setattr(torch, "compile", compiler)
    compiled = run(tmp_path, "--name", "compiled", "--batch-size", "300", "--compile")
    assert seen == [300] * 3 * 2  # of four batches an epoch the last has 100 images
    assert compiled["accuracy"] == plain["accuracy"]
    losses = [(tmp_path / name / "metrics.jsonl").read_text().split('"lr"')[0] for name in ("plain", "compiled")]
    assert losses[0] == losses[1]


def test_a_compiler_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: original(function, backend=fails))
    with pytest.raises(ValueError, match="--compile: .* test_vit here, RuntimeError: no C.. compiler here; leave it"):
        run(tmp_path, "--compile")
    assert not any(tmp_path.iterdir())


def test_a_second_process_takes_nothing_from_a_run_in_its_first_epoch(tmp_path, monkeypatch, capsys):
    argv = ["--task", "digits", *TINY, "--out", str(tmp_path), "--name", "a"]
    epoch, seen = Loop.epoch, []

    def visited(*args):
        if not seen:
            seen.append(refused(capsys, argv))
            assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.json", ".lock"}
        return epoch(*args)

    monkeypatch.setattr(Loop, "epoch", visited)
    train.main(argv)
    assert "another process trains in" in seen[0]
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES


@pytest.mark.parametrize("damage", ["[" * 200_000, '{"task": "dig', "\udcff", " " * (64 << 20) + "{}"])
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_of_a_run_is_named_in_a_line(name, damage, finished, tmp_path, capsys):
    folder = tmp_path / "a"
    shutil.copytree(finished[0], folder)
    (folder / name).write_bytes(damage.encode(errors="surrogateescape"))
    said = refused(capsys, ["--task", "digits", *TINY, "--out", str(tmp_path), "--name", "a", "--branches", "2"])
    assert said.startswith(f"error: {folder / name} ")


def test_a_machine_without_git_loses_no_result(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.environment(torch.device("cpu"))["commit"] is None


def test_the_commit_is_that_of_capavision_and_of_no_project_around_it(tmp_path):
    def git(*argv):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *argv], cwd=tmp_path, check=True)

    installed = tmp_path / ".venv" / "capavision.py"
    installed.parent.mkdir()
    installed.write_text("")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    assert record.commit(installed) is None
    git("add", "-f", ".venv")
    git("commit", "-q", "-m", "ours")
    assert len(record.commit(installed)) == 40
    installed.write_text("changed")
    assert record.commit(installed).endswith("-dirty")
