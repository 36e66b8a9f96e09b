"""Learning without forgetting (LwF): on the new inputs, keep saying what the old model says. Distillation without old data.

"Learning without Forgetting", Li and Hoiem 2016, arXiv 1606.09282, equations 1-3; temperature as in Hinton et al. 2015, arXiv 1503.02531.

    L = l(x, y) + alpha tau^2 KL( softmax(z_old / tau) || softmax(z / tau) )        z_old: logits of the model at the start of the task

| paper | here | default |
|---|---|---|
| lambda_o | `alpha` | 1 |
| T | `tau` | 2 |

The teacher stands first in the divergence and gets no gradient; tau^2 keeps the gradient's scale equal for all tau. A classifier distils the classes of earlier
tasks only (the paper's old outputs): its first task has none, and is plain training. A language model distils the whole vocabulary where a label stands, from
the first task on, for what it was pre-trained on is its oldest task.
Differs from the paper: KL instead of cross-entropy (equal gradients); one head. Cost: one forward pass more per step; one more copy of the model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.models.forward import logits_of
from remanence.stream import Task
from remanence.training.batches import IGNORED, Batch
from remanence.training.divergence import kl
from remanence.training.trainer import Trainer


@dataclass
class LwF:
    """Distil the model of the task's start on the task's inputs.

    Args:
        alpha: strength; 0 is plain training.
        tau: temperature.
    """

    alpha: float = 1.0
    tau: float = 2.0
    seen: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise Mistake("lwf.alpha", f"is {self.alpha}", "give 0 (off) or more")
        if not 0 < self.tau < float("inf"):
            raise Mistake("lwf.tau", f"is {self.tau}", "give a temperature above 0")

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the task beside a frozen copy of the model as it is now."""
        labelled = task.kind in ("classes", "images")
        classes = list(self.seen) if labelled else None
        batches = trainer.batches(task.train, task.kind)
        if self.alpha and classes != []:
            teacher = copy.deepcopy(model).requires_grad_(False).eval().to(trainer.accelerator.device)
            model = trainer.fit(model, batches, lambda model, batch: lwf_loss(model, teacher, batch, self.alpha, self.tau, classes))
        else:
            model = trainer.fit(model, batches)
        if labelled:
            self.seen = sorted({*self.seen, *task.train.with_format(None)["label"]})
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the classes seen (the teacher is the model that a task begins with)."""
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.seen = list(state["seen"])


def lwf_loss(model: nn.Module, teacher: nn.Module, batch: Batch, alpha: float, tau: float, classes: list[int] | None = None) -> Tensor:
    """Return l(x, y) + alpha tau^2 KL: means over supervised tokens, or rows; `classes` narrows the divergence to these logits."""
    student, labels = logits_of(model, batch), batch["labels"]
    with torch.no_grad():
        old = logits_of(teacher, batch)
    if labels.dim() == 1:
        chosen, count, wide, targets = torch.ones_like(labels, dtype=torch.bool), batch.rows, student, labels
        old, new = (logits if classes is None else logits[:, classes] for logits in (old, student))
    else:
        chosen, count, wide, targets = labels[:, 1:] != IGNORED, batch.tokens, student[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        old, new = old[:, :-1][chosen], student[:, :-1][chosen]  # (N, V): where the next token is a label
        chosen = chosen[chosen]
    distilled = kl(old, new, tau, chosen) * len(chosen) / count  # tau^2 is in it
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum") / count + alpha * distilled
