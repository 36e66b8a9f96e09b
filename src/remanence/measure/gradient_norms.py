"""How large the gradient of each single row is: its tail says which rows a later deletion by a gradient step would move the model for, and how far.

A row's loss is its class's negative log-likelihood, or the mean over its supervised tokens. Norms come from one pass forward and back where the model's layers
allow it (`training.row_gradients`; two rows are checked against plain backward passes first), and row by row elsewhere. Cost: a forward and a backward pass over the
rows, and, for convolutions and tokens, the rows' gradients of one layer at a time.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake
from remanence.models.forward import evaluating
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import IGNORED, Batch, Batches
from remanence.training.preference import summed_nll
from remanence.training.row_gradients import RowGradients, Unsuited
from remanence.training.scoring import check_size, encoded, item_names, walk

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class GradientNorms:
    """Measure the L2 norm of every row's gradient over the parameters in training.

    Values: `mean`, `median`, `p99`, `max`, and `tail` = p99 / median. Items: each row's `norm`.

    Args:
        rows: what to measure on.
        kind: text | qa | chat | classes | images.
        batch_size: rows per pass.
        length: longest row in tokens.
        template: of kind qa.

    Raises:
        Mistake: wrong columns, no rows, nothing supervised, or a model without a parameter in training.
    """

    rows: Dataset
    kind: str = "text"
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("gradient_norms", self.rows, self.kind)
        check_size("gradient_norms", self.batch_size)

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the distribution of norms and each row's norm."""
        rows = encoded(self._kept, at.processor, self.rows, self.kind, self.length, self.template)
        chosen = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not chosen:
            raise Mistake("gradient_norms", "the model has no parameter in training", "free some")
        norms = torch.full((rows.count,), torch.nan, dtype=torch.float64)
        with evaluating(model):
            quick = _quick(model, chosen, rows)
            for numbers, batch in walk(rows, self.batch_size, model):
                found = norms_of(model, chosen, batch, quick)
                norms[torch.from_numpy(numbers)] = found.masked_fill(~supervised(batch), torch.nan).cpu()
        kept = norms[~norms.isnan()].numpy()
        if len(kept) == 0:
            raise Mistake(
                "gradient_norms", "no row of the set is supervised, or its gradient is no number", "raise `length` or check the rows"
            )
        middle, high = np.quantile(kept, [0.5, 0.99])
        items = item_names(self.rows) if rows.count == len(self.rows) and self.kind != "text" else list(range(rows.count))
        return Scores(
            {
                "mean": float(kept.mean()),
                "median": float(middle),
                "p99": float(high),
                "max": float(kept.max()),
                "tail": float(high / middle),
            },
            [{"item": item, "norm": norm} for item, norm in zip(items, norms.tolist()) if norm == norm],
        )


def row_loss(model: nn.Module, batch: Batch) -> Float[Tensor, " B"]:
    """Return each row's mean negative log-likelihood over its supervised tokens, or that of its class."""
    total, labels = summed_nll(model, batch), batch["labels"]
    return total if labels.dim() == 1 else total / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)


def supervised(batch: Batch) -> Tensor:
    """Return which rows have something to say (B,)."""
    labels = batch["labels"]
    return torch.ones_like(labels, dtype=torch.bool) if labels.dim() == 1 else (labels[:, 1:] != IGNORED).any(1)


def norms_of(model: nn.Module, chosen: dict[str, nn.Parameter], batch: Batch, quick: RowGradients | None) -> Float[Tensor, " B"]:
    """Return the norms of a batch's rows, in one pass where the layers that it goes through allow it."""
    if quick is not None:
        with contextlib.suppress(Unsuited):
            return quick.norms(lambda: row_loss(model, batch), batch.own_rows())
    return by_row(model, chosen, batch)


def by_row(model: nn.Module, chosen: dict[str, nn.Parameter], batch: Batch) -> Float[Tensor, " B"]:
    """Return the norms by plain backward passes, one for each row."""
    found = []
    for number in range(batch.own_rows()):
        row = Batch({name: value[number : number + 1] for name, value in batch.items()})
        with torch.enable_grad():
            slopes = torch.autograd.grad(row_loss(model, row).sum(), list(chosen.values()), allow_unused=True)
        found.append(torch.stack([slope.double().square().sum() for slope in slopes if slope is not None]).sum().sqrt())
    return torch.stack(found)


def _quick(model: nn.Module, chosen: dict[str, nn.Parameter], rows: Batches) -> RowGradients | None:
    """Return what takes many rows in one pass, if it agrees with plain passes over the first rows."""
    _, batch = next(walk(rows, 2, model))
    try:
        quick = RowGradients(model, chosen)
        found, expected = quick.norms(lambda: row_loss(model, batch), batch.own_rows()), by_row(model, chosen, batch)
        close = 5e-2 if min(weight.dtype.itemsize for weight in chosen.values()) < 4 or torch.is_autocast_enabled() else 1e-3
        if bool(((found - expected).abs() <= close * expected.max()).all()):
            return quick
        reason = "rows touch each other"
    except Unsuited as error:
        reason = str(error)
    warnings.warn(f"gradients are taken row by row ({reason})", stacklevel=4)
    return None
