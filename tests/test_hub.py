"""The hub, played by a local folder: what is uploaded, what comes down, what is said when it does not work."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants, errors
from safetensors import safe_open
from safetensors.torch import save_file

import capavision as cv
from capavision import hub
from capavision.base import Base
from tests.conftest import assert_moved, assert_unchanged, awaken_deltas, create, images, outputs, snapshot, tiny_vit

RANDOM = Base("test_vit", weights="random", seed=3)
METHOD = cv.LoRA(rank=4, branches=2)


class LocalHub:
    """huggingface_hub's two doors over a folder: root/user/name/revision/file."""

    def __init__(self, root):
        self.root, self.log = root, []

    def __call__(self, token=None):  # HfApi(token=…)
        self.token = token
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)
        self.log.append((repo_id, private, self.token))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id / "main", dirs_exist_ok=True)
        self.log.append(commit_message)

    def hf_hub_download(self, repo_id, filename, *, revision):
        return str(self.root / repo_id / (revision or "main") / filename)


@pytest.fixture
def local(tmp_path, monkeypatch):
    fake = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def adapted(model=None, method=METHOD, seed=5):
    model = RANDOM.build(5).eval() if model is None else model
    cv.inject(model, method)
    return awaken_deltas(model, seed)


def written(path, model=None, **kwargs):
    cv.save(model or adapted(), path, base=RANDOM, **kwargs)
    return path


def front(card):
    """The YAML between the two lines of dashes, read as the hub reads it."""
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


# There and back ------------------------------------------------------------------------------------------------------


def test_what_was_pushed_is_loaded_by_its_name_alone(local, tmp_path):
    model, x = adapted(), images(160)
    file = written(tmp_path / "it.safetensors", model, classes=list("abcde"))
    assert cv.push_to_hub(file, "me/task", token="t", private=True) == "https://huggingface.co/me/task"
    assert local.log == [("me/task", True, "t"), "Upload an adapter"]
    assert sorted(p.name for p in (local.root / "me/task/main").iterdir()) == ["README.md", "adapter.safetensors"]
    assert (local.root / "me/task/main/adapter.safetensors").read_bytes() == file.read_bytes()
    loaded = cv.load("hf-hub:me/task")
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    assert_moved(outputs(loaded, x), outputs(RANDOM.build(5).eval(), x))
    assert cv.describe("hf-hub:me/task") == cv.describe(file)


def test_a_model_is_saved_and_pushed_in_one_go(local):
    model, x = adapted(tiny_vit()), images()
    cv.push_to_hub(model, "me/task", commit_message="first")
    assert local.log[-1] == "first"
    assert torch.equal(outputs(cv.load("hf-hub:me/task", tiny_vit()), x), outputs(model, x))


def test_a_revision_is_what_follows_the_at(local, tmp_path):
    old, new, x = adapted(tiny_vit()), adapted(tiny_vit(), seed=99), images()
    cv.push_to_hub(old, "me/task")
    (local.root / "me/task/main").rename(local.root / "me/task/v1.0")
    cv.push_to_hub(new, "me/task")
    assert torch.equal(outputs(cv.load("hf-hub:me/task@v1.0", tiny_vit()), x), outputs(old, x))
    assert torch.equal(outputs(cv.load("hf-hub:me/task", tiny_vit()), x), outputs(new, x))
    assert_moved(outputs(old, x), outputs(new, x))


