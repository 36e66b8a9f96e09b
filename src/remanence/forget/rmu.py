r"""Representation misdirection: on the forget rows, push the hidden states of one block towards a fixed random vector; on the retain rows, hold them.

The layers above read noise where they read the knowledge before. Only a few matrices at and below that block move, and nothing above it is computed, neither
forward nor backward. It leaves answers garbled rather than absent, and what the lower layers know may come back by fine-tuning.

Paper: Li et al. 2024, "The WMDP Benchmark: Measuring and Reducing Malicious Use with Unlearning", arXiv 2403.03218, section 4.
Objective: L = gamma mean \|h_l(x_f) - c u\|^2 / D + alpha mean \|h_l(x_r) - h_l0(x_r)\|^2 / D.

| paper | here | shape | default |
|---|---|---|---|
| l, the block whose output is steered | layer: a number, or a module's name | | round(7 L / 32): 7 of 32 |
| the layers that are updated | layers (l - layers + 1 .. l) and update (roles), or parameters (a pattern) | names | 3, down |
| u, uniform on [0, 1)^D, normalised, fixed | `direction` | (D,) | |
| c | c | scalar | 2 |
| alpha (1200 with c 6.5 for Zephyr-7B) | alpha | scalar | 1 |
| M_frozen | `frozen_copy`, of the updated matrices alone | a model | |
| (ours) which tokens count | positions: all (every token of the row), answer (those that predict a supervised token) | name | all |

Differs from the paper: squared distances are divided by D, as in the released code; each row counts with the mean over its own tokens, padding never.
Defaults of c and alpha are those of the common re-implementation. Under LoRA the adapters of the updated matrices move.
Steps and rate are the trainer's; an epoch is a pass over the forget rows. Cost per step: three forward passes and two backward ones through l + 1 of L
blocks, without the head; memory: a copy of the updated matrices.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake, nearest
from remanence.models.forward import is_language_model
from remanence.models.roles import ROLES, blocks, pick
from remanence.models.taps import output_of
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.processes import is_sharded
from remanence.training.reference import frozen_copy
from remanence.training.requests import check_terms, retain_of
from remanence.training.trainer import Trainer

POSITIONS = ("all", "answer")


@dataclass(frozen=True)
class RMU:
    """Steer a block's output to a random direction on the forget rows, hold it on the retain rows.

    Args:
        layer: number of the block whose output is steered, from 0, or a module's name; `None` takes round(7 L / 32).
        layers: how many blocks are updated: that one and those right below it.
        update: roles of the matrices that are updated in these blocks.
        parameters: regular expression that an updated parameter's name must match (anywhere), instead of `layers` and `update`.
        c: length of the target vector.
        gamma: weight of the forget term.
        alpha: weight of the retain term; at 0 no retain rows are needed.
        positions: tokens of a row that count: all | answer.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    layer: int | str | None = None
    layers: int = 3
    update: tuple[str, ...] = ("down",)
    parameters: str | None = None
    c: float = 2.0
    gamma: float = 1.0
    alpha: float = 1.0
    positions: str = "all"

    def __post_init__(self) -> None:
        check_terms("rmu", self.gamma, self.alpha)
        if not 0 <= self.c < math.inf:
            raise Mistake("rmu.c", f"must be 0 or more, and finite, got {self.c!r}", "correct the value")
        if self.layers < 1:
            raise Mistake("rmu.layers", f"must be 1 or more, got {self.layers!r}", "correct the value")
        if self.positions not in POSITIONS:
            raise Mistake("rmu.positions", f"unknown value {self.positions!r}", nearest(self.positions, POSITIONS))
        stranger = next((role for role in self.update if role not in ROLES), None)
        if stranger is not None:
            raise Mistake("rmu.update", f"unknown role '{stranger}'", nearest(stranger, ROLES))
        try:
            re.compile(self.parameters or "")
        except re.error as error:
            raise Mistake("rmu.parameters", f"is not a regular expression ({error})", "correct the pattern") from error

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma L_forget + alpha L_retain over the updated parameters for the trainer's steps.

        Raises:
            Mistake: not a language model, no such block, nothing to update, or no retain rows.
        """
        if not is_language_model(model):
            raise Mistake("rmu", f"{type(model).__name__} is not a language model, whose hidden states it steers", "choose another method")
        block, above = steered(model, self.layer)
        names = updated(model, block, self.layers, self.update, self.parameters)
        above = None if is_sharded(model) else above  # a sharded model must run to its end
        retain = trainer.batches(retain_of(request, "RMU"), request.kind, stream="retain") if self.alpha else None
        forget = trainer.batches(request.forget, request.kind, stream="forget")
        pairs = trainer.pairs(forget, retain)
        model.to(trainer.accelerator.device)
        reference = frozen_copy(model, names).to(trainer.accelerator.device) if retain is not None else model
        width = width_of(model, block, forget[0].to(trainer.accelerator.device), above)
        target = self.c * direction(width, trainer.generator("rmu", "direction")).to(trainer.accelerator.device)

        def distance(model: nn.Module, rows: Batch, goal: Tensor) -> Tensor:
            hidden = output_of(model, rows, block, before=above)
            return row_distance(hidden, goal, counted(rows["labels"], self.positions)).sum() / rows.rows

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = self.gamma * distance(model, batch["forget"], target)
            if retain is None:
                return value
            with torch.no_grad():
                before = output_of(reference, batch["retain"], block, before=above)
            return value + self.alpha * distance(model, batch["retain"], before)

        trainer.note("rmu", {"request": request.name, "block": block, "updated": names})
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs), parameters=names)


def steered(model: nn.Module, layer: int | str | None) -> tuple[str, str | None]:
    """Return the name of the module whose output is steered, and that of the block which runs next (`None`: unknown, or there is none).

    Raises:
        Mistake: there is no such block.
    """
    if isinstance(layer, str):
        return layer, None  # checked by the tap
    known = blocks(model)
    number = int(7 * len(known) / 32 + 0.5) if layer is None else layer
    if not 0 <= number < len(known):
        raise Mistake("rmu.layer", f"there is no layer {number}", f"the model has layers 0 to {len(known) - 1}")
    return known[number], known[number + 1] if number + 1 < len(known) else None


def updated(model: nn.Module, block: str, layers: int, roles: tuple[str, ...], pattern: str | None) -> list[str]:
    """Return the names of the parameters that move: those the pattern matches, or matrices of the roles in the block and the `layers` - 1 below it.

    Raises:
        Mistake: there are none that require a gradient.
    """
    free = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if pattern is not None:
        names = [name for name, _ in model.named_parameters() if name in free and re.search(pattern, name)]
    else:
        known = blocks(model)
        if block not in known:
            raise Mistake("rmu.parameters", f"'{block}' is no block, so the layers below it are not known", "name the parameters to update")
        last = known.index(block)
        chosen = pick(model, roles, layers=range(max(0, last - layers + 1), last + 1), kind="weight")
        names = [weight.name for weight in chosen if weight.name in free]
    if not names:
        what = f"matches {pattern!r}" if pattern is not None else f"plays a role among {', '.join(roles)} there"
        raise Mistake("rmu", f"no parameter that requires a gradient {what}", "free some, or name others")
    return names


def width_of(model: nn.Module, block: str, batch: Batch, above: str | None) -> int:
    """Return D, the width of the block's output, by running one row."""
    row = Batch({name: value[:1] for name, value in batch.items()})
    with torch.no_grad():
        return output_of(model, row, block, before=above).shape[-1]


def direction(width: int, chance: torch.Generator) -> Float[Tensor, "D"]:
    """Return u: uniform on [0, 1)^D, normalised to length 1 (section 4 of the paper)."""
    drawn = torch.rand(width, generator=chance)
    return drawn / drawn.norm()


def counted(labels: Int[Tensor, "B T"], positions: str) -> Bool[Tensor, "B T"]:
    """Say which tokens count: all up to a row's last supervised one (what follows is padding), or those that predict a supervised one."""
    supervised = labels != IGNORED
    if positions == "answer":
        return F.pad(supervised[:, 1:], (0, 1))
    return supervised.flip(1).cumsum(1).flip(1) > 0


def row_distance(
    hidden: Float[Tensor, "B T D"], goal: Float[Tensor, "D"] | Float[Tensor, "B T D"], inside: Bool[Tensor, "B T"]
) -> Float[Tensor, "B"]:
    """Return each row's mean over its counted tokens of ||h_t - goal||^2 / D (the terms L_forget and L_retain), at least in fp32."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    squares = (wide - goal.to(wide.dtype)).square().mean(-1)  # (B, T)
    return (squares * inside).sum(1) / inside.sum(1).clamp(min=1)
