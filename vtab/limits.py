"""Which settings a run can have, and which of them fit each other."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from capavision.targets import near
from vtab import recipes
from vtab.cache import KEEP
from vtab.cli import flag
from vtab.evaluate import NORMS, PRECISIONS

if TYPE_CHECKING:
    from vtab.config import Config
    from vtab.training import Training

TRAINING = {  # of any training
    "stage": ("final", "tune"),
    "precision": PRECISIONS,
    "optimizer": ("adamw", "sgd"),
    "schedule": ("step", "epoch"),
    "decay": ("cosine", "linear"),
}
CHOICES = TRAINING | {"protocol": ("honest", "paper"), "norm": ("model", *NORMS), "cache": KEEP}
AT_LEAST_ONE = ("epochs", "batch_size", "test_limit", "img_size", "test_every")
HIGHEST = {"lr": 1e3, "mask_lr": 1e3, "lr_start": 1e3, "lr_min": 1e3, "weight_decay": 1e3, "warmup": 1e9}
HIGHEST |= {"drop_path": 0.99}


def check(config: "Config") -> None:
    """Raise ValueError, with the cure, for the first setting that cannot be."""
    if not config.task and config.data_root is None:
        raise ValueError("name a task: --task digits, say, or your own images: --data-root FOLDER")
    check_training(config, CHOICES)
    if config.recipe is not None:
        recipes.find(config.recipe)
    _paper(config)
    _tuning(config)
    if config.compile and config.cache_frozen_prefix:
        raise ValueError(
            "--compile makes one graph of the backbone, --cache-frozen-prefix leaves out a part; choose one"
        )


def check_training(config: "Training", choices: Mapping[str, Sequence[str]] = MappingProxyType(TRAINING)) -> None:
    """Raise ValueError, with the cure, for the first setting of any training that cannot be.

    Args:
        config: the settings.
        choices: the values that each field may have.
    """
    _choices(config, choices)
    _numbers(config)
    if config.stage == "tune" and config.test_limit is not None:
        raise ValueError("--test-limit has no use with --stage tune, which never touches the test split")
    if config.mask_lr is not None and getattr(config.method, "masks", "") != "learned":
        raise ValueError("--mask-lr has no use without learned masks; pass --masks learned, or leave it out")
    for field in ("lr_start", "lr_min"):
        if getattr(config, field) > config.lr:
            raise ValueError(f"{flag(field)} {getattr(config, field):g} is above the peak, --lr {config.lr:g}")


def _choices(config: "Training", of_fields: Mapping[str, Sequence[str]]) -> None:
    for field, choices in of_fields.items():
        value = getattr(config, field)
        if value not in choices:
            hint = near(str(value), choices) if len(choices) > 2 else f"choose {' or '.join(choices)}"
            raise ValueError(f"{flag(field)} {value!r} is unknown; {hint}")


def _numbers(config: "Training") -> None:
    for field in AT_LEAST_ONE:
        value = getattr(config, field, None)
        if value is not None and value < 1:
            raise ValueError(f"{flag(field)} {value} must be at least 1")
    for field in ("seed", "tune_seed"):
        value = getattr(config, field, None)
        if value is not None and not 0 <= value < 2**31:
            raise ValueError(f"{flag(field)} {value} must lie in [0, 2147483648)")
    for field, high in HIGHEST.items():
        value = getattr(config, field, None)
        if value is not None and not 0 <= value <= high:
            raise ValueError(f"{flag(field)} {value} must lie in [0, {high:g}]")
    if config.warmup > 1 and config.warmup != round(config.warmup):
        raise ValueError(f"--warmup {config.warmup} must be a share of the schedule, up to 1, or a number of steps")
    if not config.clip >= 0:
        raise ValueError(f"--clip {config.clip} must be positive, or 0 not to clip")


def _paper(config: "Config") -> None:
    paper = config.protocol == "paper"
    if config.stage == "tune" and paper:
        raise ValueError("--protocol paper looks at the test split, which --stage tune never touches; leave one out")
    if config.test_every is not None and not paper:
        raise ValueError("--test-every has no use without --protocol paper: the honest protocol tests once")
    if paper and not config.looks:
        raise ValueError(
            f"--protocol paper looks at the test split after every {config.between_looks} epochs, and this run has "
            f"{config.epochs}; pass --test-every {config.epochs}, or more epochs"
        )


def _tuning(config: "Config") -> None:
    if config.tune and config.stage == "tune":
        raise ValueError("--tune has its own tuning stage and ends in a final run; leave --stage tune out")
    if config.tune_seed is not None and not config.tune:
        raise ValueError("--tune-seed has no use without --tune")
