"""The timm model underneath: enough to build it again, and a fingerprint that tells it from another checkpoint."""

import math
from collections.abc import Collection, Mapping, MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from capavision.attention import classifier
from capavision.delta import Delta
from capavision.files import cache_dir
from capavision.hub import asked_once
from capavision.targets import near
from capavision.wrappers import whole

_norms: MutableMapping[Tensor, tuple[Any, float]] = WeakTensorKeyDictionary()  # with the version that was measured
_KINDS: dict[str, Any] = {"model": str, "weights": str, "img_size": int | None, "seed": int, "hint": str}
# Arguments of timm.create_model that choose weights and files, or return something else than the model
_RESERVED = {"model_name", "num_classes", "features_only", "out_indices", "feature_cls", "feature_cfg", "model_cfg"}
_RESERVED |= {"pruned", "kwargs_filter", "scriptable", "exportable", "no_jit"}


class AbsentWeightsError(ValueError):
    """Pretrained weights that are nowhere to be had; `told` leaves out what only Python can choose."""

    def __init__(self, told: str) -> None:
        self.told = told
        super().__init__(
            f"{told}, or Base(…, weights='random'), Base(…, weights='FILE.safetensors') for a file in {cache_dir()}, "
            "or, to load an adapter, a model of your own: load(path, model=…)"
        )


@dataclass(frozen=True)
class Base:
    """How to build a timm model with its weights.

    model:    timm's name, with the checkpoint's tag where it matters: "vit_base_patch16_224.orig_in21k".
    weights:  "pretrained" (timm's own source), "random" (drawn from `seed`), or the name of a .safetensors file in
              the cache folder, see `capavision.files.cache_dir`.
    img_size: side of the input in pixels, for architectures that fix it; None is the model's own.
    hint:     the command that makes the file, for the error message where it is missing.
    kwargs:   more arguments of timm.create_model, by name: numbers, strings, bools, None and lists of them. What says
              where weights come from (pretrained_cfg, checkpoint_path, …) is refused: a file must not.

    Raises:
        ValueError: a field of another type, kwargs that are reserved or not plain; (by build) an unknown model,
            arguments it does not take, weights that this machine does not have.

    >>> Base("vit_tiny_patch16_224", weights="random").build(num_classes=10).num_classes
    10
    >>> shallow = Base("vit_tiny_patch16_224", weights="random", kwargs={"depth": 2, "global_pool": "avg"})
    >>> len(shallow.build(num_classes=10).blocks)
    2
    """

    model: str
    weights: str = "pretrained"
    img_size: int | None = None
    seed: int = 0
    hint: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name}={value!r} must be {getattr(kind, '__name__', kind)}")
        if not isinstance(self.kwargs, dict):
            raise ValueError(f"kwargs={self.kwargs!r} must be a dict of timm.create_model's arguments by name")
        object.__setattr__(self, "kwargs", {name: _plain(name, value) for name, value in self.kwargs.items()})
        given_twice = {"img_size"} if self.img_size is not None else set()
        for name in self.kwargs:
            if name in _RESERVED | given_twice or name.startswith(("pretrained", "checkpoint", "cache")):
                raise ValueError(f"kwargs may not hold {name!r}: Base says it itself, or not at all; leave it out")

    def build(self, num_classes: int, **kwargs: Any) -> nn.Module:
        """The model with a fresh head of `num_classes`; kwargs go to timm.create_model (drop_path_rate, …)."""
        import timm

        if not timm.is_model(self.model):
            name = self.model.partition(".")[0]
            raise ValueError(f"unknown timm model {self.model!r}; {near(name, timm.list_models())}")
        architecture, _, tag = self.model.partition(".")
        tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise ValueError(f"{architecture} has no weights tagged {tag!r}; {near(tag, tags)}")
        if self.weights == "pretrained" and not tags:
            raise AbsentWeightsError(f"timm has no pretrained weights of {architecture!r}; take another model")
        kwargs = {**self.kwargs, **kwargs, "num_classes": num_classes}
        if self.weights not in ("pretrained", "random"):
            kwargs["pretrained_cfg_overlay"] = {"file": str(self._file())}
        with torch.random.fork_rng(devices=[]):  # a fresh head and random weights depend on the seed alone
            torch.default_generator.manual_seed(self.seed)
            try:
                with asked_once() if self.weights == "pretrained" else nullcontext():
                    model = self._create(pretrained=self.weights != "random", **kwargs)
            except SafetensorError as error:
                raise ValueError(f"{self.weights} is damaged or no safetensors file ({error})") from error
            except (OSError, RuntimeError) as error:
                if self.weights != "pretrained" or _is_own_fault(error):
                    raise
                raise AbsentWeightsError(
                    f"the pretrained weights of {self.model!r} are not on this machine and could not be fetched "
                    f"({type(error).__name__}); take a machine that reaches the Hugging Face hub"
                ) from error
        if "pretrained_cfg_overlay" in kwargs:
            self._check_file(model)
        return model

    def _check_file(self, model: nn.Module) -> None:
        """timm only logs the keys it could not load, and would leave their tensors random."""
        with safe_open(self._file(), framework="pt") as file:
            there = set(file.keys())
        head = tuple(f"{name}." for name in classifier(model))
        own = [name for name, _ in model.named_parameters() if not name.startswith(head)]
        missing = [name for name in own if name not in there]
        if missing:
            raise ValueError(
                f"{self.weights} does not fit {self.model}: {len(missing)} of {len(own)} tensors are not in it, first "
                f"{missing[0]}; choose the model it was saved from"
            )

    def _create(self, **kwargs: Any) -> nn.Module:
        import timm

        size: dict[str, Any] = {} if self.img_size is None else {"img_size": self.img_size}
        try:
            model: nn.Module = timm.create_model(self.model, **size, **kwargs)
        except TypeError as error:
            if unknown := [name for name in self.kwargs if f"'{name}'" in str(error)]:
                raise ValueError(f"{self.model} takes no argument {unknown[0]!r}; leave it out of kwargs") from error
            if "'img_size'" not in str(error):
                raise
            model = timm.create_model(self.model, **kwargs)  # convolutional nets take any size and are not told one
        return model

    def _file(self) -> Any:
        path = cache_dir() / self.weights
        if path.parent != cache_dir() or path.suffix != ".safetensors":
            raise ValueError(f"weights={self.weights!r} must name a .safetensors file in {cache_dir()}")
        if not path.is_file():
            hint = f"; `{self.hint}` makes it" if self.hint else ""
            raise ValueError(f"the base weights {path} are missing{hint}")
        return path


