"""Recipes against the figures their authors' code has, and schedules against slow references."""

import math
from dataclasses import fields

import pytest
import torch
from timm.scheduler import CosineLRScheduler

import capavision as cv
from vtab import labels, recipes
from vtab.config import Config, parse
from vtab.recipes import RECIPES
from vtab.schedule import Schedule, make_optimizer
from vtab.tasks import TASKS, find

# Spot checks, copied from the authors' configuration files one by one
SPOTS = [
    ("convpass", "svhn", "scale", 100.0),
    ("convpass", "dtd", "scale", 0.01),
    ("convpass", "smallnorb_ele", "scale", 1.0),
    ("fact-tk", "oxford_iiit_pet", "rank", 16),
    ("fact-tk", "oxford_iiit_pet", "alpha", 160.0),  # s = 10
    ("fact-tk", "eurosat", "alpha", 3200.0),  # s = 100, rank 32
    ("repadapter", "caltech101", "scale", 5.0),
    ("repadapter", "dsprites_ori", "scale", 0.1),
    ("repadapter-attn", "dsprites_ori", "scale", 5.0),
    ("repadapter-attn", "resisc45", "scale", 0.1),
    ("bi-lora", "diabetic_retinopathy", "alpha", 320.0),
    ("bi-adaptformer", "diabetic_retinopathy", "scale", 1.0),
    ("bi-adaptformer", "oxford_iiit_pet", "scale", 0.01),
    ("adapter-plus-ranks", "cifar", "rank", 1),
    ("adapter-plus-ranks", "clevr_dist", "rank", 8),
    ("adapter-plus-ranks", "dsprites_loc", "rank", 32),
]


def config(*argv):
    return parse(["--task", "dtd", *argv])


def probed():
    model = cv.Base("test_vit", "random").build(2)
    cv.inject(model, cv.LinearProbe())
    return model


