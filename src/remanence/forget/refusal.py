r"""Refusal tuning (IdkNLL): teach the model to answer the forget questions with "I do not know", and hold the rest by a retain term.

It changes what the model says, not what it knows: the answer's probability falls because another answer's rises. It is the control that shows whether an audit
looks behind the output.

Source: the "IDK" baseline of TOFU (Maini et al. 2024, arXiv 2401.06121, section 3) without its preference term; survey arXiv 2404.02062, family A.
Objective: L = gamma NLL(q_f, refusal) + alpha R(D_r).

| source | here | shape | default |
|---|---|---|---|
| "I don't know" answers | the rows' column `idk`; else sentences, one drawn per row | text | 8 of ours |
| weights of the two terms | gamma, alpha | scalars | 1, 1 |

Differs from the source: each row keeps the refusal that it drew. Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: two forward and backward passes per step, no second model (retain: kl holds a copy of the trained parameters).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from remanence.stream import Request
from remanence.training.losses import nll
from remanence.training.refusals import refusing
from remanence.training.requests import check_terms, retain_batches, scalarised
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class Refusal:
    """Learn to refuse the forget questions, with a retain term.

    Args:
        sentences: refusals to draw from; by default the rows' own column `idk`, or eight sentences where they have none.
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    sentences: tuple[str, ...] | None = None
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "nll"

    def __post_init__(self) -> None:
        check_terms("refusal", self.gamma, self.alpha, self.retain)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma NLL(forget question, refusal) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the rows are not of kind qa, a refusal is empty, or the request has no retain set and the retain term needs one.
        """
        place = f"request '{request.name}'"
        rows = refusing(request.forget, place, request.kind, self.sentences, trainer.generator("refusals"))
        retain = retain_batches(request, trainer, "refusal tuning", self.retain)
        pairs = trainer.pairs(trainer.batches(rows, request.kind, stream="forget"), retain)
        loss = scalarised(nll, self.retain, self.gamma, self.alpha, model, trainer)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))
