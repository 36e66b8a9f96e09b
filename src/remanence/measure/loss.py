"""Loss on a set of rows: token mean and perplexity for language, cross-entropy for classes.

A probe encodes its rows once per processor and keeps them, and runs in the autocast context of its caller, if there is one. Cost: one forward pass over the
rows, no state beyond the encoded rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake
from remanence.models.forward import evaluating, logits_of
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import Batch, Batches
from remanence.training.scoring import check_size, encoded, item_names, per_row, token_scores, walk

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Loss:
    """Measure the loss.

    Values: `loss`, the mean over supervised tokens (text, qa, chat; nats per token) or over rows (classes, images), and for
    tokens `perplexity` = exp(loss).

    Items: each row's own mean `loss`, with its number of `tokens`; of kind text an item is a block of `length` tokens, not a document.

    Args:
        rows: what to measure on.
        kind: text | qa | chat | classes | images.
        batch_size: rows per forward pass.
        length: longest row in tokens.
        template: of kind qa.

    Raises:
        Mistake: wrong columns, no rows, nothing supervised, a label that the model has no output for.
    """

    rows: Dataset
    kind: str = "text"
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("loss", self.rows, self.kind)
        check_size("loss", self.batch_size)

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the mean loss and each row's loss."""
        rows = encoded(self._kept, at.processor, self.rows, self.kind, self.length, self.template)
        if self.kind in ("classes", "images"):
            return self._of_classes(model, rows)
        total, tokens = np.zeros(rows.count), np.zeros(rows.count, np.int64)
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                found = token_scores(model, batch)
                total[numbers] = -per_row(found.logp, found.row, len(numbers)).numpy()
                tokens[numbers] = torch.bincount(found.row, minlength=len(numbers)).numpy()
        if tokens.sum() == 0:
            raise Mistake("loss", "no token of the set is supervised", "raise `length` or check the rows")
        loss = float(total.sum() / tokens.sum())
        items = item_names(self.rows) if rows.count == len(self.rows) and self.kind != "text" else list(range(rows.count))
        return Scores(
            {"loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss)},
            [{"item": item, "loss": float(nll / n), "tokens": int(n)} for item, nll, n in zip(items, total, tokens) if n],
        )

    def _of_classes(self, model: nn.Module, rows: Batches) -> Scores:
        nll = np.zeros(rows.count)
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                logits = class_logits("loss", model, batch)
                nll[numbers] = F.cross_entropy(logits.float(), batch["labels"], reduction="none").double().cpu().numpy()
        return Scores(
            {"loss": float(nll.mean())}, [{"item": item, "loss": float(value)} for item, value in zip(item_names(self.rows), nll)]
        )


def class_logits(place: str, model: nn.Module, batch: Batch) -> Float[Tensor, "B K"]:
    """Return the logits of a classifier, refusing labels that it has no output for."""
    logits = logits_of(model, batch)
    highest = int(batch["labels"].max())
    if logits.dim() != 2 or int(batch["labels"].min()) < 0 or highest >= logits.shape[1]:
        raise Mistake(
            place, f"the model's output has shape {tuple(logits.shape)}, the labels go to {highest}", "give the model one output per class"
        )
    return logits
