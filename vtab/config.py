"""A run's settings: one frozen dataclass, from which come the command line, the run's name and its record."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import capavision as cv
from capavision.targets import near
from vtab import cli
from vtab.cache import KEEP


@dataclass(frozen=True)
class Config:
    """What to train and how. The same settings and seed on the same machine give the same numbers.

    task: a VTAB-1k task, digits, or the name for your own folder
    data_root: folder of images: the VTAB-1k layout (lists in it, or in a subfolder named like the task) or class
        folders
    partial: accept VTAB-1k lists of other lengths than 800, 200 and the full test split
    cache: which decoded images are kept in the cache folder: train (training and validation), all (the test split too:
        up to 10 GiB a task at 224 pixels), none
    split_file: where the split of class folders is written (default: capavision_split.json in the folder)
    model: demo (a ViT-S/14 from a Python package) or any timm name, with its tag: vit_base_patch16_224.orig_in21k
    weights: pretrained, random, or a .safetensors file
    img_size: side of the input in pixels (default: the model's own; 56 for demo)
    targets: what to adapt, comma-separated names, globs or groups (default: the method's choice for the architecture)
    parts: rows of a fused projection to adapt: letters of q, k, v
    stage: final trains on all 1,000 images and tests once, after the last epoch; tune trains on 800, watches the 200
        and never touches the test split
    test_limit: test on the first N images only, recorded as such
    epochs: passes over the training images
    batch_size: images a step
    lr: peak learning rate of AdamW
    mask_lr: peak learning rate of the scores of learned masks (default: 30 times lr)
    weight_decay: of AdamW
    warmup: share of all steps over which the learning rate rises; it then falls as a cosine
    drop_path: stochastic depth rate of the backbone
    clip: largest norm of the gradient; 0 does not clip
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
    stage: str = "final"
    test_limit: int | None = None
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    mask_lr: float | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.1
    drop_path: float = 0.1
    clip: float = 1.0
    seed: int = 0
    device: str | None = None
    out: Path = Path("runs")
    name: str | None = None

    def __post_init__(self) -> None:
        if not self.task and self.data_root is None:
            raise ValueError("name a task: --task digits, say, or your own images: --data-root FOLDER")
        if self.cache not in KEEP:
            raise ValueError(f"--cache {self.cache!r} is unknown; choose {', '.join(KEEP)}")
        if self.stage not in ("final", "tune"):
            raise ValueError(f"--stage {self.stage!r} is unknown; choose final or tune")
        if self.stage == "tune" and self.test_limit is not None:
            raise ValueError("--test-limit has no use with --stage tune, which never touches the test split")
        for flag in ("epochs", "batch_size", "img_size", "test_limit"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {value} must be at least 1")
        if self.mask_lr is not None and getattr(self.method, "masks", "") != "learned":
            raise ValueError("--mask-lr has no use without learned masks; pass --masks learned, or leave it out")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed {self.seed} must lie in [0, 2147483648)")
        limits = {"lr": 1e3, "mask_lr": 1e3, "weight_decay": 1e3, "warmup": 1, "drop_path": 0.99}
        for flag, high in limits.items():
            if getattr(self, flag) is not None and not 0 <= getattr(self, flag) <= high:
                raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)} must lie in [0, {high:g}]")
        if not self.clip >= 0:
            raise ValueError(f"--clip {self.clip} must be positive, or 0 not to clip")

    def record(self) -> dict[str, Any]:
        """The settings as JSON; paths as text, the method with its name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
        method = {"name": self.method.name, **dataclasses.asdict(self.method)}  # type: ignore[call-overload]
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()} | {"method": method}

    def digest(self) -> str:
        """Eight hex digits of all that shapes the numbers."""
        relevant = {k: v for k, v in self.record().items() if k not in ("out", "name", "cache")}
        if self.mask_lr is None:  # as in a run that was started before there were learned masks
            del relevant["mask_lr"]
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self) -> Path:
        """The run's folder."""
        task = self.task or (self.data_root.resolve().name if self.data_root else "")
        return self.out / (self.name or f"{task}-{self.model}-{self.method.name}-s{self.seed}-{self.digest()}")


def parse(argv: list[str] | None = None) -> Config:
    """The command line as a Config: general flags, and those of the chosen method.

    Raises:
        ValueError: an unknown method, or values that do not fit each other.
    """
    first = cli.Parser(add_help=False)
    first.add_argument("--method", default="lora")
    name = first.parse_known_args(argv)[0].method.replace("-", "_")
    if name not in cv.Method.known:
        raise ValueError(f"unknown method {name!r}; {near(name, cv.Method.known)}")
    method = cv.Method.known[name]
    parser = cli.Parser(
        prog="python -m vtab.train",
        description="Fine-tune a timm backbone on one task; the run folder holds the adapter and every figure.",
        epilog=f"Methods: {', '.join(sorted(cv.Method.known))}; each has flags of its own: --method NAME --help.",
    )
    cli.add_fields(parser.add_argument_group("run"), Config)
    chosen = parser.add_argument_group(f"method {name}")
    chosen.add_argument("--method", default="lora", metavar="NAME", help="(default: lora)")
    cli.add_fields(chosen, method)
    values = parser.parse_args(argv)
    return cli.collect(Config, values, method=cli.collect(method, values))
