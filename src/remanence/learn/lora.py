"""Low-rank adaptation, task by task (IncLoRA): train a fresh adapter on the frozen model, then add it into the weights.

"LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. 2021, arXiv 2106.09685, equation 3. The lower bound among the parameter-efficient methods.

    h = W x + (alpha / r) B A x;   at the task's end  W <- W + (alpha / r) B A

| paper | here | shape | default |
|---|---|---|---|
| r | `rank` | A (r, in), B (out, r) | 8 |
| alpha | `alpha` | | 16 |
| adapted matrices | `targets`: roles or module names; `None`: all of attention and MLP | | None |

A is drawn anew for each task from the event's seed; B starts at zero. Nothing is kept between tasks: the result is an ordinary model.
Differs from the paper: all matrices are adapted by default (the paper: queries and values); no dropout on the adapter.
Cost: gradients and optimizer states of the adapters alone; merging is one product per matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from remanence.errors import Mistake
from remanence.models.adapters import add_lora, merge_lora
from remanence.seeds import derive
from remanence.stream import Task
from remanence.training.trainer import Trainer


@dataclass
class LoRA:
    """Train an adapter per task and merge it.

    Args:
        rank: of the update of each matrix.
        alpha: the update counts alpha / rank.
        targets: roles (query, key, value, output, gate, up, down) or names of modules; `None`: all matrices of attention and MLP.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise Mistake("lora.rank", f"is {self.rank}", "give 1 or more")
        if not 0 < self.alpha < float("inf"):
            raise Mistake("lora.alpha", f"is {self.alpha}", "give a value above 0")

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Adapt, fit the adapter, merge; the model's own weights move by the merge alone, and stay as trainable as they were.

        Raises:
            Mistake: the model has an adapter already, or no matrix that `targets` names.
        """
        free = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        adapted = add_lora(model, self.rank, self.alpha, self.targets, seed=derive(trainer.seed, "lora"))
        adapters = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        trainer.fit(adapted, trainer.batches(task.train, task.kind), parameters=adapters)
        model = merge_lora(adapted)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(free[name])
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: adapters are merged."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""
