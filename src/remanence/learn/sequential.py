"""Plain fine-tuning on whatever comes: no defence at all. The lower bound without which no number about forgetting means anything.

    theta <- theta - lr grad L_t(theta)

Cost: one pass of the loop; no memory beyond the model's and the optimizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from remanence.stream import Task
from remanence.training.trainer import Trainer


@dataclass
class Sequential:
    """Train on the task alone. Nothing to set and nothing to keep."""

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the task's rows."""
        return trainer.fit(model, trainer.batches(task.train, task.kind))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""
