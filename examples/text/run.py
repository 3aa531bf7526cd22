"""A text run from its settings to its folder.

config.json, metrics.jsonl, result.json, adapter.safetensors, predictions.npz     as vtab.record has them
tokenizer.json, tokenizer_config.json, model_config/config.json                   as transformers saves them
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import capavision as cv
from examples.text import metrics, sources
from examples.text.data import TextData, Texts
from examples.text.encode import Encoded, check_vocabulary, encode
from examples.text.loop import TextLoop, predict
from examples.text.model import architecture, build_model, load_tokenizer, try_batch
from examples.text.recipes import RECIPES
from examples.text.settings import Classification, TextTraining
from vtab import record
from vtab.evaluate import Accuracy
from vtab.setup import digest, pick_device
from vtab.textfile import write


@dataclass(frozen=True)
class TextSetup:
    """A run that is ready to train."""

    config: Classification
    data: TextData
    text: dict[str, Any]  # the adapter file's info: what export needs to build the model again
    model: nn.Module
    tokenizer: Any
    report: cv.Report
    digest: str  # of the weights underneath

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def judge(self) -> str:
        """The split that judges the run."""
        return "val" if self.config.stage == "tune" else "test"

    def encode(self, texts: Texts) -> tuple[Encoded, Tensor]:
        """Tokens and labels, on the model's device."""
        encoded = encode(self.tokenizer, texts, self.config.max_length, self.device)
        return encoded, torch.from_numpy(texts.labels).to(self.device)

    def measure(self, texts: Texts, encoded: Encoded | None = None) -> tuple[dict[str, float], Tensor]:
        """The task's metrics in percent, and the logits."""
        encoded = encoded or self.encode(texts)[0]
        logits = predict(self.model, encoded, self.config.precision)
        return metrics.judge(self.data.metric, texts.labels, self.predicted(logits)), logits

    def predicted(self, logits: Tensor) -> Any:
        """Classes, or numbers."""
        return (logits.squeeze(-1) if self.data.labels is None else logits.argmax(1)).cpu().numpy()


def run(config: Classification) -> dict[str, Any]:
    """One run in its folder, as far as it is not done yet; returns result.json."""
    return record.once(config, lambda folder: train(config, folder))


def train(config: Classification, folder: Path) -> dict[str, Any]:
    """Set-up, epochs, the one look at the split that judges the run, the files that record it."""
    setup = prepare(config, folder)
    print(f"{setup.report}\n{setup.data.source}; {config.stage} run on {setup.device}")
    texts = setup.data.splits["train" if config.stage == "tune" else "trainval"]
    encoded, labels = setup.encode(texts)
    if encoded.cut:
        print(f"{encoded.cut:,} of {len(texts):,} texts are longer than {config.max_length} tokens, and are cut there")
    history = TextLoop(setup.model, encoded, labels, config).fit(folder, watcher(setup))
    save(setup, folder)
    cv.fold(setup.model)  # judged as it will run: the plain model, at its speed
    return conclude(setup, folder, history)


def prepare(config: Classification, folder: Path) -> TextSetup:
    """Data opened, model built and injected: everything that can be refused is refused here.

    Raises:
        ValueError: settings, texts, tokenizer and model that do not fit each other.
    """
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    data = sources.open_data(config)
    text = {
        "model": config.model,
        "architecture": architecture(config.model, "SEQUENCE_CLASSIFICATION"),
        "task": data.task,
        **({"labels": data.labels} if data.labels is not None else {}),
        "max_length": config.max_length,
        "pair": data.pair,
    }
    tokenizer = load_tokenizer(config.model)
    some = encode(tokenizer, data.splits["train"].head(256), config.max_length, torch.device("cpu"))
    model, report, base = adapted(config, text, tokenizer, some, folder)
    return TextSetup(config, data, text, model.to(device), tokenizer, report, base)


