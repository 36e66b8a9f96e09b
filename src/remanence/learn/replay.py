"""Experience replay (ER): mix rows of a small memory of the past into every step. The strongest simple method; others must beat it at equal bytes.

"On Tiny Episodic Memories in Continual Learning", Chaudhry et al. 2019, arXiv 1902.10486; the reservoir is Vitter's algorithm R (1985).

    L = mean over the new batch of l(x, y)  +  mean over a batch drawn from the memory of l(x, y)

| paper | here | default |
|---|---|---|
| mem_sz, rows kept | `capacity` | 500 |
| batch from the memory, B_M | `batch_size`, per micro-batch and process; `None`: as many as new rows | None |
| MemBatch update | `memory`: reservoir, or balanced (equal shares per class, per task for language models) | reservoir |
| when it is updated | `update`: step (with the step that first trains on a row), or task (behind the last step of its task) | step |

Differs from the paper: training may take several epochs, so each row is shown to the memory once per task, in the step that first trains on it (in a run of
one epoch this is the paper). With update: task the memory holds earlier tasks alone while a task is learned, so that all draws go to what may be forgotten: worth
a few points where a task takes several epochs, and what most libraries do. Rows are drawn with replacement, by position in the stream, so accumulation and processes do not change what is drawn.
Cost: twice the time of plain training with equal batches; `capacity` encoded rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from remanence.errors import Mistake, nearest
from remanence.models.forward import logits_of
from remanence.seeds import derive
from remanence.stream import Request, Task
from remanence.training.batches import IGNORED, Batch, Draws, Zip
from remanence.training.losses import nll
from remanence.training.memory import MEMORIES, BalancedMemory, ReservoirMemory, groups, make_memory
from remanence.training.trainer import Step, Trainer

UPDATES = ("step", "task")
SHOWN = 1024  # rows that a memory is shown at a time, behind a task


@dataclass
class Replay:
    """Replay rows of earlier tasks, and of this one.

    Args:
        capacity: rows kept; 0 keeps none, which is plain training.
        memory: reservoir | balanced.
        batch_size: rows drawn per micro-batch; `None` takes the size of the new batch.
        update: step | task.
    """

    capacity: int = 500
    memory: str = "reservoir"
    batch_size: int | None = None
    update: str = "step"
    tasks: int = field(default=0, init=False)
    kept: ReservoirMemory | BalancedMemory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise Mistake("replay.memory", f"unknown memory '{self.memory}'", nearest(self.memory, MEMORIES))
        if self.update not in UPDATES:
            raise Mistake("replay.update", f"unknown value '{self.update}'", nearest(self.update, UPDATES))
        if self.batch_size is not None and self.batch_size < 1:
            raise Mistake("replay.batch_size", f"is {self.batch_size}", "give 1 or more, or nothing for the size of the new batch")
        if self.capacity < 0:
            raise Mistake("replay.capacity", f"is {self.capacity}", "give 0 (off) or more rows")
        self.kept = make_memory(self.memory, self.capacity, 0)

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit new and old rows together; show each new row to the memory, behind the step that first trains on it or behind the task."""
        if self.kept.seen == 0:
            self.kept = make_memory(self.memory, self.capacity, derive(trainer.seed, "kept"))
        new, number = trainer.batches(task.train, task.kind), self.tasks
        old = Draws(self.kept, self.batch_size or new.size, seed=derive(trainer.seed, "memory"))

        def remember(rows: np.ndarray) -> None:
            if len(rows):
                batch = new.take(rows)
                self.kept.add(batch, group=groups(batch, number))

        def seen(model: nn.Module, step: Step) -> None:
            remember(trainer.first_seen(new, step))

        after = seen if self.update == "step" else None
        model = trainer.fit(model, Zip(new=new, old=old), replay_nll, steps=trainer.steps_for(new), after_step=after)
        if self.update == "task":
            for first in range(0, new.count, SHOWN):
                remember(np.arange(first, min(first + SHOWN, new.count)))
        self.tasks = number + 1
        trainer.note("memory", {"rows": len(self.kept), "bytes": self.kept.bytes})
        return model

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove the kept rows that equal a forget row; return their number."""
        return self.kept.erase(request, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory and the number of tasks learned."""
        return {"tasks": self.tasks, "kept": self.kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.tasks = state["tasks"]
        self.kept.load_state_dict(state["kept"])


def replay_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of the new batch plus the mean loss of the old one, where there is one; in one pass over both where their shapes allow it."""
    new = batch["new"]
    if "old" not in batch:
        return nll(model, new)
    old = batch["old"]
    if not joinable(model, new, old):
        return nll(model, new) + nll(model, old)
    both = {name: torch.cat([value, old[name]]) for name, value in new.items()}
    logits, labels = logits_of(model, both), both["labels"]
    if labels.dim() == 1:
        each = functional.cross_entropy(logits, labels, reduction="none")
        return each[: len(new["labels"])].sum() / new.rows + each[len(new["labels"]) :].sum() / old.rows
    each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    border = new["labels"][:, 1:].numel()
    return each[:border].sum() / new.tokens + each[border:].sum() / old.tokens


KEPT_BESIDE = {"group", "attention_mask"}  # what a memory adds to a row: nothing that a causal model's supervised positions depend on


def joinable(model: nn.Module, new: Batch, old: Batch) -> bool:
    """Return whether two batches can share a forward pass: columns of one shape, and no batch norm that would mix their statistics."""
    if not new.keys() <= old.keys() or not old.keys() - new.keys() <= KEPT_BESIDE:
        return False
    if any(value.shape[1:] != old[name].shape[1:] or value.dtype != old[name].dtype for name, value in new.items()):
        return False
    return not any(layer.training and isinstance(layer, _BatchNorm) for layer in model.modules())
