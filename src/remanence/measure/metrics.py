"""The formulas of continual learning on the score matrix, each with its sign and its denominator.

T tasks are learned one after the other. `a` has T + 1 rows and T columns: `a[i, j]` is the score on task j after event i, row 0 is the
start model, and formulas count tasks from 1 as papers do (in memory task j is column j - 1). NaN is a hole: an entry that was not measured.
A formula that needs a hole refuses; one that does not need it gives the same number whatever stands there.

| here | symbol | better | papers |
|---|---|---|---|
| `average_accuracy` | OP, ACC | like the scores | Lopez-Paz & Ranzato 2017 (arXiv 1706.08840); Wang et al., TRACE (2310.06762) |
| `average_incremental_accuracy` | mean of OP_t | like the scores | Rebuffi et al., iCaRL (1611.07725) |
| `learning_accuracy` | LA | like the scores | Riemer et al. (1810.11910) |
| `forgetting` | F | lower | Chaudhry et al. (1801.10112) |
| `backward_transfer`, `forward_transfer` | BWT, FWT | higher | Lopez-Paz & Ranzato 2017; TRACE divides BWT by T |
| `intransigence` | I | lower | Chaudhry et al. (1801.10112) |
| `normalised_retention`, `op_relative_to_joint` | | higher, 1 = nothing lost | ours, common in surveys |
| `min_accuracy`, `worst_case_accuracy` | min-ACC, WC-ACC | like the scores | De Lange et al. (2205.13452) |
| `windowed_forgetting`, `windowed_plasticity` | WF^w, WP^w | lower, higher | De Lange et al. (2205.13452) |
| `fuar` | FUAR | lower | Jang et al. (2110.03215) |
| `x_delta` | dG, dI, dS | higher | TRACE |

`direction` says which scores are good: "higher" (accuracy) or "lower" (loss, perplexity). Differences are turned so that their sign keeps
its meaning (positive forgetting is a loss of knowledge either way), a maximum becomes a minimum, and a ratio its reciprocal. Means of
scores are never turned. `after=t` asks for the value after t tasks; by default all T. Scores may be numpy arrays, tensors of any precision,
or nested lists; sums run in fp64.
Cost: O(T^2) at most, O(N T) for the curves of N evaluations (windows of w cost O(N T w)).
"""

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


def average_accuracy(a: Matrix, *, after: int | None = None) -> float:
    """Return OP_t = (1/t) sum_{j<=t} a[t, j], the mean score on the tasks learned so far.

    Raises:
        Mistake: the matrix is not (T+1, T), `after` is not in 1..T, or a needed entry is a hole.
    """
    a, t = square("average_accuracy", a, after)
    return float(whole("average_accuracy", a[t, :t]).mean())


def average_incremental_accuracy(a: Matrix, *, after: int | None = None) -> float:
    """Return (1/t) sum_{i<=t} OP_i, the mean of the average accuracies after every task; needs the lower triangle.

    Raises:
        Mistake: as for `average_accuracy`.
    """
    a, t = square("average_incremental_accuracy", a, after)
    seen = np.tri(t, dtype=bool)
    whole("average_incremental_accuracy", a[1 : t + 1, :t][seen])
    return float((np.where(seen, a[1 : t + 1, :t], 0.0).sum(1) / np.arange(1, t + 1)).mean())


def learning_accuracy(a: Matrix, *, after: int | None = None) -> float:
    """Return LA = (1/t) sum_{j<=t} a[j, j], the mean score on each task right after it was learned.

    Raises:
        Mistake: as for `average_accuracy`.
    """
    a, t = square("learning_accuracy", a, after)
    return float(whole("learning_accuracy", learned(a, t)).mean())