def _plain(name: str, value: Any) -> Any:
    """`value` with lists as tuples, as before it was JSON; only what cannot be code or weights passes."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(name, part) for part in value)
    if not isinstance(value, (bool, int, float, str, type(None))):
        kind = type(value).__name__
        raise ValueError(f"kwargs[{name!r}] is a {kind}; only numbers, strings, bools, None and lists can be recorded")
    return value


def _is_own_fault(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "hub" not in str(error).lower()


def fingerprint(model: nn.Module, trained: Collection[str] = ()) -> dict[str, float]:
    """One number per base tensor, its Euclidean norm; deltas, the classifier and `trained` names are left out.

    Another checkpoint differs in nearly all of them, while the same one agrees to rounding on any machine and after
    timm resampled its position embedding. (A digest of the bits would not.)
    """
    own = [name for name, m in model.named_modules() if isinstance(m, Delta)] + list(classifier(model))
    prefixes = tuple(f"{name}." for name in own)
    everything, first = model.state_dict(keep_vars=True), dict[int, str]()
    named = {k: v for k, v in everything.items() if isinstance(v, nn.Parameter)}
    aliases = {k for k, v in named.items() if first.setdefault(id(v), k) != k}  # of a module shared by several
    left_out = aliases.union(trained)
    base = {k: v for k, v in everything.items() if not k.startswith(prefixes) and k not in left_out}
    return {name: _norm(tensor) for name, tensor in base.items() if tensor.is_floating_point()}


def _norm(tensor: Tensor) -> float:
    """To 7 digits; taken once for each version of a tensor, so that changing adapters costs milliseconds."""
    if tensor.is_inference():  # keeps no version
        return _measured(tensor)
    version = (tensor._version, tensor.data_ptr(), tensor.dtype, _sample(tensor))
    known = _norms.get(tensor)
    if known is None or known[0] != version:
        known = _norms[tensor] = (version, _measured(tensor))
    return known[1]


def _sample(tensor: Tensor) -> Any:
    """A few entries spread over the tensor, since what is written through `.data` leaves the version as it was."""
    if hasattr(tensor, "full_tensor"):  # spread over processes, which must agree on whether to put it together
        return None
    count = math.ceil(16 ** (1 / max(tensor.ndim, 1)))
    return tensor.detach()[tuple(slice(None, None, -(-size // count) or 1) for size in tensor.shape)].tolist()


def _measured(tensor: Tensor) -> float:
    return float(f"{whole(tensor.detach()).cpu().double().norm().item():.7g}")


def differences(expected: Mapping[str, float], found: Mapping[str, float], tolerance: float = 1e-4) -> list[str]:
    """The tensors whose recorded norm is not the one found, and those that only one side has.

    A bfloat16 copy of a float32 base counts as another one: its weights are rounded in the third digit.
    """
    close = {
        name
        for name in expected.keys() & found.keys()
        if math.isclose(
            expected[name], found[name], rel_tol=tolerance, abs_tol=tolerance * 1e-6
        )  # inf is near inf alone
    }
    return sorted((expected.keys() | found.keys()) - close)
