"""A run's settings: one frozen dataclass, from which come the command line, the run's name and its record."""

import argparse
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import capavision as cv
from capavision.targets import near
from vtab import cli, grid, limits, recipes

TEST_EVERY = 10  # epochs between two looks at the test split in the released code of FacT, Convpass, RepAdapter
FIRST = {  # fields that there were when the first runs were named
    *("task", "data_root", "partial", "split_file", "model", "weights", "img_size", "method", "targets", "parts"),
    *("stage", "test_limit", "epochs", "batch_size", "lr", "weight_decay", "warmup", "drop_path", "clip", "seed"),
    *("device", "out", "name"),
}


@dataclass(frozen=True)
class Config:
    """What to train and how. The same settings and seed on the same machine give the same numbers.

    task: a VTAB-1k task, digits, or the name for your own folder
    data_root: folder of images: the VTAB-1k layout (lists in it, or in a subfolder named like the task) or class
        folders
    partial: accept VTAB-1k lists of other lengths than 800, 200 and the full test split
    cache: which decoded images are kept in the cache folder: train (training and validation, a test split of up to
        5,000), all (any test split: up to 10 GiB a task at 224 pixels), none
    split_file: where the split of class folders is written (default: capavision_split.json in the folder)
    model: demo (a ViT-S/14 from a Python package) or any timm name, with its tag: vit_base_patch16_224.orig_in21k
    weights: pretrained, random, or a .safetensors file
    img_size: side of the input in pixels (default: the model's own; 56 for demo)
    targets: what to adapt, comma-separated names, globs or groups (default: the method's choice for the architecture)
    parts: rows of a fused projection to adapt: letters of q, k, v
    norm: what pixels are normalised with: model (the checkpoint's own), imagenet, inception (0.5, 0.5), none
    recipe: defaults of a published recipe, which other flags override; python -m vtab.recipes lists them
    stage: final trains on all 1,000 images and tests once, after the last epoch; tune trains on 800, watches the 200
        and never touches the test split
    protocol: honest, or paper: report the best of several looks at the test split, as most papers' code does
    test_every: with the paper protocol, epochs between two looks at the test split (default: 10)
    tune: choose learning rate and scale on the 200 by successive halving, then train the final run with them
    tune_lr: the rates that --tune tries, as multiples of --lr
    tune_scale: the scales that --tune tries, as multiples of the method's own alpha or scale
    tune_seed: seed of the trials of --tune (default: the run's)
    test_limit: test on the first N images only, recorded as such
    epochs: passes over the training images
    batch_size: images a step
    drop_last: leave out the images that fill no whole batch, others in every epoch
    optimizer: adamw, or sgd with momentum 0.9
    lr: peak learning rate
    mask_lr: peak learning rate of the scores of learned masks (default: 30 times lr)
    weight_decay: of the optimizer
    schedule: step changes the learning rate at every step; epoch only between epochs, and one epoch late, as the
        released code of most papers does
    warmup: share of the schedule over which the learning rate rises; it then falls as a cosine
    lr_start: learning rate at the start of the warm-up
    lr_min: learning rate at the end of the cosine
    drop_path: stochastic depth rate of the backbone
    clip: largest norm of the gradient; 0 does not clip
    precision: of the products, while parameters stay float32: float32, bfloat16, or auto: bfloat16 on a GPU that has it
    compile: compile the backbone with torch.compile: a slow first step (a minute on 2 CPU cores; seconds once its cache
        on disk has the model), faster ones after it
    cache_frozen_prefix: compute what the backbone does before its first adapted module once for each training image,
        and keep it (up to 4 GiB): faster where --targets names late blocks; needs --drop-path 0
    seed: of initial values, masks, data order and drop-path
    device: cuda, mps or cpu (default: the best this machine has)
    out: folder of run folders
    name: the run folder's name (default: task, model, method and a digest of the settings)
    """

    task: str = ""
    data_root: Path | None = None
    partial: bool = False
    cache: str = "train"
    split_file: Path | None = None
    model: str = "demo"
    weights: str = "pretrained"
    img_size: int | None = None
    method: cv.Method = dataclasses.field(default_factory=cv.LoRA)
    targets: str | None = None
    parts: str | None = None
    norm: str = "model"
    recipe: str | None = None
    stage: str = "final"
    protocol: str = "honest"
    test_every: int | None = None
    tune: bool = False
    tune_lr: str = "0.3,1,3"
    tune_scale: str = "0.1,1,10"
    tune_seed: int | None = None
    test_limit: int | None = None
    epochs: int = 100
    batch_size: int = 64
    drop_last: bool = False
    optimizer: str = "adamw"
    lr: float = 1e-3
    mask_lr: float | None = None
    weight_decay: float = 1e-4
    schedule: str = "step"
    warmup: float = 0.1
    lr_start: float = 0.0
    lr_min: float = 0.0
    drop_path: float = 0.1
    clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    cache_frozen_prefix: bool = False
    seed: int = 0
    device: str | None = None
    out: Path = Path("runs")
    name: str | None = None

    def __post_init__(self) -> None:
        limits.check(self)

    @property
    def patterns(self) -> list[str] | None:
        """The targets one by one; None leaves the choice to the method."""
        return [name.strip() for name in self.targets.split(",")] if self.targets else None

    @property
    def between_looks(self) -> int:
        """Epochs from one look at the test split to the next, under the paper protocol."""
        return self.test_every or TEST_EVERY

    @property
    def looks(self) -> int:
        """How often the run looks at the test split."""
        if self.stage == "tune":
            return 0
        return self.epochs // self.between_looks if self.protocol == "paper" else 1

    def steps(self, images: int) -> int:
        """Steps in an epoch over that many images.

        Raises:
            ValueError: drop_last leaves none.
        """
        steps = images // self.batch_size if self.drop_last else -(-images // self.batch_size)
        if not steps:
            raise ValueError(
                f"--drop-last with --batch-size {self.batch_size} leaves no batch of {images} images; lower the batch, "
                "or pass --no-drop-last"
            )
        return steps

    def record(self) -> dict[str, Any]:
        """The settings as JSON; paths as text, the method with its name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        method = {"name": self.method.name, **dataclasses.asdict(self.method)}  # type: ignore[call-overload]
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()} | {"method": method}

    def digest(self) -> str:
        """Eight hex digits of all that shapes the numbers."""
        young = young_fields()
        relevant = {k: v for k, v in self.record().items() if k not in ("out", "name", "cache")}
        relevant = {k: v for k, v in relevant.items() if k not in young or v != young[k]}
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self) -> Path:
        """The run's folder."""
        task = self.task or (self.data_root.resolve().name if self.data_root else "")
        kind = self.method.name + ("-paper" if self.protocol == "paper" else "")
        return self.out / (self.name or f"{task}-{self.model}-{kind}-s{self.seed}-{self.digest()}")


