"""Gradient ascent held by a divergence: raise the loss on the forget rows while the predictions on retain rows stay those of the model before.

Paper: Maini et al. 2024 (TOFU), arXiv 2401.06121, section 3, "KL minimization"; after Yao et al. 2023, arXiv 2310.10683.
Objective, in the standard scalarised form L = gamma L_forget + alpha R: L = -gamma NLL(D_f) + alpha KL(p_0 || p) on D_r.

| paper | here | shape | default |
|---|---|---|---|
| M_orig (p_0) | `frozen_copy(model)` at the start | a model | |
| KL(M_orig(s) \\|\\| M_unl(s)), mean over the retain tokens | `mean_kl` | scalar | |
| weights of the two terms (1 in the paper) | gamma, alpha | scalars | 1, 1 |

Differs from the paper: the mean is over supervised tokens (answers), prompts and padding do not count.
Steps and rate are the trainer's; an epoch is a pass over the forget rows. Cost: two forward and backward passes and one forward pass of p_0 per step;
memory: a copy of the trained parameters (under LoRA, of the adapter).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.losses import nll
from remanence.training.reference import frozen_copy, mean_kl
from remanence.training.requests import check_terms, retain_of
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class AscentKL:
    """Ascend on the forget rows; keep the predictions on the retain rows.

    Args:
        gamma: weight of the forget term.
        alpha: weight of the retain term.

    Raises:
        Mistake: a value out of range.
    """

    gamma: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_terms("kl", self.gamma, self.alpha)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise -gamma NLL(forget) + alpha KL(p_0 || p)(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set.
        """
        retain = trainer.batches(retain_of(request, "KL"), request.kind, stream="retain")
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        pairs = trainer.pairs(forget, retain)
        reference = frozen_copy(model).to(trainer.accelerator.device)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self.alpha * mean_kl(model, reference, batch["retain"]) - self.gamma * nll(model, batch["forget"])

        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
