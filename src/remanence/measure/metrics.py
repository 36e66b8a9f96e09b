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

from typing import Any, Literal

import numpy as np

from remanence.errors import Mistake
from remanence.measure.curve_metrics import min_accuracy, windowed_forgetting, windowed_plasticity, worst_case_accuracy
from remanence.measure.score_matrix import (
    Direction,
    Matrix,
    Vector,
    array,
    learned,
    option,
    ratio,
    sign,
    square,
    stage,
    table,
    vector,
    whole,
)

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "fuar",
    "intransigence",
    "learning_accuracy",
    "min_accuracy",
    "normalised_retention",
    "op_relative_to_joint",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
    "x_delta",
]


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


def gained(place: str, pair: tuple[Any, Any], turn: float) -> float:
    """Return the sum of the positive parts of after - before."""
    before, after = array(pair[0]), array(pair[1])
    if before.shape != after.shape:
        raise Mistake(place, f"scores before have shape {before.shape}, after {after.shape}", "give both for the same sets")
    return float(np.maximum(turn * (whole(place, after) - whole(place, before)), 0.0).sum())