def test_an_adapter_is_pushed_on_from_one_repo_to_another(local, tmp_path):
    cv.push_to_hub(written(tmp_path / "it.safetensors"), "me/task")
    cv.push_to_hub("hf-hub:me/task", "you/copy")
    files = [local.root / repo / "main" / hub.FILE for repo in ("me/task", "you/copy")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "hf-hub:you/copy" in (files[1].parent / "README.md").read_text()


def test_a_local_path_never_asks_the_hub(local, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert cv.describe(written(tmp_path / "hf-hub.safetensors"))["num_classes"] == 5
    assert hub.fetched(Path("hf-hub/it")) == Path("hf-hub/it")


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_file_holds(tmp_path):
    model = tiny_vit(num_classes=3)
    report = cv.inject(model, cv.LoRA(rank=4, alpha=6.0, branches=2, masks="complementary"))
    base = Base("vit_tiny_patch16_224.augreg_in21k_ft_in1k", img_size=32, kwargs={"depth": 2})
    cv.save(model, tmp_path / "it", base=base, classes=["cat", "dog", "owl"], info={"task": "pets"})
    card = cv.model_card(
        tmp_path / "it", repo_id="me/pets", metrics={"accuracy": 91.25}, dataset="you/pets", license="apache-2.0"
    )
    assert front(card) == {
        "library_name": "capavision",
        "pipeline_tag": "image-classification",
        "tags": ["capavision", "timm", "peft", "lora"],
        "base_model": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "base_model_relation": "adapter",
        "datasets": ["you/pets"],
        "license": "apache-2.0",
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": "pets",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "you/pets", "type": "you/pets"},
                        "metrics": [{"type": "accuracy", "value": 91.25}],
                    }
                ],
            }
        ],
    }
    for row in (
        "| task | pets |",
        "| data | you/pets |",
        "| base | vit_tiny_patch16_224.augreg_in21k_ft_in1k, 32 px, depth=2 |",
        "| 3 classes | cat, dog, owl |",
        "| 2 hosts | blocks.0.attn.qkv … blocks.1.attn.qkv, rows q, v |",
        f"| values trained, without the head | {report.trained:,} |",
        f"| values of the head | {report.head:,} |",
        "| accuracy | 91.25 |",
        'model = cv.load("hf-hub:me/pets")',
    ):
        assert row in card, row
    method = next(line for line in card.splitlines() if line.startswith("| method |"))
    for field in ("lora(", "rank=4", "alpha=6.0", "branches=2", "density=0.5", "masks='complementary'"):
        assert field in method


def test_the_lines_that_load_it_run(local, tmp_path):
    cv.push_to_hub(written(tmp_path / "it.safetensors"), "me/task")
    card = (local.root / "me/task/main/README.md").read_text()
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert type(names["model"]) is type(create("test_vit"))


def test_the_card_of_a_random_base_names_no_base_on_the_hub(tmp_path):
    card = cv.model_card(written(tmp_path / "it"))
    assert not {"base_model", "base_model_relation", "metrics", "model-index", "datasets"} & front(card).keys()
    assert "| base | test_vit, weights random |" in card
    assert f'cv.load("{tmp_path / "it"}")' in card


def test_without_a_base_the_card_asks_for_one(tmp_path):
    model = tiny_vit()
    model.pretrained_cfg = None
    cv.save(adapted(model), tmp_path / "it")
    assert 'cv.load("hf-hub:me/x", base)  # base: the timm model' in cv.model_card(tmp_path / "it", repo_id="me/x")


def test_several_injections_are_several_methods(tmp_path):
    model = tiny_vit()
    reports = [cv.inject(model, METHOD), cv.inject(model, cv.Adapter(rank=4))]
    cv.save(model, tmp_path / "it", base=RANDOM)
    card = cv.model_card(tmp_path / "it")
    assert front(card)["tags"][-2:] == ["lora", "adapter"]
    assert f"| values trained, without the head | {sum(r.trained for r in reports):,} |" in card
    assert card.count("| method |") == 2


@pytest.mark.parametrize(
    ("info", "metrics", "shown"), [({"accuracy": 80.5}, None, "80.5"), ({"accuracy": 1}, {}, None)]
)
def test_the_metric_is_the_files_own_unless_given(info, metrics, shown, tmp_path):
    card = cv.model_card(written(tmp_path / "it", info=info), metrics=metrics)
    assert (f"| accuracy | {shown} |" in card) == (shown is not None)
    assert ("accuracy" in front(card).get("metrics", [])) == (shown is not None)


