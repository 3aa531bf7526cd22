"""The two files that make a PEFT LoRA adapter, read and written as data: no model, no PEFT, no pickle.

adapter_config.json          the settings: rank and alpha, by host where they differ; which hosts, which modules saved
adapter_model.safetensors    base_model.model.<host>.lora_A.weight, .lora_B.weight, base_model.model.<module>.<key>

Source: what peft 0.21 writes and reads. Its patterns match hosts by suffix unless told otherwise; those written here
match a full name and nothing else.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from capavision.files import new_folder, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """ΔW = (alpha / rank) B A on one host: A (rank, n_in), B (n_out, rank), with a conv's kernel axes behind."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def write(
    path: str | os.PathLike[str], layers: Mapping[str, Layer], saved: Mapping[str, Tensor], modules_to_save: list[str]
) -> None:
    """Write an adapter folder whole or not at all; `saved` is the state of every module PEFT will wrap.

    Raises:
        ValueError: the folder exists.
        OSError: the disk is full or the parent folder cannot be written; nothing is left there.
    """
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in saved.items()}
    for name, layer in layers.items():
        tensors |= {f"{PREFIX}{name}.lora_A.weight": layer.A, f"{PREFIX}{name}.lora_B.weight": layer.B}
    with new_folder(path) as folder:
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_config(layers, modules_to_save), indent=2))


def _config(layers: Mapping[str, Layer], modules_to_save: list[str]) -> dict[str, Any]:
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: _tidy(layer.alpha) for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        # PEFT matches a list by suffix, a string as a regular expression over the full name.
        "target_modules": "|".join(map(re.escape, layers)),
        "modules_to_save": modules_to_save or None,
        "r": rank,
        "lora_alpha": alpha,
        # It looks for a pattern behind any dot, unless the pattern insists on the start.
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _tidy(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


# The settings that change neither the shape nor the function of what is in the file. Every other one must be off.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "runtime_config", "megatron_config", "megatron_core"),
    *("base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "lora_dropout", "qalora_group_size"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "eva_config"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
}
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # pissa, olora, corda, loftq… rewrite the base's weights


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The LoRA layers of an adapter folder by host, and its other tensors, the modules saved whole, by name.

    Raises:
        ValueError: no such folder, weights in a pickle, damage, another PEFT method than plain LoRA.
    """
    config, tensors = _load(Path(path))
    return _layers(path, config, tensors)


def _load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds its weights as a pickle, adapter_model.bin, which may hold code and is not loaded; where "
            f"you trust it, load it in PEFT: save_pretrained writes {WEIGHTS}"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; name the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}); save it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{folder} holds a PEFT adapter of type {kind!r}; only 'LORA' can be taken over")
    on = {key: value for key, value in config.items() if value and key not in _HARMLESS and value != "none"}
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        on["init_lora_weights"] = config["init_lora_weights"]
    if on:
        settings = ", ".join(f"{key}={value!r}" for key, value in on.items())
        raise ValueError(f"{folder} is no plain LoRA ({settings}); merge it in PEFT, and use the merged model")
    return config, tensors


_KEY = re.compile(r"(?P<host>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")


def _layers(
    path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The LoRA layers by host, and the tensors that belong to none."""
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(name):
            pair = factors.setdefault(match["host"], {})
            if match["factor"] in pair:
                raise ValueError(f"{path} holds several adapters for {match['host']}; save one of them alone")
            pair[match["factor"]] = tensor
        else:
            rest[name] = tensor
    layers = {}
    for host, pair in factors.items():
        if len(pair) < 2 or min(tensor.ndim for tensor in pair.values()) < 2:
            raise ValueError(f"{path} is damaged: {host} lacks lora_A or lora_B; save it again")
        layers[host] = Layer(pair["A"], pair["B"], _alpha(path, config, host, pair["A"].shape[0]))
    if not layers:
        raise ValueError(f"{path} holds no lora_A and lora_B on a module, so there is nothing to take over")
    return layers, rest


def _alpha(path: str | os.PathLike[str], config: dict[str, Any], host: str, rank: int) -> float:
    """alpha of one host as PEFT finds it: patterns match behind any dot, the first one counts."""

    def setting(default: str, patterns: str) -> float:
        found = config.get(patterns) or {}
        value = next((v for key, v in found.items() if re.match(rf"(.*\.)?({key})$", host)), config[default])
        return float(value)

    try:
        expected, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
    except (KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise ValueError(f"{path}: its rank or alpha is damaged ({error!r}); save it again") from error
    if expected != rank:
        raise ValueError(f"{path} is damaged: {host} has rank {rank}, the configuration says {expected:g}")
    return alpha * rank**0.5 if config.get("use_rslora") else alpha
