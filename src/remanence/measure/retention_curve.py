"""Forgetting along a run, not only at its end: how far each task stands behind its best, and the area under that curve (AUFC).

"Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", Khadangi 2026, arXiv 2602.22479 (metric definitions of version 1):

    F_n = mean over tasks j whose training has ended of  max(0, now - best so far)  (losses; max(0, best so far - now) for scores)
    AUFC = area under F by the trapezoid rule / (last step - first step)

The paper does not state how its area is normalised; divided by the span it has the unit of the metric and does not grow with the run. Give log-perplexity
(nats), not perplexity: a perplexity of thousands on one task would be all of the area.
Cost: O(N T) for N evaluations of T tasks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from remanence.errors import Mistake
from remanence.measure.score_matrix import Direction, Matrix, Vector, array, sign, table, whole
from remanence.storage import write_text


def forgetting_curve(curve: Matrix, steps: Vector, ended: Sequence[float], *, direction: Direction = "lower") -> Float[np.ndarray, " N"]:
    """Return F_n at each evaluation: the mean shortfall from the best so far of the tasks whose training ended at or before it; 0 where none has.

    Args:
        curve: (N, T) measurements; holes (NaN) only where a task's training has not ended.
        steps: (N) of the evaluations, increasing.
        ended: (T) the step at which the training of each task ended.
        direction: "lower" for losses, "higher" for scores.

    Raises:
        Mistake: shapes that do not fit, steps out of order, or a hole where a number is needed.
    """
    place = "forgetting_curve"
    values, at, ends = sign(place, direction) * table(place, curve), array(steps), array(ended)
    if at.shape != (len(values),) or ends.shape != (values.shape[1],):
        raise Mistake(place, f"{values.shape} measurements, {at.shape} steps, {ends.shape} ends", "give a row per step, a column per task")
    if not (np.diff(at) > 0).all():
        raise Mistake(place, "the steps do not increase", "sort the evaluations by step")
    counts = at[:, None] >= ends
    whole(place, values[counts])
    best = np.fmax.accumulate(np.where(np.isnan(values), -np.inf, values), axis=0)
    short = np.where(counts, best - np.where(counts, values, 0.0), 0.0)  # best includes now, so nothing is negative
    return np.where(counts.any(1), np.where(counts, short, 0.0).sum(1) / counts.sum(1).clip(min=1), 0.0)


def aufc(forgetting: Vector, steps: Vector) -> float:
    """Return the area under a forgetting curve by the trapezoid rule, divided by the span of its steps; lower is better.

    Raises:
        Mistake: fewer than two evaluations, steps out of order, or holes.
    """
    f, at = whole("aufc", array(forgetting)), array(steps)
    if f.ndim != 1 or f.shape != at.shape or len(f) < 2 or not (np.diff(at) > 0).all():
        raise Mistake("aufc", f"{f.shape} values at {at.shape} steps", "give two or more evaluations at increasing steps")
    return float(np.trapezoid(f, at) / (at[-1] - at[0]))


def at_boundaries(curve: Matrix, steps: Vector, ended: Sequence[float]) -> Float[np.ndarray, "T T"]:
    """Return the per-boundary table: row i is every task's measurement at the last evaluation not behind the end of task i.

    Raises:
        Mistake: a task ended before the first evaluation.
    """
    values, at = table("at_boundaries", curve), array(steps)
    rows = np.searchsorted(at, array(ended), side="right") - 1
    if (rows < 0).any():
        raise Mistake("at_boundaries", "a task ended before the first evaluation", "measure at the ends of tasks")
    return values[rows]


def write_curves(
    path: str | Path, curve: Matrix, steps: Vector, ended: Sequence[float], names: Sequence[str], *, direction: Direction = "lower"
) -> None:
    """Write a CSV with a line per evaluation: its step, each task's measurement, the mean forgetting, and the area up to there.

    Raises:
        Mistake: as for `forgetting_curve`, or the file cannot be written.
    """
    f, at, values = forgetting_curve(curve, steps, ended, direction=direction), array(steps), array(curve)
    area = [0.0, *(aufc(f[: n + 1], at[: n + 1]) for n in range(1, len(f)))]
    lines = [["step", *names, "forgetting", "aufc"]]
    lines += [[f"{value:.6g}" for value in (at[n], *values[n], f[n], area[n])] for n in range(len(f))]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(Path(path), text.getvalue())
