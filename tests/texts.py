"""A tiny text encoder with its tokenizer, and texts that it can learn, for tests without network."""

import csv
import random
from pathlib import Path

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", *(f"w{i}" for i in range(40))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def write_tokenizer(folder: Path, words=WORDS) -> None:
    """Whole words; a pair's texts have types 0 and 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=inputs, **names).save_pretrained(folder)


def write_model(folder: Path, config="BertConfig", model="BertModel", sizes=SMALL, **more) -> Path:
    """An encoder with random weights, as save_pretrained writes it, and its tokenizer."""
    import torch
    import transformers

    settings = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0, **sizes, **more}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = getattr(transformers, model)(getattr(transformers, config)(initializer_range=0.2, **settings))
    built.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def sentence(rng: random.Random, word: str = "", longest: int = 12) -> str:
    """Some words, `word` somewhere among them."""
    words = rng.choices(WORDS[6:], k=rng.randint(3, longest))
    if word:
        words[rng.randrange(len(words))] = word
    return " ".join(words)


def write_csv(path: Path, count: int = 300, seed: int = 0) -> Path:
    """Columns review, other, stars, verdict: the verdict is good or bad, as one of the review's words."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "other", "stars", "verdict"])
        for i in range(count):
            verdict = ("good", "bad")[i % 2]
            stars = rng.uniform(3, 5) if verdict == "good" else rng.uniform(0, 2)
            writer.writerow([f"w{i % 40} {sentence(rng, verdict)}", sentence(rng), f"{stars:.2f}", verdict])
    return path