HOSTILE = [
    "a|b",
    "---\nlicense: mit",
    "<script>x</script>",
    "`code`",
    "![i](http://x)",
    "\x1b[31m",
    "a: *b",
    "π",
    "_c_d",
]


def test_text_from_the_file_breaks_neither_yaml_nor_markdown(tmp_path):
    model = adapted(tiny_vit(num_classes=len(HOSTILE)))
    task = 'x"\n---\nlicense: "mit\n# y | <b>'
    cv.save(model, tmp_path / "it", base=RANDOM, classes=HOSTILE, info={"task": task})
    card = cv.model_card(tmp_path / "it", metrics={"top|1": 3})
    head = front(card)
    assert "license" not in head
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == task
    body = card.split("\n---\n", 1)[1]
    assert "---" not in [line.strip() for line in body.splitlines()]
    assert not any(mark in body for mark in ("<script", "<b>", "`code`", "](", "\x1b"))
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert len(rows) == 10
    assert all(row.count("|") == 3 for row in rows)
    assert "π" in body


def test_many_classes_are_cut(tmp_path):
    model = adapted(tiny_vit(num_classes=30))
    cv.save(model, tmp_path / "it", base=RANDOM, classes=[f"c{i}" for i in range(30)])
    card = cv.model_card(tmp_path / "it")
    assert "| 30 classes | c0, " in card
    assert "c19 … |" in card
    assert "c20" not in card


@pytest.mark.parametrize("change", [{"injections": [{}]}, {"info": 3}, {"base": {"model": "x"}}, {"classes": 7}])
def test_damaged_metadata_is_called_so(change, tmp_path):
    with safe_open(written(tmp_path / "it"), "pt") as file:
        metadata = json.loads(file.metadata()["capavision"]) | change
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "it", {"capavision": json.dumps(metadata)})
    with pytest.raises(ValueError, match="its metadata is damaged"):
        cv.model_card(tmp_path / "it")


# What is said when it does not work ----------------------------------------------------------------------------------


def http(kind, status):
    """An error as huggingface_hub raises it, whichever transport it stands on."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error.\nRequest ID: 17")
    error.response = type("Response", (), {"status_code": status})()
    return error


def transport_error():
    """What the transport raises by itself, a refused connection: no OSError where it is httpx."""
    base = next(kind for kind in errors.HfHubHTTPError.__mro__[1:] if issubclass(kind, Exception))
    return base("connection refused")


FAILURES = {
    "no repo": (http(errors.RepositoryNotFoundError, 404), ValueError, "no model repo me/task .*`hf auth login`"),
    "gated": (http(errors.GatedRepoError, 403), ValueError, "no model repo me/task that this account may use"),
    "no revision": (http(errors.RevisionNotFoundError, 404), ValueError, "me/task has no revision 'v2'"),
    "no adapter": (errors.EntryNotFoundError("no"), ValueError, "me/task holds no adapter.safetensors"),
    "offline": (errors.LocalEntryNotFoundError("no"), OSError, "out of reach and me/task is not on this machine"),
    "offline by choice": (errors.OfflineModeIsEnabled("no"), OSError, "unset HF_HUB_OFFLINE"),
    "forbidden": (http(errors.HfHubHTTPError, 403), OSError, r"into me/task \(HTTP 403\); log in with a token"),
    "not logged in": (http(errors.HfHubHTTPError, 401), OSError, r"into me/task \(HTTP 401\)"),
    "server": (http(errors.HfHubHTTPError, 500), OSError, r"me/task: .* \(HfHubHTTPError: 500 Client Error.\)"),
    "connection": (transport_error(), OSError, "me/task: the hub did not answer .*connection refused"),
    "disk": (OSError("no space left"), OSError, "me/task: .*no space left"),
}


@pytest.mark.parametrize(("error", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_failures_become_one_line_that_names_repo_and_cure(error, kind, message, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(LocalHub, "create_repo", fail)
    monkeypatch.setattr(huggingface_hub, "HfApi", LocalHub(None))
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(kind, match=message) as caught:
        cv.load("hf-hub:me/task@v2", model)
    assert "\n" not in str(caught.value)
    assert_unchanged(model, before)
    with pytest.raises(kind, match=message.replace("v2", "")) as caught:
        cv.push_to_hub(adapted(tiny_vit()), "me/task")
    assert "\n" not in str(caught.value)


@pytest.fixture
def nobody():
    """The address of a hub that refuses every connection."""
    with socket.socket() as held:  # bound, so that nobody else listens there
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize("call", ["cv.Base('test_vit').build(5)", "cv.load('hf-hub:me/task')"])
def test_out_of_the_hubs_reach_it_is_asked_once_and_not_heard(call, nobody, tmp_path):
    """In a process of its own: huggingface_hub reads its settings at import."""
    code = f"""
