r"""SatImp: weighted gradient ascent with two weights, saturation (what is forgotten needs no more) and importance (what no model doubts carries little).

p^beta1 lets alone the tokens that the model has forgotten, (1 - p)^beta2 those that it is sure of anyway: function words and the ends of names.
beta2 = 0 is WGA, and both 0 gradient ascent.

Paper: Yang, Wang, Huang, Liu, Zhang and Han 2025, "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", arXiv 2505.11953 (ICML 2025).
Objective: L = gamma L_SatImp(D_f) + alpha R(D_r), L_SatImp = -E_t[p_t^beta1 (1 - p_t)^beta2 NLL_t], the weights held fixed.

| paper | here | shape | default |
|---|---|---|---|
| p(s_i \| s_<i) | exp(-NLL) of each supervised token | (N,) | |
| exponents of saturation and importance | beta1, beta2 | scalars | 5, 1 |
| weights of the two terms | gamma, alpha | scalars | 0.1, 1 |

Differs from the paper: the paper, which judges by extraction strength, weighs forgetting ten times as much as retaining (gamma 1, alpha 0.1); the defaults here
are the reverse, those of OpenUnlearning's configuration (its class has the paper's). Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: two forward and backward passes per step, no second model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.losses import answer_nll
from remanence.training.requests import check_numbers, check_terms, retain_batches, scalarised
from remanence.training.trainer import Trainer
from remanence.training.unlearning import satimp_loss


@dataclass(frozen=True)
class SatImp:
    """Ascend on the forget tokens, weighted by saturation and importance, with a retain term.

    Args:
        beta1: exponent of p (saturation).
        beta2: exponent of 1 - p (importance).
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 0.1
    alpha: float = 1.0
    retain: str = "nll"

    def __post_init__(self) -> None:
        check_terms("satimp", self.gamma, self.alpha, self.retain)
        check_numbers("satimp", beta1=self.beta1, beta2=self.beta2)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_SatImp(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """

        def satimp(model: nn.Module, rows: Batch) -> Tensor:
            return satimp_loss(answer_nll(model, rows), self.beta1, self.beta2).sum() / rows.tokens

        retain = retain_batches(request, trainer, "SatImp", self.retain)
        pairs = trainer.pairs(trainer.batches(request.forget, request.kind, stream="forget"), retain)
        loss = scalarised(satimp, self.retain, self.gamma, self.alpha, model, trainer)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
