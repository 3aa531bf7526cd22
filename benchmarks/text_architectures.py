"""Encoders and decoders of transformers on the meta device: what each method chooses in them, beside PEFT's defaults.

    python -m benchmarks.text_architectures [--architectures bert,t5] [--out docs/text_architectures.md]

No weights are made. Each model has the sizes that its configuration class has by default, so trained values are those
of a model one may meet: BertConfig() is BERT-base, LlamaConfig() is Llama 2 7B.
"""

import argparse
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import capavision as cv
from benchmarks.architectures import attempt
from benchmarks.tables import check_names, measured, row, table
from capavision.attention import classifier, query_value_hosts
from vtab.cli import Parser, run
from vtab.textfile import write

# By transformers' own name, config.model_type, with "-vision" where two share one.
ARCHITECTURES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "xlm-roberta": "XLMRobertaForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",  # of DeBERTa-v3 too
    "distilbert": "DistilBertForSequenceClassification",
    "albert": "AlbertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "mpnet": "MPNetForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "t5": "T5EncoderModel",
    "bart": "BartModel.encoder",  # the decoder's mask asks for values, which the meta device has none of
    "clip_text_model": "CLIPTextModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip": "SiglipForImageClassification",
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
    "falcon": "FalconForSequenceClassification",
    "bloom": "BloomForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
METHODS: dict[str, cv.Method] = {
    "LoRA": cv.LoRA(),
    "pfeiffer adapter": cv.Adapter(),
    "houlsby adapter": cv.Adapter(where="houlsby"),
    "parallel adapter": cv.Adapter(where="parallel"),
    "Prefix": cv.Prefix(),
}
COLUMNS = ("architecture", "method", "hosts", "trained values", "which")
CHOICES = ("architecture", "class", "values", "q and v", "PEFT's default", "head", "PEFT's head", "methods")


@dataclass(frozen=True)
class Row:
    """One method in one architecture; `which` names its hosts, or says why there are none."""

    architecture: str
    method: str
    which: str
    hosts: int = 0
    trained: int = 0

    @property
    def cells(self) -> tuple[object, ...]:
        counts = (self.hosts, f"{self.trained:,}") if self.hosts else ("", "")
        return (self.architecture, self.method, *counts, self.which)


def build(path: str, **sizes: Any) -> nn.Module:
    """The model of that class, its configuration's defaults replaced by `sizes`; "Class.child" is a part of it."""
    import transformers

    name, _, part = path.partition(".")
    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**sizes)).eval()
    return model.get_submodule(part)


def on_meta(name: str) -> nn.Module:
    """The architecture at its default sizes, without memory."""
    sizes = {"pad_token_id": None} if name == "deberta-v2" else {}  # else it looks for padding in the batch
    with torch.device("meta"):
        return build(ARCHITECTURES[name], **sizes)


def example(model: Any) -> dict[str, torch.Tensor]:
    """A batch of one: an image, or eight tokens."""
    if model.main_input_name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        return {"pixel_values": torch.zeros(1, 3, config.image_size, config.image_size, device="meta")}
    return {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}


def sweep(names: Sequence[str]) -> Iterator[Row]:
    """The rows in order, each as soon as it is known."""
    for name in names:
        model = on_meta(name)
        for method, settings in METHODS.items():
            result, report = attempt(model, settings, example(model))
            if report is None:
                yield Row(name, method, result)
            else:
                yield Row(name, method, pattern(report.hosts), len(report.hosts), report.trained)


def pattern(names: Iterable[str]) -> str:
    """Globs for the names, those that differ in their last component only in one.

    >>> pattern(["layer.0.attn.v", "layer.0.attn.q", "layer.1.attn.v", "layer.1.attn.q"])
    '`layer.*.attn.{q,v}`'
    """
    owners: dict[str, dict[str, None]] = {}
    for name in names:
        owner, _, last = re.sub(r"\b\d+\b", "*", name).rpartition(".")
        owners.setdefault(owner, {})[last] = None
    lasts = [(owner, sorted(last)) for owner, last in owners.items()]
    globs = [(owner, last[0] if len(last) == 1 else "{" + ",".join(last) + "}") for owner, last in lasts]
    return ", ".join(f"`{'.'.join(filter(None, parts))}`" for parts in globs)


def choice(name: str, rows: Iterable[Row]) -> tuple[object, ...]:
    """What LoRA adapts and which modules train whole, beside PEFT's defaults; and which methods found hosts."""
    model = on_meta(name)
    ours, heads = query_value_hosts(model), list(classifier(model))
    defaults, trained = peft_choice(on_meta(name), list(ours), heads)
    letters = sorted({parts for parts in ours.values() if parts})
    chosen = pattern(ours) + "".join(f" rows {', '.join(parts)}" for parts in letters) if ours else "refused"
    if defaults is None:
        theirs = "none"
    else:
        theirs = "the same" if set(defaults) == set(ours) and not letters else pattern(defaults)
    values = sum(p.numel() for p in model.parameters())
    listed = (", ".join(f"`{head}`" for head in found) for found in (heads, trained))
    refused = [r.method for r in rows if r.architecture == name and not r.hosts]
    served = f"all but {' and '.join(refused)}" if refused else "all"
    return (name, f"`{type(model).__name__}`", f"{values:,}", chosen, theirs, *listed, served)


