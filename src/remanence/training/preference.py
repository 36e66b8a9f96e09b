"""Losses of preference optimisation on rows that must go: NPO and DPO, on each row's negative log-likelihood summed over its answer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.training.batches import Batch
from remanence.training.losses import answer_nll


def summed_nll(model: nn.Module, batch: Batch) -> Float[Tensor, "B"]:
    """Return s(x), each row's negative log-likelihood summed over its supervised tokens (or of its class), in nats."""
    return answer_nll(model, batch).sum(1)


def npo_loss(nll_sum: Float[Tensor, "B"], nll_sum_reference: Float[Tensor, "B"], beta: float) -> Float[Tensor, "B"]:
    """Return each row's -(2/beta) log sigmoid(beta (s - s_0)), s = -log pi (Zhang et al. 2024, eq. 3); (2/beta) log 2 at the reference."""
    return -(2 / beta) * F.logsigmoid(beta * (nll_sum - nll_sum_reference.to(nll_sum.dtype)))


def dpo_loss(
    won: Float[Tensor, "B"],
    won_reference: Float[Tensor, "B"],
    lost: Float[Tensor, "B"],
    lost_reference: Float[Tensor, "B"],
    beta: float,
) -> Float[Tensor, "B"]:
    """Return each row's -log sigmoid(beta [(s_0(w) - s(w)) - (s_0(l) - s(l))]) on summed NLLs (Rafailov et al. 2023, eq. 7); log 2 at the reference.

    Unlearning papers that follow OpenUnlearning multiply it by 2 / beta; the factor is the caller's.
    """
    margin = (won_reference.to(won.dtype) - won) - (lost_reference.to(lost.dtype) - lost)
    return -F.logsigmoid(beta * margin)
