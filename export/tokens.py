"""What a package of texts takes: tokens, by the run's own tokenizer.json; the package `tokenizers`, never transformers.

    text -> tokens, with the special ones -> the first max_length -> padded at the end to the longest of the batch

as in training. Padding is masked, so that a text's answer depends on no other text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.cli import first_line

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FILE = "tokenizer.json"
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
SHOWN = 60  # characters of a text, where it is named
SENTENCES = (  # of several lengths, for comparisons; in a foreign language or vocabulary they are tokens all the same
    "The plot is thin.",
    "A warm, funny and surprisingly moving film that never talks down to its audience.",
    "Is it worth seeing twice?",
    "What begins as a quiet story about two sisters and a house by the sea turns, somewhere in its second hour, into "
    "a thriller that trusts neither its characters nor us.",
    "No.",
    "In 1997, about 3.5% of the 12,000 answers were wrong; by 2003 it was less than 0.2%!",
    "He didn't say that she couldn't.",
)

Text = str | tuple[str, str]
Row = tuple[list[int], list[int]]  # ids and types of the tokens
Batch = dict[str, np.ndarray]  # input_ids, attention_mask and perhaps token_type_ids, int64 (n, length)


def opened(path: Path, vocabulary: int) -> "Tokenizer":
    """A tokenizer, for an encoder that knows `vocabulary` tokens.

    Raises:
        ValueError: it is missing, damaged, or of another model.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
        largest = max(tokenizer.get_vocab().values(), default=-1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; it belongs to the run, where transformers saved it") from None
    except Exception as error:  # tokenizers raises nothing but that
        raise ValueError(f"{path} is damaged or no tokenizer ({first_line(error)})") from error
    if not 0 <= largest < vocabulary:
        raise ValueError(
            f"{path} has tokens up to number {largest:,}, and the encoder's embedding has {vocabulary:,} rows: it is "
            "another model's; put the run's own there"
        )
    return tokenizer


def read(path: Path, pair: bool) -> list[Text]:
    """A file's texts, one a line; of pairs, with a tab between the two.

    Raises:
        ValueError: it is not there, a table, no UTF-8 or empty; a line that is no pair.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix.lower() in (".csv", ".tsv") and not (pair and path.suffix.lower() == ".tsv"):
        raise ValueError(
            f"{path} is a table, whose names and labels are no texts; give a file of texts alone, one a line"
        )
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); convert it first") from error
    lines = content.rstrip("\r\n").split("\n")
    if not content.strip():
        raise ValueError(f"{path} is empty; it must hold a text a line")
    rows = [line.removesuffix("\r").split("\t") if pair else [line.removesuffix("\r")] for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != 1 + pair:
            raise ValueError(f"{path}: line {number} has {len(row) - 1} tabs; a pair has one, between its two texts")
        if not all(part.strip() for part in row):
            raise ValueError(f"{path}: line {number} is empty{' in one of its parts' if pair else ''}")
    return [(row[0], row[1]) if pair else row[0] for row in rows]


def check_words(text: str, name: str, where: str = "") -> None:
    """Raise ValueError for a text without a word, or with what is no character."""
    if not text.strip():
        raise ValueError(f"{name} is empty{where}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} is no Unicode: {text[:80]!r}; decode it with its own encoding")


class Tokens:
    """Texts, or pairs of texts, to the graph's inputs.

    Args:
        folder: the package, or the run.
        about: what the manifest says of the input: max_length, pair, the graph's inputs, vocabulary, pad.

    Raises:
        ValueError: tokenizer.json is missing, damaged or of another model.
    """

    kind, unit = "text", "tokens"
    outputs: tuple[str, ...] = ("logits",)

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.about, self.length, self.pair = about, int(about["max_length"]), bool(about["pair"])
        self.file = folder / FILE
        self.tokenizer = opened(self.file, about["vocabulary"])
        self.tokenizer.enable_truncation(self.length)
        self.tokenizer.no_padding()

    def zeros(self) -> Batch:
        """The smallest input that the graph takes."""
        return self._padded([([0], [0])])

    def sample(self, seed: int, count: int) -> Batch:
        """Sentences in turn with rows of random tokens, the first of these of full length; the same everywhere."""
        return self._padded(self._drawn(seed, count))

    def each(self, seed: int, count: int) -> Iterator[Batch]:
        """The same rows one by one, without padding."""
        return (self._padded([row]) for row in self._drawn(seed, count))

    def check(self, texts: Sequence[Text]) -> None:
        """Raise TypeError for one text instead of a list, or what is no text; ValueError for an empty one."""
        if isinstance(texts, str):
            raise TypeError("predict takes a list of texts, and this is one str: write [text]")
        for number, text in enumerate(texts, 1):
            parts: tuple[Any, ...] = tuple(text) if self.pair and isinstance(text, (tuple, list)) else (text,)
            if len(parts) != 1 + self.pair or not all(isinstance(part, str) for part in parts):
                wanted = "a pair of str, (first, second)" if self.pair else "a str"
                raise TypeError(f"text {number} must be {wanted}, not {str(text)[:80]!r} ({type(text).__name__})")
            for part in parts:
                check_words(part, f"text {number}", " in one of its parts" if self.pair else "")

    def prepare(self, texts: Sequence[Text]) -> Batch:
        """Texts that `check` lets pass, as tokens: cut at max_length and padded to the longest.

        Raises:
            ValueError: a text of which no token is left.
        """
        rows = self._rows(texts)
        for text, (ids, _) in zip(texts, rows, strict=True):
            if not ids:
                raise ValueError(f"the tokenizer finds no token in {str(text)[:80]!r}; leave it out")
        return self._padded(rows)

    def cut(self, texts: Sequence[Text]) -> list[int]:
        """Which of the texts are longer than max_length tokens, so that their end is not read."""
        return [i for i, found in enumerate(self.encodings(texts)) if found.overflowing]

    def shown(self, text: Text) -> str:
        """A text, or both of a pair, on one line that is not too long."""
        line = " ".join((text if isinstance(text, str) else " | ".join(text)).split())
        return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"

    def feeds(self, batch: Batch) -> Batch:
        """The graph's inputs: the batch as it is.

        Raises:
            ValueError: it is none.
        """
        names = self.about["names"]
        if not (isinstance(batch, dict) and batch.keys() == set(names)):
            raise ValueError(f"tokens must be a dict of {', '.join(names)}, as Classifier.input.prepare makes")
        return batch

    def joined(self, outputs: Sequence[np.ndarray], given: Batch) -> np.ndarray:
        """The logits (n, classes) among what the graph gave."""
        return outputs[0]

    def encodings(self, texts: Sequence[Text]) -> "list[Encoding]":
        """What the tokenizer makes of texts, in its own words.

        Raises:
            ValueError: it fails at them.
        """
        try:
            return self.tokenizer.encode_batch(list(texts))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers, as at a pattern of endless search, is no Exception
            raise ValueError(
                f"{self.file} fails at these texts ({first_line(error)}); put the run's own there"
            ) from error

    def _rows(self, texts: Sequence[Text]) -> list[Row]:
        return [(found.ids[: self.length], found.type_ids[: self.length]) for found in self.encodings(texts)]

    def _drawn(self, seed: int, count: int) -> list[Row]:
        pairs = list(zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], strict=True))
        sentences = self._rows(pairs if self.pair else SENTENCES)
        return [self._random(seed, i) if i % 2 else sentences[(seed + i // 2) % len(sentences)] for i in range(count)]

    def _random(self, seed: int, number: int) -> Row:
        words = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(1 + self.length)
        length = self.length if number == 1 else 1 + int(words[0] % self.length)
        ids = words[1 : 1 + length] % self.about["vocabulary"]
        return ids.astype(np.int64).tolist(), [int(self.pair and 2 * i >= length) for i in range(length)]

    def _padded(self, rows: Sequence[Row]) -> Batch:
        shape = len(rows), max(len(ids) for ids, _ in rows)
        batch = {IDS: np.full(shape, self.about["pad"]), MASK: np.zeros(shape, int), TYPES: np.zeros(shape, int)}
        for i, (ids, types) in enumerate(rows):
            batch[IDS][i, : len(ids)], batch[TYPES][i, : len(ids)], batch[MASK][i, : len(ids)] = ids, types, 1
        return {name: batch[name].astype(np.int64) for name in self.about["names"]}
