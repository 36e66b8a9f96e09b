"""The model as it was: a frozen copy, and the divergence of the model in training from it."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.training.batches import Batch
from remanence.training.losses import answer_tokens


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return the model as it is now, in evaluation mode and without gradients.

    Parameters in training are copied, frozen ones are shared: under LoRA the copy costs the adapter alone, and is exact even where the adapter was
    trained before (switching it off would give the model before that).
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def summed_kl(logits_reference: Float[Tensor, "N V"], logits: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Return sum_n KL(p_0 || p) = sum_n sum_v p_0 (log p_0 - log p), in nats."""
    return F.kl_div(logits.log_softmax(-1), logits_reference.log_softmax(-1), log_target=True, reduction="sum")


def mean_kl(model: nn.Module, reference: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean KL(p_0 || p) over supervised next tokens (labels (B, T)) or rows (labels (B,)); prompts and padding do not count."""
    with torch.no_grad():
        before, _ = answer_tokens(reference, batch)
    now, _ = answer_tokens(model, batch)
    return summed_kl(before, now) / (batch.rows if batch["labels"].dim() == 1 else batch.tokens)
