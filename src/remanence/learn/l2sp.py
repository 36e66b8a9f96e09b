"""L2-SP: pull all weights back to where they started, equally. The control for EWC: is the Fisher worth its cost?

"Explicit Inductive Bias for Transfer Learning with Convolutional Networks", Li, Grandvalet and Davoine 2018, arXiv 1802.01483, equation 2.

    L = l(x, y) + lam / 2 || theta - theta_0 ||^2

| paper | here | default |
|---|---|---|
| alpha | `lam` | 0.01 |
| w^0 | `reference`: task (the weights before this task) or start (those before the first one) | task |

Differs from the paper: heads are pulled like all other weights. Cost: plain training; one copy of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.stream import Task
from remanence.training.batches import Batch
from remanence.training.losses import nll
from remanence.training.trainer import Trainer


@dataclass
class L2SP:
    """Penalise every movement.

    Args:
        lam: strength; 0 is plain training.
        reference: task | start.
    """

    lam: float = 0.01
    reference: str = "task"
    anchor: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.lam < float("inf"):
            raise Mistake("l2sp.lam", f"is {self.lam}", "give 0 (off) or more")
        if self.reference not in ("task", "start"):
            raise Mistake("l2sp.reference", f"unknown reference '{self.reference}'", "known are start, task")

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the task under the penalty."""
        if self.lam and (self.reference == "task" or not self.anchor):
            self.anchor = {name: value.detach().clone() for name, value in model.named_parameters()}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return nll(model, batch) + self.lam / 2 * distance(model, self.anchor) if self.lam else nll(model, batch)

        return trainer.fit(model, trainer.batches(task.train, task.kind), loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that pull."""
        return {"anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.anchor = dict(state["anchor"])


def distance(model: nn.Module, anchor: dict[str, Tensor]) -> Tensor:
    """Return the squared distance of the trained weights from the anchor, which is moved to their device, once."""
    parts = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if anchor[name].device != parameter.device:
                anchor[name] = anchor[name].to(parameter.device)
            parts.append((parameter - anchor[name]).square().sum())
    return torch.stack(parts).sum()