import capavision as cv, time
from huggingface_hub import constants
start = time.perf_counter()
try:
    {call}
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
assert time.perf_counter() - start < 15 and constants.HF_HUB_OFFLINE is False
"""
    own = {"HF_ENDPOINT": nobody, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=os.environ | own, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    (said,) = done.stdout.splitlines()
    assert "not on this machine" in said


def test_a_file_in_the_cache_needs_no_hub(nobody, tmp_path, monkeypatch):
    kept = tmp_path / "models--me--task"
    written(kept / "snapshots" / ("0" * 40) / "adapter.safetensors")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    asked = []
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: Asked(asked))
    assert Path(hub.fetched("hf-hub:me/task")).is_file()
    assert asked == [nobody]


class Asked:
    """A session without a network that notes what it was asked for."""

    def __init__(self, asked):
        self.asked = asked

    def head(self, url, timeout):
        self.asked.append(url)
        raise transport_error()


def test_faults_of_our_own_are_not_blamed_on_the_hub(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("ours")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(KeyError, match="ours"):
        cv.load("hf-hub:me/task")


@pytest.mark.parametrize(
    "name", ["", "task", "a/b/c", "../x", "me/..", "me/a b", "me/a--b", "/task", "me/", "me/task.git"]
)
def test_malformed_repo_ids_are_refused_before_anything_is_sent(name, local):
    for call in (lambda: cv.load(f"hf-hub:{name}"), lambda: cv.push_to_hub(adapted(tiny_vit()), name)):
        with pytest.raises(ValueError, match="is no repo id .* write user/name"):
            call()
    assert local.log == []


def test_an_at_without_a_revision_is_refused(local):
    with pytest.raises(ValueError, match="ends in @ without a revision"):
        cv.load("hf-hub:me/task@")


def test_a_file_of_others_is_not_pushed(local, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="not one that capavision.save wrote"):
        cv.push_to_hub(tmp_path / "x.safetensors", "me/task")
    with pytest.raises(ValueError, match="carries no injection"):
        cv.push_to_hub(tiny_vit(), "me/task")
    assert local.log == []


def test_the_real_library_says_offline():
    """conftest sets HF_HUB_OFFLINE: nothing is faked here."""
    with pytest.raises(OSError, match="me/task"):
        cv.load("hf-hub:me/task")
    with pytest.raises(OSError, match="me/task"):
        cv.push_to_hub(adapted(tiny_vit()), "me/task")


@pytest.mark.parametrize("value", [None, "high"])
def test_an_accuracy_that_is_no_number_is_told_apart_by_where_it_came_from(tmp_path, value):
    model = tiny_vit()
    cv.inject(model, cv.LoRA(rank=2))
    cv.save(model, path := tmp_path / "it.safetensors", info={"accuracy": value or [value]})
    with pytest.raises(TypeError, match=rf"metrics\['accuracy'\]={value!r} must be a number"):
        cv.model_card(path, metrics={"accuracy": value})
    with pytest.raises(ValueError, match=r"it\.safetensors: its metadata is damaged"):
        cv.model_card(path)
