"""Dark experience replay (DER++): replay what the model answered when it saw a row (its logits then), and the label too, from two draws of one memory.

"Dark Experience for General Continual Learning: a Strong, Simple Baseline", Buzzega et al. 2020, arXiv 2004.07211, Algorithm 2 and equation 6.

    L = l(x, y)  +  alpha E_(x', z') || h(x') - z' ||^2  +  beta E_(x'', y'') l(x'', y'')

| paper | here | shape | default |
|---|---|---|---|
| alpha | `alpha` | | 0.1 |
| beta | `beta` | | 0.5 |
| buffer size | `capacity` | | 500 |
| z' | stored logits, of the weights before the step that first trains on the row | (K,) or (T, V) | |

The square is averaged over the logits of a position (as the authors' code does), then over a row's positions, then over rows. Of a language model, (T, V)
floats per row are the memory's bulk: `span="answer"` keeps the positions that predict a label, `top=k` the k largest logits of each with their indices
(k values and k int32: 8k bytes per position instead of 4V), and the difference is taken on those.

Differs from the paper: each row is shown to the reservoir once per task, in its first pass (the paper makes one pass). Its logits are computed for this, without
dropout and autocast, before the step's update. Draws are with replacement, by position in the stream.
Cost: three times the forward and backward work of plain training, and one forward pass more in the first epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.forward import evaluating, logits_of
from remanence.seeds import derive
from remanence.stream import Request, Task
from remanence.training.batches import Batch, Draws, Numbered, Zip
from remanence.training.losses import nll
from remanence.training.memory import ReservoirMemory, groups, stored_logits
from remanence.training.trainer import Step, Trainer


@dataclass
class DERpp:
    """Replay stored logits and labels.

    Args:
        alpha: weight of the distance to the stored logits; 0 leaves them out (with `beta` that is replay of labels).
        beta: weight of the replayed labels' loss; 0 leaves them out (that is DER).
        capacity: rows kept.
        batch_size: rows of each of the two draws, per micro-batch; `None` takes the size of the new batch.
        top: logits kept per position; `None` keeps all.
        span: of a language model, answer (positions that predict a label) | row (all). Classifiers have one position.
    """

    alpha: float = 0.1
    beta: float = 0.5
    capacity: int = 500
    batch_size: int | None = None
    top: int | None = None
    span: str = "answer"
    tasks: int = field(default=0, init=False)
    kept: ReservoirMemory | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise Mistake(f"derpp.{name}", f"is {getattr(self, name)}", "give 0 (off) or more")
        for name in ("batch_size", "top"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Mistake(f"derpp.{name}", f"is {getattr(self, name)}", "give 1 or more, or nothing")
        if self.capacity < 0:
            raise Mistake("derpp.capacity", f"is {self.capacity}", "give 0 (off) or more rows")
        if self.span not in ("answer", "row"):
            raise Mistake("derpp.span", f"unknown span '{self.span}'", "known are answer, row")

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit new rows, stored logits and stored labels together; keep rows with the logits that the model had before it trained on them."""
        span = "row" if task.kind in ("classes", "images") else self.span
        self.kept = kept = self.kept or self._memory(span, derive(trainer.seed, "kept"))
        kept.logits_span = span
        new, number = trainer.batches(task.train, task.kind), self.tasks
        size = self.batch_size or new.size
        streams: dict[str, Numbered] = {"new": new}
        if self.alpha:
            streams["dark"] = Draws(kept, size, seed=derive(trainer.seed, "memory", "logits"))
        if self.beta:
            streams["old"] = Draws(kept, size, seed=derive(trainer.seed, "memory"))

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return derpp_loss(model, batch, self.alpha, self.beta)

        def remember(model: nn.Module, step: Step) -> None:
            rows = trainer.first_seen(new, step)
            if len(rows) and self.capacity and streams.keys() != {"new"}:
                batch = new.take(rows)
                with evaluating(model):
                    logits = logits_of(model, batch.to(trainer.accelerator.device)).float()
                kept.add(batch, logits=logits.cpu(), group=groups(batch, number))

        model = trainer.fit(model, Zip(**streams), loss, steps=trainer.steps_for(new), after_backward=remember)
        self.tasks = number + 1
        trainer.note("memory", {"rows": len(kept), "bytes": kept.bytes})
        return model

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove the kept rows that equal a forget row; return their number."""
        return 0 if self.kept is None else self.kept.erase(request, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and the number of tasks learned."""
        return {
            "tasks": self.tasks,
            "span": self.kept and self.kept.logits_span,
            "kept": self.kept if self.kept is None else self.kept.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.tasks = state["tasks"]
        if state["kept"] is not None:
            self.kept = self._memory(state["span"], 0) if self.kept is None else self.kept
            self.kept.load_state_dict(state["kept"])

    def _memory(self, span: str, seed: int) -> ReservoirMemory:
        return ReservoirMemory(self.capacity, seed, keep_logits="full" if self.top is None else self.top, logits_span=span)


def derpp_loss(model: nn.Module, batch: Batch, alpha: float, beta: float) -> Tensor:
    """Return l(new) + alpha (distance to stored logits) + beta l(old); parts that the batch lacks count nothing (equation 6)."""
    total = nll(model, batch["new"])
    if "dark" in batch:
        present, stored, mask = stored_logits(logits_of(model, batch["dark"]), batch["dark"])
        total = total + alpha * logit_distance(present, stored, mask).sum() / batch["dark"].rows
    if "old" in batch:
        total = total + beta * nll(model, batch["old"])
    return total


def logit_distance(present: Float[Tensor, "B ... K"], stored: Float[Tensor, "B ... K"], mask: Bool[Tensor, "B ..."]) -> Float[Tensor, "B"]:
    """Return each row's squared distance, the mean over a position's K logits and over the positions that count."""
    each = (present - stored.to(present.dtype)).square().mean(-1)
    each, mask = each.reshape(len(each), -1), mask.reshape(len(mask), -1)
    return torch.where(mask, each, 0.0).sum(1) / mask.sum(1).clamp(min=1)
