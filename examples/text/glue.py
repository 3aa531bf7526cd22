"""GLUE's tasks as rows, read through the package datasets.

Sources: arXiv 1804.07461; columns as in nyu-mll/glue on the Hugging Face hub. The labels of GLUE's own test splits are
not public, so its validation splits are what is tested here, once; the texts that --stage tune watches come from train.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from capavision.hub import asked_once
from capavision.targets import near
from examples.text.data import Texts

REPO = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """One row: the columns with the texts, the metric, the splits to test on."""

    columns: tuple[str, ...]
    metric: str = "accuracy"
    tests: tuple[str, ...] = ("validation",)


TASKS = {
    "cola": Task(("sentence",), "matthews"),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2"), "f1+accuracy"),
    "qqp": Task(("question1", "question2"), "f1+accuracy"),
    "stsb": Task(("sentence1", "sentence2"), "pearson+spearman"),
    "mnli": Task(("premise", "hypothesis"), tests=("validation_matched", "validation_mismatched")),
    "qnli": Task(("question", "sentence")),
    "rte": Task(("sentence1", "sentence2")),
}


def load(name: str) -> tuple[Task, Texts, list[Texts], list[str] | None]:
    """A task: its row, the training texts, those of each split to test on, the classes' names (None: numbers).

    Raises:
        ValueError: no such task, the hub out of reach, a data set of another form.
    """
    if name not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; {near(name, TASKS)}")
    task = TASKS[name]
    import datasets

    try:
        with asked_once():
            found = datasets.load_dataset(REPO, name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"GLUE's {name} is not on this machine, and the Hugging Face hub did not give it ({error}); run once where "
            "the hub is in reach and copy ~/.cache/huggingface, or take --data rotten_tomatoes or your own .csv"
        ) from error
    label = found["train"].features["label"]
    train, *tests = (_texts(found[split], task) for split in ("train", *task.tests))
    return task, train, tests, getattr(label, "names", None)


def _texts(part: Any, task: Task) -> Texts:
    first, *second = (list(part[column][:]) for column in task.columns)
    labels = np.asarray(part["label"][:])
    return Texts(
        first, second[0] if second else None, labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)
    )