def rates(settings, images=1000):
    """The learning rate that each step of a run has, read from the optimizer."""
    optimizer = make_optimizer(probed(), settings, fused=False)
    steps = settings.steps(images)
    schedule, found = Schedule(optimizer, settings, steps), []
    for step in range(settings.epochs * steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(("name", "task", "field", "value"), SPOTS)
def test_a_recipe_has_the_authors_figure_for_a_task(name, task, field, value):
    method = parse(["--task", task, "--recipe", name]).method
    assert getattr(method, field) == value


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_every_recipe_makes_a_run_of_every_task(recipe):
    known = {f.name for f in fields(Config)}
    assert recipe.run.keys() <= known
    assert recipe.source
    assert len(recipe.rank_by_task) in (0, 19)
    assert len(recipe.scale_by_task) in (0, 19)
    for task in TASKS:
        made = parse(["--task", task, "--recipe", recipe.name])
        assert made.recipe == recipe.name
        assert recipe.method in (None, made.method.name)
        assert {key: getattr(made, key) for key in recipe.run} == dict(recipe.run)


def test_the_common_recipe_is_the_fields():
    made = config("--recipe", "common")
    assert (made.optimizer, made.lr, made.weight_decay, made.epochs, made.batch_size) == ("adamw", 1e-3, 1e-4, 100, 64)
    assert (made.drop_last, made.drop_path, made.clip, made.norm) == (True, 0.1, 0.0, "imagenet")
    assert made.steps(1000) == 15  # 1,500 steps in all, 40 images dropped in each epoch


def test_explicit_flags_win_and_a_scale_follows_the_rank():
    made = parse(["--task", "svhn", "--recipe", "fact-tk", "--rank", "4", "--lr", "5e-4", "--norm", "none"])
    assert made.method == cv.LoRA(rank=4, alpha=400.0)  # s = 100
    assert (made.lr, made.norm, made.schedule) == (5e-4, "none", "epoch")
    assert parse(["--task", "svhn", "--recipe", "fact-tk", "--alpha", "7"]).method.alpha == 7


def test_a_switch_of_a_recipe_can_be_turned_off():
    assert config("--recipe", "common").drop_last
    assert not config("--recipe", "common", "--no-drop-last").drop_last


def test_a_recipe_names_its_method():
    assert config("--recipe", "adapter-plus").method == cv.Adapter(rank=8, activation="gelu")
    assert config("--recipe", "vpt-linear").method == cv.LinearProbe()
    assert config("--recipe", "common", "--method", "bitfit").method == cv.Method.known["bitfit"]()


@pytest.mark.parametrize("name", ["oxford_iiit_pet", "pets", "Pets", "clevr(task='count_all')", "vtab-svhn"])
def test_a_task_has_its_row_under_every_name_that_opens_it(name):
    made, by_id = (parse(["--task", task, "--recipe", "fact-tk"]) for task in (name, find(name).id))
    assert made.method == by_id.method != cv.LoRA(rank=32)


def test_vpt_warms_up_as_each_of_its_configurations_says():
    made = {name: config("--recipe", f"vpt-{name}") for name in ("linear", "full", "bitfit")}
    assert {name: run.warmup * run.epochs for name, run in made.items()} == {"linear": 10, "full": 5, "bitfit": 5}


def test_a_task_outside_the_table_keeps_the_default_and_says_so():
    recipe = RECIPES["convpass"]
    assert parse(["--task", "digits", "--recipe", "convpass"]).method.scale == 1.0
    assert "no published scale for digits: the default" in recipe.unlike("digits")
    assert not any("no published" in line for line in recipe.unlike("dtd"))
    assert "no published" not in str(RECIPES["common"].unlike("digits"))


REFUSED = [
    (["--recipe", "noah-lra"], "unknown recipe 'noah-lra'; did you mean 'noah-lora'"),
    (
        ["--recipe", "fact-tk", "--method", "adapter"],
        "--recipe fact-tk is one of lora, not of adapter; those that fit:",
    ),
    (["--norm", "imagnet"], "--norm 'imagnet' is unknown; did you mean 'imagenet'"),
    (["--optimizer", "adam"], "--optimizer 'adam' is unknown; choose adamw or sgd"),
    (["--schedule", "linear"], "--schedule 'linear' is unknown; choose step or epoch"),
    (["--protocol", "papper"], "--protocol 'papper' is unknown; choose honest or paper"),
    (["--lr", "1e-6", "--lr-min", "1e-5"], "--lr-min 1e-05 is above the peak, --lr 1e-06"),
    (["--lr-start", "-1"], "--lr-start -1.0 must lie in"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED, ids=lambda value: " ".join(value)[:30])
def test_a_wrong_setting_names_the_right_ones(argv, message):
    with pytest.raises(ValueError, match=".") as caught:
        config(*argv)
    assert message in str(caught.value)


def test_a_batch_that_drop_last_would_drop_is_refused():
    assert Config(task="dtd", batch_size=300).steps(1000) == 4
    assert Config(task="dtd", batch_size=300, drop_last=True).steps(1000) == 3
    with pytest.raises(ValueError, match="leaves no batch of 1000 examples"):
        Config(task="dtd", batch_size=1001, drop_last=True).steps(1000)


def test_the_common_schedule_is_timms_stepped_after_each_epoch():
    """The released loop, written out: train an epoch, then scheduler.step(epoch)."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=100, warmup_t=10, lr_min=1e-5, warmup_lr_init=1e-6)
    expected = []
    for epoch in range(100):
        expected += [optimizer.param_groups[0]["lr"]] * 15
        scheduler.step(epoch)
    assert rates(config("--recipe", "common")) == expected
    assert expected[0] == expected[29] == 1e-6
    assert expected[30] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 10)
    at_98 = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * 98 / 100))
    assert expected[-1] == pytest.approx(at_98)


def test_the_default_schedule_is_a_cosine_by_step():
    made = Config(task="dtd", epochs=10, batch_size=100, lr=2e-3, warmup=0.2, lr_start=1e-4, lr_min=1e-5)
    total, rising = 100, 20
    expected = [
        1e-4 + (2e-3 - 1e-4) * i / rising
        if i < rising
        else 1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + math.cos(math.pi * i / total))
        for i in range(total)
    ]
    assert rates(made) == pytest.approx(expected)
    assert max(rates(Config(task="dtd", epochs=10))) <= 1e-3


def test_a_linear_decay_and_a_warm_up_in_steps_are_those_of_transformers():
    """Up from 0 over the warm-up's steps, then straight down to 0, which the step after the last would have."""
    made = Config(task="dtd", epochs=10, batch_size=100, lr=2e-3, warmup=30, decay="linear")
    total, rising = 100, 30
    expected = [2e-3 * (i / rising if i < rising else (total - i) / (total - rising)) for i in range(total)]
    assert rates(made) == pytest.approx(expected)
    share = Config(task="dtd", epochs=10, batch_size=100, lr=2e-3, warmup=0.3, decay="linear")
    assert rates(share) == rates(made)
    assert rates(Config(task="dtd", epochs=1, batch_size=100, warmup=1))[-1] < 1e-3  # 1 is the whole of it


def test_a_warm_up_longer_than_the_schedule_is_refused():
    with pytest.raises(ValueError, match="--warmup 200 is longer than the whole schedule, 100 steps; pass a share"):
        rates(Config(task="dtd", epochs=10, batch_size=100, warmup=200))


def test_sgd_has_momentum():
    optimizer = make_optimizer(probed(), config("--optimizer", "sgd"), fused=False)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.9


LABELS = [
    ([], "lora r8"),
    (["--branches", "2"], "capaboost-lora r8 x2"),
    (["--branches", "2", "--masks", "complementary"], "capaboost-lora r8 x2 masks=complementary"),
    (["--branches", "2", "--density", "0.25"], "capaboost-lora r8 x2 density=0.25"),
    (["--alpha", "16"], "lora r8 alpha=16"),
    (["--alpha", "16", "--tune"], "lora r8"),
    (["--method", "adapter", "--rank", "4", "--where", "houlsby"], "adapter r4 where=houlsby"),
    (["--method", "prefix"], "prefix l10"),
    (["--method", "bitfit"], "bitfit"),
    (["--method", "linear-probe"], "linear_probe"),
    (["--targets", "qkv"], "lora r8 targets=qkv"),
    (["--recipe", "bi-lora"], "lora r32"),
    (["--recipe", "bi-lora", "--alpha", "3"], "lora r32 alpha=3"),
    (["--recipe", "adapter-plus-ranks"], "adapter activation=gelu"),
    (["--recipe", "adapter-plus-ranks", "--rank", "5"], "adapter r5 activation=gelu"),
]


@pytest.mark.parametrize(("argv", "label"), LABELS, ids=lambda value: " ".join(value)[:40])
def test_a_methods_label_is_the_same_in_every_task_of_a_table(argv, label):
    assert {labels.method(parse(["--task", task, *argv])) for task in ("cifar", "svhn", "digits")} == {label}


@pytest.mark.parametrize("width", [60, 200])
def test_the_list_has_all_that_recipes_say_and_fits_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    told = recipes.listing(RECIPES)
    assert max(map(len, told.splitlines())) <= min(width, recipes.WIDEST)
    whole = " " + " ".join(told.split())
    for name, recipe in RECIPES.items():
        own = whole.partition(f" {name} method ")[2].partition(" source ")[0]
        assert f"searched {recipe.searched}" in own
        assert f"reported {recipe.reported}" in own
        for note in recipe.differs:
            number = whole.partition(f"] {note}")[0].rpartition("[")[2]
            assert f"[{number}]" in own


def test_the_scales_are_listed_by_task():
    assert "| svhn | 100 | rank 32, 100 | 10 | 10 | 10 | 10 | rank 16 |" in recipes.scales()


def test_runs_from_before_these_flags_keep_their_names():
    old = Config(task="digits")
    assert old.digest() == "b3b9c6dc"  # of the settings' first form
    assert old.digest() != Config(task="digits", norm="none").digest()
    assert Config(task="digits", protocol="paper").folder().name.startswith("digits-demo-lora-paper-s0-")
