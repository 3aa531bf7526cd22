"""Which settings a run can have, and which of them fit each other."""

from typing import TYPE_CHECKING

from capavision.targets import near
from vtab import recipes
from vtab.cache import KEEP
from vtab.cli import flag
from vtab.evaluate import NORMS, PRECISIONS

if TYPE_CHECKING:
    from vtab.config import Config

CHOICES = {
    "stage": ("final", "tune"),
    "protocol": ("honest", "paper"),
    "norm": ("model", *NORMS),
    "cache": KEEP,
    "precision": PRECISIONS,
    "optimizer": ("adamw", "sgd"),
    "schedule": ("step", "epoch"),
}
AT_LEAST_ONE = ("epochs", "batch_size", "img_size", "test_limit", "test_every")
HIGHEST = {"lr": 1e3, "mask_lr": 1e3, "lr_start": 1e3, "lr_min": 1e3, "weight_decay": 1e3, "warmup": 1}
HIGHEST |= {"drop_path": 0.99}


def check(config: "Config") -> None:
    """Raise ValueError, with the cure, for the first setting that cannot be."""
    if not config.task and config.data_root is None:
        raise ValueError("name a task: --task digits, say, or your own images: --data-root FOLDER")
    _choices(config)
    _numbers(config)
    _test_split(config)
    _tuning(config)
    if config.mask_lr is not None and getattr(config.method, "masks", "") != "learned":
        raise ValueError("--mask-lr has no use without learned masks; pass --masks learned, or leave it out")
    if config.compile and config.cache_frozen_prefix:
        raise ValueError(
            "--compile makes one graph of the backbone, --cache-frozen-prefix leaves out a part; choose one"
        )
    for field in ("lr_start", "lr_min"):
        if getattr(config, field) > config.lr:
            raise ValueError(f"{flag(field)} {getattr(config, field):g} is above the peak, --lr {config.lr:g}")


def _choices(config: "Config") -> None:
    for field, choices in CHOICES.items():
        value = getattr(config, field)
        if value not in choices:
            hint = near(str(value), choices) if len(choices) > 2 else f"choose {' or '.join(choices)}"
            raise ValueError(f"{flag(field)} {value!r} is unknown; {hint}")
    if config.recipe is not None:
        recipes.find(config.recipe)


def _numbers(config: "Config") -> None:
    for field in AT_LEAST_ONE:
        value = getattr(config, field)
        if value is not None and value < 1:
            raise ValueError(f"{flag(field)} {value} must be at least 1")
    for field in ("seed", "tune_seed"):
        value = getattr(config, field)
        if value is not None and not 0 <= value < 2**31:
            raise ValueError(f"{flag(field)} {value} must lie in [0, 2147483648)")
    for field, high in HIGHEST.items():
        value = getattr(config, field)
        if value is not None and not 0 <= value <= high:
            raise ValueError(f"{flag(field)} {value} must lie in [0, {high:g}]")
    if not config.clip >= 0:
        raise ValueError(f"--clip {config.clip} must be positive, or 0 not to clip")


def _test_split(config: "Config") -> None:
    paper = config.protocol == "paper"
    if config.stage == "tune" and config.test_limit is not None:
        raise ValueError("--test-limit has no use with --stage tune, which never touches the test split")
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
