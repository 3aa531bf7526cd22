"""Encoder, head and tokenizer of a text run."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.cli import first_line
from export.text import CODELESS, build, location, quiet


def architecture(model: str, task: str) -> str:
    """The class of transformers that has the model's encoder and a head for the task.

    Args:
        model: as --model takes it.
        task: SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING.

    Raises:
        ValueError: no such model, or none of its family for the task.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    with quiet(model):
        config = AutoConfig.from_pretrained(location(model), **CODELESS)
    families: Any = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")
    if type(config) not in families:
        what = task.lower().replace("_", " ")
        raise ValueError(f"transformers has no {what} with {type(config).__name__}; take another --model")
    name: str = families[type(config)].__name__
    return name


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, a fast one, which a file without code describes whole; it pads with the token that the
    model takes for padding, by which decoders find a text's last one.

    Raises:
        ValueError: none, a slow one, or one without that token.
    """
    from transformers import AutoConfig, AutoTokenizer

    with quiet(model):
        try:
            tokenizer = AutoTokenizer.from_pretrained(location(model), **CODELESS)
        except (ValueError, ImportError) as error:
            raise ValueError(_unread(model, error)) from error
        pad = AutoConfig.from_pretrained(location(model), **CODELESS).pad_token_id
    if not tokenizer.is_fast:
        raise ValueError(
            f"{model} has no fast tokenizer (tokenizer.json), which a run folder needs; take another --model"
        )
    if pad is not None and pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer of {model} has no padding token; add one, and save model and tokenizer anew")
    return tokenizer


def _unread(model: str, error: Exception) -> str:
    told = f"the tokenizer of {model} cannot be read"
    if importlib.util.find_spec("sentencepiece"):
        return f"{told} ({first_line(error)}); save the model's own tokenizer into its folder"
    return (
        f"{told}: it has no tokenizer.json; if it is SentencePiece's (spm.model, as DeBERTa's), that takes "
        "sentencepiece and protobuf: pip install 'capavision[text]'"
    )


def build_model(text: Mapping[str, Any], folder: Path, seed: int) -> nn.Module:
    """The plain model on the CPU; its fresh head depends on the seed alone.

    Args:
        text: the "text" entry of the adapter file's info.
        folder: the run's.
        seed: of the head.

    Raises:
        ValueError: as `export.text.build`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build({"text": text}, folder)


def try_batch(model: nn.Module, example: Mapping[str, Tensor], name: str) -> None:
    """One forward pass before anything is written.

    Raises:
        ValueError: the model cannot take texts of this length.
    """
    try:
        with torch.inference_mode():
            model.eval()(**example)
    except (RuntimeError, IndexError, ValueError) as error:
        tokens, known = example["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
        told = f"it has {known} positions" if known and tokens > known - 3 else first_line(error)[:120]
        raise ValueError(f"{name} cannot take texts of {tokens} tokens ({told}); lower --max-length") from error
