"""The model as it was: a frozen copy, and the divergence of the model in training from it."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.models.forward import logits_of
from remanence.training.batches import IGNORED, Batch


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return the model as it is now, in evaluation mode and without gradients.

    Parameters in training are copied, frozen ones are shared: under LoRA the copy costs the adapter alone, and is exact even where the adapter was
    trained before (switching it off would give the model before that).
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def supervised_logits(logits: Float[Tensor, "*B V"], labels: Int[Tensor, "*L"]) -> Float[Tensor, "N V"]:
    """Return the logits that predict a label: (B, T, V) at the positions before supervised tokens, (B, K) whole; at least in fp32."""
    chosen = logits if labels.dim() == 1 else logits[:, :-1][labels[:, 1:] != IGNORED]
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def summed_kl(logits_reference: Float[Tensor, "N V"], logits: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Return sum_n KL(p_0 || p) = sum_n sum_v p_0 (log p_0 - log p), in nats."""
    return F.kl_div(logits.log_softmax(-1), logits_reference.log_softmax(-1), log_target=True, reduction="sum")


def mean_kl(model: nn.Module, reference: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean KL(p_0 || p) over supervised next tokens (labels (B, T)) or rows (labels (B,)); prompts and padding do not count."""
    labels = batch["labels"]
    with torch.no_grad():
        before = supervised_logits(logits_of(reference, batch), labels)
    now = supervised_logits(logits_of(model, batch), labels)
    return summed_kl(before, now) / (batch.rows if labels.dim() == 1 else batch.tokens)


def fingerprint(model: nn.Module) -> list[int]:
    """Return one number per parameter, the sum of its bits as integers: two models with the same list have, but for chance, the same weights."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [weight.detach().view(whole[weight.element_size()]).sum(dtype=torch.int64) for weight in model.parameters()]
    return torch.stack([number.cpu() for number in sums]).tolist() if sums else []
