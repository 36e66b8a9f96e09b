"""The plain losses: functions of (model, batch), with means that divide by the batch's denominators (see `Batch`)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.models.forward import logits_of
from remanence.training.batches import IGNORED, Batch


def next_token_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T-1"]:
    """Return the negative log-likelihood of every next token, 0 where the label is ignored."""
    wide = logits[:, :-1]
    return F.cross_entropy(wide.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")


def row_nll(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Return the summed negative log-likelihood of each row's supervised tokens."""
    return next_token_nll(logits, labels).sum(1)


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood: over supervised next tokens (labels (B, T)), or over rows (class labels (B,))."""
    logits, labels = logits_of(model, batch), batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="sum") / batch.rows
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum") / batch.tokens
