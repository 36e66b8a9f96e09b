"""Replay whose strength follows measured forgetting: where past rows are kept, and the controller that says how much they count.

From "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", Khadangi 2026, arXiv 2602.22479 (v3 and later). After each
measurement of the earlier tasks' probes,

    F = mean max(0, loss now - best loss so far);   err = F - F*;   I <- clip(I + err, 0, I_max);   lam = clip(lam_min + K_p err + K_i I, lam_min, lam_max)

The proportional-integral form is a public reading of the paper's version 5; constants are ours. I never leaves [0, I_max], so a long time below the target is
not paid back later (no wind-up).
Cost: nothing beside the measurement; the store keeps `ring + reservoir` rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.forward import unwrapped
from remanence.training.batches import Batch
from remanence.training.memory import FILL, ReservoirMemory, RingMemory

if TYPE_CHECKING:
    from remanence.stream import Request
    from remanence.training.trainer import Trainer


@runtime_checkable
class Bypassing(Protocol):
    """A model with side loops that replayed rows do not go through."""

    def bypass(self) -> contextlib.AbstractContextManager[None]: ...


@contextlib.contextmanager
def replaying(model: nn.Module) -> Iterator[None]:
    """Run replayed rows inside: a model with side loops takes them around these, any other model does nothing special."""
    core = unwrapped(model)
    with core.bypass() if isinstance(core, Bypassing) else contextlib.nullcontext():
        yield


@runtime_checkable
class Closing(Protocol):
    """A model with something to do behind a task (a memory whose entries are encoded anew)."""

    def after_task(self) -> int:
        """Do it; return how many entries changed."""
        ...


def task_ended(model: nn.Module, device: torch.device) -> int:
    """Let a model do on a device what it does behind a task; any other model does nothing."""
    core = unwrapped(model)
    return core.to(device).after_task() if isinstance(core, Closing) and isinstance(core, nn.Module) else 0


class ReplayStore:
    """Rows of the past: the newest ones (a ring), and a uniform sample of all (a reservoir).

    Rows are drawn uniformly over both together (see `training.batches.Draws`).

    Args:
        ring: newest rows kept.
        reservoir: rows of the sample.
        seed: of the sample.
    """

    def __init__(self, ring: int, reservoir: int, seed: int):
        self.ring, self.reservoir = RingMemory(ring, seed), ReservoirMemory(reservoir, seed)

    def __len__(self) -> int:
        return len(self.ring) + len(self.reservoir)

    @property
    def bytes(self) -> int:
        """The size of both."""
        return self.ring.bytes + self.reservoir.bytes

    def push(self, batch: Mapping[str, Tensor]) -> None:
        """Show rows to the store, behind the step that trained on them.

        Raises:
            Mistake: the rows hold neither ids nor features.
        """
        if "input_ids" not in batch and "pixel_values" not in batch:
            raise Mistake("replay store", f"the rows have no ids, only {', '.join(batch) or 'nothing'}", "give encoded rows")
        self.ring.add(batch)
        self.reservoir.add(batch)

    def take(self, rows: np.ndarray) -> Batch:
        """Return the rows of the given places: the ring's first, then the reservoir's."""
        near, far = rows[rows < len(self.ring)], rows[rows >= len(self.ring)] - len(self.ring)
        parts = [memory.take(chosen) for memory, chosen in ((self.ring, near), (self.reservoir, far)) if len(chosen)]
        return Batch({name: _stacked([part[name] for part in parts], name) for name in parts[0]})

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove what a request asks to forget; return the number of rows that went."""
        return self.ring.erase(request, trainer) + self.reservoir.erase(request, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return both, for `storage.save_tree`."""
        return {"ring": self.ring.state_dict(), "reservoir": self.reservoir.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.ring.load_state_dict(state["ring"])
        self.reservoir.load_state_dict(state["reservoir"])


@dataclass
class ForgettingController:
    """Say how much replayed rows count.

    Args:
        target: F*, forgetting that is accepted, in units of the probes' loss.
        kp: weight of the present error.
        ki: weight of its sum.
        i_max: bound of the sum.
        lam_min: least strength.
        lam_max: greatest strength.
    """

    target: float = 0.02
    kp: float = 2.0
    ki: float = 0.5
    i_max: float = 2.0
    lam_min: float = 0.05
    lam_max: float = 1.0
    best: dict[str, float] = field(default_factory=dict, init=False)
    integral: float = field(default=0.0, init=False)
    lam: float = field(default=0.0, init=False)
    forgetting: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.lam_min <= self.lam_max < math.inf:
            raise Mistake("controller", f"lam_min {self.lam_min} and lam_max {self.lam_max} are no range", "give 0 <= lam_min <= lam_max")
        if min(self.target, self.kp, self.ki, self.i_max) < 0:
            raise Mistake("controller", "target, kp, ki and i_max must be 0 or more", "correct the value")
        self.lam = self.lam_min

    def update(self, losses: Mapping[str, float], current: str | None = None) -> float:
        """Take the probes' losses, compare those of earlier tasks with their best, and return lam.

        Args:
            losses: by task.
            current: the task being learned, whose probe is only noted.
        """
        self.best |= {name: min(loss, self.best.get(name, math.inf)) for name, loss in losses.items()}
        earlier = [max(0.0, loss - self.best[name]) for name, loss in losses.items() if name != current]
        self.forgetting = float(np.mean(earlier)) if earlier else 0.0
        return self.follow(self.forgetting)

    def follow(self, forgetting: float) -> float:
        """Take a measurement of F and return lam."""
        error = forgetting - self.target
        self.integral = min(max(self.integral + error, 0.0), self.i_max)
        self.lam = min(max(self.lam_min + self.kp * error + self.ki * self.integral, self.lam_min), self.lam_max)
        return self.lam

    def state_dict(self) -> dict[str, Any]:
        """Return what changes."""
        return {"best": dict(self.best), "integral": self.integral, "lam": self.lam, "forgetting": self.forgetting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.integral, self.lam, self.forgetting = dict(state["best"]), state["integral"], state["lam"], state["forgetting"]


def _stacked(parts: list[Tensor], name: str) -> Tensor:
    """Return rows below each other, the narrower ones filled up as the memories do."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 2 and parts[0].shape[1] != parts[1].shape[1]:
        width = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=FILL.get(name, 0)) for part in parts]
    return torch.cat(parts)
