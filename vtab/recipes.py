"""Published recipes as rows: what each method's authors trained with, as defaults of this trainer's flags.

    python -m vtab.recipes                                          all of them
    python -m vtab.train --task dtd --method lora --recipe noah-lora ...   explicit flags override the recipe

Figures come from the authors' code, which each row names; where code and paper differ, the code counts. A recipe sets
how to train, never how to test: most of these authors report the best of several looks at the test split
(`reported`), which takes --protocol paper here as well. What we cannot do as they did is in `differs`.
Methods that are not here at all (SSF, SPT, ARC, RLRR, GLoRA, NOAH's search, VPT, PACE) have no recipe.
"""

import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from capavision.targets import near
from vtab import tasks
from vtab.tasks import VTAB

DROPOUT = "module dropout of 0.1: no method here has dropout"
WIDEST = 120  # columns that are still read with ease


@dataclass(frozen=True)
class Recipe:
    """One row: flags of the run and of the method, the same for every task or by task, and where they come from."""

    name: str
    source: str
    method: str | None  # None fits every method
    run: Mapping[str, Any]
    of_method: Mapping[str, Any] = field(default_factory=dict)
    rank_by_task: tuple[int, ...] = ()  # the 19 tasks in VTAB's order
    scale_by_task: tuple[float, ...] = ()  # factor on the delta: alpha = scale · rank for LoRA
    searched: str = "nothing"
    reported: str = "the last epoch"
    differs: tuple[str, ...] = (DROPOUT,)

    @property
    def by_task(self) -> tuple[str, ...]:
        """The method's fields that take another value for each task."""
        scale = "alpha" if self.method == "lora" else "scale"
        return (("rank",) if self.rank_by_task else ()) + ((scale,) if self.scale_by_task else ())

    def values(self, task: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Defaults for `task`: flags of the run, and of the method given the explicit flags `given`."""
        row = _row(task)
        of_method = dict(self.of_method)
        if self.rank_by_task and row is not None:
            of_method["rank"] = self.rank_by_task[row]
        if self.scale_by_task and row is not None:
            scale = self.scale_by_task[row]
            rank = given.get("rank", of_method.get("rank"))
            of_method |= {"alpha": float(scale * rank)} if self.method == "lora" else {"scale": float(scale)}
        return {**self.run, "recipe": self.name}, of_method

    def unlike(self, task: str) -> list[str]:
        """What a run on `task` does otherwise than the authors did."""
        if self.by_task and _row(task) is None:
            return [*self.differs, f"no published {' or '.join(self.by_task)} for {task or 'this task'}: the default"]
        return list(self.differs)


def _row(task: str) -> int | None:
    """The task's place in VTAB's order; None for a task of one's own."""
    row = tasks.get(task)
    return VTAB.index(row) if row in VTAB else None


COMMON: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "schedule": "epoch",
    "warmup": 0.1,
    "lr_start": 1e-6,
    "lr_min": 1e-5,
    "epochs": 100,
    "batch_size": 64,
    "drop_last": True,
    "drop_path": 0.1,
    "clip": 0.0,
    "norm": "imagenet",
}
BARE = {**COMMON, "norm": "none"}
BEST_OF_10 = "best of 10 test evaluations"
UNDOCUMENTED = "by task; how is not documented"

