"""A question-answering run from its settings to its folder.

config.json, metrics.jsonl, result.json, adapter.safetensors     as vtab.record has them
tokenizer.json, tokenizer_config.json, model_config/config.json  as transformers saves them
predictions.json             the answer to each question by its id, as SQuAD's official scripts read it
nbest_predictions.json       the best answers to each, with their shares of a softmax over the scores kept
null_odds.json               for v2.0: the null score minus the best other, for evaluate-v2.0.py --na-prob-file
"""

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import capavision as cv
from examples.text import answers, qa_loop, spans, squad
from examples.text.encode import Encoded
from examples.text.model import architecture, load_tokenizer
from examples.text.qa_recipes import RECIPES
from examples.text.qa_settings import QuestionAnswering
from examples.text.run import adapted, environment, origin, save_sources
from examples.text.spans import Decoded, Window
from examples.text.squad import Squad
from vtab import record
from vtab.setup import pick_device
from vtab.textfile import write

TRIED = 64  # windows that tokenizer and model are tried with


@dataclass(frozen=True)
class QuestionSetup:
    """A run that is ready to train.

    training, judged: the questions to train on, and those that judge the run, with the windows of each
    full: how many questions the judging split has
    facts: about the data, for the record
    """

    config: QuestionAnswering
    training: tuple[Squad, list[Window]]
    judged: tuple[Squad, list[Window]]
    full: int
    facts: dict[str, Any]
    text: dict[str, Any]
    model: nn.Module
    tokenizer: Any
    report: cv.Report
    digest: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def judge(self) -> str:
        """The split that judges the run."""
        return "val" if self.config.stage == "tune" else "test"

    @property
    def source(self) -> str:
        """Where the questions come from."""
        return ", ".join(dict.fromkeys((self.training[0].source, self.judged[0].source)))

    @functools.cached_property
    def asked(self) -> Encoded:
        """The judging questions' windows, on the model's device."""
        return qa_loop.encode(self.judged[1], self.tokenizer, self.device)[0]

    def decode(self) -> list[Decoded]:
        """The best answers to the judging questions."""
        questions, windows = self.judged
        logits = qa_loop.predict(self.model, self.asked, self.config.precision)
        return spans.decode(questions, windows, logits, self.config.longest_answer, self.config.n_best)

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
    questions, windows = setup.training
    kept = [window for window in windows if window.label is not None]
    print(f"{setup.report}\n{setup.source}; {config.stage} run on {setup.device}")
    print(f"{len(questions):,} questions in {len(kept):,} windows to train on, {questions.answerable:,} have an answer")
    if lost := len({window.question for window in windows}) - len({window.question for window in kept}):
        print(f"{lost:,} more are left out: the tokenizer makes no token of their answers")
    history = qa_loop.SpanLoop(setup.model, *qa_loop.encode(kept, setup.tokenizer, setup.device), config).fit(
        folder, watcher(setup)
    )
    info = {"task": config.task, "source": setup.source, "stage": config.stage, "text": setup.text}
    cv.save(setup.model, folder / "adapter.safetensors", info=info)
    save_sources(setup.model, setup.tokenizer, folder)
    cv.fold(setup.model)  # judged as it will run: the plain model, at its speed
    return conclude(setup, folder, history)