def peft_choice(model: Any, hosts: list[str], heads: list[str]) -> tuple[list[str] | None, list[str]]:
    """PEFT's default hosts, None where it has none; and which of `heads` it trains whole by default."""
    import peft
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MAPPING

    known = model.config.model_type in MAPPING
    config = peft.LoraConfig(task_type="SEQ_CLS" if heads else None, target_modules=None if known else hosts)
    theirs: Any = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    names = [name for name, p in theirs.named_parameters() if p.requires_grad]
    trained = [head for head in heads if any(f".{head}." in name and "lora_" not in name for name in names)]
    return theirs.targeted_module_names if known else None, trained


def document(rows: Sequence[Row], choices: Sequence[Sequence[object]], command: str, seconds: float) -> str:
    """What --out writes."""
    methods = "\n".join(f"- {name}: `{method}`" for name, method in METHODS.items())
    return f"""# Architectures of transformers

Models on the meta device at their configuration's default sizes; each method on its default hosts. `*` stands for the
layers' numbers, `{{a,b}}` for several names. That each trains, saves, loads and folds exactly there is tested on tiny
models of the same classes (`tests/test_text_architectures.py`).

{measured(command, seconds, ("transformers", "peft"))}

## q and v, and the head, beside PEFT

PEFT's default hosts are what `LoraConfig()` adapts; where it has none, it asks for `target_modules`. PEFT's head is
what `task_type="SEQ_CLS"` trains besides.

{table(CHOICES, choices)}

{NOTES}

## What each method chose

{methods}

{table(COLUMNS, [r.cells for r in rows])}
"""


NOTES = """Where they differ, and why:

- **none**: PEFT's list is by `model_type` and lacks these; ours goes by the names of projections and needs no list.
- **modernbert**: `Wqkv` is one Linear. We adapt its rows of q and of v, each with factors of its own, and leave k.
- **gpt_neox, falcon, bloom**: `query_key_value` holds q, k and v head by head; falcon's, by its configuration, one k
  and v behind all heads of q. Both adapt it whole, k too. So do we in **phi3** where its heads are grouped and
  `qkv_proj` has fewer rows of k and v than of q.
- **gpt2**: `c_attn` is transformers' `Conv1D`, which stores its weight transposed. PEFT adapts it whole. A weight delta
  is refused here; with an `nn.Linear` of the transposed weight in its place, the rows of q and v are found.
- **Heads**: DeBERTa's pooler and the `classification_head` of BART and T5 are as new as the classifier, so they are
  trained with it. PEFT leaves them at their random start, unless `modules_to_save` names them.

What else to know:

- **albert**: all its layers are one, so a method has one layer's hosts; their deltas act at every depth, and their
  gradients are summed over it. Its attention ends in a residual sum and a norm: a Houlsby adapter there comes after it.
- **siglip**: text and vision encoder end in a module called `head`. Of an encoder alone it counts as the classifier. In
  SiglipForImageClassification, which does not use it, adapters have a host there that trains in vain.
- **Prefix** needs torch's scaled_dot_product_attention: deberta-v2, mpnet and bloom compute their softmax by themselves
  and are refused, as is any model set to "eager". T5 calls it in transformers 5.
- **parallel** runs beside the MLP. Where this is two Linears in no module of their own (BERT's `intermediate.dense`
  and `output.dense`, BART's `fc1` and `fc2`), its host is the second, and its x the first one's input. Target that same
  name, or the group "mlp". The first one then takes no delta of its own, as no module takes two."""


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the sweep, print a row as each is known, write the document."""
    args = parse(argv)
    names = args.architectures.split(",")
    start, rows = time.perf_counter(), []
    print(table(COLUMNS, []), flush=True)
    for found in sweep(names):
        rows.append(found)
        print(row(found.cells), flush=True)
    choices = [choice(name, rows) for name in names]
    print(f"\n{table(CHOICES, choices)}")
    if args.out:
        some = "" if args.architectures == ",".join(ARCHITECTURES) else f" --architectures {args.architectures}"
        command = f"python -m benchmarks.text_architectures{some}"
        write(args.out, document(rows, choices, command, time.perf_counter() - start))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; architectures are checked before anything is built."""
    parser = Parser(prog="python -m benchmarks.text_architectures", description=(__doc__ or "").partition("\n")[0])
    every = ",".join(ARCHITECTURES)
    parser.add_argument("--architectures", default=every, metavar="A,B", help="some of them (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there too, with date and versions")
    args = parser.parse_args(argv)
    check_names("--architectures", args.architectures, ARCHITECTURES)
    return args


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
