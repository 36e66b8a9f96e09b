r"""Primal-dual unlearning (PDU): flatten the logits on the forget rows under the constraint that the retain loss stays below a bound; the weight finds itself.

The forget loss is the squared distance of the largest logit from the mean one, with no softmax: it is 0 only where all tokens are equally likely, and its
gradient does not die near there. The multiplier of the constraint rises while the retain loss is above the bound and falls below it.

Paper: Entesari, Hatami, Khaziev, Ramakrishna and Fazlyab 2025, "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models",
arXiv 2506.05314. Problem: min L_LM(D_f) subject to NLL(D_r) <= eps; L = gamma L_LM(D_f) + alpha (NLL(D_r) - eps), alpha <- max(0, alpha + eta (NLL - eps)).

| paper | here | shape | default |
|---|---|---|---|
| logit margin loss, mean (max_v z - mean_v z)^2 | `logit_margin_loss` | (N,) | |
| epsilon = (1 + tolerance) NLL of the model before on D_r | eps, or tolerance | nats per token | None, 0.5 |
| dual variable at the start | alpha | scalar | 100 |
| dual step size | eta | scalar | 5 |
| epochs before the dual variable moves (warm start) | warmup | passes over the forget rows | 5 |

Differs from the paper: the tolerance is ours (the scripts write eps out: 0.3 for TOFU, 0.1 to 1.5 for MUSE); the loss reads the logits that predict answer
tokens, where the released code is one place to the right. alpha, eta and warmup are those of its TOFU scripts. A run without more than `warmup` epochs never
moves the multiplier. Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: two forward and backward passes per step, no second model; without eps one forward pass over the retain rows before. State: the multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import Batch, Batches
from remanence.training.losses import answer_tokens, nll
from remanence.training.preference import summed_nll
from remanence.training.processes import sum_over_processes, world_size
from remanence.training.requests import check_numbers, retain_of
from remanence.training.trainer import Step, Trainer
from remanence.training.unlearning import logit_margin_loss


@dataclass
class PDU:
    """Flatten the logits of the forget rows under a bound on the retain loss.

    Args:
        eps: bound on the retain rows' mean NLL in nats per token; `None` measures them before and adds the tolerance.
        tolerance: share by which the retain NLL may rise, where eps is not given.
        alpha: multiplier of the constraint at the start.
        eta: step of the multiplier; 0 holds it.
        warmup: passes over the forget rows before it moves.
        gamma: weight of the forget term.

    Raises:
        Mistake: a value out of range.
    """

    eps: float | None = None
    tolerance: float = 0.5
    alpha: float = 100.0
    eta: float = 5.0
    warmup: float = 5.0
    gamma: float = 1.0
    dual: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_numbers("pdu", tolerance=self.tolerance, alpha=self.alpha, eta=self.eta, warmup=self.warmup, gamma=self.gamma)
        if self.eps is not None:
            check_numbers("pdu", eps=self.eps)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_LM(forget) + alpha NLL(retain) for the trainer's steps, with alpha climbing on the constraint.

        Raises:
            Mistake: the request has no retain set.
        """
        retain = trainer.batches(retain_of(request, "PDU"), request.kind, stream="retain")
        pairs = trainer.pairs(trainer.batches(request.forget, request.kind, stream="forget"), retain)
        bound = self.eps if self.eps is not None else (1 + self.tolerance) * mean_nll(model, retain, trainer)
        wait = self.warmup * math.ceil(len(pairs) / (trainer.settings.accumulate * world_size()))  # steps
        self.dual = self.alpha
        seen: list[Tensor] = []  # the retain NLL of this step's micro-batches

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            logits, _ = answer_tokens(model, batch["forget"])
            kept = nll(model, batch["retain"])
            seen.append(kept.detach())
            return self.gamma * logit_margin_loss(logits).sum() / batch["forget"].tokens + self.dual * (kept - bound)

        def climb(model: nn.Module, step: Step) -> None:
            mean = sum_over_processes(torch.stack(seen).mean()) / world_size()
            seen.clear()
            if step.number >= wait:
                self.dual = max(0.0, self.dual + self.eta * (mean.item() - bound))

        model = trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs), after_step=climb)
        trainer.note("dual variable", {"start": self.alpha, "end": self.dual, "bound": bound})
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier."""
        return {"dual": self.dual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.dual = state["dual"]


def mean_nll(model: nn.Module, rows: Batches, trainer: Trainer) -> float:
    """Return the mean NLL per supervised token over all rows."""
    return trainer.over_rows(model, rows, summed_nll).sum().item() / sum(batch.own_tokens() for batch in rows)
