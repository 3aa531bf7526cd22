"""What a run answered, in the files that SQuAD's official scripts read and BERT's SQuAD code writes.

predictions.json             the answer to each question by its id, as SQuAD's official scripts read it
nbest_predictions.json       the best answers to each, with their shares of a softmax over the scores kept
null_odds.json               for v2.0: the null score minus the best other, for evaluate-v2.0.py --na-prob-file
wrong_answers.csv            what was answered otherwise than expected, the worst first, for people to read
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.text import tables
from examples.text.answers import Scores, golds
from examples.text.questions import Squad
from export.spans import Decoded
from vtab.textfile import write


def write_answers(folder: Path, questions: Squad, decoded: Sequence[Decoded], said: Mapping[str, str]) -> None:
    """The three files; each whole or not at all.

    Args:
        folder: the run's.
        questions: those that were asked.
        decoded: the best answers to each.
        said: the one that was given, by the question's id.
    """
    write(folder / "predictions.json", json.dumps(said, indent=1))
    write(folder / "nbest_predictions.json", json.dumps(nbest(questions, decoded), indent=1))
    if questions.version == "2.0":
        odds = {q.id: told.odds for q, told in zip(questions.questions, decoded, strict=True)}
        write(folder / "null_odds.json", json.dumps(odds, indent=1))


def write_wrong(folder: Path, questions: Squad, said: Mapping[str, str], scores: Scores) -> None:
    """The questions without an exact match, with the answers that would have been right; "" is none.

    Args:
        folder: the run's.
        questions: those that were asked.
        said: the answer that was given, by the question's id.
        scores: theirs.
    """
    wrong = [i for i in np.argsort(scores.f1, kind="stable") if not scores.exact[i]]
    rows = [
        (q.id, q.text, " | ".join(dict.fromkeys(golds(q, questions.version))), said[q.id], round(100 * scores.f1[i], 1))
        for i, q in ((i, questions.questions[i]) for i in wrong)
    ]
    tables.write(folder / "wrong_answers.csv", ["id", "question", "expected", "given", "f1"], rows)


def nbest(questions: Squad, decoded: Sequence[Decoded]) -> dict[str, list[dict[str, Any]]]:
    """The answers that were kept of each question, "" among them for v2.0, with their shares of a softmax."""
    threshold = 0.0 if questions.version == "2.0" else None  # "" stands where its score puts it, as in BERT's own files
    return {
        question.id: [
            {"text": a.text, "start": a.start, "score": a.score, "probability": a.probability}
            for a in told.ranked(threshold)
        ]
        for question, told in zip(questions.questions, decoded, strict=True)
    }
