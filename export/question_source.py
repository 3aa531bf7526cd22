"""A run on questions as the exporter sees it: as one on texts, but that its graph gives start and end logits, and that
its package says how answers are chosen by them.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from export import squad, tokens
from export.answerer import Answerer
from export.graph import Outputs
from export.questions import Questions
from export.runtime import Runtime, read_json
from export.shape import ANSWERS, fits
from export.text_source import TOKENIZER_CONFIG, TextSource


@dataclasses.dataclass(frozen=True)
class QuestionSource(TextSource):
    """An adapter file of a run on questions, and what its package says of them."""

    kind: ClassVar[str] = "question"
    opens: ClassVar[type[Runtime]] = Answerer
    taken: ClassVar[type[tokens.Tokens]] = Questions
    outputs: ClassVar[Outputs] = {name: {0: "batch", 1: "length"} for name in Questions.outputs}

    @classmethod
    def inputs_of(cls, file: Path, text: dict[str, Any], model: Any) -> dict[str, Any]:
        """As of texts, with how windows are cut and answers chosen.

        Raises:
            ValueError: the file does not say how.
        """
        return super().inputs_of(file, text, model) | _answers(file, text) | {"pair": True}

    @classmethod
    def marks(cls, folder: Path, theirs: Any) -> dict[str, Any]:
        """The token whose position stands for no answer.

        Raises:
            ValueError: nothing tells.
        """
        if theirs is None:
            raise ValueError(
                f"{folder / TOKENIZER_CONFIG} is missing; it belongs to the run, where transformers saved it"
            )
        return {"null": theirs.cls_token_id}

    @property
    def labels(self) -> dict[str, str]:
        """The two logits of a token."""
        return {"0": "start", "1": "end"}

    @property
    def regression(self) -> dict[str, bool]:
        """No answer is a number."""
        return {}

    def read(self, path: Path) -> list[tokens.Text]:
        """A file of questions to compare variants on.

        Raises:
            ValueError: what `export.squad.asked` refuses.
        """
        return list(squad.asked(path).values())


def _answers(file: Path, text: dict[str, Any]) -> dict[str, Any]:
    """stride, longest_answer, n_best, null_threshold.

    Raises:
        ValueError: neither the file nor its run says so.
    """
    told = _recorded(file.with_name("result.json")) | text
    if not fits(told, ANSWERS) or told["stride"] >= text["max_length"]:
        raise ValueError(
            f"{file}: info['text'] is {text}; of a run on questions it also says {{'stride': 128, 'longest_answer': "
            "30, 'n_best': 20, 'null_threshold': 0.0}, the last None where all questions have an answer"
        )
    return {key: told[key] for key in ANSWERS}


def _recorded(path: Path) -> dict[str, Any]:
    """Runs of before the adapter file said it have it here."""
    result: dict[str, Any] = read_json(path) if path.is_file() else {}
    if not fits(result, {"config": dict, "null_threshold": lambda value: value is None or fits(value, {})}):
        return {}
    return {**result["config"], "null_threshold": (result["null_threshold"] or {}).get("used")}
