"""A text run as the exporter sees it: an encoder of transformers, and the tokenizer.json beside its adapter file."""

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import capavision as cv
from export import shape, tokens
from export.cli import first_line
from export.graph import LOGITS, Outputs, outputs, traced
from export.names import rename
from export.runtime import Runtime, relative_error
from export.source import Source
from export.text import CODELESS, build, checked, quiet

TOKENIZER_CONFIG = "tokenizer_config.json"  # what transformers knows of a tokenizer beside tokenizer.json
SEED, BATCH = 0, 5  # of the rows whose answers padding must not change


class ByName(nn.Module):
    """A model of transformers as one that takes its inputs by position and gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = {tokens.IDS: input_ids, tokens.MASK: attention_mask}
        return outputs(self.model, given if token_type_ids is None else {**given, tokens.TYPES: token_type_ids})


def source_of(file: Path, about: dict[str, Any]) -> "TextSource":
    """The source of an adapter file that is of texts, by what it says of itself.

    Raises:
        ValueError: it says too little, is of another kind of task, or has no tokenizer that fits beside it.
    """
    from export.question_source import QuestionSource

    architecture = checked(about["info"])["architecture"]
    kinds = {"ForSequenceClassification": TextSource, "ForQuestionAnswering": QuestionSource}
    for ending, kind in kinds.items():
        if architecture.endswith(ending):
            return kind.described(file, about)
    raise ValueError(
        f"{file} is of {architecture}, and a package answers with labels, a number or a stretch of a context: export a "
        "run of examples.text_classification or examples.question_answering; export.text.build and capavision.load run "
        "this one in PyTorch"
    )


@dataclasses.dataclass(frozen=True)
class TextSource(Source):
    """An adapter file of a run on texts, and what its package says of them."""

    kind: ClassVar[str] = "text"
    variants: ClassVar[tuple[str, ...]] = ("int8",)
    taken: ClassVar[type[tokens.Tokens]] = tokens.Tokens
    outputs: ClassVar[Outputs] = LOGITS
    inputs: dict[str, Any]

    @classmethod
    def described(cls, file: Path, about: dict[str, Any]) -> "TextSource":
        """Of an adapter file and what it says of itself.

        Raises:
            ValueError: it says too little, has no tokenizer that fits beside it, or a max_length that the encoder has
                no positions for; an encoder with a decoder.
        """
        text, folder = checked(about["info"], max_length=shape.length, pair=bool), file.parent
        model: Any = cv.load(file, build(about["info"], folder)).float().eval()
        if model.config.is_encoder_decoder:  # its head asks, in Python, how many end tokens there are
            raise ValueError(
                f"{file} is of {text['architecture']}, which looks for its answer at each text's end token, which "
                "no graph can; train an encoder such as BERT, or a decoder such as Llama"
            )
        inputs = cls.inputs_of(file, text, model)
        made, theirs = cls.taken(folder, inputs), _own(folder)
        inputs |= cls.marks(folder, theirs)
        told = _told(made, theirs, folder)
        read = tokens.TYPES in inspect.signature(model.forward).parameters
        typed = read and told and getattr(model.config, "type_vocab_size", 2) > 1
        if not (typed and made.sample(SEED, 1)[tokens.TYPES].any()):
            inputs["names"] = [tokens.IDS, tokens.MASK]
        longest = cls.taken(folder, inputs).sample(SEED, 2)  # its second row has max_length tokens
        _refuse_too_long(model, longest, text["model"])
        return cls(file, about, model, inputs)

    @classmethod
    def inputs_of(cls, file: Path, text: dict[str, Any], model: Any) -> dict[str, Any]:
        """What a manifest says of the input, with all the names that there may be.

        Args:
            file: the adapter file.
            text: what it says of the run.
            model: the run's.
        """
        return {
            "kind": cls.kind,
            "max_length": text["max_length"],
            "pair": text["pair"],
            "names": [tokens.IDS, tokens.MASK, tokens.TYPES],
            "vocabulary": model.get_input_embeddings().num_embeddings,
            "pad": model.config.pad_token_id or 0,
        }

    @classmethod
    def marks(cls, folder: Path, theirs: Any) -> dict[str, Any]:
        """The special tokens among that, by the run's tokenizer as transformers has it, or None."""
        return {}

    @property
    def text(self) -> dict[str, Any]:
        """What the file says of the run."""
        found: dict[str, Any] = self.about["info"]["text"]
        return found

    @property
    def task(self) -> str:
        """The task's name: the run's own word, else the folder's or the file's."""
        named = self.text.get("task")
        return named if isinstance(named, str) and named else super().task

    @property
    def labels(self) -> dict[str, str]:
        """Class index as text -> name; of a regression, its own name."""
        return {str(i): name for i, name in enumerate(self.text.get("labels") or ["score"])}

    @property
    def regression(self) -> dict[str, bool]:
        """Whether the answer is a number."""
        return {} if self.text.get("labels") else {"regression": True}

    @property
    def architecture(self) -> str:
        """Its name in transformers."""
        return str(self.text["architecture"])

    @property
    def base(self) -> dict[str, Any]:
        """What the manifest says of the encoder; of a folder its name alone."""
        model = self.text["model"]
        return {"model": Path(model).name if Path(model).is_dir() else model}

    @property
    def builder(self) -> dict[str, str]:
        """Versions of what makes tokens and the model."""
        import tokenizers
        import transformers

        return {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}

    @property
    def input(self) -> dict[str, Any]:
        """What the manifest says of the input."""
        return {"input": self.inputs}

    def write_input(self, folder: Path) -> None:
        """Copy the tokenizer."""
        shutil.copyfile(self.path.parent / tokens.FILE, folder / tokens.FILE)

    def traced(
        self, model: nn.Module, opset: int | None = None, *, exporter: str | None = None, dynamic_size: bool = False
    ) -> onnx.ModelProto:
        """The graph of `model`, folded or without its deltas; batch and length are open.

        Raises:
            ValueError: what `export.graph.traced` refuses; a size, which texts have none of.
        """
        if dynamic_size:
            raise ValueError("--dynamic-size is for images; a text's length is open anyway, so leave it out")
        if not any(isinstance(module, cv.AttentionDelta) for module in model.modules()):
            model.set_attn_implementation("eager")  # type: ignore[operator]  # fewer nodes than the fused one's
        batch = torch.export.Dim("batch", min=1)
        length = torch.export.Dim("length", min=1, max=self.inputs["max_length"])
        given = {name: (x, {0: batch, 1: length}) for name, x in self.example(2, 7).items()}  # 1 would be baked in
        given[tokens.MASK][0][1, 4:] = 0
        proto = traced(ByName(model).eval(), given, self.labels, opset, exporter=exporter, outputs=self.outputs)
        rename(proto.graph, {tensor.name: tensor.name.removeprefix("model.") for tensor in proto.graph.initializer})
        return proto

    def compared(self, runtime: Runtime, tolerance: float, dynamic_size: bool) -> dict[str, Any]:
        """How much padding changes an answer, for the manifest.

        Raises:
            ValueError: by more than `tolerance`.
        """
        together = runtime.logits(runtime.input.sample(SEED, BATCH))
        alone = [runtime.logits(row)[0] for row in runtime.input.each(SEED, BATCH)]
        seen = [row[..., : one.shape[-1]] for one, row in zip(alone, together, strict=True)]  # padding has no answer
        error = float(np.max([relative_error(one, row) for one, row in zip(alone, seen, strict=True)]))  # or NaN
        if not error <= tolerance:
            raise ValueError(
                f"padding changes a text's answer by {error:.1e} of the largest logit, above {tolerance:g}: "
                f"{self.architecture} does not mask it; nothing was written"
            )
        return {"padding": {"relative_error": error, "rows": BATCH}}

    def read(self, path: Path) -> "list[tokens.Text]":
        """A file of texts to compare variants on.

        Raises:
            ValueError: what `export.tokens.read` refuses.
        """
        return tokens.read(path, self.inputs["pair"])

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        """A batch of so many tokens a text."""
        length = min(length, self.inputs["max_length"])
        return {name: torch.ones(batch, length, dtype=torch.int64) for name in self.inputs["names"]}


