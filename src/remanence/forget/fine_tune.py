"""Fine-tuning on what stays: train on the retain rows and hope that the others fade (catastrophic forgetting, used on purpose). A baseline.

Source: the first baseline of most unlearning papers (for example Golatkar et al. 2020, arXiv 1911.04933, section 5). Objective: L = NLL(D_r).

| definition | here |
|---|---|
| D_r | request.retain |
| steps, rate | the trainer's; an epoch is a pass over the retain rows |

Cost: one forward and backward pass per step, no second model. It forgets what the retain rows contradict, and keeps what is learned by heart for long.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from remanence.stream import Request
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer


@dataclass(frozen=True)
class FineTune:
    """Train on the retain rows alone. Nothing to set."""

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Fit the retain rows for the trainer's steps.

        Raises:
            Mistake: the request has no retain set.
        """
        batches = trainer.batches(retain_of(request, "fine-tuning"), request.kind, stream="retain")
        return trainer.fit(model, batches, steps=trainer.steps_for(batches))
