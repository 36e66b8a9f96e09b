"""The importance of each weight on some rows, as selective dampening (`forget/ssd.py`) reads it: a diagonal Fisher, each row once, shared among processes.

Foster, Schoepf and Brintrup 2023, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", arXiv 2308.07707, and its code;
label_free: arXiv 2402.19308. Cost: one pass with gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import ByName
from remanence.training.batches import Batch, Batches, Ragged
from remanence.training.fisher import Fisher, diagonal_fisher, save_fisher
from remanence.training.processes import rank, sum_over_processes, world_size
from remanence.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

MODES = {"sample": "empirical", "batch": "batched", "label_free": "label_free"}  # name here -> definition of `diagonal_fisher`


def importance_of(model: nn.Module, batches: Batches, mode: str, trainer: Trainer, names: Iterable[str] | None = None) -> Fisher:
    """Return the importance of each parameter on the rows of `batches`, each row once in a shuffled order, shared among processes."""
    order = torch.randperm(batches.count, generator=trainer.generator("importance")).numpy()
    size = batches.size
    mine = (attended(batches, order[first : first + size]) for first in range(rank() * size, batches.count, world_size() * size))
    inside = None if names is None else [f"model.{name}" for name in names]
    found = diagonal_fisher(ByName(model), mine, definition=MODES[mode], parameters=inside, reduce_sum=sum_over_processes)
    plain = {name.removeprefix("model."): value for name, value in found.items()}
    frozen = [name.removeprefix("model.") for name in found.frozen]
    return Fisher(plain, definition=found.definition, row=found.row, reduce=found.reduce, count=found.count, frozen=frozen)


def attended(batches: Batches, rows: np.ndarray) -> Batch:
    """Return the batch of some rows with an attention mask, so that padding counts nowhere (label_free looks at every attended position)."""
    batch, tokens = batches.take(rows), batches.columns.get("input_ids")
    if isinstance(tokens, Ragged):
        lengths = torch.from_numpy(tokens.lengths[rows])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()  # (B, T)
    return batch


def save_importance(path: str | Path, model: nn.Module, rows: Dataset, kind: str, trainer: Trainer, mode: str = "sample") -> Fisher:
    """Measure the general importance on all training rows and write it, for `SSD(importance=path)` when the rows are gone.

    Args:
        path: of the safetensors file.
        model: as it is when the request comes; a file of other weights is refused.
        rows: all that the model was trained on, the rows to be forgotten among them.
        kind: of the rows.
        trainer: encodes the rows.
        mode: sample | batch | label_free.
    """
    if mode not in MODES:
        raise Mistake("ssd.mode", f"unknown value {mode!r}", nearest(mode, MODES))
    model.to(trainer.accelerator.device)
    found = importance_of(model, trainer.batches(rows, kind), mode, trainer)
    save_fisher(path, found, model=model)
    return found
