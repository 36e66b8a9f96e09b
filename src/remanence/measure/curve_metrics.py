"""The formulas of continual learning on curves of evaluations: the worst since a task was learned, the largest drop and rise in a window.

De Lange et al. 2022, "Continual evaluation for lifelong learning: Identifying the stability gap", arXiv 2205.13452. `metrics.py` has the table of all formulas
and what their arguments have in common. Cost: O(N T) for N evaluations of T tasks; windows of w cost O(N T w).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from remanence.errors import Mistake
from remanence.measure.score_matrix import Direction, Matrix, Vector, array, sign, square, table, whole


def min_accuracy(a: Matrix, ends: Sequence[int] | None = None, *, direction: Direction = "higher") -> float:
    """Return min-ACC = 1/(T-1) sum_{j<T} min_{t_j < n <= N} a[n, j], the mean of the worst scores since each task's training ended.

    It is the mean of minima, not the minimum of the mean. With the matrix of task ends it is the classic minimum over later tasks; with an
    evaluation at every step it shows the stability gap. A minimum over many noisy numbers is biased down: report the size of the evaluation
    sets beside it.

    Args:
        a: (T+1, T), or with `ends` any number of evaluations (N+1, T). The task being learned (the last column) does not enter.
        ends: row t_j at which task j's training ended, one per task, increasing; by default 1..T.
        direction: "lower" for losses: the mean of maxima.

    Raises:
        Mistake: fewer than two tasks, `ends` does not fit, no evaluation after a task's end, or a needed entry is a hole.
    """
    turn = sign("min_accuracy", direction)
    scores, rows = curves("min_accuracy", a, ends)
    return turn * worst_since("min_accuracy", turn * scores, rows)


def worst_case_accuracy(a: Matrix, ends: Sequence[int] | None = None, *, direction: Direction = "higher") -> float:
    """Return WC-ACC = (1/T) a[N, T] + (1 - 1/T) min-ACC: the current task's last score and the worst ones of all others; at most OP.

    With one task it is that task's last score. Arguments and errors as for `min_accuracy`.
    """
    place = "worst_case_accuracy"
    turn = sign(place, direction)
    scores, rows = curves(place, a, ends)
    tasks = scores.shape[1]
    current = whole(place, scores[-1, -1:])[0]
    return float(current if tasks == 1 else current / tasks + (1 - 1 / tasks) * turn * worst_since(place, turn * scores, rows))


def windowed_forgetting(curve: Matrix | Vector, window: int, *, direction: Direction = "higher") -> float:
    """Return WF^w = mean over tasks of max_{m<=m'<m+w} ( A_m - A_m' ), the largest drop in any w evaluations in a row; lower is better.

    Args:
        curve: (N, T) scores over N evaluations, or (N) of one task. Leading holes (before a task was first measured) are skipped.
        window: w >= 2, counted in evaluations: it changes its meaning with the interval between them.
        direction: "lower" for losses: the largest rise.

    Raises:
        Mistake: the window is below 2, a task was never measured, or a hole stands after its first measurement.
    """
    return largest_drop("windowed_forgetting", curve, window, sign("windowed_forgetting", direction))


def windowed_plasticity(curve: Matrix | Vector, window: int, *, direction: Direction = "higher") -> float:
    """Return WP^w = mean over tasks of max_{m<=m'<m+w} ( A_m' - A_m ), the largest rise in any w evaluations in a row; higher is better.

    Arguments and errors as for `windowed_forgetting`; WP(curve) = WF(-curve).
    """
    return largest_drop("windowed_plasticity", curve, window, -sign("windowed_plasticity", direction))


def curves(place: str, a: Matrix, ends: Sequence[int] | None) -> tuple[Float[np.ndarray, "N T"], np.ndarray]:
    """Return the evaluations and the row at which each task's training ended, checked against each other."""
    if ends is None:
        scores, tasks = square(place, a, None)
        return scores, np.arange(1, tasks + 1)
    scores = table(place, a)
    rows = np.asarray(ends)
    if rows.shape != (scores.shape[1],) or not np.issubdtype(rows.dtype, np.integer):
        raise Mistake(place, f"`ends` has shape {rows.shape} for {scores.shape[1]} tasks", "give one row number per task")
    if np.any(np.diff(rows) <= 0) or rows[0] < 0 or (len(rows) > 1 and rows[-2] >= len(scores) - 1):
        raise Mistake(
            place, f"`ends` is {rows.tolist()} for {len(scores)} rows", "give increasing row numbers, with an evaluation after each of them"
        )
    return scores, rows


def worst_since(place: str, scores: Float[np.ndarray, "N T"], ends: np.ndarray) -> float:
    """Return the mean over all tasks but the last of the minimum after the task's end."""
    if scores.shape[1] < 2:
        raise Mistake(place, "is not defined after 1 task", "give at least 2 tasks")
    older, later = scores[:, :-1], np.arange(len(scores))[:, None] > ends[:-1]
    whole(place, older[later])
    return float(np.where(later, older, np.inf).min(0).mean())


def largest_drop(place: str, curve: Matrix | Vector, window: int, turn: float) -> float:
    """Return the mean over tasks of the largest fall of turn * curve inside a window of evaluations."""
    if window < 2:
        raise Mistake(place, f"a window of {window} evaluations has no room for a change", "give a window of at least 2")
    values = array(curve)
    scores = turn * table(place, values[:, None] if values.ndim == 1 else values)
    measured = ~np.isnan(scores)
    if not measured.any(0).all():
        raise Mistake(place, "a task was never measured", "leave out its column")
    whole(place, scores[np.logical_or.accumulate(measured)])  # holes may only lead
    width = min(window, len(scores))
    padded = np.concatenate([np.full((width - 1, scores.shape[1]), -np.inf), np.where(measured, scores, -np.inf)])
    highest = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).max(-1)  # of the window that ends at n, n included
    return float((np.where(measured, highest, 0.0) - np.where(measured, scores, 0.0)).max(0).mean())
