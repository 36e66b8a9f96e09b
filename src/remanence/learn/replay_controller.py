"""Replay whose strength a controller raises when measured forgetting rises; for any model, with or without side loops.

The learner of "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", Khadangi 2026, arXiv 2602.22479 (v3 and later):

    L = mean over the stream's batch of l(x) + lam * mean over a batch of past rows of l(x)      (lam by `training.replay_control.ForgettingController`)

| paper | here | default |
|---|---|---|
| ring, reservoir | `ring`, `reservoir`, in rows | 256, 2048 |
| replay batch | `share` of the stream's batch | 0.25 |
| F*, K_p, K_i, I_max, lam_min, lam_max | `target`, `kp`, `ki`, `i_max`, `lam_min`, `lam_max` | 0.02, 2, 0.5, 2, 0.05, 1 |
| steps between measurements | `every`, counted over tasks | 500 |
| probes | the first `probe_rows` test rows of every task so far | 64 |

Around TRC2 this is the paper's training; around any other model it is the control that TRC2 must be held against: the same replay at the same budget.
Past rows go around a model's side loops (`replaying`). Rows enter the store behind the step that first trains on them, so a step never replays itself.
Behind a task the model may bring its memory up to date (`task_ended`; TRC2 with `slot_span`).

Differs from the paper: everything but the parts' names is ours (only its abstract and page were read). A task without test rows is probed on its training rows.
Cost: 1 + `share` times plain training, and every `every` steps a forward pass over `probe_rows` rows per task.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.forward import evaluating
from remanence.seeds import derive
from remanence.stream import Request, Task, keys_of
from remanence.training.batches import Batch, Draws, Zip
from remanence.training.losses import nll
from remanence.training.memory import ReservoirMemory
from remanence.training.replay_control import ForgettingController, ReplayStore, replaying, task_ended
from remanence.training.trainer import Step, Trainer


@dataclass
class ControlledReplay:
    """Replay past rows as strongly as forgetting asks for.

    Args:
        ring: newest rows kept.
        reservoir: rows of the uniform sample of all.
        share: rows replayed per row of the stream.
        every: steps between two measurements.
        probe_rows: test rows of each task that are measured.
        target: forgetting that is accepted, nats.
        kp: weight of the present error.
        ki: weight of the summed error.
        i_max: bound of the sum.
        lam_min: least strength of replay.
        lam_max: greatest strength; 0 is plain training.
    """

    ring: int = 256
    reservoir: int = 2048
    share: float = 0.25
    every: int = 500
    probe_rows: int = 64
    target: float = 0.02
    kp: float = 2.0
    ki: float = 0.5
    i_max: float = 2.0
    lam_min: float = 0.05
    lam_max: float = 1.0
    steps: int = field(default=0, init=False)
    store: ReplayStore = field(init=False, repr=False)
    controller: ForgettingController = field(init=False, repr=False)
    probes: dict[str, ReservoirMemory] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("ring", 0), ("reservoir", 0), ("every", 1), ("probe_rows", 1)):
            if getattr(self, name) < least:
                raise Mistake(f"replay-controller.{name}", f"is {getattr(self, name)}", f"give {least} or more")
        if not self.share > 0:
            raise Mistake("replay-controller.share", f"is {self.share}", "give a positive share, or lam_max: 0 for no replay")
        self.store = ReplayStore(self.ring, self.reservoir, 0)
        self.controller = ForgettingController(self.target, self.kp, self.ki, self.i_max, min(self.lam_min, self.lam_max), self.lam_max)

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the stream's rows and past ones together; measure earlier tasks on the way and set the strength."""
        if task.test is not None and not set(keys_of(task.test, task.kind)).isdisjoint(keys_of(task.train, task.kind)):
            raise Mistake(
                f"task '{task.name}'", "test rows are among the training rows, so the probe would not see forgetting", "split them"
            )
        if self.steps == 0 and self.store.reservoir.seen == 0:
            self.store = ReplayStore(self.ring, self.reservoir, derive(trainer.seed, "kept"))
        new = trainer.batches(task.train, task.kind)
        measured = trainer.batches(task.measured, task.kind, shuffle=False)
        if task.name not in self.probes:
            self.probes[task.name] = ReservoirMemory(self.probe_rows, 0)
            self.probes[task.name].add(measured.take(np.arange(min(self.probe_rows, measured.count))))
        old = Draws(self.store, max(1, round(self.share * new.size)), seed=derive(trainer.seed, "memory"))
        curve: list[dict[str, Any]] = []

        def weighed(model: nn.Module, batch: Batch) -> Tensor:
            loss = nll(model, batch["new"])
            if "old" not in batch or self.controller.lam == 0:
                return loss
            with replaying(model):
                return loss + self.controller.lam * nll(model, batch["old"])

        def behind(model: nn.Module, step: Step) -> None:
            rows = trainer.first_seen(new, step)
            if len(rows) and len(self):
                self.store.push(new.take(rows))
            self.steps += 1
            if self.steps % self.every == 0:
                losses = {name: probe_loss(model, probe, new.size) for name, probe in self.probes.items() if len(probe)}
                self.controller.update(losses, task.name)
                curve.append({"step": self.steps, "lam": self.controller.lam, "forgetting": self.controller.forgetting} | losses)

        model = trainer.fit(model, Zip(new=new, old=old), weighed, steps=trainer.steps_for(new), after_step=behind)
        refreshed = task_ended(model, trainer.accelerator.device)
        found = {"task": task.name, "curve": curve, "rows": len(self.store), "bytes": self.store.bytes}
        trainer.note("forgetting", found | ({"refreshed": refreshed} if refreshed else {}))
        return model

    def __len__(self) -> int:
        return self.ring + self.reservoir

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove the kept rows that equal a forget row, from probes too; return their number. (A model's own memory is asked by `Life`.)"""
        return self.store.erase(request, trainer) + sum(probe.erase(request, trainer) for probe in self.probes.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the store, the controller and the probes."""
        probes = {name: probe.state_dict() for name, probe in self.probes.items()}
        return {"steps": self.steps, "store": self.store.state_dict(), "controller": self.controller.state_dict(), "probes": probes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.steps = state["steps"]
        self.store.load_state_dict(state["store"])
        self.controller.load_state_dict(state["controller"])
        self.probes = {name: ReservoirMemory(self.probe_rows, 0) for name in state["probes"]}
        for name, probe in self.probes.items():
            probe.load_state_dict(state["probes"][name])


def probe_loss(model: nn.Module, probe: ReservoirMemory, size: int) -> float:
    """Return the mean loss of a probe's rows, the model being left as it was."""
    device = next(model.parameters()).device
    total, weight = 0.0, 0.0
    with evaluating(model):
        for first in range(0, len(probe), size):
            batch = Batch(probe.rows(torch.arange(first, min(first + size, len(probe))))).to(device)
            counts = batch.own_tokens()
            total, weight = total + float(nll(model, batch)) * counts, weight + counts
    return total / max(weight, 1.0)
