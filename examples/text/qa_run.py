"""A question-answering run from its settings to its folder.

config.json, metrics.jsonl, result.json, adapter.safetensors, curve.png                as vtab.record has them
tokenizer.json, tokenizer_config.json, model_config/config.json                        as transformers saves them
predictions.json, nbest_predictions.json, null_odds.json, wrong_answers.csv            as qa_files has them
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import capavision as cv
from examples.text import answers, qa_files, qa_loop, squad, windows
from examples.text.adapted import Adapted, adapt
from examples.text.encode import Encoded
from examples.text.model import architecture, load_tokenizer
from examples.text.qa_settings import QuestionAnswering
from examples.text.questions import Squad
from examples.text.windows import Window
from export import spans
from export.spans import Decoded
from vtab import record

TRIED = 64  # windows that tokenizer and model are tried with


@dataclass(frozen=True)
class QuestionSetup:
    """A run that is ready to train.

    training, judged: the questions to train on, and those that judge the run, with the windows of each
    facts: about the data, for the record
    """

    config: QuestionAnswering
    training: tuple[Squad, list[Window]]
    judged: tuple[Squad, list[Window]]
    facts: dict[str, Any]
    adapted: Adapted

    @functools.cached_property
    def asked(self) -> Encoded:
        """The judging questions' windows, on the model's device."""
        return qa_loop.encode(self.judged[1], self.adapted.tokenizer, self.adapted.device)[0]

    def decode(self) -> list[Decoded]:
        """The best answers to the judging questions."""
        questions, rows = self.judged
        logits = qa_loop.predict(self.adapted.model, self.asked, self.config.precision)
        contexts = [question.context for question in questions.questions]
        return spans.decode(contexts, rows, logits, self.config.longest_answer, self.config.n_best)

    def answers(self, decoded: Sequence[Decoded], *, always: bool = False) -> dict[str, str]:
        """One answer to each question by its id; "" where none scores better by the threshold, unless `always`."""
        questions = self.judged[0]
        threshold = None if always or questions.version == "1.1" else self.config.null_threshold
        return {q.id: told.answer(threshold) for q, told in zip(questions.questions, decoded, strict=True)}


def run(config: QuestionAnswering) -> dict[str, Any]:
    """One run in its folder, as far as it is not done yet; returns result.json."""
    return record.once(config, lambda folder: train(config, folder))


def train(config: QuestionAnswering, folder: Path) -> dict[str, Any]:
    """Set-up, epochs, the one look at the split that judges the run, the files that record it."""
    setup = prepare(config, folder)
    adapted, (questions, rows) = setup.adapted, setup.training
    print(f"{adapted.report}\n{setup.facts['source']}; {config.stage} run on {adapted.device}")
    print(f"{len(questions):,} questions in {len(rows):,} windows to train on, {questions.answerable:,} with an answer")
    if lost := len(questions) - len({row.question for row in rows}):
        print(f"{lost:,} of them are left out: no window holds the whole answer")
    if questions.answerable == len(questions) and setup.judged[0].answerable < len(setup.judged[0]):
        print("all of them have an answer, unlike those to be judged by: nothing teaches to give none")
    if shared := setup.facts["judged_contexts_in_training"]:
        print(f"{shared} of the {len(setup.judged[0].contexts)} contexts that judge it are trained on: no fair test")
    encoded, labels = qa_loop.encode(rows, adapted.tokenizer, adapted.device)
    history = qa_loop.SpanLoop(adapted.model, encoded, labels, config).fit(folder, watcher(setup))
    adapted.save(folder, setup.facts["source"])
    cv.fold(adapted.model)  # judged as it will run: the plain model, at its speed
    return conclude(setup, folder, history)


def prepare(config: QuestionAnswering, folder: Path) -> QuestionSetup:
    """Questions read and cut into windows, model built and injected: everything that can be refused is refused here.

    Raises:
        ValueError: settings, questions, tokenizer and model that do not fit each other.
    """
    training, judging = open_questions(config)
    text = {
        "model": config.model,
        "architecture": architecture(config.model, "QUESTION_ANSWERING"),
        "task": config.task,
        "max_length": config.max_length,
        "pair": True,
        "stride": config.stride,
        "longest_answer": config.longest_answer,
        "n_best": config.n_best,
        "null_threshold": config.null_threshold if judging.version == "2.0" else None,
    }
    tokenizer, judged = load_tokenizer(config.model), judging.head(config.test_limit)
    cut = [windows.cut(part, tokenizer, config.max_length, config.stride) for part in (training, judged)]
    labelled = [window for window in cut[0] if window.label is not None]
    if not any(training.questions[window.question].answers for window in labelled):
        raise ValueError(
            f"no window of {training.source} holds a whole answer; raise --max-length {config.max_length} or --stride "
            f"{config.stride}, or give questions whose answers the tokenizer of {config.model} knows"
        )
    some, _ = qa_loop.encode(labelled[:TRIED], tokenizer, torch.device("cpu"))
    facts = facts_of(config, training, judging) | {"windows": {"train": len(labelled), "judged": len(cut[1])}}
    adapted = adapt(config, text, tokenizer, some, folder)
    return QuestionSetup(config, (training, labelled), (judged, cut[1]), facts, adapted)


def open_questions(config: QuestionAnswering) -> tuple[Squad, Squad]:
    """The questions to train on, and those that judge the run: --dev, or in the tune stage a part of --train.

    Raises:
        ValueError: no such file or set, one that is not SQuAD's format, no answers to learn from.
    """
    if config.data:
        everything, dev = squad.fetch(config.data)
    else:
        assert config.train is not None
        everything = squad.read(config.train)
        dev = squad.read(config.dev) if config.dev and config.stage == "final" else everything
    training, judging = everything.drawn(config.train_size, config.split_seed), dev
    if config.stage == "tune":
        training, judging = training.split(config.val_share, config.split_seed)
    if not training.answerable:
        raise ValueError(f"{training.source} has no answers among the {len(training)} questions to train on")
    if config.null_threshold and judging.version == "1.1":
        raise ValueError(
            f"--null-threshold {config.null_threshold:g} has no use with {judging.source}, all of whose questions have "
            "an answer; leave it out"
        )
    return training, judging


def facts_of(config: QuestionAnswering, training: Squad, judging: Squad) -> dict[str, Any]:
    """About the data, for the record."""
    judged, known = judging.head(config.test_limit), set(training.contexts)
    return {
        "source": ", ".join(dict.fromkeys((training.source, judging.source))),
        "digest": training.digest,
        "test_digest": judging.digest,
        "version": judged.version,
        "splits": {"train": len(training), config.judge: len(judging)},
        "answerable": {"train": training.answerable, "judged": judged.answerable},
        "judged_contexts_in_training": sum(context in known for context in judged.contexts),
    }


def watcher(setup: QuestionSetup) -> Any:
    """In the tune stage, what the watched questions come to after each epoch."""
    if setup.config.stage != "tune":
        return lambda epoch: {}

    def watch(epoch: int) -> dict[str, float]:
        found = answers.score(setup.judged[0], setup.answers(setup.decode()))
        means = found.record("1.1")
        return {"val_score": means["f1"], "val_accuracy": means["exact"]}

    return watch


def conclude(setup: QuestionSetup, folder: Path, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The look at the questions that judge the run, and the files that say what came out."""
    questions = setup.judged[0]
    start = time.perf_counter()
    decoded = setup.decode()
    seconds = time.perf_counter() - start
    said = setup.answers(decoded)
    scores = answers.score(questions, said)
    figures = scores.record(questions.version)
    qa_files.write_answers(folder, questions, decoded, said)
    qa_files.write_wrong(folder, questions, said, scores)
    found = {
        "metric": "f1",
        "score": figures["f1"],
        "score_interval95": scores.f1_interval(),
        "accuracy": scores.matches.percent,  # exact match
        "interval95": scores.matches.interval,
        "metrics": figures,
        "null_threshold": thresholds(setup, decoded),
        "examples": len(questions),
        "examples_in_full_split": setup.facts["splits"][setup.config.judge],
        "unit": "questions",
    }
    result = setup.adapted.conclude(folder, found, setup.facts, history, seconds)
    tell(setup, result, scores)
    print(folder)
    return result