def _own(folder: Path) -> Any:
    """The run's tokenizer as transformers has it; None where it was not saved so."""
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    from transformers import AutoTokenizer

    with quiet(str(folder)):
        return AutoTokenizer.from_pretrained(folder, **CODELESS)


def _told(made: tokens.Tokens, theirs: Any, folder: Path) -> bool:
    """Whether transformers tells the model which tokens are of a pair's second text, by the run's own tokenizer.

    Raises:
        ValueError: that one, as in training, makes other tokens than `tokenizers` does with tokenizer.json alone.
    """
    if theirs is None:
        return True
    texts = [*tokens.SENTENCES, " ".join(tokens.SENTENCES * 20)]
    parts = [texts, texts[1:] + texts[:1]] if made.pair else [texts]
    limits = {"truncation": True, "max_length": made.length} if made.tokenizer.truncation else {}
    expected = theirs(*parts, verbose=False, **limits)
    given: list[Any] = list(zip(*parts, strict=True)) if made.pair else texts
    for text, found, ids in zip(given, made.encodings(given), expected[tokens.IDS], strict=True):
        if found.ids != ids:
            raise ValueError(
                f"{folder}: tokenizer.json alone makes other tokens than transformers did in training, of "
                f"{made.shown(text)!r}; save the run's tokenizer again, a fast one that cuts texts at their end"
            )
    return tokens.TYPES in expected


def _refuse_too_long(model: nn.Module, longest: tokens.Batch, name: str) -> None:
    """Raise ValueError for texts that the encoder has no positions for."""
    try:
        with torch.inference_mode():
            outputs(model, {key: torch.from_numpy(array) for key, array in longest.items()})
    except (IndexError, RuntimeError) as error:
        length = longest[tokens.IDS].shape[1]
        raise ValueError(
            f"the encoder {name} takes no {length} tokens ({first_line(error)}); save the run with the max_length of "
            "its training"
        ) from error
