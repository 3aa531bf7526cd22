"""The settings of vtab.train: one frozen dataclass, from which come the command line, the run's name and its record."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtab import limits, recipes
from vtab.command import Command
from vtab.training import Training

TEST_EVERY = 10  # epochs between two looks at the test split in the released code of FacT, Convpass, RepAdapter
FIRST = {  # fields that there were when the first runs were named
    *("task", "data_root", "partial", "split_file", "model", "weights", "img_size", "method", "targets", "parts"),
    *("stage", "test_limit", "epochs", "batch_size", "lr", "weight_decay", "warmup", "drop_path", "clip", "seed"),
    *("device", "out", "name"),
}


@dataclass(frozen=True)
class Config(Training):
    """What to train on images, and how. The same settings and seed on the same machine give the same numbers.

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
    drop_path: stochastic depth rate of the backbone
    compile: compile the backbone with torch.compile: a slow first step (a minute on 2 CPU cores; seconds once its cache
        on disk has the model), faster ones after it
    cache_frozen_prefix: compute what the backbone does before its first adapted module once for each training image,
        and keep it (up to 4 GiB): faster where --targets names late blocks; needs --drop-path 0
    seed: of initial values, masks, data order and drop-path
    """

    task: str = ""
    data_root: Path | None = None
    partial: bool = False
    cache: str = "train"
    split_file: Path | None = None
    model: str = "demo"
    weights: str = "pretrained"
    img_size: int | None = None
    norm: str = "model"
    protocol: str = "honest"
    test_every: int | None = None
    tune: bool = False
    tune_lr: str = "0.3,1,3"
    tune_scale: str = "0.1,1,10"
    tune_seed: int | None = None
    drop_path: float = 0.1
    compile: bool = False
    cache_frozen_prefix: bool = False

    def __post_init__(self) -> None:
        limits.check(self)

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

    @classmethod
    def young(cls) -> dict[str, Any]:
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in FIRST}

    def title(self) -> str:
        task = self.task or (self.data_root.resolve().name if self.data_root else "")
        return f"{task}-{self.model}-{self.method.name}" + ("-paper" if self.protocol == "paper" else "")


TRAIN = Command(
    prog="python -m vtab.train",
    description="Fine-tune a timm backbone on one task; the run folder holds the adapter and every figure.",
    config=Config,
    choices=limits.CHOICES,
    recipes=recipes.RECIPES,
)
parse = TRAIN.parse
