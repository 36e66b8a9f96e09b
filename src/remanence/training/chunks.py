"""Rows in pieces that can be left out: windows of characters of a text; a question with its answer, or a chat, is one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remanence.training.batches import Batches

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.training.trainer import Loss, Trainer


@dataclass(frozen=True)
class Chunks:
    """The chunks of some rows, in order.

    Args:
        rows: that were cut.
        kind: text | qa | chat.
        texts: of the chunks, C.
        owner: number of the row that each comes from, (C,).
    """

    rows: Dataset
    kind: str
    texts: list[str]
    owner: Int[np.ndarray, " C"]

    def keep(self, kept: Bool[Tensor, " C"]) -> Dataset:
        """Return the rows made of the kept chunks alone; rows without any are gone."""
        left = np.flatnonzero(kept.numpy())
        if self.kind != "text":
            return self.rows.select(self.owner[left])
        parts: dict[int, list[str]] = {}
        for number in left.tolist():
            parts.setdefault(int(self.owner[number]), []).append(self.texts[number])
        return _texts(["".join(part) for part in parts.values()])

    def alone(self, numbers: Int[np.ndarray, " S"]) -> Dataset:
        """Return some chunks as rows of their own."""
        return _texts([self.texts[number] for number in numbers]) if self.kind == "text" else self.rows.select(self.owner[numbers])

    def rest(self, numbers: Int[np.ndarray, " S"]) -> Dataset | None:
        """Return, for each of some chunks, its row without it; `None` where nothing is left of a row (a record is one chunk)."""
        if self.kind != "text":
            return None
        first = np.searchsorted(self.owner, np.arange(len(self.rows) + 1))  # chunks of row r: first[r] .. first[r + 1] - 1
        spans = [(first[self.owner[number]], number, first[self.owner[number] + 1]) for number in numbers]
        return _texts(["".join(self.texts[start:number] + self.texts[number + 1 : stop]) for start, number, stop in spans])


def cut_rows(rows: Dataset, kind: str, size: int) -> Chunks:
    """Cut texts into windows of `size` characters, and any other row into one chunk, its words in order."""
    plain = rows.with_format(None)
    if kind == "qa":
        return Chunks(rows, kind, [f"{asked}\n{said}" for asked, said in zip(plain["question"], plain["answer"])], np.arange(len(rows)))
    if kind == "chat":
        return Chunks(rows, kind, ["\n".join(turn["content"] for turn in turns) for turns in plain["messages"]], np.arange(len(rows)))
    pieces = [(number, text[first : first + size]) for number, text in enumerate(plain["text"]) for first in range(0, len(text), size)]
    return Chunks(rows, kind, [piece for _, piece in pieces], np.array([number for number, _ in pieces], np.int64))


def row_sums(trainer: Trainer, model: nn.Module, rows: Dataset, kind: str, function: Loss) -> Float[Tensor, "R 2"]:
    """Return a function's two values for every row, summed over its windows: a text is read alone, in windows of the settings' length."""
    if kind == "text":
        encoded, owner = windows(list(rows.with_format(None)["text"]), trainer.processor, trainer.settings.length)
    else:
        encoded, owner = trainer.encode(rows, kind), torch.arange(len(rows))
    found = torch.zeros(len(rows), 2, dtype=torch.float64)
    if not len(encoded):
        return found
    batches = Batches(encoded, trainer.settings.batch_size, shuffle=False, pad=getattr(trainer.processor, "pad_token_id", None) or 0)
    return found.index_add_(0, owner, trainer.over_rows(model, batches, function, (2,)))


def windows(texts: list[str], tokenizer: Any, length: int) -> tuple[Dataset, Int[Tensor, " W"]]:
    """Return each text's tokens and the end token in windows of `length`, and the text that each is of; one of a single token has no target."""
    from datasets import Dataset

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [[*row, *end] for row in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    cut = [(number, row[first : first + length]) for number, row in enumerate(ids) for first in range(0, len(row) - 1, length)]
    owner = torch.tensor([number for number, _ in cut], dtype=torch.int64)
    return Dataset.from_dict({"input_ids": [row for _, row in cut], "labels": [row for _, row in cut]}), owner


def _texts(texts: list[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"text": texts})
