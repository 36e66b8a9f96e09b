"""Batches whose targets are noise: every supervised token becomes one drawn uniformly from the vocabulary, afresh each time its row comes."""

from __future__ import annotations

import numpy as np
import torch

from remanence.seeds import derive
from remanence.training.batches import IGNORED, Batch, Batches, uniform

LONGEST = 2**24  # tokens of a row


class RandomLabels:
    """Draw the labels of position p of the stream from a hash of (seed, p): the same under any accumulation, and after a resume.

    Args:
        batches: of token rows.
        vocabulary: V, labels are 0 .. V-1.
        seed: of the draws.
    """

    def __init__(self, batches: Batches, vocabulary: int, *, seed: int):
        self.batches, self.vocabulary, self.key = batches, vocabulary, np.uint64(derive(seed, "labels"))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        batch, size = self.batches[index], self.batches.size
        labels = batch["labels"]
        row = np.arange(index * size, (index + 1) * size, dtype=np.uint64)[:, None]
        cell = row * np.uint64(LONGEST) + np.arange(labels.shape[1], dtype=np.uint64)
        drawn = torch.from_numpy((uniform(self.key, cell) * self.vocabulary).astype(np.int64))
        batch["labels"] = torch.where(labels == IGNORED, labels, drawn)
        return batch
