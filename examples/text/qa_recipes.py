"""CapaBoost's own settings on SQuAD as recipes: what its authors' four scripts train with.

    python -m examples.question_answering --recipe capaboost-lora-deberta-squad      other flags override it
    python -m examples.text.recipes                                                  all of them

Source: LINs-lab/CapaBoost, scripts/, commit a0d9963; CapaBoost, arXiv 2407.01320. Their run_qa.py looks at SQuAD's
development split, the one that is reported, after every epoch.
"""

from typing import Any

from examples.text.recipes import ADAPTER_DIFFERS, DEBERTA, DIFFERS, MASKS, SOURCE, trained
from vtab.recipes import Recipe

REPORTED = "not told; the development split is looked at after every epoch"
SETS = {"squad": "squad", "squad-v2": "squad_v2"}  # by the recipes' spelling
SCRIPTS = {"squad": "squad", "squad-v2": "squadv2"}


def _run(data: str, epochs: int, batch: int) -> dict[str, Any]:
    settings = trained(DEBERTA, 1e-3, epochs, batch, 384, 1000, 0.01)
    return {"data": SETS[data], "stride": 128, **settings}


def _lora(data: str) -> Recipe:
    return Recipe(
        f"capaboost-lora-deberta-{data}",
        f"{SOURCE}run_multimask_lora_{SCRIPTS[data]}.sh",
        "lora",
        _run(data, 15, 32),
        {"rank": 1, "alpha": 16.0, **MASKS},
        reported=REPORTED,
        differs=DIFFERS[:1],
    )


def _adapter(data: str) -> Recipe:
    return Recipe(
        f"capaboost-adapter-deberta-{data}",
        f"{SOURCE}run_multimask_adapter_{SCRIPTS[data]}.sh",
        "adapter",
        _run(data, 20, 16),
        {"rank": 32, "where": "pfeiffer", "activation": "relu", **MASKS},  # their reduction factor is 24 of 768
        reported=REPORTED,
        differs=ADAPTER_DIFFERS[:1],
    )


RECIPES = {recipe.name: recipe for make in (_lora, _adapter) for recipe in map(make, SETS)}
