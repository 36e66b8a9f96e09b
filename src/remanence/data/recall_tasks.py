"""Recall tasks with ground truth: key-value pairs hidden among filler, asked for later, so that only what remembers them can answer.

One row of T tokens: the first part hides pairs (a key, then its value) between filler tokens, a gap of filler follows, and the last part asks for every
pair once, key first. Only the values asked for are supervised, so chance is 1 / values. A model whose sight is shorter than the gap cannot answer.

| tokens of the vocabulary | numbers |
|--------------------------|---------|
| filler | 0 to filler - 1 |
| keys | filler to filler + keys - 1 |
| values | the last `values` |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.seeds import generator
from remanence.training.batches import IGNORED, Batch


@dataclass(frozen=True)
class Recall:
    """Key-value pairs in filler: `draw` gives rows, `self[i]` the i-th fresh batch of an endless stream (for `Trainer.fit`).

    Args:
        tokens: T, the length of a row.
        pairs: hidden in each row; their keys differ, values may repeat.
        keys: how many there are.
        values: how many there are.
        filler: how many different filler tokens there are.
        gap: filler tokens between the part that tells and the part that asks, at the least.
        size: rows of a batch.
        seed: of the stream of batches.

    Raises:
        Mistake: the pairs do not fit, or there are fewer keys than pairs.
    """

    tokens: int = 64
    pairs: int = 4
    keys: int = 16
    values: int = 16
    filler: int = 16
    gap: int = 16
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise Mistake("recall.pairs", f"{self.pairs} pairs need as many keys, there are {self.keys}", "raise keys")
        if self.slots < self.pairs:
            raise Mistake("recall.tokens", f"{self.pairs} pairs do not fit into {self.tokens} tokens", "lengthen the rows")
        if self.filler < 1 or self.values < 2:
            raise Mistake("recall", "needs a filler token and two values", "raise filler or values")

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return self.filler + self.keys + self.values

    @property
    def slots(self) -> int:
        """Places for a pair in each part."""
        return (self.tokens - self.gap) // 4

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.values

    def __getitem__(self, index: int) -> Batch:
        return self.draw(self.size, generator(self.seed, "recall", index))

    def draw(self, rows: int, random: torch.Generator) -> Batch:
        """Return `input_ids` and `labels` (rows, T); a label is given at each value that is asked for (the token that follows its key)."""
        ids = torch.randint(self.filler, (rows, self.tokens), generator=random)
        key = torch.rand(rows, self.keys, generator=random).argsort(1)[:, : self.pairs] + self.filler  # (rows, pairs), distinct
        value = torch.randint(self.values, (rows, self.pairs), generator=random) + self.filler + self.keys
        told, asked = (2 * torch.rand(rows, self.slots, generator=random).argsort(1)[:, : self.pairs] for _ in range(2))
        asked = asked + self.tokens - 2 * self.slots
        for place in (told, asked):
            ids.scatter_(1, place, key).scatter_(1, place + 1, value)
        labels = torch.full_like(ids, IGNORED).scatter_(1, asked + 1, value)
        return Batch({"input_ids": ids, "labels": labels})


def recall_accuracy(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> float:
    """Return the share of supervised tokens that the logits of the token before rank first."""
    asked: Bool[Tensor, "B T"] = labels[:, 1:] != IGNORED
    return float((logits[:, :-1].argmax(-1) == labels[:, 1:])[asked].double().mean())
