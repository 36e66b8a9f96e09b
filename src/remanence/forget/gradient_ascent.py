"""Gradient ascent: raise the loss on the forget rows. Nothing holds the rest of the model together, so it is the field's lower bound: it forgets, then collapses.

Paper: Jang et al. 2022, "Knowledge Unlearning for Mitigating Privacy Risks in Language Models", arXiv 2210.01504, eq. 1. Objective: L = -gamma NLL(D_f).

| paper | here | shape | default |
|---|---|---|---|
| D_f | request.forget | rows | |
| L_UL | `-gamma * nll` | scalar | gamma 1 |
| (ours) | max_nll: end after the step whose forget NLL passed this | nats per token | none |

Differs from the paper: it stops at an extraction-likelihood threshold measured between epochs, here (if asked) at a bound on the NLL that each step computes anyway.
Steps and rate are the trainer's. Cost: one forward and backward pass per step, no second model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.stream import Request
from remanence.training.batches import Batch
from remanence.training.losses import nll
from remanence.training.processes import sum_over_processes, world_size
from remanence.training.trainer import Step, Trainer


@dataclass(frozen=True)
class GradientAscent:
    """Ascend the forget rows' mean negative log-likelihood.

    Args:
        gamma: strength; 0 changes nothing.
        max_nll: end the stage after the first step whose forget NLL (before the step, in nats per supervised token) is above this; `None` runs all steps.

    Raises:
        Mistake: a value out of range.
    """

    gamma: float = 1.0
    max_nll: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise Mistake("gradient_ascent.gamma", f"must be 0 or more, and finite, got {self.gamma!r}", "correct the value")
        if self.max_nll is not None and not self.max_nll > 0:
            raise Mistake("gradient_ascent.max_nll", f"must be above 0, got {self.max_nll!r}", "correct the value or leave it out")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Ascend on `request.forget` for the trainer's steps, or until `max_nll`."""
        batches = trainer.batches(request.forget, request.kind, stream="forget")
        seen: list[Tensor] = []  # the NLL of this step's micro-batches

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = nll(model, batch)
            seen.append(value.detach())
            return -self.gamma * value

        def passed(model: nn.Module, step: Step) -> bool:
            if self.max_nll is None:
                seen.clear()
                return False
            mean = sum_over_processes(torch.stack(seen).mean()) / world_size()
            seen.clear()
            return bool(mean > self.max_nll)

        return trainer.fit(model, batches, loss, steps=trainer.steps_for(batches), after_step=passed)
