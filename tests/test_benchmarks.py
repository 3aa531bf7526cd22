"""The sweeps over timm: what they report where a promise holds, where it is refused and where it is broken."""

import runpy
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import capavision as cv
from benchmarks import architectures, coverage
from tests.conftest import create


def results(rows):
    return {(row.family, row.method): row.result for row in rows}


def test_the_coverage_of_two_families_and_its_document(tmp_path, capsys):
    out = tmp_path / "coverage.md"
    rows = coverage.main(["--families", "resnet,vision_transformer", "--methods", "lora,adapter", "--out", str(out)])
    assert all(row.result == "ok" for row in rows)
    assert [(row.family, row.method) for row in rows] == [
        ("resnet", "lora"),
        ("resnet", "adapter"),
        ("resnet", "batch norms"),
        ("vision_transformer", "lora"),
        ("vision_transformer", "adapter"),
    ]
    printed, written = capsys.readouterr().out, out.read_text()
    for row in rows:
        assert " | ".join(map(str, row.cells)) in written
        assert " | ".join(map(str, row.cells)) in printed
    assert f"torch {torch.__version__}" in written
    assert "python -m benchmarks.coverage --families resnet,vision_transformer --methods lora,adapter" in written


def test_what_inject_refuses_is_a_row_with_its_sentence(monkeypatch):
    monkeypatch.setitem(coverage.SETTINGS, "adapter", (cv.Adapter(where="parallel"), None))
    (row,) = coverage.main(["--families", "starnet", "--methods", "adapter"])[:1]
    assert row.result.startswith("refused: StarNet has no default host for Adapter")
    assert row.outcome is None


class Outer(cv.WeightDelta):
    """ΔW = u vᵀ, but for one fault."""

    factored = True

    def __init__(self, fault, site):
        super().__init__()
        self.fault = fault
        self.u = nn.Parameter(site.zeros(site.n_out) + 0.1 * (fault == "start"))
        self.v = nn.Parameter(site.zeros(site.n_in) + 0.1)

    def weight(self):
        if self.fault == "dead":
            return torch.outer(self.u, self.v.detach())
        return torch.outer(self.u, self.v) * (self.fault != "still")

    def forward(self, x):
        return super().forward(x) * (2 if self.fault == "forward" else 1)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("", "ok"),
        ("start", "the start is not the plain model"),
        ("still", "the delta moved nothing"),
        ("dead", "delta.v is dead"),
        ("forward", "has another gradient than the chain rule gives"),
    ],
)
def test_a_broken_promise_is_told(monkeypatch, fault, says):
    monkeypatch.setattr(cv.Method, "known", dict(cv.Method.known))

    @dataclass(frozen=True)
    class Broken(cv.Method):
        fault: str
        name = "broken"
        placement = cv.WeightDelta

        def build(self, site):
            return Outer(self.fault, site)

    result, outcome = coverage.attempt("vision_transformer", Broken(fault), "qkv")
    assert says in result
    assert result.startswith("FAILED: ") == bool(fault)
    assert (outcome is None) == bool(fault)


@pytest.mark.parametrize("command", [coverage.main, architectures.main])
@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--methods", "lorra"], "--methods: 'lorra' is unknown; did you mean 'lora'"),
        (["--methods", "linear_probe"], "--methods: 'linear_probe' is unknown"),
        (["--families", "resnets"], "resnets"),
        (["--limit", "many"], "many"),
    ],
)
def test_flags_that_cannot_be_served_are_refused(command, argv, match):
    with pytest.raises(ValueError, match=match):
        command(argv)


def test_architectures_are_counted_on_the_meta_device(tmp_path, capsys):
    out = tmp_path / "architectures.md"
    rows = architectures.main(["--limit", "2", "--methods", "lora,adapter", "--out", str(out)])
    assert [(row.architecture, row.family, row.method, row.result, row.hosts) for row in rows[:2]] == [
        ("beit_base_patch16_224", "beit", "lora", "ok", 12),
        ("beit_base_patch16_224", "beit", "adapter", "ok", 12),
    ]
    assert rows[0].trained == 12 * 2 * 8 * (768 + 768)
    assert rows[1].trained == 12 * (32 * (768 + 768 + 1) + 768)
    assert "| beit | lora | 2 | 2 |" in out.read_text()
    assert "architectures" in capsys.readouterr().out