NOAH_LORA = Recipe(
    "noah-lora",
    "ZhangYuanhan-AI/NOAH configs/LoRA/VTAB, model/supernet_vision_transformer_timm.py",
    "lora",
    {**COMMON, "targets": "qkv"},  # one A for q, k and v together: 294,912 values in a ViT-B
    {"rank": 8, "alpha": 8.0},
    reported="best of 11 test evaluations",
)
NOAH_ADAPTER = Recipe(
    "noah-adapter",
    "ZhangYuanhan-AI/NOAH configs/Adapter/VTAB, model/module/adapter_super.py",
    "adapter",
    {**COMMON, "targets": "mlp"},
    {"rank": 8, "where": "houlsby", "activation": "gelu"},
    reported="best of 11 test evaluations",
    differs=(
        DROPOUT,
        "QuickGELU, and a Xavier start of both matrices: here GELU, and U = 0",
        "their adapter stands after the drop-path, ours before it",
    ),
)
CONVPASS = Recipe(
    "convpass",
    "JieShibo/PETL-ViT convpass/vtab/configs/convpass",
    "adapter",
    COMMON,
    {"rank": 8, "where": "parallel", "activation": "gelu"},
    scale_by_task=(0.1, 1, 0.01, 0.1, 1, 100, 0.1, 10, 10, 10, 1, 1, 0.1, 10, 10, 100, 0.1, 100, 1),
    searched=f"scale in 0.01, 0.1, 1, 10, 100 {UNDOCUMENTED}",
    reported=BEST_OF_10,
    differs=(
        DROPOUT,
        "Convpass has a 3 × 3 convolution in its bottleneck, and one beside each attention too: its scales only",
    ),
)
FACT_TK = Recipe(
    "fact-tk",
    "JieShibo/PETL-ViT FacT/fact_tk.py, FacT/configs/tk",
    "lora",
    COMMON,
    {"rank": 32},
    rank_by_task=(32, 32, 16, 32, 16, 32, 16, 32, 32, 32, 16, 32, 16, 32, 32, 32, 32, 32, 16),
    scale_by_task=(0.1, 10, 0.01, 1, 10, 100, 1, 10, 100, 10, 1, 10, 10, 10, 10, 100, 1, 100, 10),
    searched=f"scale in 0.01, 0.1, 1, 10, 100 and rank 16 or 32 {UNDOCUMENTED}",
    reported=BEST_OF_10,
    differs=(DROPOUT, "FacT shares its factors among all layers and Linears: its ranks and scales only"),
)
REPADAPTER = Recipe(
    "repadapter",
    "luogen1996/RepAdapter train.py, configs/repblock",
    "adapter",
    COMMON,
    {"rank": 8, "where": "houlsby"},
    scale_by_task=(0.1, 5, 1, 0.5, 0.1, 10, 0.1, 1, 1, 5, 0.1, 0.5, 0.1, 5, 5, 5, 0.1, 10, 1),
    searched="scale in 0.1, 0.5, 1, 5, 10 by task (scripts/search_rep*.sh)",
    reported=BEST_OF_10,
    differs=(DROPOUT, "RepAdapter is linear, grouped, before attention and MLP, its norm in the loss: its scales only"),
)
REPADAPTER_ATTN = replace(
    REPADAPTER,
    name="repadapter-attn",
    source="luogen1996/RepAdapter train.py, configs/repattn",
    run={**COMMON, "targets": "attention"},
    scale_by_task=(0.1, 10, 0.1, 0.5, 0.5, 10, 0.1, 0.5, 5, 0.1, 0.5, 1, 0.1, 5, 1, 10, 5, 10, 1),
    differs=(DROPOUT, "RepAdapter is linear, grouped, before attention, its norm in the loss: its scales only"),
)
BI_LORA = Recipe(
    "bi-lora",
    "JieShibo/PETL-ViT binary_adapter/lora.py, configs/lora/*-bit1-dim32.yaml",
    "lora",
    BARE,
    {"rank": 32, "alpha": 32.0},
    scale_by_task=(0.1, 10, 0.01, 1, 0.1, 10, 0.1, 10, 10, 10, 10, 1, 0.1, 10, 10, 1, 0.1, 10, 1),
    searched=f"scale in 0.01, 0.1, 1, 10 {UNDOCUMENTED}",
    reported=BEST_OF_10,
    differs=(DROPOUT, "their matrices have weights of 1 bit, and the scales belong to these: here full precision"),
)
BI_ADAPTFORMER = replace(
    BI_LORA,
    name="bi-adaptformer",
    source="JieShibo/PETL-ViT binary_adapter/adaptformer.py, configs/adaptformer/*-bit1-dim32.yaml",
    method="adapter",
    of_method={"rank": 32, "where": "parallel"},
    scale_by_task=(0.1, 10, 0.01, 1, 0.01, 10, 0.1, 1, 1, 10, 1, 1, 0.1, 1, 1, 1, 0.1, 1, 1),
    differs=(
        *BI_LORA.differs,
        "their adapter reads the residual stream before the norm and stands outside the drop-path",
    ),
)
ADAPTER_PLUS = Recipe(
    "adapter-plus",
    "visinf/adapter_plus conf/, modeling/adaptermodel.py",
    "adapter",
    {**COMMON, "norm": "model", "lr_start": 1e-5, "lr_min": 1e-6},
    {"rank": 8, "where": "pfeiffer", "activation": "gelu"},
    reported="the last epoch, seeds 18, 45, 25",
    differs=(
        "a trained scale for each channel, and drop-path on the adapter: neither is here",
        "no weight decay on biases; both matrices start from N(0, 0.01): here all decay, and U = 0",
        "their cosine starts where the warm-up ends; here it starts with the schedule",
    ),
)
ADAPTER_PLUS_RANKS = replace(
    ADAPTER_PLUS,
    name="adapter-plus-ranks",
    source="visinf/adapter_plus conf/experiment/vtab/adapter_plus_dim1-32.yaml",
    rank_by_task=(1, 4, 2, 1, 8, 16, 1, 16, 2, 32, 32, 4, 8, 8, 8, 32, 4, 32, 8),
    searched="rank in 1, 2, 4, 8, 16, 32 by task",
)
OSU_SEARCHED = "lr in 1e-3, 1e-2; weight decay in 1e-4, 1e-3; rank in {}, on val200"
OSU_LORA = Recipe(
    "osu-lora",
    "OSU-MLB/ViT_PEFT_Vision, default_vtab",
    "lora",
    BARE,
    searched=OSU_SEARCHED.format("1, 8, 16, 32"),
    reported="the last epoch, seed 42",
    differs=(DROPOUT, "the defaults here are one point of their grid; --tune searches lr and scale"),
)
OSU_ADAPTER = replace(
    OSU_LORA,
    name="osu-adapter",
    method="adapter",
    of_method={"rank": 8, "where": "houlsby"},
    searched=OSU_SEARCHED.format("4 … 32; scale in 0.01, 0.1, 1, 10"),
)
OSU_ADAPTFORMER = replace(
    OSU_LORA,
    name="osu-adaptformer",
    method="adapter",
    of_method={"rank": 16, "where": "parallel", "scale": 0.1},
    searched=OSU_SEARCHED.format("4, 16, 32; scale in 0.05, 0.1, 0.2"),
)
VPT = {**COMMON, "lr_start": 0.0, "lr_min": 0.0, "drop_last": False, "drop_path": 0.0}
VPT_SEARCHED = "lr in {}, times batch / 256; weight decay in 1e-2, 1e-3, 1e-4, 0, on val200"
VPT_DIFFERS = (
    "lr and weight decay are chosen by task on val200: the default here is the middle of the grid; pass --tune",
    "their cosine starts where the warm-up ends, and the schedule an epoch earlier; here it starts with the schedule",
    "their data are lossless; see the record for yours",
)
VPT_LINEAR = Recipe(
    "vpt-linear",
    "KMnP/vpt tune_vtab.py, configs/base-linear.yaml; VPT, arXiv 2203.12119",
    "linear_probe",
    {**VPT, "optimizer": "sgd", "lr": 1.0 * 64 / 256},
    searched=VPT_SEARCHED.format("0.05 … 50"),
    reported="the last epoch, five seeds",
    differs=(*VPT_DIFFERS, "their batch is 1,024, more than there are images: here 64"),
)
VPT_FULL = replace(
    VPT_LINEAR,
    name="vpt-full",
    source="KMnP/vpt tune_vtab.py, configs/base-finetune.yaml; VPT, arXiv 2203.12119",
    method="full",
    run={**VPT, "lr": 1e-3 * 64 / 256, "warmup": 0.05},
    searched=VPT_SEARCHED.format("1e-4, 5e-4, 1e-3, 5e-3"),
    differs=(*VPT_DIFFERS, "their batch is 384: here 64"),
)
_ROWS = (
    Recipe(
        "common",
        "what NOAH, FacT, Convpass, RepAdapter and V-PETL share: JieShibo/PETL-ViT convpass/vtab/train.py",
        None,
        COMMON,
        reported=BEST_OF_10,
    ),
    NOAH_LORA, NOAH_ADAPTER, CONVPASS, FACT_TK, REPADAPTER, REPADAPTER_ATTN, BI_LORA, BI_ADAPTFORMER, ADAPTER_PLUS,
    ADAPTER_PLUS_RANKS, OSU_LORA, OSU_ADAPTER, OSU_ADAPTFORMER, VPT_LINEAR, VPT_FULL,
    replace(VPT_FULL, name="vpt-bitfit", method="bitfit"),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in _ROWS}


