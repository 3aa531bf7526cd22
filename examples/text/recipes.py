"""CapaBoost's own settings on GLUE as recipes: what its authors' scripts train with, as defaults of the flags here.

    python -m examples.text.recipes                                            all of them
    python -m examples.text_classification --recipe capaboost-lora-deberta-rte      other flags override it

Source: LINs-lab/CapaBoost, scripts/, commit a0d9963; CapaBoost, arXiv 2407.01320. A recipe sets how to train, never how
to test. The scripts keep the epoch that is best on held-out texts: those of run_glue_no_test.py on GLUE's validation
split, which they report; those of run_glue.py on texts that they do not report.
"""

from typing import Any

from vtab.recipes import Recipe, listing

SOURCE = "LINs-lab/CapaBoost scripts/"
SAME = "the best epoch on GLUE's validation split, by that split"
HALF = "the best epoch by one half of GLUE's validation split, on the other"
APART = "the best epoch by 1,000 training texts held out, on GLUE's validation split"
SMALL = ("cola", "rte", "mrpc", "stsb")  # tasks whose training texts run_glue.py leaves whole
DIFFERS = (
    "they start A 9.8 times larger (fan-in is the rank) and B not at 0, so that their lr and alpha need not suit ours",
    "float16 there; here float32, bfloat16 on a GPU that has it",
    "here 200 training texts are kept for --stage tune, and the last epoch counts",
)
ADAPTER_DIFFERS = (
    "their two branches have a bias each, of which one learns: here one, by its gradient",
    *DIFFERS[1:],
)
MASKS = {"branches": 2, "density": 0.5, "masks": "random"}
DEBERTA, ROBERTA = "microsoft/deberta-v3-base", "FacebookAI/roberta-base"
# Epochs and learning rate by task in run_lora_rank_ablation.sh, which loops over MNLI as it stands
BY_TASK = {
    "cola": (40, 5e-4),
    "sst2": (20, 1e-4),
    "mrpc": (40, 5e-4),
    "qqp": (20, 5e-4),
    "stsb": (20, 5e-4),
    "rte": (30, 5e-4),
    "qnli": (10, 5e-4),
    "mnli": (20, 5e-4),
}


def _run(task: str, *settings: Any) -> Any:
    return {"data": f"glue/{task}", **trained(*settings)}


def trained(model: str, lr: float, epochs: int, batch: int, length: int, warmup: float, decay: float) -> Any:
    """The flags that a script sets, beside transformers' own defaults: AdamW, a linear decay to 0, clipping at 1."""
    return {
        "model": model,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch,
        "max_length": length,
        "warmup": warmup,
        "weight_decay": decay,
        "optimizer": "adamw",
        "schedule": "step",
        "decay": "linear",
        "lr_start": 0.0,
        "lr_min": 0.0,
        "clip": 1.0,
        "drop_last": False,
    }


_ROWS = (
    Recipe(
        "capaboost-lora-deberta-rte",
        f"{SOURCE}run_lora.sh",
        "lora",
        _run("rte", DEBERTA, 1.5e-3, 60, 32, 512, 200, 0.01),
        {"rank": 8, "alpha": 16.0, **MASKS},
        searched="lr in 1e-4, 5e-4, 1e-3, 5e-3 beside it",
        reported=SAME,
        differs=DIFFERS,
    ),
    Recipe(
        "capaboost-lora-deberta-qnli",
        f"{SOURCE}run_lora_qnli.sh",
        "lora",
        _run("qnli", DEBERTA, 8e-4, 30, 64, 320, 500, 0.01),
        {"rank": 8, "alpha": 32.0, **MASKS},
        searched="lr in 1e-4, 5e-4, 1e-3, 5e-3 beside it",
        reported=SAME,
        differs=DIFFERS,
    ),
    *(
        Recipe(
            f"capaboost-lora-roberta-{task}",
            f"{SOURCE}run_lora_rank_ablation.sh",
            "lora",
            _run(task, ROBERTA, lr, epochs, 128, 128, 0.1, 0.1),
            {"rank": 4, "alpha": 6.0, **MASKS},
            reported=HALF if task in SMALL else APART,
            differs=DIFFERS,
        )
        for task, (epochs, lr) in BY_TASK.items()
    ),
    Recipe(
        "capaboost-adapter-deberta-mnli",
        f"{SOURCE}run_adapter.sh",
        "adapter",
        _run("mnli", DEBERTA, 5e-4, 30, 64, 256, 1000, 0.01),
        {"rank": 32, "where": "pfeiffer", "activation": "relu", **MASKS},
        searched="lr in 1e-3, 3e-3, 5e-3, 1e-4, 8e-4 beside it",
        reported=APART,
        differs=ADAPTER_DIFFERS,
    ),
    Recipe(
        "capaboost-adapter-roberta-rte",
        f"{SOURCE}run_adapter.sh, its commented part",
        "adapter",
        _run("rte", ROBERTA, 5e-4, 20, 128, 128, 0.1, 0.1),
        {"rank": 64, "where": "pfeiffer", "activation": "relu", **MASKS},
        searched="density in 0.5, 0.7, 0.9",
        reported=HALF,
        differs=ADAPTER_DIFFERS,
    ),
)
RECIPES = {recipe.name: recipe for recipe in _ROWS}

if __name__ == "__main__":
    from vtab.cli import Parser, run

    def main(argv: list[str] | None = None) -> str:
        """Print them."""
        from examples.text.qa_recipes import RECIPES as OF_SQUAD

        description = "CapaBoost's recipes on GLUE and SQuAD."
        Parser(prog="python -m examples.text.recipes", description=description).parse_args(argv)
        print(text := listing(RECIPES | OF_SQUAD))
        return text

    run(main)