def test_every_architecture_of_timm_is_in_the_sweep():
    import timm

    assert architectures.architectures().keys() == set(timm.list_models())


def test_what_fails_in_one_architecture_is_its_row(monkeypatch):
    def fail(model, method, **_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(cv, "inject", fail)
    rows = architectures.main(["--limit", "1", "--methods", "lora"])
    assert [row.result for row in rows] == ["FAILED: RuntimeError: no such luck"]
    assert "no such luck" in architectures.troubles(rows)


def test_the_suites_floor_is_counted_from_the_flops(monkeypatch, capsys):
    """Two images an epoch on a machine that does 1 GFLOP/s: the floor by hand."""
    from benchmarks import vtab_suite

    monkeypatch.setattr(vtab_suite, "TRAINING", 2)
    monkeypatch.setattr(vtab_suite, "POOL", 4)
    monkeypatch.setattr(vtab_suite, "matmul_rate", lambda device: 1e9)
    monkeypatch.setattr(vtab_suite, "forward_flops", lambda model, x: 10**7)
    vtab_suite.main(["--model", "test_vit", "--tasks", "kitti,eurosat", "--epochs", "50", "--share", "0.02"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    floors = {line[0].removeprefix("| "): float(line[7].replace(",", "")) for line in lines[2:5]}
    kitti, eurosat = (0.01 * (2 * 2 * 50 + count) for count in (711, 5400))
    assert floors == pytest.approx({"kitti": kitti, "eurosat": eurosat, "2 tasks": kitti + eurosat}, abs=0.06)
    shares = [float(line[1].removesuffix(" % |")) for line in lines if line[0].endswith(("data", "ward", "optimizer"))]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert len(shares) == 4


def test_changing_adapters_is_timed(capsys):
    from benchmarks import swap

    swap.main(["--model", "test_vit", "--rounds", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [row[0].removeprefix("| ") for row in rows] == [*swap.CHANGES, "from nothing"]
    assert all(float(row[2].replace(",", "").removesuffix(" |")) >= 0 for row in rows)


@pytest.mark.parametrize(("model", "without"), [("test_vit", "conv"), ("test_resnet", "linear")])
def test_a_step_is_timed_beside_its_floor(model, without, capsys):
    from benchmarks import step

    pytest.importorskip("peft")
    vits = ("qkv", "prefix", "adapter") if model == "test_resnet" else ("late qkv", "cached prefix")  # it has 2 blocks
    cases = [case for case in step.CASES if not case.endswith((without, *vits))]
    ratios = step.main(["--model", model, "--batch", "2", "--rounds", "1", "--cases", ";".join(cases)])
    assert list(ratios) == cases
    assert ratios["floor"] == 1
    printed = {line.split(" | ")[0][2:]: line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:-1]}
    assert printed.keys() == set(cases)
    trained = {case: int(row[1].replace(",", "")) for case, row in printed.items()}
    assert trained["floor"] < min(count for case, count in trained.items() if case != "floor")
    kept = {case: float(row[4].removesuffix(" |")) for case, row in printed.items()}
    assert kept["floor"] == 1
    assert kept["full"] > 1
    assert all(share > 0.5 for share in kept.values()), kept


def test_the_cached_prefix_is_a_case_of_its_own(monkeypatch):
    from benchmarks import step

    late = step.ours(step.CAPABOOST, ["blocks.1.attn.qkv"])
    monkeypatch.setattr(step, "CASES", {"floor": step.floor, "late qkv, cached prefix": late})
    assert step.main(["--model", "test_vit", "--rounds", "1", "--cases", "late qkv, cached prefix"]).keys() == {
        "floor", "late qkv, cached prefix",
    }  # fmt: skip


def test_a_forward_pass_is_timed_beside_the_plain_models(capsys):
    from benchmarks import evaluation

    pytest.importorskip("peft")
    ratios = evaluation.main(["--model", "test_vit", "--batch", "2", "--rounds", "1"])
    assert list(ratios) == list(evaluation.CASES)
    assert ratios["plain"] == 1
    plain, folded, merged = (
        [type(module) for module in evaluation.CASES[case](create("test_vit")).modules()]
        for case in ("plain", "capaboost linear, folded", "peft linear, merged")
    )
    assert plain == folded == merged


def test_memory_is_what_autograd_keeps():
    """x of a Linear and of a GELU, whose weights are there anyway: 2 × (2 · 8) floats, and the loss's own few."""
    from benchmarks.step import Trainee

    net = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    kept = Trainee(net, torch.randn(2, 8), torch.arange(2)).memory() * 1e6
    assert 2 * 64 <= kept <= 2 * 64 + 100


def test_the_growth_of_a_step_is_measured_and_drawn(tmp_path, monkeypatch, capsys):
    from benchmarks import growth

    monkeypatch.setattr(growth, "MIDDLE", {"rank": 2, "branches": 2, "tokens": 8, "width": 8})
    monkeypatch.setattr(growth, "AXES", {"rank": (1, 2), "branches": (1, 2), "tokens": (2, 8), "width": (4, 8)})
    found = growth.main(["--rounds", "1", "--out", str(tmp_path / "growth.svg")])
    assert {axis: len(points) for axis, points in found.items()} == dict.fromkeys(growth.AXES, 2)
    assert all(ratio > 0 for points in found.values() for each in points for ratio in each.values())
    said = capsys.readouterr().out
    assert "expected 4" in said
    assert "expected 16" in said
    assert (tmp_path / "growth.svg").read_text().startswith("<?xml")


def test_the_crossing_of_two_lines():
    from benchmarks.growth import crossing

    points = [{"merged": m, "factored": f} for m, f in ((3, 1), (2, 1), (1, 2))]
    assert crossing((1, 4, 16), points) == pytest.approx(8)
    assert crossing((1, 4), points[:2]) is None


def test_what_happens_around_training_is_timed(capsys):
    from benchmarks import lifecycle

    lifecycle.main(["--model", "test_vit", "--rounds", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert [row[0].removeprefix("| ") for row in rows] == list(lifecycle.METHODS)
    assert all(float(row[6].split(" + ")[1].split()[0]) <= 64 for row in rows), "KB beside the values"


def test_the_gradients_of_structured_updates_are_timed_beside_what_is_counted():
    from benchmarks import structured

    name, host, *times, ratio, counted = structured.gradients(cv.Kronecker(), (16, 8), 4, torch.device("cpu"), 2)
    assert (name, host, counted) == ("kronecker", "8 → 16", "4.50")
    assert all(float(time) >= 0 for time in times)
    assert "…" in ratio


REFUSED = {
    "lifecycle --rounds 0": "--rounds 0 must be at least 1",
    "step --cases nosuch": "--cases: 'nosuch' is unknown",
    "evaluation --cases plain;nosuch": "--cases: 'nosuch' is unknown",
    "step --rounds 0": "--rounds 0 must be at least 1",
    "growth --rounds 0": "--rounds 0 must be at least 1",
    "swap --model nosuchmodel": "unknown timm model 'nosuchmodel'; did you mean",
    "export_split --rounds 0": "--rounds 0 must be at least 1",
    "swap --rounds 0": "--rounds 0 must be at least 1",
    "swap --device tpu": "--device tpu is not on this machine; here: ",
    "structured --tokens -1": "--tokens -1 must be at least 1",
    "structured --rouns 3": "unrecognized arguments: --rouns 3; did you mean '--rounds'",
    "parameters --model test_vit": "unrecognized arguments: --model test_vit",
    "vtab_suite --model nosuchmodel": "unknown timm model 'nosuchmodel'; did you mean",
    "vtab_suite --tasks kiti": "--tasks: 'kiti' is unknown; did you mean 'kitti'",
    "vtab_suite --share 0": "--share 0.0 must lie in (0, 1]",
    "vtab_suite --epochs 0": "--epochs 0 must be at least 1",
    "text --arms lora-r3": "--arms: 'lora-r3' is unknown; did you mean",
    "text --test 0": "--test 0 must be at least 1",
    "coverage --families resnets": "--families: 'resnets' is unknown; did you mean",
    "architectures --limit many": "argument --limit: invalid int value: 'many'; see",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_mistake_is_one_line_and_exit_code_2(line, monkeypatch, capsys):
    name, *argv = line.split()
    monkeypatch.setattr("sys.argv", [name, *argv])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert REFUSED[line] in said