def find(name: str, among: Mapping[str, Recipe] = RECIPES) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: no such recipe; near names are given.

    >>> find("fact-tk").values("svhn", {})[1]
    {'rank': 32, 'alpha': 3200.0}
    """
    if name not in among:
        raise ValueError(f"unknown recipe {name!r}; {near(name, among)} The help of --recipe says what lists all")
    return among[name]


def listing(recipes: Mapping[str, Recipe] = RECIPES) -> str:
    """The recipes, as wide as the terminal: what each sets, what its authors searched and reported; below them, each
    once, what we do otherwise."""
    notes = list(dict.fromkeys(note for recipe in recipes.values() for note in recipe.differs))
    common = recipes["common"].run if "common" in recipes else {}
    parts = []
    for recipe in recipes.values():
        run = recipe.run if recipe.name == "common" else {k: v for k, v in recipe.run.items() if common.get(k) != v}
        sets = [f"{key} {_text(value)}" for key, value in {**run, **recipe.of_method}.items()]
        sets = (["as common"] if common and recipe.name != "common" else []) + sets
        sets += [f"{name} by task" for name in recipe.by_task]
        lines = {
            "method": recipe.method or "any",
            "sets": ", ".join(sets),
            "searched": recipe.searched,
            "reported": recipe.reported,
            "differs": " ".join(f"[{1 + notes.index(note)}]" for note in recipe.differs),
            "source": recipe.source,
        }
        told = [_wrapped(f"  {name:<8}  ", text) for name, text in lines.items() if text]
        parts.append("\n".join([recipe.name, *told]))
    here = [_wrapped(f"[{number}]".ljust(5), note) for number, note in enumerate(notes, 1)]
    return "\n\n".join([*parts, "\n".join(["How they differ here", *here])])


def _wrapped(start: str, text: str) -> str:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    indents = {"initial_indent": start, "subsequent_indent": " " * len(start)}
    return textwrap.fill(text, width, break_on_hyphens=False, **indents)


def scales() -> str:
    """The factors on the delta that authors chose by task, as Markdown."""
    columns = [recipe for recipe in RECIPES.values() if recipe.scale_by_task or recipe.rank_by_task]
    rows = [f"| task | {' | '.join(recipe.name for recipe in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i, task in enumerate(VTAB):
        cells = []
        for recipe in columns:
            rank = [f"rank {recipe.rank_by_task[i]}"] if recipe.rank_by_task else []
            cells.append(", ".join(rank + ([f"{recipe.scale_by_task[i]:g}"] if recipe.scale_by_task else [])))
        rows.append(f"| {task.id} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from vtab.cli import Parser, run

    def main(argv: list[str] | None = None) -> str:
        """Print recipes and scales."""
        Parser(prog="python -m vtab.recipes", description="Published recipes, and their scales by task.").parse_args(
            argv
        )
        print(text := f"{listing()}\n\n{scales()}")
        return text

    run(main)
