"""Relearning attack: fine-tune a copy on a part of the forget rows, and see how fast they come back, beside a model that never knew them.

Half of the rows are shown to it (`relearn_share`), the others are watched: rows that come back without being shown were never gone (Hu et
al. 2024, arXiv 2406.13356). The curve is the mean probability exp(-NLL) behind so many optimizer steps; a finding is the area under it,
divided by the steps, from 0 to 1, up to the step by which the reference has come half way to what the original knew: later every model has
learned the rows. The attack trains every weight with AdamW at a constant rate, in the same order for every model. It is held against the
attack on the oracle; without one against the original that learns holdout rows, which it never saw. Cost: `relearn_steps` steps, a fp32
copy of the model and AdamW's state, and one forward pass over the rows per point, twice.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from remanence.errors import Mistake, nearest
from remanence.forget.audit.case import Case
from remanence.forget.audit.report import Curve
from remanence.models.forward import is_language_model, unwrapped
from remanence.seeds import derive, numpy_generator
from remanence.training.trainer import Settings, Step, Trainer

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Relearned:
    """Each row's probability behind so many steps, of the rows that were shown and of those that were only watched."""

    steps: tuple[int, ...]
    shown: Float[np.ndarray, "P N"]
    watched: Float[np.ndarray, "P M"]


def attack_by_relearning(case: Case) -> None:
    """Add the areas under the curves, and the curves."""
    found: dict[tuple[str, str], Relearned] = {}

    def relearned(who: str, part: str) -> Relearned:
        if (who, part) not in found:
            found[who, part] = relearn(case, case.models[who], case.sets[part])
        return found[who, part]

    ceiling = float(case.probability("original", "forget").mean()) if "original" in case.models else 1.0
    other = ("oracle", "forget") if "oracle" in case.models else ("original", "holdout")
    there = other[0] in case.models and other[1] in case.sets
    whose = {
        ("model", "forget"): "the audited model",
        ("oracle", "forget"): "the oracle",
        ("original", "holdout"): "the original, on the holdout",
    }
    for side in ("shown", "watched"):
        if side == "watched" and not relearned("model", "forget").watched.shape[1]:
            case.skipped["relearning/watched"] = "one row cannot be shared out"
            continue
        until = half_way(getattr(relearned(*other), side).mean(1), ceiling) if there else len(relearned("model", "forget").steps) - 1

        def measure(who: str, part: str, side: str = side, until: int = until) -> Float[np.ndarray, " N"]:
            one = relearned(who, part)
            return area(one.steps[: until + 1], getattr(one, side)[: until + 1])

        case.compare(f"relearning/{side}", "robustness", measure, original=case.probability)
        for key in (key for key in whose if key in found):
            one, values = found[key], getattr(found[key], side)
            if values.shape[1]:
                case.curves.append(Curve(f"relearning/{side}", whose[key], one.steps, tuple(values.mean(1).tolist())))
    if not there:
        case.skipped["relearning reference"] = (
            "there is neither an oracle, nor an original with a holdout: the curve has nothing to be compared with"
        )


def relearn(case: Case, model: nn.Module, rows: Dataset) -> Relearned:
    """Attack a copy of a model."""
    settings = case.settings
    first, second = shared_out(groups_of(rows, settings.relearn_together), settings.relearn_share, case.seed)
    options = Settings(
        steps=settings.relearn_steps,
        batch_size=settings.relearn_batch,
        lr=settings.relearn_lr or attack_rate(model),
        length=settings.length,
        template=settings.template,
        log_every=max(1, settings.relearn_steps),
    )
    trainer = Trainer(options, processor=case.processor, seed=derive(case.seed, "relearning"), name="relearning", progress=False)
    twin = copy.deepcopy(model).requires_grad_(True)
    if next(twin.parameters()).dtype in (torch.float16, torch.bfloat16):
        twin = twin.float()  # small steps would be rounded away
    shown, watched = (case.encode(rows.select(part)) if len(part) else None for part in (first, second))
    points = sorted({0, settings.relearn_steps, *(step for step in settings.relearn_points if step < settings.relearn_steps)})
    curves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def look(model: nn.Module) -> None:
        for curve, part in zip(curves, (shown, watched)):
            curve.append(np.exp(-case.nll(model, part)) if part is not None else np.zeros(0))

    def after(model: nn.Module, step: Step) -> None:
        if step.number + 1 in points:
            look(model)
        case.tick(f"relearning, step {step.number + 1}")

    look(twin.to(trainer.accelerator.device))
    trainer.fit(twin, trainer.batches(rows.select(first), case.kind, stream="forget"), after_step=after)
    return Relearned(tuple(points), np.stack(curves[0]), np.stack(curves[1]))


def groups_of(rows: Dataset, column: str | None) -> Int[np.ndarray, " N"]:
    """Return the number of the group that each row belongs to: rows of one value in the column, or each its own.

    Raises:
        Mistake: there is no such column.
    """
    if column is None:
        return np.arange(len(rows))
    if column not in rows.column_names:
        raise Mistake("audit.relearn_together", f"there is no column '{column}'", nearest(column, rows.column_names))
    return np.unique(np.array(list(map(str, rows.with_format(None)[column]))), return_inverse=True)[1]


def shared_out(group: Int[np.ndarray, " N"], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows that are shown (at least one group) and of those that are watched, at random by groups."""
    count = int(group.max()) + 1
    order = numpy_generator(seed, "audit", "relearning").permutation(count)
    chosen = np.isin(group, order[: min(max(1, round(share * count)), count)])
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def half_way(curve: Float[np.ndarray, " P"], ceiling: float) -> int:
    """Return the number of the first point behind the start at which a curve has come half way from there to a ceiling; else the last one."""
    back = np.flatnonzero(curve[1:] >= (curve[0] + max(ceiling, curve[0])) / 2)
    return int(back[0]) + 1 if len(back) else len(curve) - 1


def attack_rate(model: nn.Module) -> float:
    """Return 0.1 / width, at most 1e-3: 1e-3 for desk models and classifiers, 2e-5 for a width of 4096."""
    if not is_language_model(model):
        return 1e-3
    return min(1e-3, 0.1 / unwrapped(model).config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def area(steps: tuple[int, ...], values: Float[np.ndarray, "P N"]) -> Float[np.ndarray, " N"]:
    """Return the mean of each row's curve over the steps, by the trapezoid rule; without steps its only value."""
    if steps[-1] == 0:
        return values[0]
    return np.trapezoid(values, steps, axis=0) / steps[-1]
