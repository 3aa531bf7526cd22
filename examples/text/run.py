"""A text run from its settings to its folder.

config.json, metrics.jsonl, result.json, adapter.safetensors, predictions.npz, curve.png    as vtab.record has them
tokenizer.json, tokenizer_config.json, model_config/config.json                             as transformers saves them
predictions.csv     each text that judged the run, its label, what was predicted and of a class how probable it seemed
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import capavision as cv
from examples.text import metrics, sources, tables
from examples.text.adapted import Adapted, adapt
from examples.text.data import TextData, Texts
from examples.text.encode import Encoded, encode
from examples.text.loop import TextLoop, predict
from examples.text.model import architecture, load_tokenizer
from examples.text.settings import Classification
from vtab import record
from vtab.evaluate import Accuracy


@dataclass(frozen=True)
class TextSetup:
    """A run that is ready to train."""

    config: Classification
    data: TextData
    adapted: Adapted

    def encode(self, texts: Texts) -> tuple[Encoded, Tensor]:
        """Tokens and labels, on the model's device."""
        encoded = encode(self.adapted.tokenizer, texts, self.config.max_length, self.adapted.device)
        return encoded, torch.from_numpy(texts.labels).to(encoded.device)

    def measure(self, texts: Texts, encoded: Encoded | None = None) -> tuple[dict[str, float], Tensor]:
        """The task's metrics in percent, and the logits."""
        encoded = encoded or self.encode(texts)[0]
        logits = predict(self.adapted.model, encoded, self.config.precision)
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
    adapted = setup.adapted
    print(f"{adapted.report}\n{setup.data.source}; {config.stage} run on {adapted.device}")
    texts = setup.data.splits["train" if config.stage == "tune" else "trainval"]
    encoded, labels = setup.encode(texts)
    if encoded.cut:
        print(f"{encoded.cut:,} of {len(texts):,} texts are longer than {config.max_length} tokens, and are cut there")
    history = TextLoop(adapted.model, encoded, labels, config).fit(folder, watcher(setup))
    adapted.save(folder, setup.data.source)
    cv.fold(adapted.model)  # judged as it will run: the plain model, at its speed
    return conclude(setup, folder, history)


def prepare(config: Classification, folder: Path) -> TextSetup:
    """Data opened, model built and injected: everything that can be refused is refused here.

    Raises:
        ValueError: settings, texts, tokenizer and model that do not fit each other.
    """
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
    adapted = adapt(config, text, tokenizer, some, folder)
    if data.labels is None:
        start_at(adapted.model, float(data.splits["train"].labels.mean()))
    return TextSetup(config, data, adapted)


def start_at(model: nn.Module, mean: float) -> None:
    """Let a head that answers with a number start at the labels' mean, to which it would have to climb from 0."""
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1]
    if heads and heads[-1].bias is not None:
        nn.init.constant_(heads[-1].bias, mean)


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


def conclude(setup: TextSetup, folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The look at the split that judges the run, and the files that say what came out."""
    config, data, judge = setup.config, setup.data, setup.config.judge
    texts = data.splits[judge].head(config.test_limit)
    start = time.perf_counter()
    figures, logits = setup.measure(texts)
    more = {name: part.head(config.test_limit) for name, part in data.splits.items() if name.startswith(f"{judge}_")}
    beside = {name: setup.measure(part)[0]["score"] for name, part in more.items()}
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {"metric": data.metric, "score": figures.pop("score"), "metrics": figures | beside}
    if data.labels is not None:
        score = _accuracy(setup, texts, logits)
        found |= {"accuracy": score.percent, "interval95": score.interval}
        record.write_predictions(folder / "predictions.npz", texts.labels, logits.cpu().numpy())
    write_predictions(folder / "predictions.csv", setup, texts, logits)
    found |= {"examples": len(texts), "examples_in_full_split": len(data.splits[judge]), "unit": "texts"}
    facts = {"source": data.source, "splits": {k: len(s) for k, s in data.splits.items()}, **data.facts}
    result = setup.adapted.conclude(folder, found, facts, history, seconds)
    parts = ", ".join(f"{name} {value:.2f} %" for name, value in result["metrics"].items())
    told = parts if data.metric != "accuracy" else f"accuracy {score}"
    print(f"{data.task} ({data.source}): {judge} {told}, {setup.adapted.report.trained:,} trained values\n{folder}")
    return result


def write_predictions(path: Path, setup: TextSetup, texts: Texts, logits: Tensor) -> None:
    """What was predicted for each text, in their order, for people to read."""
    labels, pairs = setup.data.labels, texts.second is not None
    columns: list[Any] = [texts.first, *([texts.second] if pairs else [])]
    if labels is None:
        columns += [
            [float(f"{number:.7g}") for number in numbers] for numbers in (texts.labels, setup.predicted(logits))
        ]
    else:
        columns += [[labels[i] for i in classes] for classes in (texts.labels, setup.predicted(logits))]
        columns.append([float(f"{p:.6g}") for p in logits.softmax(1).amax(1).tolist()])
    header = ["text", *(["text_pair"] if pairs else []), "label", "predicted", *(["probability"] if labels else [])]
    tables.write(path, header, zip(*columns, strict=True))


def _accuracy(setup: TextSetup, texts: Texts, logits: Tensor) -> Accuracy:
    return Accuracy(int(np.sum(setup.predicted(logits) == texts.labels)), len(texts))
