"""What the formulas of the field (metrics.py, curve_metrics.py) ask of a matrix of scores: its shape, its holes, its sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from remanence.errors import Mistake, nearest

Direction = Literal["higher", "lower"]
Matrix = Float[np.ndarray, "N T"] | Float[Tensor, "N T"] | Sequence[Sequence[float]]
Vector = Float[np.ndarray, " T"] | Float[Tensor, " T"] | Sequence[float]
SIGN = {"higher": 1.0, "lower": -1.0}


def array(values: Any) -> np.ndarray:
    """Return values as an fp64 numpy array; tensors of any precision and device."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def table(place: str, a: Matrix) -> Float[np.ndarray, "N T"]:
    """Return a as an fp64 array, refusing anything but a non-empty matrix."""
    try:
        a = array(a)
    except (TypeError, ValueError) as error:
        raise Mistake(
            place, f"the scores are not a matrix of numbers ({error})", "give rows of equal length, NaN where nothing was measured"
        ) from error
    if a.ndim != 2 or 0 in a.shape:
        raise Mistake(place, f"the scores have shape {a.shape}", "give a matrix with one row per event and one column per task")
    return a


def square(place: str, a: Matrix, after: int | None, turn: float = 1.0, least: int = 1) -> tuple[Float[np.ndarray, "N T"], int]:
    """Return (turn * a, t) for a (T+1, T) matrix, refusing other shapes and t outside least..T."""
    a = table(place, a)
    rows, tasks = a.shape
    if rows != tasks + 1:
        raise Mistake(
            place, f"the scores have {rows} rows and {tasks} columns", f"give the start model's row and one per task, {tasks + 1} in all"
        )
    t = stage(place, after, tasks)
    if t < least:
        raise Mistake(place, f"is not defined after {t} task", f"give at least {least} tasks")
    return turn * a, t


def stage(place: str, after: int | None, last: int) -> int:
    """Return `after`, by default the last event, refusing what is not in 1..last."""
    if after is None:
        return last
    if not 1 <= after <= last:
        raise Mistake(place, f"after={after} is outside 1..{last}", "name an event of the matrix, counted from 1")
    return after


def learned(a: Float[np.ndarray, "N T"], t: int) -> Float[np.ndarray, " t"]:
    """Return a[j, j] for j = 1..t."""
    return np.diagonal(a[1:])[:t]


def whole(place: str, needed: np.ndarray) -> np.ndarray:
    """Return the entries as they are, refusing holes."""
    holes = int(np.isnan(needed).sum())
    if holes:
        raise Mistake(
            place,
            f"{holes} of the {needed.size} entries that it reads were not measured",
            "measure every learned task after every event, or choose another metric",
        )
    return needed


def vector(place: str, name: str, values: Vector, size: int) -> Float[np.ndarray, " T"]:
    """Return values as an fp64 vector of the given size."""
    values = array(values)
    if values.shape != (size,):
        raise Mistake(place, f"`{name}` has shape {values.shape}", f"give one score per task, {size} in all")
    return values


def option(place: str, name: str, value: str, known: Sequence[str]) -> None:
    """Refuse an option that is not known."""
    if value not in known:
        raise Mistake(place, f"unknown {name} '{value}'", nearest(str(value), known))


def sign(place: str, direction: str) -> float:
    """Return 1 for scores that are better when higher, -1 when lower."""
    option(place, "direction", direction, tuple(SIGN))
    return SIGN[direction]


def ratio(place: str, now: Any, reference: Any, turn: float) -> Any:
    """Return now / reference, or its reciprocal for losses, refusing a zero denominator."""
    upper, lower = (now, reference) if turn > 0 else (reference, now)
    if np.any(np.asarray(lower) == 0):
        raise Mistake(place, "a score that it divides by is 0", "report the difference (forgetting, backward_transfer) instead")
    return upper / lower
