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

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake, nearest
from remanence.models.forward import logits_of
from remanence.stream import Request
from remanence.training.batches import Batch, Zip
from remanence.training.losses import nll, row_nll
from remanence.training.reference import frozen_copy, mean_kl
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer

RETAIN = ("nll", "kl", "none")


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
        for name in ("gamma", "alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Mistake(f"npo.{name}", f"must be 0 or more, and finite, got {getattr(self, name)!r}", "correct the value")
        if not 0 < self.beta < math.inf:
            raise Mistake("npo.beta", f"must be above 0, and finite, got {self.beta!r}", "correct the value")
        if self.retain not in RETAIN:
            raise Mistake("npo.retain", f"unknown value {self.retain!r}", nearest(self.retain, RETAIN))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_NPO(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: the request has no retain set and the retain term needs one.
        """
        streams = {}
        if self.retain != "none":
            rows = retain_of(request, f"NPO with the retain term '{self.retain}'", "add retain rows to the request, or set retain: none")
            streams["retain"] = trainer.batches(rows, request.kind, stream="retain")
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        streams["forget"] = forget.with_column("reference_nll", trainer.over_rows(model, forget, summed_nll))
        reference = frozen_copy(model).to(trainer.accelerator.device) if self.retain == "kl" else None

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            rows = batch["forget"]
            value = self.gamma * npo_loss(summed_nll(model, rows), rows["reference_nll"], self.beta).sum() / rows.rows
            if reference is not None:
                return value + self.alpha * mean_kl(model, reference, batch["retain"])
            return value + self.alpha * nll(model, batch["retain"]) if self.retain == "nll" else value

        return trainer.fit(model, Zip(**streams), loss, steps=trainer.steps_for(forget))


def summed_nll(model: nn.Module, batch: Batch) -> Float[Tensor, "B"]:
    """Return s(x), each row's negative log-likelihood summed over its supervised tokens (or of its class), in nats."""
    logits, labels = logits_of(model, batch), batch["labels"]
    return F.cross_entropy(logits, labels, reduction="none") if labels.dim() == 1 else row_nll(logits, labels)


def npo_loss(nll_sum: Float[Tensor, "B"], nll_sum_reference: Float[Tensor, "B"], beta: float) -> Float[Tensor, "B"]:
    """Return each row's -(2/beta) log sigmoid(beta (s - s_0)), s = -log pi (eq. 3); (2/beta) log 2 at the reference."""
    return -(2 / beta) * F.logsigmoid(beta * (nll_sum - nll_sum_reference.to(nll_sum.dtype)))