def young_fields() -> dict[str, Any]:
    """Fields that the first runs did not have yet, with the defaults that leave names and records as they were."""
    return {f.name: f.default for f in dataclasses.fields(Config) if f.name not in FIRST}


def parser_for(argv: list[str] | None) -> tuple[cli.Parser, type[cv.Method], recipes.Recipe | None]:
    """The parser of this command line: general flags, and those of the method that it or its recipe names.

    Raises:
        ValueError: an unknown method or recipe, a recipe of another method.
    """
    first = cli.Parser(add_help=False)
    for flag in ("--method", "--recipe"):
        first.add_argument(flag)
    early = first.parse_known_args(argv)[0]
    recipe = recipes.find(early.recipe) if early.recipe else None
    name = (early.method or (recipe and recipe.method) or "lora").replace("-", "_")
    if early.method in grid.SETTINGS:
        ((method, flags),) = grid.expand_methods(early.method).values()
        raise ValueError(f"{early.method} is --method {method} {' '.join(flags)}")
    if name not in cv.Method.known:
        raise ValueError(f"unknown method {name!r}; {near(name, cv.Method.known)}")
    if recipe and recipe.method not in (None, name):
        fitting = ", ".join(r.name for r in recipes.RECIPES.values() if r.method in (None, name))
        raise ValueError(f"--recipe {recipe.name} is one of {recipe.method}, not of {name}; those that fit: {fitting}")
    parser = cli.Parser(
        prog="python -m vtab.train",
        description="Fine-tune a timm backbone on one task; the run folder holds the adapter and every figure.",
        epilog=f"Methods: {', '.join(sorted(cv.Method.known))}; each has flags of its own: --method NAME --help.",
    )
    cli.add_fields(parser.add_argument_group("run"), Config, limits.CHOICES)
    chosen = parser.add_argument_group(f"method {name}")
    chosen.add_argument("--method", default="lora", metavar="NAME", help="(default: lora, or the recipe's)")
    cli.add_fields(chosen, cv.Method.known[name])
    parser.elsewhere = _of_other_methods(name)
    return parser, cv.Method.known[name], recipe


def _of_other_methods(name: str) -> dict[str, str]:
    """Of each flag that other methods have and `name` lacks, the sentence that says so."""
    flags = {known: [cli.flag(field) for field in cli.field_docs(method)] for known, method in cv.Method.known.items()}
    own = f"{name} has {', '.join(flags[name]) or 'no flags of its own'}"
    owners: dict[str, list[str]] = {}
    for known in sorted(flags):
        for flag in flags[known]:
            owners.setdefault(flag, []).append(known)
    return {flag: f"{own}; {flag} is of {', '.join(owners[flag])}" for flag in owners if flag not in flags[name]}


def configure(values: argparse.Namespace, method: type[cv.Method], recipe: recipes.Recipe | None) -> Config:
    """A Config from parsed flags over the recipe's values over the defaults."""
    given = vars(values)
    settings, of_method = recipe.values(given.get("task", ""), given) if recipe else ({}, {})
    merged, own = (argparse.Namespace(**(defaults | given)) for defaults in (settings, of_method))
    config: Config = cli.collect(Config, merged, method=cli.collect(method, own))
    return config


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a Config: general flags, and those of the chosen method.

    Raises:
        ValueError: an unknown method, or values that do not fit each other.
    """
    parser, method, recipe = parser_for(argv)
    return configure(parser.parse_args(argv), method, recipe)