def prepare(config: QuestionAnswering, folder: Path) -> QuestionSetup:
    """Questions read and cut into windows, model built and injected: everything that can be refused is refused here.

    Raises:
        ValueError: settings, questions, tokenizer and model that do not fit each other.
    """
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    training, judging = open_questions(config)
    judged = judging.head(config.test_limit)
    text = {
        "model": config.model,
        "architecture": architecture(config.model, "QUESTION_ANSWERING"),
        "task": config.task,
        "max_length": config.max_length,
        "stride": config.stride,
        "pair": True,
    }
    tokenizer = load_tokenizer(config.model)
    cut = [spans.windows(part, tokenizer, config.max_length, config.stride) for part in (training, judged)]
    some, _ = qa_loop.encode(cut[0][:TRIED], tokenizer, torch.device("cpu"))
    model, report, base = adapted(config, text, tokenizer, some, folder)
    known = set(training.contexts)
    facts = {
        "version": judged.version,
        "splits": {"train": len(training), "val" if config.stage == "tune" else "test": len(judging)},
        "answerable": {"train": training.answerable, "judged": judged.answerable},
        "windows": {"train": len(cut[0]), "judged": len(cut[1])},
        "judged_contexts_in_training": sum(context in known for context in judged.contexts),
    }
    both = (training, cut[0]), (judged, cut[1])
    return QuestionSetup(config, *both, len(judging), facts, text, model.to(device), tokenizer, report, base)


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
    return training, judging


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
    config, questions, judge = setup.config, setup.judged[0], setup.judge
    start = time.perf_counter()
    decoded = setup.decode()
    seconds = time.perf_counter() - start
    said = setup.answers(decoded)
    scores = answers.score(questions, said)
    metrics = scores.record(questions.version)
    write(folder / "predictions.json", json.dumps(said, indent=1))
    write(folder / "nbest_predictions.json", json.dumps(nbest(questions, decoded), indent=1))
    if questions.version == "2.0":
        odds = {q.id: told.odds for q, told in zip(questions.questions, decoded, strict=True)}
        write(folder / "null_odds.json", json.dumps(odds, indent=1))
    result: dict[str, Any] = {
        "task": config.task,
        "split": judge,
        "stage": config.stage,
        "protocol": config.protocol,
        "metric": "f1",
        "score": metrics["f1"],
        "score_interval95": scores.f1_interval(),
        "accuracy": scores.matches.percent,  # exact match
        "interval95": scores.matches.interval,
        "metrics": metrics,
        "null_threshold": thresholds(setup, decoded),
        "images": len(questions),  # vtab's word for examples
        "images_in_full_split": setup.full,
        "recipe_differs": RECIPES[config.recipe].unlike(config.task) if config.recipe else [],
        **record.costs(config, setup.report, history, seconds),
        "selection": {"settings": origin(config), "epoch": "the last", "looks_at_test": int(judge == "test")},
        "data": {"source": setup.source, **setup.facts},
        "text": setup.text,
        "base": {"model": config.model, "weights": "pretrained", "digest": setup.digest, "img_size": None},
        "environment": environment(setup.device),
    }
    write(folder / "result.json", json.dumps(result, indent=1))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    tell(setup, result, scores)
    print(folder)
    return result


def nbest(questions: Squad, decoded: Sequence[Decoded]) -> dict[str, list[dict[str, Any]]]:
    """The answers that were kept of each question, "" among them for v2.0, with their shares of a softmax."""
    found = {}
    for question, told in zip(questions.questions, decoded, strict=True):
        entries = [(span.score, span.text, span.start) for span in told.spans]
        if questions.version == "2.0":
            entries = sorted([*entries, (told.null, "", -1)], key=lambda entry: -entry[0])
        scores = np.array([score for score, *_ in entries])
        shares = np.exp(scores - scores.max())
        found[question.id] = [
            {"text": text, "start": start, "score": score, "probability": float(share)}
            for (score, text, start), share in zip(entries, shares / shares.sum(), strict=True)
        ]
    return found


def thresholds(setup: QuestionSetup, decoded: Sequence[Decoded]) -> dict[str, Any] | None:
    """The null threshold that was used, and the best ones on these very questions; None where all have an answer."""
    questions = setup.judged[0]
    if questions.version == "1.1":
        return None
    scores = answers.score(questions, setup.answers(decoded, always=True))
    odds = np.array([told.odds for told in decoded])
    found: dict[str, Any] = {"used": setup.config.null_threshold, "best_chosen_on": f"these {setup.judge} questions"}
    for which in ("exact", "f1"):
        found[f"best_{which}"], found[f"best_{which}_thresh"] = answers.best_threshold(scores, odds, which)
    return found


def tell(setup: QuestionSetup, result: dict[str, Any], scores: answers.Scores) -> None:
    """What came out."""
    low, high = result["score_interval95"]
    print(
        f"{result['task']} ({setup.source}): {setup.judge} exact match {scores.matches}, "
        f"F1 {result['score']:.1f} ({low:.1f} … {high:.1f}), {setup.report.trained:,} trained values"
    )
    if shared := setup.facts["judged_contexts_in_training"]:
        print(f"{shared} of the {len(setup.judged[0].contexts)} contexts asked about were trained on")
    if setup.config.stage == "tune" and (best := result["null_threshold"]):
        print(f"best F1 on these questions, {best['best_f1']:.1f}: --null-threshold {best['best_f1_thresh']:.4g}")
