"""An adapter for others: its file and a model card that says what it is and how to load it, on the Hugging Face hub."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from capavision.host import SLOT
from capavision.hub import FILE, SCHEME, check_repo, fetched, upload
from capavision.learned import BITS
from capavision.metadata import damaged
from capavision.state import describe, save

SHOWN = 20  # class names in the card


def push_to_hub(
    source: str | os.PathLike[str] | nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload an adapter",
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> str:
    """Upload an adapter and its model card; `load("hf-hub:" + repo_id)` is then all that others need.

    Args:
        source: a file written by `save`, or an injected model, which is saved with its defaults.
        repo_id: "user/name"; the repo is made where it is missing, else its adapter and its README are replaced.
        private: whether a new repo is visible to its owner only.
        token: an access token that may write; None takes the one of `hf auth login`.
        commit_message: the first line of the commit.
        metrics, dataset, license: for the card, see `model_card`.

    Returns:
        The repo's address.

    Raises:
        ValueError: a malformed repo id, a file that is none of ours, a model without injections.
        OSError: the hub is out of reach, or refuses the account.

    >>> push_to_hub("runs/mine/adapter.safetensors", "me/dsprites", metrics={"accuracy": 91.1})  # doctest: +SKIP
    'https://huggingface.co/me/dsprites'
    """
    check_repo(repo_id)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(source, nn.Module):
            save(source, folder / FILE)
        else:
            describe(source)
            shutil.copyfile(fetched(source), folder / FILE)
        card = model_card(folder / FILE, repo_id=repo_id, metrics=metrics, dataset=dataset, license=license)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return upload(folder, repo_id, private=private, token=token, message=commit_message)


def model_card(
    path: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> str:
    """README.md of an adapter file: YAML for the hub, then task, method, values trained, metrics, classes, loading.

    Args:
        path: a file written by `save`.
        repo_id: where it will lie on the hub; None writes a local file's name into the lines that load it.
        metrics: name and value, {"accuracy": 91.1}; None takes "accuracy" from the file's info, if it is there.
        dataset: the training set's id on the hub.
        license: as the hub spells it, "apache-2.0".

    Raises:
        ValueError: not one of our files, or damaged.
        TypeError: a metric that is no number.

    >>> print(model_card("dtd.safetensors", repo_id="me/dtd", metrics={"accuracy": 71.2}))  # doctest: +SKIP
    """
    for kind, value in (metrics or {}).items():
        _check_number(kind, value)
    about = describe(path)
    name = (repo_id or Path(path).stem).rpartition("/")[2]
    try:
        found = about["info"].get("accuracy") if metrics is None else None
        metrics = dict(metrics or {}) if found is None else {"accuracy": found}
        rows = [*_task_rows(about, dataset), *_method_rows(about, _sizes(path)), *_metric_rows(metrics)]
        front = _front_matter(about, name, metrics, dataset, license)
        body = _body(name, rows, f"{SCHEME}{repo_id}" if repo_id else os.fspath(path), about["base"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise damaged(path, repr(error)) from error
    return f"---\n{front}\n---\n\n{body}"


def _check_number(kind: str, value: object) -> None:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"metrics[{kind!r}]={value!r} must be a number") from error


def _front_matter(
    about: dict[str, Any], name: str, metrics: Mapping[str, float], dataset: str | None, license: str | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-classification"
    on = dataset or about["info"].get("task")
    results = (
        [EvalResult(task, str(on), str(on), kind, float(value)) for kind, value in metrics.items()] if on else None
    )
    base = _base_on_hub(about["base"])
    methods = [str(plan["method"]["name"]) for plan in about["injections"]]
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=[dataset] if dataset else None,
        eval_results=results or None,
        library_name="capavision",
        license=license,
        metrics=list(metrics) or None,
        model_name=name,
        pipeline_tag=task,
        tags=["capavision", "timm", "peft", *methods],
    )
    return data.to_yaml()


def _base_on_hub(base: dict[str, Any] | None) -> str | None:
    """The hub's id of the base, where its weights are timm's own."""
    if not base or base["weights"] != "pretrained":
        return None
    from timm.models import get_pretrained_cfg, is_model

    cfg = get_pretrained_cfg(base["model"], allow_unregistered=True) if is_model(base["model"]) else None
    return cfg.hf_hub_id if cfg else None


def _sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Values of each tensor in the file; only its header is read."""
    with safe_open(fetched(path), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    return {name: math.prod(shape) for name, shape in shapes.items()}


Rows = list[tuple[str, str]]


def _task_rows(about: dict[str, Any], dataset: str | None) -> Rows:
    info, base, classes = about["info"], about["base"], about["classes"]
    rows = [("task", _plain(info.get("task", "image classification")))]
    if dataset:
        rows.append(("data", _plain(dataset)))
    if base:
        weights = "" if base["weights"] == "pretrained" else f", weights {_plain(base['weights'])}"
        size = f", {_plain(base['img_size'])} px" if base["img_size"] else ""
        more = "".join(f", {_plain(name)}={_plain(value)}" for name, value in base.get("kwargs", {}).items())
        rows.append(("base", f"{_plain(base['model'])}{weights}{size}{more}"))
    if classes:
        more = " …" if len(classes) > SHOWN else ""
        rows.append((f"{len(classes)} classes", ", ".join(map(_plain, classes[:SHOWN])) + more))
    elif about["num_classes"]:
        rows.append(("classes", _plain(about["num_classes"])))
    return rows


def _method_rows(about: dict[str, Any], sizes: dict[str, int]) -> Rows:
    rows = []
    deltas: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    for plan in about["injections"]:
        fields = ", ".join(f"{key}={value!r}" for key, value in plan["method"].items() if key != "name")
        rows.append(("method", f"{_plain(plan['method']['name'])}({_plain(fields)})"))
        if hosts := list(plan["hosts"]):
            span = hosts[0] if len(hosts) == 1 else f"{hosts[0]} … {hosts[-1]}"
            parts = ", ".join(next(iter(plan["hosts"].values())))
            rows.append((f"{len(hosts)} hosts", _plain(span) + (f", rows {_plain(parts)}" if parts else "")))
        deltas += tuple(f"{host}.{SLOT}." for host in hosts)
        head += tuple(f"{name}." for name in plan["head"])
    trained = sum(size for name, size in sizes.items() if not name.startswith(head))
    masks = sum(size for name, size in sizes.items() if name.startswith(deltas) and name.endswith(f".{BITS}"))
    beside = f", and {masks:,} bytes of learned masks" if masks else ""
    rows.append(("values trained, without the head", f"{trained - masks:,}{beside}"))
    rows.append(("values of the head", f"{sum(size for name, size in sizes.items() if name.startswith(head)):,}"))
    return rows


def _metric_rows(metrics: Mapping[str, float]) -> Rows:
    return [(_plain(name), f"{float(value):g}") for name, value in metrics.items()]


def _body(name: str, rows: Rows, source: str, base: dict[str, Any] | None) -> str:
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    lines = ["import capavision as cv", ""]
    if base:
        lines.append(
            f"model = cv.load({json.dumps(source)})  # builds the base with timm, adds the deltas and the head"
        )
    else:
        lines.append(f"model = cv.load({json.dumps(source)}, base)  # base: the timm model that it was trained on")
    lines.append("cv.fold(model)  # if you like: a plain timm model, ΔW written into its weights")
    code = "\n".join(lines)
    return (
        f"# {_plain(name)}\n\nAn adapter for a timm model, made with capavision: the values that were trained, and all "
        f"it takes to use them.\n\n| | |\n| --- | --- |\n{table}\n\n## Load\n\n```python\n{code}\n```\n"
    )


def _plain(text: object) -> str:
    """`text` on one line, with no character that Markdown or HTML could take for markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub(r"[\\`*{}\[\]()<>&|#~$!]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"&#{ord(match[0])};", line)
