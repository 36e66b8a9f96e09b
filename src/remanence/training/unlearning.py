"""Losses on what must be forgotten: pure functions of tensors, one value per row or token, so that the mean over a step (`batch.rows`, `batch.tokens`) is exact.

NPO and DPO stand in `training.preference`, gradient ascent is minus `training.losses.nll`. N counts the supervised tokens of a batch (or the rows of a
classifier), so that prompts and padding are out before a loss begins; p is the probability of the right token and nll = -log p.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from remanence.training.batches import IGNORED, uniform

SPAN = 2**24  # places of the hash that one row of a stream owns, more than any row has tokens


def simnpo_loss(nll_sum: Float[Tensor, "B"], length: Float[Tensor, "B"], beta: float, delta: float) -> Float[Tensor, "B"]:
    """Return each row's -(2/beta) log sigmoid(beta (s/|y| - delta)), s the NLL summed over an answer of |y| tokens (SimNPO: Fan et al. 2024, arXiv 2410.07163).

    beta * delta is the paper's margin gamma.
    """
    return -(2 / beta) * F.logsigmoid(beta * (nll_sum / length - delta))


def wga_loss(nll: Float[Tensor, "*N"], beta: float) -> Float[Tensor, "*N"]:
    """Return each token's -p^beta nll with the weight held fixed (weighted gradient ascent: Wang et al. 2025, arXiv 2502.19301)."""
    return -((-beta * nll.detach()).exp() * nll)


def satimp_loss(nll: Float[Tensor, "*N"], beta1: float, beta2: float) -> Float[Tensor, "*N"]:
    """Return each token's -p^beta1 (1 - p)^beta2 nll, weights held fixed: saturation times importance (SatImp: Yang et al. 2025, arXiv 2505.11953)."""
    fixed = nll.detach()
    return -((-beta1 * fixed).exp() * (-torch.expm1(-fixed)) ** beta2 * nll)


def ceu_loss(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Return each token's cross-entropy towards softmax(own logits, the true token's at -inf), held fixed (CE-U: Yang 2025, arXiv 2503.01224).

    The gradient on the logits is p - q: p_y on the true token however sure the model is, and at most 1 in sum.
    """
    wished = logits.detach().scatter(1, targets[:, None], -torch.inf).softmax(1)
    return F.cross_entropy(logits, wished, reduction="none")


def undial_loss(
    logits: Float[Tensor, "N V"], logits_reference: Float[Tensor, "N V"], targets: Int[Tensor, "N"], beta: float
) -> Float[Tensor, "N"]:
    """Return each token's cross-entropy towards softmax(z_0 - beta onehot(y)), z_0 the reference's logits (UNDIAL: Dong et al. 2024, arXiv 2402.10052)."""
    place = targets[:, None]
    wished = logits_reference.detach().scatter_add(1, place, torch.full_like(place, -beta, dtype=logits_reference.dtype)).softmax(1)
    return F.cross_entropy(logits, wished, reduction="none")


def logit_margin_loss(logits: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
    """Return each token's (max_v z_v - mean_v z_v)^2, which is 0 only where all logits are equal (PDU: Entesari et al. 2025, arXiv 2506.05314)."""
    return (logits.amax(1) - logits.mean(1)) ** 2


def without_first(labels: Int[Tensor, "B T"], count: int) -> Int[Tensor, "B T"]:
    """Return labels with the first `count` supervised tokens of every row ignored (the place before a row's first token predicts nothing, and is none)."""
    supervised = labels != IGNORED
    supervised[:, 0] = False
    return labels.masked_fill(supervised & (supervised.cumsum(1) <= count), IGNORED)


def drawn_labels(labels: Int[Tensor, "B *T"], key: np.uint64, first: int, classes: int) -> Int[Tensor, "B *T"]:
    """Return labels with every supervised one drawn uniformly from `classes`, a hash of (key, position in the stream, time step); ours.

    Args:
        labels: of batch rows `first`, `first` + 1, ... of a stream, so that the draw does not depend on how the stream is cut.
        key: of the hash.
        first: number of the first row in the stream.
        classes: number of tokens or classes.
    """
    width = labels.shape[1] if labels.dim() > 1 else 1
    position = np.arange(first, first + len(labels), dtype=np.uint64)[:, None] * np.uint64(SPAN) + np.arange(width, dtype=np.uint64)
    drawn = torch.from_numpy((uniform(key, position) * classes).astype(np.int64)).view(labels.shape)
    return torch.where(labels != IGNORED, drawn, labels)
