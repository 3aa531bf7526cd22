"""Texts as token numbers that stay on the device, cut to the longest of each batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.text.data import Texts

CHUNK = 4096  # texts tokenized at once: what a tokenizer tells of a text takes a hundred times its tokens
UNKNOWN = 0.5  # share of tokens outside the vocabulary from which on a tokenizer is another's


@dataclass(frozen=True)
class Batch:
    """Some of the texts.

    indices: which, on the device
    width: the tokens of the longest of them
    """

    indices: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Encoded:
    """Texts as the model reads them, padded at the end to the longest of all.

    ids, types: token numbers, and of models that tell a pair's texts apart the number of the text; int32 (n, longest)
    lengths: tokens of each, on the device; sizes: the same in main memory, so that a GPU is never asked for a width
    cut: how many texts were longer than allowed
    """

    ids: Tensor
    types: Tensor | None
    lengths: Tensor
    sizes: Tensor
    cut: int = 0

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.ids.device

    def batches(self, order: Tensor, size: int) -> list[Batch]:
        """The texts in `order`, a tensor in main memory, `size` at a time."""
        widths = [int(self.sizes[part].max()) for part in order.split(size)]
        moved = order.to(self.device).split(size)
        return [Batch(indices, width) for indices, width in zip(moved, widths, strict=True)]

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model takes, by name."""
        places = torch.arange(batch.width, device=self.device)
        found = {
            "input_ids": self.ids[batch.indices, : batch.width].long(),
            "attention_mask": (places < self.lengths[batch.indices, None]).long(),
        }
        if self.types is not None:
            found["token_type_ids"] = self.types[batch.indices, : batch.width].long()
        return found


def encode(tokenizer: Any, texts: Texts, max_length: int, device: torch.device) -> Encoded:
    """The texts as tokens on `device`; of pairs the longer text is cut first.

    Raises:
        ValueError: max_length has no room for a token of each text; a text without a token.
    """
    needed = tokenizer.num_special_tokens_to_add(pair=texts.second is not None) + (2 if texts.second is not None else 1)
    if max_length < needed:
        raise ValueError(f"--max-length {max_length} has no room for a token of each text; {needed} is the least")
    rows: dict[str, list[Tensor]] = {}
    cut = 0
    for start in range(0, len(texts), CHUNK):
        first, second = (part and list(part[start : start + CHUNK]) for part in (texts.first, texts.second))
        found = tokenizer(first, second, truncation=True, max_length=max_length, padding=False)
        for name in found.keys() & set(tokenizer.model_input_names):
            rows.setdefault(name, []).extend(torch.tensor(row, dtype=torch.int32) for row in found[name])
        cut += sum(bool(encoding.overflowing) for encoding in found.encodings)
    sizes = torch.tensor([len(row) for row in rows["input_ids"]])
    if not sizes.all():
        raise ValueError(f"the tokenizer makes no token of {texts.first[int(sizes.argmin())][:60]!r}; remove the text")
    ids = padded(rows["input_ids"], tokenizer.pad_token_id, device)
    types = padded(rows["token_type_ids"], tokenizer.pad_token_type_id, device) if "token_type_ids" in rows else None
    return Encoded(ids, types, sizes.to(device), sizes, cut)


def check_vocabulary(name: str, tokenizer: Any, encoded: Encoded, vocabulary: int) -> None:
    """Does the tokenizer fit model and texts?

    Raises:
        ValueError: it makes tokens that the model has no embedding of, or hardly any that it knows itself.
    """
    highest = max(int(encoded.ids.max()), len(tokenizer) - 1)
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {name} has tokens up to {highest}, the model embeddings of {vocabulary}: they do not "
            "fit each other; save both into one folder, from one source"
        )
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id])
    words = encoded.ids[~torch.isin(encoded.ids, special.to(encoded.ids))]
    unknown = float((words == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0.0
    if not len(words) or unknown > UNKNOWN:
        raise ValueError(
            f"the tokenizer of {name} knows {100 * (1 - unknown):.0f} % of these texts' tokens: it is another model's, "
            "or its vocabulary is missing; save the model's own tokenizer into its folder"
        )


def padded(rows: Sequence[Any], filling: int, device: torch.device) -> Tensor:
    """Rows of whole numbers as one int32 tensor, as wide as the longest."""
    parts = [torch.as_tensor(row, dtype=torch.int32) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=filling).to(device)