def forgetting(
    a: Matrix, *, since: Literal["learned", "start"] = "learned", after: int | None = None, direction: Direction = "higher"
) -> float:
    """Return F_t = 1/(t-1) sum_{j<t} ( max_l a[l, j] - a[t, j] ); positive means forgotten, lower is better.

    Args:
        a: scores, (T+1, T).
        since: which earlier models count: "learned" is l in j..t-1 (since task j was learned), "start" is l in 0..t-1 (the start model and
            the models before task j too, the classic form). F can be negative: the last model may know a task better than all earlier ones.
        after: t, by default T.
        direction: "lower" for losses: F_t = mean ( a[t, j] - min_l a[l, j] ).

    Raises:
        Mistake: fewer than two tasks, an unknown option, a wrong shape, or a needed entry is a hole.
    """
    place = "forgetting"
    option(place, "since", since, ("learned", "start"))
    a, t = square(place, a, after, sign(place, direction), least=2)
    before = a[:t, : t - 1]  # rows l = 0..t-1, tasks j < t
    counts = np.ones_like(before, dtype=bool)
    if since == "learned":
        counts = np.tri(t, t - 1, -1, dtype=bool)  # l >= j, task j standing in column j-1
    whole(place, before[counts])
    best = np.where(counts, before, -np.inf).max(0)
    return float((best - whole(place, a[t, : t - 1])).mean())


def backward_transfer(
    a: Matrix, *, denominator: Literal["T-1", "T"] = "T-1", after: int | None = None, direction: Direction = "higher"
) -> float:
    """Return BWT_t = 1/(t-1) sum_{j<t} ( a[t, j] - a[j, j] ); negative means forgotten, higher is better.

    Args:
        a: scores, (T+1, T).
        denominator: "T-1" (Lopez-Paz & Ranzato) or "T" (TRACE); with "T", BWT = OP - LA exactly.
        after: t, by default T.
        direction: "lower" for losses.

    Raises:
        Mistake: as for `forgetting`.
    """
    place = "backward_transfer"
    option(place, "denominator", denominator, ("T-1", "T"))
    a, t = square(place, a, after, sign(place, direction), least=2)
    change = whole(place, a[t, : t - 1]) - whole(place, learned(a, t - 1))
    return float(change.sum() / (t - 1 if denominator == "T-1" else t))


def forward_transfer(a: Matrix, b: Vector, *, after: int | None = None, direction: Direction = "higher") -> float:
    """Return FWT_t = 1/(t-1) sum_{2<=j<=t} ( a[j-1, j] - b[j] ); positive means that earlier tasks helped, higher is better.

    Args:
        a: scores, (T+1, T).
        b: scores of the reference, (T): a freshly initialised model, or the start model (then b = a[0]); say which. b[1] is never read.
        after: t, by default T.
        direction: "lower" for losses.

    Raises:
        Mistake: as for `forgetting`, or b has another length.
    """
    place = "forward_transfer"
    turn = sign(place, direction)
    a, t = square(place, a, after, turn, least=2)
    reference = turn * vector(place, "b", b, a.shape[1])
    ahead = np.diagonal(a[1:], offset=1)[: t - 1]  # a[j-1, j], j = 2..t
    return float((whole(place, ahead) - whole(place, reference[1:t])).mean())


def intransigence(a: Matrix, joint: Vector, *, after: int | None = None, direction: Direction = "higher") -> float:
    """Return I = (1/t) sum_{j<=t} ( joint[j] - a[j, j] ); positive means that the model learned less than a joint one, lower is better.

    Args:
        a: scores, (T+1, T).
        joint: (T), joint[j] = score on task j of a model trained on tasks 1..j together.
        after: t, by default T.
        direction: "lower" for losses.

    Raises:
        Mistake: as for `average_accuracy`, or `joint` has another length.
    """
    place = "intransigence"
    turn = sign(place, direction)
    a, t = square(place, a, after, turn)
    reference = turn * vector(place, "joint", joint, a.shape[1])
    return float((whole(place, reference[:t]) - whole(place, learned(a, t))).mean())


