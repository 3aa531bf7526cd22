"""A miniature of SQuAD in its own format, with tokenizers trained on it and encoders that are tiny and random."""

import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from export.families import awaken, seeded

HARBOUR = (
    "The harbour of Port Ellery was built in 1741 by the engineer Anna Müller. Its stone pier is 212 metres long. "
    "Every morning the ferry leaves for Sark at half past six, and the mail boat follows an hour later. Fishermen sell "
    "crab, herring and blue mussels on the quay until noon. In winter the gates of the inner basin are closed against "
    "the northern swell. The lighthouse on the eastern rock was lit for the first time on 3 May 1802; its lamp burned "
    "whale oil. A keeper named Tom Crane lived there for thirty-one years. Today the light is electric, and nobody "
    "climbs the 96 steps but the painter, who renews the red band every fourth summer."
)
TEA = (  # the owner's name ends with a letter and an accent of two code points, which BERT's tokenizer takes apart
    "The café “Zur Krähe” serves 龍井 tea from Hangzhou 🍵 and a cake with plums. Its owner, Marie Cande\u0301, came "
    "from Málaga in 1998. The  rent is 900 €."
)
BEES = "A hive of the valley holds 40,000 bees. They fly up to 3 km for the lime trees' honey-dew."

# (context, [(id, question, answers)]): no answers are impossible questions, which only version 2.0 has
PARAGRAPHS = [
    (HARBOUR, [
        ("h1", "Who built the harbour?", ["Anna Müller", "the engineer Anna Müller"]),
        ("h2", "How long is the pier?", ["212 metres"]),
        ("h3", "Who lived in the lighthouse?", ["Tom Crane", "A keeper named Tom Crane"]),
        ("h4", "What does the painter renew?", ["the red band", "red band"]),
        ("h5", "Who burned the harbour?", []),
    ]),
    (TEA, [
        ("t1", " Which tea is served? ", ["龍井", "龍井 tea"]),
        ("t2", "Where did the owner come from?", ["Málaga"]),
        ("t3", "Who owns the café?", ["Marie Cande\u0301"]),
        ("t4", "What is the rent?", ["900 €"]),
        ("t5", "Who sold the café?", []),
    ]),
    (BEES, [
        ("b1", "How many bees are in a hive?", ["40,000"]),
        ("b2", "How far do bees fly?", ["up to 3 km", "3 km"]),
        ("b3", "How many wasps are there?", []),
    ]),
]  # fmt: skip


def content(version="2.0"):
    """What the file holds."""
    paragraphs = []
    for context, asked in PARAGRAPHS:
        qas = []
        for key, question, texts in asked:
            answers = [{"text": text, "answer_start": context.index(text)} for text in texts]
            if version == "2.0":
                plausible = {} if texts else {"plausible_answers": [{"text": context[:4], "answer_start": 0}]}
                qas.append(
                    {"id": key, "question": question, "answers": answers, "is_impossible": not texts} | plausible
                )
            elif texts:
                qas.append({"id": key, "question": question, "answers": answers})
        paragraphs.append({"context": context, "qas": qas})
    articles = [{"title": "Places", "paragraphs": paragraphs[:2]}, {"title": "Animals", "paragraphs": paragraphs[2:]}]
    return {"version": "v2.0" if version == "2.0" else "1.1", "data": articles}


def write(path: Path, version="2.0"):
    """The file, in plain UTF-8 for one version and with escapes for the other."""
    path.write_text(json.dumps(content(version), ensure_ascii=version == "2.0"), encoding="utf-8")
    return path


def texts():
    return [text for context, asked in PARAGRAPHS for text in (context, *(question for _, question, _ in asked))]


def wordpiece(length=4):
    """As BERT's: lower case, accents stripped, so that tokens end before a combining mark.

    Its words are in pieces of `length` letters: WordPieceTrainer finds another vocabulary in each process.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts() for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    cut = {f"{'##' * (at > 0)}{word[at : at + length]}" for word in words for at in range(0, len(word), length)}
    letters = {f"{mark}{letter}" for letter in "".join(words) for mark in ("", "##")}
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*marks, *sorted(cut | letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(marks)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), marks, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
        **names,
    )


def bytes_bpe(size=420):
    """As RoBERTa's, with the space before a word in the word's token; no token has a type, a pair four marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=marks, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), marks, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], model_max_length=512, **names
    )


TOKENIZERS = {"wordpiece": wordpiece, "byte-level": bytes_bpe}


def save_encoder(folder: Path, seed=0):
    """A BERT of 2 layers for questions, with its tokenizer, as transformers saves them."""
    tokenizer = wordpiece()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    seeded(lambda: awaken(transformers.BertForQuestionAnswering(config)), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
