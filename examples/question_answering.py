"""Fine-tune a Hugging Face encoder on questions about paragraphs, SQuAD's task, by any method of capavision.

    python -m examples.question_answering --train train-v2.0.json --dev dev-v2.0.json --method lora --branches 2
    python -m examples.question_answering --recipe capaboost-lora-deberta-squad-v2      # where the hub is in reach

The answer is a stretch of the paragraph; in SQuAD v2.0 there may be none. Judged by exact match and F1 as SQuAD's
official scripts have them; predictions.json is in the form that these scripts read. The protocol is vtab.train's:
--stage tune keeps some training paragraphs to choose settings by, --null-threshold among them; the default --stage
final looks at --dev once, after the last epoch. --seeds 3 does it three times over. python -m export RUN --out DIR
makes a package of the run, which python -m export.predict DIR --question "…" --context "…" asks.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.text.qa_recipes import RECIPES
from examples.text.qa_run import run
from examples.text.qa_settings import QuestionAnswering
from vtab import cli, limits, seeds
from vtab.command import Command

COMMAND = Command(
    prog="python -m examples.question_answering",
    description="Fine-tune a text encoder on questions; the run folder holds the adapter, tokenizer and every answer.",
    config=QuestionAnswering,
    choices=limits.TRAINING,
    recipes=RECIPES,
)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as the command line says, or go on where the same command stopped; returns result.json, or with --seeds
    the mean and spread of several."""
    return seeds.train(COMMAND, argv, run)


if __name__ == "__main__":
    cli.run(main)
