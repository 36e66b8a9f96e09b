"""The model as it was: a frozen copy, and the divergence of the model in training from it."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.training.batches import Batch
from remanence.training.losses import answer_tokens


def frozen_copy(model: nn.Module, moving: Collection[str] | None = None) -> nn.Module:
    """Return the model as it is now, in evaluation mode and without gradients.

    Parameters in training are copied, frozen ones are shared: under LoRA the copy costs the adapter alone, and is exact even where the adapter was
    trained before (switching it off would give the model before that).

    Args:
        model: any module.
        moving: names of the parameters that training will move, where those are fewer than the ones that require a gradient; all others are shared.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} if moving is None else set(moving)
    shared = {id(parameter): parameter for name, parameter in model.named_parameters() if name not in trained}
    kept = copy.deepcopy(model, dict(shared)).eval()
    for parameter in kept.parameters():
        if id(parameter) not in shared:  # a shared one is the model's own, whose flag stays
            parameter.requires_grad_(False)
    return kept


def summed_kl(logits_reference: Float[Tensor, "N V"], logits: Float[Tensor, "N V"]) -> Float[Tensor, ""]:
    """Return sum_n KL(p_0 || p) = sum_n sum_v p_0 (log p_0 - log p), in nats."""
    return F.kl_div(logits.log_softmax(-1), logits_reference.log_softmax(-1), log_target=True, reduction="sum")


def mean_kl(model: nn.Module, reference: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean KL(p_0 || p) over supervised next tokens (labels (B, T)) or rows (labels (B,)); prompts and padding do not count."""
    with torch.no_grad():
        before, _ = answer_tokens(reference, batch)
    now, _ = answer_tokens(model, batch)
    return summed_kl(before, now) / (batch.rows if batch["labels"].dim() == 1 else batch.tokens)


def fingerprint(model: nn.Module) -> list[int]:
    """Return one number per parameter, the sum of its bits as integers: two models with the same list have, but for chance, the same weights."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [weight.detach().view(whole[weight.element_size()]).sum(dtype=torch.int64) for weight in model.parameters()]
    return torch.stack([number.cpu() for number in sums]).tolist() if sums else []
