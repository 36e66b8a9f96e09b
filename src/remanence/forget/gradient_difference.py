"""Gradient difference: raise the loss on the forget rows while lowering it on retain rows. The retain term keeps what it sees; the ascent has no floor.

Paper: Liu, Liu and Stone 2022, "Continual Learning and Private Unlearning", arXiv 2203.12817; Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3.
Objective, in the standard scalarised form L = gamma L_forget + alpha R: L = -gamma NLL(D_f) + alpha NLL(D_r).

| paper | here | shape | default |
|---|---|---|---|
| S_F | request.forget, its own shuffled stream | rows | |
| S_R | request.retain, an endless shuffled stream beside it, as many rows per step | rows | |
| weights of the two terms (1 in the paper) | gamma, alpha | scalars | 1, 1 |

Steps and rate are the trainer's; an epoch is a pass over the forget rows. Cost: two forward and backward passes per step, no second model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.losses import nll
from remanence.training.requests import check_terms, retain_of
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class GradientDifference:
    """Ascend on the forget rows and descend on the retain rows.

    Args:
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Raises:
        Mistake: a value out of range.
    """

    gamma: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_terms("gradient_difference", self.gamma, self.alpha)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise -gamma NLL(forget) + alpha NLL(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set.
        """
        retain = trainer.batches(retain_of(request, "gradient difference"), request.kind, stream="retain")
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        pairs = trainer.pairs(forget, retain)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self.alpha * nll(model, batch["retain"]) - self.gamma * nll(model, batch["forget"])

        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