def thresholds(setup: QuestionSetup, decoded: Sequence[Decoded]) -> dict[str, Any] | None:
    """The null threshold that was used, and the best ones on these very questions; None where all have an answer."""
    questions = setup.judged[0]
    if questions.version == "1.1":
        return None
    scores = answers.score(questions, setup.answers(decoded, always=True))
    odds = np.array([told.odds for told in decoded])
    found: dict[str, Any] = {
        "used": setup.config.null_threshold,
        "best_chosen_on": f"these {setup.config.judge} questions",
    }
    for which in ("exact", "f1"):
        found[f"best_{which}"], found[f"best_{which}_thresh"] = answers.best_threshold(scores, odds, which)
    return found


def tell(setup: QuestionSetup, result: dict[str, Any], scores: answers.Scores) -> None:
    """What came out."""
    low, high = result["score_interval95"]
    print(
        f"{result['task']} ({setup.facts['source']}): {result['split']} exact match {scores.matches}, "
        f"F1 {result['score']:.1f} ({low:.1f} … {high:.1f}), {setup.adapted.report.trained:,} trained values"
    )
    if setup.config.stage == "tune" and (best := result["null_threshold"]):
        print(f"best F1 on these questions, {best['best_f1']:.1f}: --null-threshold {best['best_f1_thresh']:.4g}")
