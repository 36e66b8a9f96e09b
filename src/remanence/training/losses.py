"""The plain losses: functions of (model, batch), with means that divide by the batch's denominators (see `Batch`).

A model is asked for the logits of the time steps that some row supervises, where it can be: of a question and its answer that is the answer's part, and with a
vocabulary far wider than the model these logits are most of the memory and much of the time of a step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.models.forward import logits_of
from remanence.training.batches import IGNORED, Batch
from remanence.training.scoring import supervised_logits


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "B S V"], Int[Tensor, "B S"]]:
    """Return logits and what each should predict (IGNORED: nothing) at the time steps that some row supervises; a classifier's rows are one step each."""
    labels = batch["labels"]
    if labels.dim() == 1:
        return logits_of(model, batch)[:, None], labels[:, None]
    targets = labels[:, 1:]
    supervised = targets != IGNORED
    row, time = supervised.nonzero(as_tuple=True)
    logits, column = supervised_logits(model, batch, supervised, time)
    wanted = targets.new_full(logits.shape[:2], IGNORED)
    return logits, wanted.index_put_((row, column), targets[row, time])


def answer_tokens(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "N V"], Int[Tensor, "N"]]:
    """Return logits and target of every supervised token (every row of a classifier), row after row, at least in fp32."""
    logits, targets = answer_logits(model, batch)
    chosen = (targets.flatten() != IGNORED).nonzero().squeeze(1)
    logits = logits.flatten(0, 1).index_select(0, chosen)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()[chosen]


def answer_nll(model: nn.Module, batch: Batch) -> Float[Tensor, "B S"]:
    """Return the negative log-likelihood at the steps of `answer_logits`, 0 where nothing is to be predicted."""
    logits, targets = answer_logits(model, batch)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none").view(targets.shape)


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood: over supervised next tokens (labels (B, T)), or over rows (class labels (B,))."""
    logits, targets = answer_logits(model, batch)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (batch.rows if batch["labels"].dim() == 1 else batch.tokens)
