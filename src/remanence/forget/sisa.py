r"""SISA: learn in shards and slices with checkpoints, so that a row can be taken out exactly by training a part of one shard again.

Each row belongs to one of S shards and, inside it, to one of R slices. A model per shard learns slice after slice (the rows so far, together), and its weights
before each slice are kept. Forgetting a row goes back, in its shard alone, to the weights from before its slice and trains on without it; the answer is the
mean of the models' probabilities. What results is what training without the row gives, bit for bit: a guarantee, not an approximation.

Paper: Bourtoule et al. 2019, "Machine Unlearning", arXiv 1912.03817 (IEEE S&P 2021), section 4.
Objective: theta_k = argmin NLL(D_k minus D_f), k = 1..S, along the paper's slicing.

| paper | here | shape | default |
|---|---|---|---|
| S shards, R slices | shards, slices | | 5, 5 |
| D_k, D_{k,r} | `places`: a hash of (seed, row) names shard and slice | (N, 2) | seed 0 |
| e_r epochs of slice r | `slice_share` of the trainer's: 2 / (R + 1) of the epochs (the same passes over each row in all), 1 / R of the steps | | |
| checkpoint before D_{k,r} | points: the trained parameters and the buffers | S x R models per task | |
| aggregation | `mean_of` probabilities (the paper: votes or means) | (B, V) | |

It is a learner and a forgetter: `learn: {method: sisa}` and `forget: {method: sisa}` with the same keys are one object. Every task is learned behind the
earlier ones, and a request goes back to the first slice, of any task, that holds one of its rows. All members start from the model that is given.
Differs from the paper: rows are placed by a hash, so that where a row goes depends on no other row, and shards are only about equally large. Members without
a row do not count in the mean. Rows come from the trainer's history. Cost: training, about that of one model (each shard has 1/S of the rows); answering, S
forward passes; a request for one row, about 1/S of training, less with slices; memory: S models, and S x R per task in its state. Utility falls with S, as
each member sees little; facts that stand in one row only are known to one member of S.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.ensemble import Ensemble, ensemble_of
from remanence.seeds import derive
from remanence.stream import Request, Task, keys_of
from remanence.training.batches import Batches
from remanence.training.trainer import Settings, Trainer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class SISA:
    """Learn in shards and slices; forget exactly by training a part of the shards again.

    Args:
        shards: models, each with its share of the rows.
        slices: parts of a shard that are learned one after another, with a checkpoint before each.
        seed: of the rows' places.

    Raises:
        Mistake: a number below 1.
    """

    shards: int = 5
    slices: int = 5
    seed: int = 0
    tasks: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    points: list[list[dict[str, Tensor]]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("shards", "slices"):
            if getattr(self, name) < 1:
                raise Mistake(f"sisa.{name}", f"must be 1 or more, got {getattr(self, name)!r}", "correct the value")

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Teach every member its share of the task, slice after slice; the first task makes an ensemble of the model.

        Raises:
            Mistake: the model has an adapter, or is another ensemble.
        """
        ensemble: Any = model
        if not isinstance(model, Ensemble):
            ensemble = ensemble_of(model, self.shards)
            ensemble.rows.zero_()
            self.tasks, self.points = [], []
        self._check(ensemble)
        self.tasks.append({"name": task.name, "kind": task.kind, "seed": trainer.seed, "settings": asdict(trainer.settings)})
        self.points = self.points or [[] for _ in range(self.shards)]
        first = (len(self.tasks) - 1) * self.slices
        for shard in range(self.shards):
            self._train(ensemble, shard, first, {task.name: task.train}, trainer)
        count_rows(ensemble, places(keys_of(task.train, task.kind), self.seed, self.shards, self.slices))
        return ensemble

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Take each shard that holds a forget row back to before that row, and train it on without the rows.

        Raises:
            Mistake: the model was not taught by this object, or a forget row was learned otherwise.
        """
        if not isinstance(model, Ensemble) or not self.tasks:
            remedy = "learn with the method 'sisa' in the same life, with the same keys"
            raise Mistake("sisa", "the model was not taught by SISA, so nothing can be taken out of it exactly", remedy)
        self._check(model)
        rows, firsts = self._remaining(request, trainer.history)
        trained = 0
        for shard, first in enumerate(firsts):
            if first is not None:
                trained += self._train(model, shard, first, rows, trainer)
        model.rows.zero_()
        for task in self.tasks:
            if task["name"] in rows:
                count_rows(model, places(keys_of(rows[task["name"]], task["kind"]), self.seed, self.shards, self.slices))
        touched = [shard for shard, first in enumerate(firsts) if first is not None]
        if not touched:
            warnings.warn(f"request '{request.name}': no row that SISA learned equals a forget row", stacklevel=2)
        stages = self.shards * self.slices * len(self.tasks)
        trainer.note("sisa", {"request": request.name, "shards": touched, "slices trained again": trained, "slices": stages})
        return model

    def _check(self, ensemble: Any) -> None:
        if len(ensemble.members) != self.shards or (self.points and len(self.points) != self.shards):
            raise Mistake("sisa.shards", f"is {self.shards}, the ensemble has {len(ensemble.members)} members", "give the same number")
        if not self.tasks and bool((ensemble.rows > 0).any()):
            raise Mistake("sisa", "the ensemble was taught by another SISA, whose checkpoints are not here", "learn in one life")

    def _remaining(self, request: Request, history: tuple[Task, ...]) -> tuple[dict[str, Dataset], list[int | None]]:
        """Return each learned task's rows without the forgotten ones, and for each shard the number of its first slice that loses a row."""
        gone = set(keys_of(request.forget, request.kind))
        known = {task["name"]: number for number, task in enumerate(self.tasks)}
        rows: dict[str, Dataset] = {}
        firsts: list[int | None] = [None] * self.shards
        for task in history:
            keys = keys_of(task.train, task.kind)
            lost = np.array([task.kind == request.kind and key in gone for key in keys], dtype=bool)
            if lost.any() and task.name not in known:
                problem = f"{int(lost.sum())} of its rows were learned in task '{task.name}', not by SISA"
                raise Mistake(f"request '{request.name}'", problem, "learn every task with the method 'sisa'")
            if task.name not in known:
                continue
            rows[task.name] = task.train.select(np.flatnonzero(~lost)) if lost.any() else task.train
            for shard, piece in places([key for key, out in zip(keys, lost) if out], self.seed, self.shards, self.slices).tolist():
                number, before = known[task.name] * self.slices + piece, firsts[shard]
                firsts[shard] = number if before is None else min(before, number)
        if not history:
            problem = "the trainer has no history, and SISA trains again on the rows that it learned"
            raise Mistake(f"request '{request.name}'", problem, "learn and forget in one life, or give Trainer(history=[...])")
        return rows, firsts

    def _train(self, ensemble: Ensemble, shard: int, first: int, rows: dict[str, Dataset], trainer: Trainer) -> int:
        """Train a member from slice `first` (over all tasks) on, from its checkpoint; return how many slices were trained."""
        member, done = ensemble.members[shard], 0
        if first < len(self.points[shard]):
            put_back(member, self.points[shard][first])
        kept = self.points[shard][:first]
        for number in range(first, len(self.tasks) * self.slices):
            kept = [*kept, snapshot(member)]
            self.points = [kept if each == shard else points for each, points in enumerate(self.points)]
            task, last = self.tasks[number // self.slices], number % self.slices
            if task["name"] not in rows:
                continue
            whole = rows[task["name"]]
            where = places(keys_of(whole, task["kind"]), self.seed, self.shards, self.slices)
            inside = np.flatnonzero((where[:, 0] == shard) & (where[:, 1] <= last))
            if len(inside):
                self._fit(member, whole.select(inside), task, (shard, last), trainer)
                kept, done = self.points[shard], done + 1
        return done

    def _fit(self, member: nn.Module, rows: Dataset, task: dict[str, Any], slice_: tuple[int, int], trainer: Trainer) -> None:
        """Train a member on the rows up to a slice, with the seeds and settings of the event that brought the task: a request trains as the task did."""
        seed, pad = derive(task["seed"], "sisa", *slice_), getattr(trainer.processor, "pad_token_id", None) or 0
        with trainer.settled(Settings(**task["settings"])):
            batches = Batches(trainer.encode(rows, task["kind"]), trainer.settings.batch_size, seed=derive(seed, "order"), pad=pad)
            steps = math.ceil(trainer.steps_for(batches) * slice_share(self.slices, trainer.settings.steps is None))
            trainer.fit(member, batches, steps=steps, noise=derive(seed, "noise"))

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, in order, and the weights before each slice."""
        return {"tasks": self.tasks, "points": self.points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.tasks, self.points = list(state["tasks"]), [list(points) for points in state["points"]]


def places(keys: list[Any], seed: int, shards: int, slices: int) -> np.ndarray:
    """Return (shard, slice) of each row, (N, 2), by a hash of the seed and the row's content alone (ours). O(N)."""
    drawn = np.array([derive(seed, "sisa", key) for key in keys], dtype=np.int64)
    return np.stack([drawn % shards, drawn // shards % slices], axis=1)


def slice_share(slices: int, epochs: bool) -> float:
    """Return the share of a training that each slice gets: 2 / (R + 1) of the epochs, so that sum_r e_r r / R = e (section 4.2); 1 / R of the steps."""
    return 2 / (slices + 1) if epochs else 1 / slices


def count_rows(ensemble: Ensemble, where: np.ndarray) -> None:
    """Add to each member's count the rows of its shard."""
    ensemble.rows += torch.from_numpy(np.bincount(where[:, 0], minlength=len(ensemble.members))).to(ensemble.rows)


def snapshot(member: nn.Module) -> dict[str, Tensor]:
    """Copy the trained parameters and the buffers to the CPU."""
    trained = {name for name, parameter in member.named_parameters() if parameter.requires_grad}
    trained |= {name for name, _ in member.named_buffers()}
    return {name: value.detach().to("cpu", copy=True) for name, value in member.state_dict().items() if name in trained}


def put_back(member: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put a snapshot back, in place."""
    member.load_state_dict(saved, strict=False)
