r"""Weighted gradient ascent: climb the loss of each forget token in proportion to how likely it still is, so that what has been forgotten is let alone.

Gradient ascent's pull on a token grows as 1/p while p falls, and runs away. Multiplied by p^beta it vanishes with p (beta = 1: the gradient is that of p itself);
beta = 0 is gradient ascent.

Paper: Wang, Zhou, Zhou, Shin, Han and Weinberger 2025, "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", arXiv 2502.19301.
Objective: L = gamma L_WGA(D_f) + alpha R(D_r), L_WGA = -E_t[p_t^beta NLL_t], the weight held fixed.

| paper | here | shape | default |
|---|---|---|---|
| p(s_i \| s_<i) | exp(-NLL) of each supervised token | (N,) | |
| exponent of the weight | beta | scalar | 1 |
| weights of the two terms | gamma, alpha | scalars | 1, 1 |

Differs from the paper: nothing; the mean is over the supervised tokens of a step. Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: two forward and backward passes per step, no second model (the released code holds one that it never asks).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.losses import answer_nll
from remanence.training.requests import check_numbers, check_terms, retain_batches, scalarised
from remanence.training.trainer import Trainer
from remanence.training.unlearning import wga_loss


@dataclass(frozen=True)
class WGA:
    """Ascend on the forget tokens, weighted by their probability, with a retain term.

    Args:
        beta: exponent of the weight p^beta; 0 is gradient ascent.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    beta: float = 1.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "nll"

    def __post_init__(self) -> None:
        check_terms("wga", self.gamma, self.alpha, self.retain)
        check_numbers("wga", beta=self.beta)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_WGA(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """

        def wga(model: nn.Module, rows: Batch) -> Tensor:
            return wga_loss(answer_nll(model, rows), self.beta).sum() / rows.tokens

        retain = retain_batches(request, trainer, "WGA", self.retain)
        pairs = trainer.pairs(trainer.batches(request.forget, request.kind, stream="forget"), retain)
        loss = scalarised(wga, self.retain, self.gamma, self.alpha, model, trainer)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
