r"""Task arithmetic: fine-tune a copy on the forget rows, and go the same way backwards from the model as it was.

What fine-tuning on some rows adds to the weights is a direction; subtracted, it takes away what was like it. No retain row is needed and the forget rows are
only ever learned, never unlearned. It removes tasks and styles better than single facts. With `then` the model learns new answers afterwards (F-Learning).

Papers: Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv 2212.04089, section 3 (negation); then: Ni et al. 2023, "Forgetting before
Learning: Utilizing Parametric Arithmetic for Knowledge Updating in Large Language Models", arXiv 2311.08011.
Objective: theta = theta_0 - alpha (theta_ft - theta_0), theta_ft = argmin NLL(D_f) from theta_0.

| paper | here | shape | default |
|---|---|---|---|
| theta_pre, theta_ft | the model, and a copy that `trainer.fit` trains on the forget rows | (P,) | |
| tau = theta_ft - theta_pre | `negate` | (P,) | |
| scaling term (lambda in F-Learning) | alpha | scalar | 1 |
| F-Learning: then fine-tune on the new knowledge | then: none, new (forget rows with the answers of their column `new_answer`), retain | name | none |

Differs from the paper: the scaling term is given, not chosen on held-out rows. Under LoRA the arithmetic is on the adapter's two matrices, which to first
order is that on their product where the adapter was fresh. Buffers (running statistics) stay those of the model. alpha 0 is the identity, bit for bit.
Steps and rate are the trainer's, for each of the two trainings. Cost: fine-tuning on the forget rows; memory: a copy of the trained parameters.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.stream import Request
from remanence.training.requests import retain_of
from remanence.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

THEN = ("none", "new", "retain")


@dataclass(frozen=True)
class TaskVector:
    """Subtract what fine-tuning on the forget rows would add; learn something afterwards where asked.

    Args:
        alpha: how far to go back; 0 is the identity.
        then: what to fine-tune on afterwards: none | new (the forget rows with the answers in their column `new_answer`) | retain.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    alpha: float = 1.0
    then: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise Mistake("task_vector.alpha", f"must be 0 or more, and finite, got {self.alpha!r}", "correct the value")
        if self.then not in THEN:
            raise Mistake("task_vector.then", f"unknown value {self.then!r}", nearest(self.then, THEN))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Fine-tune a copy on the forget rows, subtract the difference, and fine-tune on what `then` names.

        Raises:
            Mistake: the rows that `then` names are not in the request.
        """
        learned = self._learned(request)
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        if self.alpha:
            model.to(trainer.accelerator.device)
            tuned = trainer.fit(trained_copy(model), forget, steps=trainer.steps_for(forget))
            negate(model, tuned, self.alpha)
            del tuned
        if learned is None:
            return model
        batches = trainer.batches(learned, request.kind, stream="then")
        return trainer.fit(model, batches, steps=trainer.steps_for(batches))

    def _learned(self, request: Request) -> Dataset | None:
        """Return the rows that are learned after the subtraction, `None` for none."""
        if self.then == "none":
            return None
        if self.then == "retain":
            return retain_of(request, "a task vector with then: retain", "add retain rows to the request, or set then: none")
        if request.kind != "qa" or "new_answer" not in request.forget.column_names:
            raise Mistake(
                f"request '{request.name}'",
                "its forget rows have no column 'new_answer', which then: new learns",
                "add the new answers to the forget rows (kind qa), or set then: none",
            )
        rows = request.forget.select_columns(["question", "new_answer"])
        return rows.rename_column("new_answer", "answer")


def trained_copy(model: nn.Module) -> nn.Module:
    """Return a copy to train, in which frozen parameters are shared with the model."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad})


def negate(model: nn.Module, tuned: nn.Module, alpha: float) -> None:
    """Set each parameter in training to theta_0 - alpha (theta_ft - theta_0), in place (Ilharco et al., table 1)."""
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), tuned.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.copy_(negated(parameter, other, alpha))


def negated(theta: Float[Tensor, "*P"], theta_ft: Float[Tensor, "*P"], alpha: float) -> Float[Tensor, "*P"]:
    """Return theta - alpha (theta_ft - theta); a weight that did not move stays as it is, bit for bit."""
    return torch.where(theta_ft == theta, theta, theta - alpha * (theta_ft - theta))
