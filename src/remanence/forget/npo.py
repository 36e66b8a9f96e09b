r"""Negative preference optimisation: lower the probability of the forget answers, but less and less where it has fallen far below the reference's.

It is DPO with only the rejected side: the weight 2 sigmoid(-beta (s - s_0)) on each row's gradient starts at 1 and goes to 0, so that the ascent slows where
gradient ascent runs away; for beta -> 0 it is gradient ascent on the summed NLL s. A retain term holds the rest.

Paper: Zhang, Lin, Bai and Mei 2024, "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", arXiv 2404.05868, eq. 3.
Objective: L = gamma L_NPO(D_f) + alpha R(D_r).

| paper | here | shape | default |
|---|---|---|---|
| -log pi_theta(y \| x), summed over the answer | nll_sum | (B,) nats | |
| -log pi_ref(y \| x) | nll_sum_reference, column `reference_nll` of the forget rows | (B,) nats | |
| beta (inverse temperature) | beta | scalar | 0.1 |
| NPO, NPO+RT, NPO+KL | retain: none, nll, kl | name | nll |
| weights of the two terms (1 in the paper) | gamma, alpha | scalars | 1, 1 |

Differs from the paper: s_0 of every forget row is computed once, before the first step, so no second model is held (except a frozen copy for retain: kl).
Steps and rate are the trainer's; an epoch is a pass over the forget rows. Cost: one forward pass over the forget rows, then two forward and backward
passes per step (kl: and a forward pass of the copy); memory: one number per forget row (kl: a copy of the trained parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.preference import npo_loss, summed_nll
from remanence.training.requests import check_terms, retain_batches, retain_term
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class NPO:
    """Optimise the negative preference on the forget rows, with a retain term.

    Args:
        beta: how soon the ascent slows; small is near gradient ascent.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "nll"

    def __post_init__(self) -> None:
        check_terms("npo", self.gamma, self.alpha, self.retain)
        if not 0 < self.beta < float("inf"):
            raise Mistake("npo.beta", f"must be above 0, and finite, got {self.beta!r}", "correct the value")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_NPO(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """
        retain = retain_batches(request, trainer, "NPO", self.retain)
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        forget = forget.with_column("reference_nll", trainer.over_rows(model, forget, summed_nll))
        pairs, keep = trainer.pairs(forget, retain), retain_term(self.retain, model, trainer)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            rows = batch["forget"]
            value = self.gamma * npo_loss(summed_nll(model, rows), rows["reference_nll"], self.beta).sum() / rows.rows
            return value + self.alpha * keep(model, batch["retain"]) if retain is not None else value

        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