def adapted(
    config: TextTraining, text: dict[str, Any], tokenizer: Any, some: Encoded, folder: Path
) -> tuple[nn.Module, cv.Report, str]:
    """The run's model, injected, with the report and the digest of the weights underneath.

    Args:
        config: the settings.
        text: the "text" entry of the adapter file's info.
        tokenizer: the model's.
        some: of the training texts, to try tokenizer and model with.
        folder: the run's.

    Raises:
        ValueError: settings, texts, tokenizer and model that do not fit each other.
    """
    model = build_model(text, folder, config.seed)
    check_vocabulary(config.model, tokenizer, some, model.get_input_embeddings().num_embeddings)
    longest = {"input_ids": torch.full((1, config.max_length), int(some.ids[0, 0]))}
    try_batch(model, longest, config.model)
    example = some.inputs(some.batches(torch.arange(min(2, len(some))), 2)[0])
    base = digest(model)
    report = cv.inject(model, config.method, config.patterns, config.parts, seed=config.seed, example=example)
    return model, report, base


def watcher(setup: TextSetup) -> Any:
    """In the tune stage, what val comes to after each epoch."""
    if setup.config.stage != "tune":
        return lambda epoch: {}
    val = setup.data.splits["val"]
    encoded, _ = setup.encode(val)

    def watch(epoch: int) -> dict[str, float]:
        found, logits = setup.measure(val, encoded)
        right = {} if setup.data.labels is None else {"val_accuracy": _accuracy(setup, val, logits).percent}
        return {"val_score": found["score"]} | right

    return watch


def save(setup: TextSetup, folder: Path) -> None:
    """The adapter with all that whoever loads it must know, the tokenizer and the model's configuration."""
    info = {"task": setup.data.task, "source": setup.data.source, "stage": setup.config.stage, "text": setup.text}
    cv.save(setup.model, folder / "adapter.safetensors", classes=setup.data.labels, info=info)
    save_sources(setup.model, setup.tokenizer, folder)


def save_sources(model: Any, tokenizer: Any, folder: Path) -> None:
    """The tokenizer and the model's configuration, as transformers saves them."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        model.config.save_pretrained(f"{temporary}/model_config")
        for path in sorted(Path(temporary).rglob("*")):
            if path.is_file():
                write(folder / path.relative_to(temporary), path.read_text(encoding="utf-8"))


def conclude(setup: TextSetup, folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The look at the split that judges the run, and the files that say what came out."""
    config, data, judge = setup.config, setup.data, setup.judge
    texts = data.splits[judge].head(config.test_limit)
    start = time.perf_counter()
    found, logits = setup.measure(texts)
    more = {name: part.head(config.test_limit) for name, part in data.splits.items() if name.startswith(f"{judge}_")}
    beside = {name: setup.measure(part)[0]["score"] for name, part in more.items()}
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "task": data.task,
        "split": judge,
        "stage": config.stage,
        "protocol": config.protocol,
        "metric": data.metric,
        "score": found.pop("score"),
        "metrics": found | beside,
    }
    if data.labels is not None:
        score = _accuracy(setup, texts, logits)
        result |= {"accuracy": score.percent, "interval95": score.interval}
        record.write_predictions(folder / "predictions.npz", texts.labels, logits.cpu().numpy())
    result |= {
        "images": len(texts),  # vtab's word for examples
        "images_in_full_split": len(data.splits[judge]),
        "recipe_differs": RECIPES[config.recipe].unlike(data.task) if config.recipe else [],
        **record.costs(config, setup.report, history, seconds),
        "selection": {"settings": origin(config), "epoch": "the last", "looks_at_test": int(judge == "test")},
        "data": {"source": data.source, "splits": {k: len(s) for k, s in data.splits.items()}, **data.facts},
        "text": setup.text,
        "base": {"model": config.model, "weights": "pretrained", "digest": setup.digest, "img_size": None},
        "environment": environment(setup.device),
    }
    write(folder / "result.json", json.dumps(result, indent=1))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    told = f"{data.metric} {result['score']:.2f}" if data.metric != "accuracy" else f"accuracy {score}"
    print(f"{data.task} ({data.source}): {judge} {told}, {setup.report.trained:,} trained values\n{folder}")
    return result


def _accuracy(setup: TextSetup, texts: Texts, logits: Tensor) -> Accuracy:
    return Accuracy(int(np.sum(setup.predicted(logits) == texts.labels)), len(texts))


def origin(config: TextTraining) -> str:
    """Where the settings come from, for the record."""
    return "the command line" if config.recipe is None else f"recipe {config.recipe} and the command line"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit, for the record."""
    import tokenizers
    import transformers

    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    return record.environment(device) | versions
