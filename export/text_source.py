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
from export.graph import answer, traced
from export.names import rename
from export.runtime import Classifier, relative_error
from export.source import Source
from export.text import CODELESS, build, checked, quiet

TOKENIZER_CONFIG = "tokenizer_config.json"  # what transformers knows of a tokenizer beside tokenizer.json
SEED, BATCH = 0, 5  # of the rows whose answers padding must not change


class ByName(nn.Module):
    """A model of transformers as one that takes its inputs by position and gives logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        given = {tokens.IDS: input_ids, tokens.MASK: attention_mask}
        return answer(self.model, given if token_type_ids is None else {**given, tokens.TYPES: token_type_ids})


@dataclasses.dataclass(frozen=True)
class TextSource(Source):
    """An adapter file of a run on texts, and what its package says of them."""

    kind: ClassVar[str] = "text"
    variants: ClassVar[tuple[str, ...]] = ("int8",)
    inputs: dict[str, Any]

    @classmethod
    def described(cls, file: Path, about: dict[str, Any]) -> "TextSource":
        """Of an adapter file and what it says of itself.

        Raises:
            ValueError: it says too little, is of another kind of task, or has no tokenizer that fits beside it.
        """
        text = checked(about["info"], max_length=shape.length, pair=bool)
        if not text["architecture"].endswith("ForSequenceClassification"):
            raise ValueError(
                f"{file} is of {text['architecture']}, and a package answers with labels or a number: export a run of "
                "examples.text_classification; export.text.build and capavision.load run this one in PyTorch"
            )
        model = cv.load(file, build(about["info"], file.parent)).float().eval()
        return cls(file, about, model, _inputs(text, model, file.parent))

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
        proto = traced(ByName(model).eval(), given, self.labels, opset, exporter=exporter)
        rename(proto.graph, {tensor.name: tensor.name.removeprefix("model.") for tensor in proto.graph.initializer})
        return proto

    def compared(self, runtime: Classifier, tolerance: float, dynamic_size: bool) -> dict[str, Any]:
        """How much padding changes an answer, for the manifest.

        Raises:
            ValueError: by more than `tolerance`.
        """
        together = runtime.logits(runtime.input.sample(SEED, BATCH))
        alone = [runtime.logits(row)[0] for row in runtime.input.each(SEED, BATCH)]
        error = float(np.max([relative_error(one, row) for one, row in zip(alone, together, strict=True)]))  # or NaN
        if not error <= tolerance:
            raise ValueError(
                f"padding changes a text's answer by {error:.1e} of the largest logit, above {tolerance:g}: "
                f"{self.architecture} does not mask it; nothing was written"
            )
        return {"padding": {"relative_error": error, "rows": BATCH}}

    def example(self, batch: int, length: int) -> dict[str, Tensor]:
        """A batch of so many tokens a text."""
        length = min(length, self.inputs["max_length"])
        return {name: torch.ones(batch, length, dtype=torch.int64) for name in self.inputs["names"]}


def _inputs(text: dict[str, Any], model: nn.Module, folder: Path) -> dict[str, Any]:
    """What a manifest says of the input of an encoder.

    Raises:
        ValueError: tokenizer.json is missing, damaged or another model's; a max_length that the encoder has no
            positions for.
    """
    config: Any = model.config
    about = {
        "kind": "text",
        "max_length": text["max_length"],
        "pair": text["pair"],
        "names": [tokens.IDS, tokens.MASK, tokens.TYPES],
        "vocabulary": model.get_input_embeddings().num_embeddings,  # type: ignore[operator]
        "pad": config.pad_token_id or 0,
    }
    made = tokens.Tokens(folder, about)
    read = tokens.TYPES in inspect.signature(model.forward).parameters and getattr(config, "type_vocab_size", 2) > 1
    if not (read and _told(made, folder) and made.sample(SEED, 1)[tokens.TYPES].any()):
        about["names"] = [tokens.IDS, tokens.MASK]
    longest = tokens.Tokens(folder, about).sample(SEED, 2)  # its second row has max_length tokens
    try:
        with torch.inference_mode():
            answer(model, {name: torch.from_numpy(array) for name, array in longest.items()})
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"the encoder {text['model']} takes no {text['max_length']} tokens ({first_line(error)}); save the run "
            "with the max_length of its training"
        ) from error
    return about


def _told(made: tokens.Tokens, folder: Path) -> bool:
    """Whether transformers tells the model which tokens are of a pair's second text, by the run's own tokenizer.

    Raises:
        ValueError: that one, as in training, makes other tokens than `tokenizers` does with tokenizer.json alone.
    """
    if not (folder / TOKENIZER_CONFIG).is_file():
        return True
    from transformers import AutoTokenizer

    with quiet(str(folder)):
        theirs = AutoTokenizer.from_pretrained(folder, **CODELESS)
    texts = [*tokens.SENTENCES, " ".join(tokens.SENTENCES * 20)]
    pairs = [texts, texts[1:] + texts[:1]] if made.pair else [texts]
    expected = theirs(*pairs, truncation=True, max_length=made.length)
    for text, ids in zip(zip(*pairs, strict=True), expected[tokens.IDS], strict=True):
        found = made.prepare([text if made.pair else text[0]])[tokens.IDS][0]
        if found.tolist() != ids:
            raise ValueError(
                f"{folder}: tokenizer.json alone makes other tokens than transformers did in training, of "
                f"{made.shown(text)!r}; save the run's tokenizer again, a fast one that cuts texts at their end"
            )
    return tokens.TYPES in expected
