"""An encoder under its head, injected: what runs of every text task build, save and record alike."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import capavision as cv
from capavision.files import replacing
from examples.text.encode import Encoded, check_vocabulary
from examples.text.metrics import OF_NUMBERS
from examples.text.model import build_model, try_batch
from examples.text.settings import TextTraining
from vtab import plots, record
from vtab.setup import digest, pick_device
from vtab.textfile import write


@dataclass(frozen=True)
class Adapted:
    """A model that is ready to train.

    text: the adapter file's info: what export needs to build the model again
    digest: of the weights underneath
    """

    config: TextTraining
    text: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    report: cv.Report
    digest: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def save(self, folder: Path, source: str) -> None:
        """The adapter with all that whoever loads it must know, the tokenizer and the model's configuration."""
        info = {"task": self.text["task"], "source": source, "stage": self.config.stage, "text": self.text}
        cv.save(self.model, folder / "adapter.safetensors", classes=self.text.get("labels"), info=info)
        with tempfile.TemporaryDirectory() as temporary:
            self.tokenizer.save_pretrained(temporary)
            self.model.config.save_pretrained(f"{temporary}/model_config")
            for path in sorted(Path(temporary).rglob("*")):
                if path.is_file():
                    with replacing(folder / path.relative_to(temporary)) as whole:
                        shutil.copyfile(path, whole)

    def conclude(
        self, folder: Path, found: dict[str, Any], data: dict[str, Any], history: list[dict[str, Any]], seconds: float
    ) -> dict[str, Any]:
        """Write curve.png and result.json, the run's last file, and return what that holds.

        Args:
            folder: the run's.
            found: what the split that judged the run came to.
            data: its source, splits and facts.
            history: a record an epoch.
            seconds: of the last look.
        """
        config, task = self.config, self.text["task"]
        origin = "the command line" if config.recipe is None else f"recipe {config.recipe} and the command line"
        result = {
            "task": task,
            "split": config.judge,
            "stage": config.stage,
            "protocol": config.protocol,
            **found,
            "recipe_differs": config.known[config.recipe].unlike(task) if config.recipe else [],
            **record.costs(config, self.report, history, seconds),
            "selection": {"settings": origin, "epoch": "the last", "looks_at_test": int(config.judge == "test")},
            "data": data,
            "text": self.text,
            "base": {"model": config.model, "weights": "pretrained", "digest": self.digest},
            "environment": _environment(self.device),
        }
        self._picture(folder / "curve.png", result, history)
        write(folder / "result.json", json.dumps(result, indent=1))
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    def _picture(self, path: Path, result: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """The learning curve."""
        metric = result["metric"]
        loss = "mean squared error" if metric in OF_NUMBERS else "cross-entropy"
        what = "test, looked at once" if result["split"] == "test" else result["split"]
        source = f"{result['task']} ({result['data']['source']})"
        title = f"{source}, {Path(self.config.model).name}, {result['method']}"
        training = "training" if metric == "accuracy" else "training accuracy"
        lines = {"accuracy": training, "val_score": "val"}
        plots.curve(path, history, (what, history[-1]["epoch"], result["score"]), title, metric, loss, lines)


def adapt(config: TextTraining, text: dict[str, Any], tokenizer: Any, some: Encoded, folder: Path) -> Adapted:
    """The run's model, tried and injected, on its device.

    Args:
        config: the settings.
        text: the "text" entry of the adapter file's info.
        tokenizer: the model's.
        some: of the training texts, in main memory, to try tokenizer and model with.
        folder: the run's.

    Raises:
        ValueError: settings, texts, tokenizer and model that do not fit each other.
    """
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model: Any = build_model(text, folder, config.seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    check_vocabulary(config.model, tokenizer, some, model.get_input_embeddings().num_embeddings)
    row = some.ids[0, : some.sizes[0]].long()  # drawn out at its start: the end of a text tells some models where it is
    longest = torch.cat([row[:1].expand(config.max_length - len(row)), row])
    try_batch(model, {"input_ids": longest[None]}, config.model)
    example = some.inputs(some.batches(torch.arange(min(2, len(some))), 2)[0])
    base = digest(model)
    report = cv.inject(model, config.method, config.patterns, config.parts, seed=config.seed, example=example)
    return Adapted(config, text, model.to(device), tokenizer, report, base)


def _environment(device: torch.device) -> dict[str, Any]:
    import tokenizers
    import transformers

    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    return record.environment(device) | versions