def normalised_retention(a: Matrix, *, after: int | None = None, direction: Direction = "higher") -> float:
    """Return 1/(t-1) sum_{j<t} a[t, j] / a[j, j]; 1 means all kept, below 1 forgotten, higher is better.

    With direction "lower" each ratio is a[j, j] / a[t, j].

    Raises:
        Mistake: as for `forgetting`, or a denominator is zero.
    """
    place = "normalised_retention"
    turn = sign(place, direction)
    a, t = square(place, a, after, least=2)
    now, then = whole(place, a[t, : t - 1]), whole(place, learned(a, t - 1))
    return float(ratio(place, now, then, turn).mean())


def op_relative_to_joint(a: Matrix, joint: Vector, *, after: int | None = None, direction: Direction = "higher") -> float:
    """Return OP_t / ( (1/t) sum_{j<=t} joint[j] ); 1 means as good as joint training, higher is better.

    Args:
        a: scores, (T+1, T).
        joint: (T), scores on every task of one model trained on all of them together.
        after: t, by default T; for t < T, `joint` should come from a model trained on the first t tasks.
        direction: "lower" for losses: the reciprocal.

    Raises:
        Mistake: as for `average_accuracy`, or the denominator is zero.
    """
    place = "op_relative_to_joint"
    turn = sign(place, direction)
    a, t = square(place, a, after)
    reference = whole(place, vector(place, "joint", joint, a.shape[1])[:t])
    return float(ratio(place, whole(place, a[t, :t]).mean(), reference.mean(), turn))


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


def fuar(
    invariant: tuple[Any, Any],
    *,
    updated: tuple[Any, Any] | None = None,
    new: tuple[Any, Any] | None = None,
    direction: Direction = "higher",
) -> float | None:
    """Return FUAR = sum max(0, forgotten) / ( sum max(0, updated) + sum max(0, acquired) ), facts lost per fact gained; lower is better.

    Each argument is a pair (score before, score after), numbers or arrays of several sets; 1 means one fact lost per fact gained, 0 nothing
    lost.

    Args:
        invariant: scores on facts that must stay.
        updated: scores on facts that changed.
        new: scores on facts that are new.
        direction: "lower" for losses.

    Returns:
        The ratio, or `None` when nothing was gained (Jang et al. print "no gain"): the ratio has no meaning then.

    Raises:
        Mistake: neither `updated` nor `new` is given, a pair does not match, or a score is a hole.
    """
    turn = sign("fuar", direction)
    if updated is None and new is None:
        raise Mistake("fuar", "there is nothing that could have been gained", "give `updated` or `new`")
    lost = gained("fuar", (invariant[1], invariant[0]), turn)
    gain = sum(gained("fuar", pair, turn) for pair in (updated, new) if pair is not None)
    return None if gain == 0 else lost / gain


def x_delta(g: Matrix, *, after: int | None = None, direction: Direction = "higher") -> float:
    """Return the X-delta (1/M) sum_i ( g[t, i] - g[0, i] ) over M benchmarks that are not part of the stream; negative means loss.

    Args:
        g: (T+1, M) scores: general ability, instruction following or safety; row 0 is the start model.
        after: t, by default the last row.
        direction: "lower" for losses.

    Raises:
        Mistake: fewer than two rows, `after` is not one of them, or a needed entry is a hole.
    """
    place = "x_delta"
    g = sign(place, direction) * table(place, g)
    if len(g) < 2:
        raise Mistake(place, f"has {len(g)} rows", "give the start model's row and at least one more")
    t = stage(place, after, len(g) - 1)
    return float((whole(place, g[t]) - whole(place, g[0])).mean())


# The pieces below are shared by the formulas above.


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


def gained(place: str, pair: tuple[Any, Any], turn: float) -> float:
    """Return the sum of the positive parts of after - before."""
    before, after = array(pair[0]), array(pair[1])
    if before.shape != after.shape:
        raise Mistake(place, f"scores before have shape {before.shape}, after {after.shape}", "give both for the same sets")
    return float(np.maximum(turn * (whole(place, after) - whole(place, before)), 0.0).sum())
