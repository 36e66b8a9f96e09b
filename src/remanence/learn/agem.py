"""Averaged gradient episodic memory (A-GEM): where a step would raise the loss on the memory to first order, take out that part of the gradient.

"Efficient Lifelong Learning with A-GEM", Chaudhry et al. 2019, arXiv 1812.00420, equation 11.

    if g . g_ref < 0:   g <- g - (g . g_ref / g_ref . g_ref) g_ref        g_ref: mean gradient on a batch drawn from the memory of earlier tasks

| paper | here | default |
|---|---|---|
| episodic memory size | `capacity` | 500 |
| samples for g_ref | `batch_size`, per micro-batch and process; `None`: as many as new rows | None |

The products run over all trained parameters as one vector, before clipping. Rows of the present task enter the memory at its end, so g_ref speaks of the past
alone. Differs from the paper: the memory is a reservoir or shared equally among classes or tasks, as chosen (the paper: equally among classes).
Cost: two backward passes per step; one more gradient in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.seeds import derive
from remanence.stream import Request, Task
from remanence.training.batches import Batch, Draws, Zip
from remanence.training.losses import nll
from remanence.training.memory import MEMORIES, BalancedMemory, ReservoirMemory, groups, make_memory
from remanence.training.projection import agem_project_named
from remanence.training.trainer import Step, Trainer


@dataclass
class AGEM:
    """Project the gradient where it conflicts with the memory's.

    Args:
        capacity: rows kept; 0 keeps none, which is plain training.
        memory: reservoir | balanced.
        batch_size: rows of the reference gradient, per micro-batch; `None` takes the size of the new batch.
    """

    capacity: int = 500
    memory: str = "balanced"
    batch_size: int | None = None
    tasks: int = field(default=0, init=False)
    projected: int = field(default=0, init=False)
    kept: ReservoirMemory | BalancedMemory = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise Mistake("agem.memory", f"unknown memory '{self.memory}'", nearest(self.memory, MEMORIES))
        if self.batch_size is not None and self.batch_size < 1:
            raise Mistake("agem.batch_size", f"is {self.batch_size}", "give 1 or more, or nothing for the size of the new batch")
        if self.capacity < 0:
            raise Mistake("agem.capacity", f"is {self.capacity}", "give 0 (off) or more rows")
        self.kept = make_memory(self.memory, self.capacity, 0)

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the new rows with projected gradients, then put them into the memory."""
        if self.kept.seen == 0:
            self.kept = make_memory(self.memory, self.capacity, derive(trainer.seed, "kept"))
        new = trainer.batches(task.train, task.kind)
        old = Draws(self.kept, self.batch_size or new.size, seed=derive(trainer.seed, "memory"))
        self.projected = 0

        def project(model: nn.Module, step: Step) -> None:
            if "old" in step.batches[0]:
                self.projected += project_gradients(model, reference_gradient(model, step, trainer))

        model = trainer.fit(model, Zip(new=new, old=old), new_nll, steps=trainer.steps_for(new), after_backward=project)
        for batch in trainer.batches(task.train, task.kind, size=256, shuffle=False):  # one cut for every batch size: it orders the slots
            self.kept.add(batch, group=groups(batch, self.tasks))
        self.tasks += 1
        trainer.note("memory", {"rows": len(self.kept), "bytes": self.kept.bytes, "steps projected": self.projected})
        return model

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove the kept rows that equal a forget row; return their number."""
        return self.kept.erase(request, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, the number of tasks learned, and how many steps of the running one were projected."""
        return {"tasks": self.tasks, "projected": self.projected, "kept": self.kept.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.tasks, self.projected = state["tasks"], state["projected"]
        self.kept.load_state_dict(state["kept"])


def new_nll(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of the new rows alone."""
    return nll(model, batch["new"])


def reference_gradient(model: nn.Module, step: Step, trainer: Trainer) -> dict[str, Tensor]:
    """Return the mean gradient of the loss on the step's old rows, over all its micro-batches and processes."""
    return trainer.gradient(model, nll, *(batch["old"] for batch in step.batches))


def project_gradients(model: nn.Module, reference: dict[str, Tensor]) -> bool:
    """Replace the gradients of the model by their projection (equation 11); return whether they conflicted with the reference."""
    named = dict(model.named_parameters())
    gradient = {name: torch.zeros_like(grad) if (own := named[name].grad) is None else own for name, grad in reference.items()}
    found = agem_project_named(gradient, reference)
    for name, grad in found.items():
        named[name].grad = grad
    return any(found[name] is not gradient[name] for name in found)
