"""Fine-tune a Hugging Face encoder on texts with a label, or pairs of them, by any method of capavision.

    python -m examples.text_classification --data rotten_tomatoes --method lora --rank 2 --branches 2
    python -m examples.text_classification --data reviews.csv --text-column review --label-column stars
    python -m examples.text_classification --recipe capaboost-lora-deberta-rte        # where the hub is in reach

The protocol is vtab.train's: choose settings with --stage tune (a part of the training texts is kept for it), then one
run with the default --stage final, which looks at the test split once, after the last epoch. --seeds 3 does it three
times over. `python -m vtab.report runs` shows the runs.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.text.metrics import METRICS
from examples.text.recipes import RECIPES
from examples.text.run import run
from examples.text.settings import Classification
from vtab import cli, limits, seeds
from vtab.command import Command

COMMAND = Command(
    prog="python -m examples.text_classification",
    description="Fine-tune a text encoder on one task; the run folder holds adapter, tokenizer and every figure.",
    config=Classification,
    choices=limits.TRAINING | {"metric": tuple(METRICS)},
    recipes=RECIPES,
)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as the command line says, or go on where the same command stopped; returns result.json, or with --seeds
    the mean and spread of several."""
    return seeds.train(COMMAND, argv, run)


if __name__ == "__main__":
    cli.run(main)
