"""Elastic weight consolidation (EWC): pull every weight back to where the old tasks left it, in proportion to its Fisher information there.

"Overcoming catastrophic forgetting in neural networks", Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3; the online form is that of
"Progress & Compress", Schwarz et al. 2018, arXiv 1805.06370, section 4.

    L = l(x, y) + lam / 2  sum_k sum_i F_k,i (theta_i - theta*_k,i)^2

| paper | here | shape | default |
|---|---|---|---|
| lambda | `lam` | | 1 |
| gamma | `gamma`, online only: F <- gamma F + F_t | | 1 |
| F | `past[k]["fisher"]` | as the weights | |
| theta* | `past[k]["anchor"]`, the weights at the end of task k; online: of the last task | as the weights | |

`mode="separate"` keeps one pair (F, theta*) per task, "online" one in all. `definition` names the Fisher (see `training.fisher`): "sampled" draws labels from
the model (the true Fisher), "empirical" takes those of the data. lam means nothing without the scale of F: its trace is noted beside lam after every task.
Differs from the papers: a row of a language model counts as one observation, with the mean loss of its supervised tokens; at most `rows` rows are looked at.
Cost: plain training and, per task, one backward pass per row; two copies of the weights (per task where separate).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import ByName
from remanence.stream import Task
from remanence.training.batches import Batch
from remanence.training.fisher import DEFINITIONS, Fisher, diagonal_fisher
from remanence.training.losses import nll
from remanence.training.memory import with_mask
from remanence.training.processes import rank, sum_over_processes, world_size
from remanence.training.trainer import Trainer


@dataclass
class EWC:
    """Penalise the movement of weights that mattered.

    Args:
        lam: strength; 0 is plain training.
        mode: online | separate.
        gamma: share of the old Fisher that stays in online mode.
        definition: exact | sampled | empirical | batched | label_free.
        rows: rows of the task that the Fisher is estimated on; `None`: all.
    """

    lam: float = 1.0
    mode: str = "online"
    gamma: float = 1.0
    definition: str = "sampled"
    rows: int | None = None
    past: list[dict[str, dict[str, Tensor]]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.lam < float("inf"):
            raise Mistake("ewc.lam", f"is {self.lam}", "give 0 (off) or more")
        if not 0 <= self.gamma <= 1:
            raise Mistake("ewc.gamma", f"is {self.gamma}", "give a share from 0 to 1")
        if self.rows is not None and self.rows < 1:
            raise Mistake("ewc.rows", f"is {self.rows}", "give 1 or more, or nothing for all")
        for name, known in (("mode", ("online", "separate")), ("definition", DEFINITIONS)):
            if getattr(self, name) not in known:
                raise Mistake(f"ewc.{name}", f"unknown {name} '{getattr(self, name)}'", nearest(getattr(self, name), known))

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the task under the penalty, then take down its Fisher and the weights."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = nll(model, batch)
            for old in self.past:  # read at every step: a resume replaces it
                value = value + self.lam / 2 * quadratic(model, old["fisher"], old["anchor"])
            return value

        model = trainer.fit(model, trainer.batches(task.train, task.kind), loss)
        if self.lam:
            fisher = self._fisher(model, task, trainer)
            about = {"lam": self.lam, "trace": fisher.trace, "lam_trace": self.lam * fisher.trace}
            trainer.note("fisher", about | {"definition": fisher.definition, "row": fisher.row, "rows": fisher.count, "mode": self.mode})
            anchor = {name: value.detach().clone() for name, value in model.named_parameters() if name in fisher}
            if self.mode == "online" and self.past:
                fisher = decayed(self.past.pop()["fisher"], fisher, self.gamma)  # type: ignore[assignment]
            self.past.append({"fisher": dict(fisher), "anchor": anchor})
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the pairs of Fisher and weights."""
        return {"past": self.past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.past = [{kind: dict(values) for kind, values in old.items()} for old in state["past"]]

    def _fisher(self, model: nn.Module, task: Task, trainer: Trainer) -> Fisher:
        """Estimate the Fisher on rows in a drawn order; each process takes its share of the batches."""
        rows = task.train
        if self.rows is not None and self.rows < len(rows):
            rows = rows.select(torch.randperm(len(rows), generator=trainer.generator("fisher rows"))[: self.rows].tolist())
        mine = islice(trainer.batches(rows, task.kind, shuffle=False), rank(), None, world_size())
        batches = map(with_mask, mine)  # without a mask some families look for padding in the ids, which vmap cannot do
        generator = trainer.generator("fisher labels", rank())
        reduce_sum = sum_over_processes if world_size() > 1 else None
        found = diagonal_fisher(ByName(model), batches, definition=self.definition, generator=generator, reduce_sum=reduce_sum)
        plain = {name.removeprefix("model."): value for name, value in found.items()}
        return Fisher(plain, definition=found.definition, row=found.row, reduce=found.reduce, count=found.count)


def quadratic(model: nn.Module, fisher: dict[str, Tensor], anchor: dict[str, Tensor]) -> Tensor:
    """Return sum_i F_i (theta_i - theta*_i)^2; its gradient is 2 F (theta - theta*). What is given is moved to the model's device, once."""
    parts = []
    for name, parameter in model.named_parameters():
        if name in fisher:
            if fisher[name].device != parameter.device:
                fisher[name], anchor[name] = fisher[name].to(parameter.device), anchor[name].to(parameter.device)
            parts.append((fisher[name] * (parameter - anchor[name]).square()).sum())
    return torch.stack(parts).sum() if parts else torch.zeros(())


def decayed(old: dict[str, Tensor], new: dict[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """Return gamma F + F_t; a weight that only one of them knows keeps what it has."""
    faded = {name: gamma * value for name, value in old.items()}
    return faded | {name: value + faded[name].to(value.device) if name in faded else value for name, value in new.items()}
