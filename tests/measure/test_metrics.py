"""The formulas, by hand on one fixed stream of four tasks, by brute force on random ones, and their identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from remanence.errors import Mistake
from remanence.measure import metrics

# Row 0 is the start model, row i the model after task i, column j the task j + 1.
A = np.array(
    [
        [0.10, 0.20, 0.30, 0.95],
        [0.90, 0.20, 0.35, 0.25],
        [0.70, 0.80, 0.40, 0.25],
        [0.75, 0.50, 0.60, 0.45],
        [0.50, 0.60, 0.30, 0.80],
    ]
)
B = np.array([0.0, 0.25, 0.25, 0.25])
JOINT = np.array([0.9, 0.9, 0.8, 1.0])
FEW = settings(max_examples=60, deadline=None)
SQUARES = st.integers(2, 6).flatmap(lambda tasks: arrays.arrays(np.float64, (tasks + 1, tasks), elements=st.floats(0.01, 1)))
CURVES = arrays.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.floats(0, 1))


def near(value: float):
    return pytest.approx(value, abs=1e-12)


def test_average_accuracy_by_hand():
    assert metrics.average_accuracy(A) == near((0.50 + 0.60 + 0.30 + 0.80) / 4)
    assert metrics.average_accuracy(A, after=2) == near((0.70 + 0.80) / 2)


def test_average_incremental_accuracy_by_hand():
    after = [0.90, (0.70 + 0.80) / 2, (0.75 + 0.50 + 0.60) / 3, 2.2 / 4]
    assert metrics.average_incremental_accuracy(A) == near(sum(after) / 4)
    assert metrics.average_incremental_accuracy(A, after=3) == near(sum(after[:3]) / 3)


def test_learning_accuracy_by_hand():
    assert metrics.learning_accuracy(A) == near((0.90 + 0.80 + 0.60 + 0.80) / 4)


def test_forgetting_by_hand_in_both_variants():
    # Since learned: best of column 1 is 0.90, of column 2 0.80, of column 3 only row 3: 0.60.
    assert metrics.forgetting(A) == near(((0.90 - 0.50) + (0.80 - 0.60) + (0.60 - 0.30)) / 3)
    assert metrics.forgetting(A, after=2) == near(0.90 - 0.70)
    better_before = A.copy()
    better_before[0, 1], better_before[1, 2] = 1.0, 0.7  # better before they were learned: seen by "start" only
    assert metrics.forgetting(better_before) == near(metrics.forgetting(A))
    assert metrics.forgetting(better_before, since="start") == near(((0.90 - 0.50) + (1.0 - 0.60) + (0.70 - 0.30)) / 3)


def test_forgetting_is_negative_when_the_last_model_is_the_best():
    assert metrics.forgetting([[0, 0], [0.5, 0], [0.75, 1]]) == near(-0.25)


def test_backward_transfer_by_hand_with_both_denominators():
    change = (0.50 - 0.90) + (0.60 - 0.80) + (0.30 - 0.60)
    assert metrics.backward_transfer(A) == near(change / 3)
    assert metrics.backward_transfer(A, denominator="T") == near(change / 4)
    assert metrics.backward_transfer(A, after=3) == near(((0.75 - 0.90) + (0.50 - 0.80)) / 2)


def test_forward_transfer_by_hand():
    assert metrics.forward_transfer(A, B) == near(((0.20 - 0.25) + (0.40 - 0.25) + (0.45 - 0.25)) / 3)
    assert metrics.forward_transfer(A, [math.nan, 0.25, 0.25, math.nan], after=3) == near(((0.20 - 0.25) + (0.40 - 0.25)) / 2)


def test_intransigence_by_hand():
    assert metrics.intransigence(A, JOINT) == near((0.0 + 0.1 + 0.2 + 0.2) / 4)


def test_normalised_retention_by_hand():
    assert metrics.normalised_retention(A) == near((0.50 / 0.90 + 0.60 / 0.80 + 0.30 / 0.60) / 3)


def test_op_relative_to_joint_by_hand():
    assert metrics.op_relative_to_joint(A, JOINT) == near(2.2 / 3.6)


def test_min_and_worst_case_accuracy_by_hand():
    # Minima after each task's own end: rows 2..4 of column 1: 0.50; rows 3..4 of column 2: 0.50; row 4 of column 3: 0.30.
    assert metrics.min_accuracy(A) == near((0.50 + 0.50 + 0.30) / 3)
    assert metrics.worst_case_accuracy(A) == near(0.80 / 4 + 3 / 4 * 1.3 / 3)
    assert metrics.worst_case_accuracy([[0.0], [0.7]]) == near(0.7)


def test_min_accuracy_on_a_curve_starts_behind_the_end_of_the_task():
    curve = np.array([[0.0, math.nan], [0.1, math.nan], [0.9, math.nan], [0.2, 0.3], [0.8, 0.7]])  # task 1 ends at row 2, task 2 at row 4
    assert metrics.min_accuracy(curve, [2, 4]) == near(0.2)
    assert metrics.worst_case_accuracy(curve, [2, 4]) == near((0.7 + 0.2) / 2)


def test_windowed_change_by_hand():
    curve = np.array([0.5, 0.1, 0.9, 0.8, 0.4])
    assert metrics.windowed_forgetting(curve, 2) == near(0.4)  # 0.5 to 0.1, and 0.8 to 0.4
    assert metrics.windowed_forgetting(curve, 3) == near(0.5)  # 0.9 to 0.4
    assert metrics.windowed_plasticity(curve, 100) == near(0.8)  # 0.1 to 0.9
    assert metrics.windowed_forgetting(np.stack([curve, np.arange(5) / 5], 1), 3) == near(0.25)  # the second task only rises


def test_windowed_change_skips_evaluations_before_the_task():
    late = np.array([[0.9, math.nan], [0.5, math.nan], [0.5, 0.6], [0.5, 0.3]])
    assert metrics.windowed_forgetting(late, 2) == near((0.4 + 0.3) / 2)
    assert metrics.windowed_plasticity(late, 2) == near(0.0)


def test_fuar_by_hand():
    # Lost 0.2 + 0 (a gain on facts that must stay is no negative loss), updated 0.1, acquired 0.3.
    assert metrics.fuar(([0.8, 0.5], [0.6, 0.7]), updated=(0.2, 0.3), new=([0.1], [0.4])) == near(0.2 / 0.4)
    assert metrics.fuar((0.8, 0.6), updated=(0.2, 0.1), new=(0.1, 0.4)) == near(0.2 / 0.3)
    assert metrics.fuar((0.6, 0.8), new=(0.1, 0.4)) == 0
    assert metrics.fuar((2.0, 3.0), new=(5.0, 4.5), direction="lower") == near(1.0 / 0.5)


def test_fuar_without_a_gain_has_no_number():
    assert metrics.fuar((0.8, 0.6), updated=(0.3, 0.3), new=(0.4, 0.1)) is None


def test_x_delta_by_hand():
    general = [[0.5, 0.4, 0.3], [0.4, 0.4, 0.4], [0.2, 0.5, 0.2]]
    assert metrics.x_delta(general) == near((-0.3 + 0.1 - 0.1) / 3)
    assert metrics.x_delta(general, after=1) == near(0.0)


@FEW
@given(SQUARES)
def test_op_minus_learning_accuracy_is_backward_transfer(a):
    tasks = a.shape[1]
    gap = metrics.average_accuracy(a) - metrics.learning_accuracy(a)
    assert gap == near(metrics.backward_transfer(a) * (tasks - 1) / tasks)
    assert gap == near(metrics.backward_transfer(a, denominator="T"))


@FEW
@given(SQUARES, st.data())
def test_every_formula_equals_plain_loops(a, data):
    last = a.shape[1]
    t = data.draw(st.integers(2, last))
    b = data.draw(arrays.arrays(np.float64, last, elements=st.floats(0.01, 1)))
    at = lambda i, j: float(a[i, j - 1])  # noqa: E731 - the papers' counting
    older = range(1, t)
    expected = {
        "average_accuracy": sum(at(t, j) for j in range(1, t + 1)) / t,
        "average_incremental_accuracy": sum(sum(at(i, j) for j in range(1, i + 1)) / i for i in range(1, t + 1)) / t,
        "learning_accuracy": sum(at(j, j) for j in range(1, t + 1)) / t,
        "forgetting": sum(max(at(i, j) for i in range(j, t)) - at(t, j) for j in older) / (t - 1),
        "backward_transfer": sum(at(t, j) - at(j, j) for j in older) / (t - 1),
        "normalised_retention": sum(at(t, j) / at(j, j) for j in older) / (t - 1),
    }
    for name, value in expected.items():
        assert getattr(metrics, name)(a, after=t) == near(value), name
    start = sum(max(at(i, j) for i in range(t)) - at(t, j) for j in older) / (t - 1)
    assert metrics.forgetting(a, since="start", after=t) == near(start)
    ahead = sum(at(j - 1, j) - b[j - 1] for j in range(2, t + 1)) / (t - 1)
    assert metrics.forward_transfer(a, b, after=t) == near(ahead)
    assert metrics.intransigence(a, b, after=t) == near(sum(b[j - 1] - at(j, j) for j in range(1, t + 1)) / t)
    assert metrics.op_relative_to_joint(a, b, after=t) == pytest.approx(expected["average_accuracy"] * t / b[:t].sum(), rel=1e-9)
    worst = [min(at(n, j) for n in range(j + 1, last + 1)) for j in range(1, last)]
    assert metrics.min_accuracy(a) == near(sum(worst) / (last - 1))
    assert metrics.worst_case_accuracy(a) <= metrics.average_accuracy(a) + 1e-12


@FEW
@given(CURVES, st.integers(2, 15))
def test_windowed_change_equals_all_pairs(curve, window):
    count = len(curve)
    pairs = [(m, n) for m in range(count) for n in range(m, min(count, m + window))]
    drop = np.mean([max(column[m] - column[n] for m, n in pairs) for column in curve.T])
    rise = np.mean([max(column[n] - column[m] for m, n in pairs) for column in curve.T])
    assert metrics.windowed_forgetting(curve, window) == near(drop)
    assert metrics.windowed_plasticity(curve, window) == near(rise)
    assert metrics.windowed_plasticity(-curve, window) == near(drop)
    assert metrics.windowed_forgetting(curve, window + 1) >= drop - 1e-12
    assert metrics.windowed_forgetting(np.sort(curve, 0), window) == 0


@FEW
@given(CURVES.filter(lambda curve: len(curve) > 3))
def test_a_sparser_grid_never_shows_a_lower_minimum(curve):
    curve = curve[: len(curve) - 1 + len(curve) % 2]  # odd: every second row includes the last
    two = np.stack([curve[:, 0], curve[:, -1]], 1)
    assert metrics.min_accuracy(two, [0, len(two) - 1]) <= metrics.min_accuracy(two[::2], [0, len(two[::2]) - 1]) + 1e-12


TURNED = {
    "forgetting": (),
    "backward_transfer": (),
    "forward_transfer": (B,),
    "intransigence": (JOINT,),
    "x_delta": (),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_loss_gives_the_same_difference_as_its_negative(name):
    formula, rest = getattr(metrics, name), TURNED[name]
    assert formula(-A, *(-extra for extra in rest), direction="lower") == near(formula(A, *rest))


def test_losses_turn_extremes_and_ratios_too():
    assert metrics.min_accuracy(1 - A, direction="lower") == near(1 - metrics.min_accuracy(A))
    assert metrics.worst_case_accuracy(1 - A, direction="lower") == near(1 - metrics.worst_case_accuracy(A))
    assert metrics.windowed_forgetting(-A, 3, direction="lower") == near(metrics.windowed_forgetting(A, 3))
    assert metrics.windowed_plasticity(-A, 3, direction="lower") == near(metrics.windowed_plasticity(A, 3))
    assert metrics.normalised_retention(1 / A, direction="lower") == near(metrics.normalised_retention(A))
    assert metrics.op_relative_to_joint([[9.0], [4.0]], [2.0], direction="lower") == near(0.5)


def test_a_metric_reads_only_the_entries_that_it_needs():
    lower = A.copy()
    lower[0], lower[np.triu_indices(4, 1)[0] + 1, np.triu_indices(4, 1)[1]] = (
        math.nan,
        math.nan,
    )  # what is measured when only seen tasks are
    for name in (
        "average_accuracy",
        "average_incremental_accuracy",
        "learning_accuracy",
        "forgetting",
        "backward_transfer",
        "normalised_retention",
        "min_accuracy",
        "worst_case_accuracy",
    ):
        assert getattr(metrics, name)(lower) == getattr(metrics, name)(A), name
    assert metrics.intransigence(lower, JOINT) == metrics.intransigence(A, JOINT)


@pytest.mark.parametrize(
    ("formula", "hole"),
    [
        (metrics.average_accuracy, (4, 0)),
        (metrics.average_incremental_accuracy, (2, 0)),
        (metrics.learning_accuracy, (2, 1)),
        (metrics.forgetting, (3, 0)),
        (lambda a: metrics.forgetting(a, since="start"), (0, 2)),
        (metrics.backward_transfer, (1, 0)),
        (lambda a: metrics.forward_transfer(a, B), (1, 1)),
        (lambda a: metrics.intransigence(a, JOINT), (4, 3)),
        (metrics.normalised_retention, (3, 2)),
        (metrics.min_accuracy, (3, 1)),
        (metrics.worst_case_accuracy, (4, 3)),
        (lambda a: metrics.windowed_forgetting(a, 2), (2, 2)),
        (metrics.x_delta, (0, 0)),
    ],
)
def test_a_needed_hole_is_refused(formula, hole):
    a = A.copy()
    a[hole] = math.nan
    with pytest.raises(Mistake, match="not measured"):
        formula(a)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.average_accuracy(A[1:]),
        lambda: metrics.average_accuracy(A[0]),
        lambda: metrics.average_accuracy([[1.0], [1.0, 2.0]]),
        lambda: metrics.average_accuracy(A, after=0),
        lambda: metrics.average_accuracy(A, after=5),
        lambda: metrics.forgetting(A, after=1),
        lambda: metrics.forgetting(A, since="begin"),
        lambda: metrics.forgetting(A, direction="up"),
        lambda: metrics.backward_transfer(A, denominator="T+1"),
        lambda: metrics.forward_transfer(A, B[1:]),
        lambda: metrics.normalised_retention([[0, 0], [0, 0], [1, 1]]),
        lambda: metrics.op_relative_to_joint(A, np.zeros(4)),
        lambda: metrics.min_accuracy([[0.0], [0.7]]),
        lambda: metrics.min_accuracy(A, [1, 2, 3]),
        lambda: metrics.min_accuracy(A, [1, 1, 2, 4]),
        lambda: metrics.min_accuracy(A, [1, 2, 4, 5]),
        lambda: metrics.windowed_forgetting(A, 1),
        lambda: metrics.windowed_forgetting([math.nan, math.nan], 2),
        lambda: metrics.fuar((0.8, 0.6)),
        lambda: metrics.fuar((0.8, [0.6, 0.5]), new=(0, 1)),
        lambda: metrics.fuar((0.8, math.nan), new=(0, 1)),
        lambda: metrics.x_delta(A[:1]),
    ],
)
def test_a_malformed_question_is_refused_in_one_sentence(call):
    with pytest.raises(Mistake) as refusal:
        call()
    assert refusal.value.problem
    assert refusal.value.remedy
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("turn", [torch.tensor, lambda a: torch.tensor(a, dtype=torch.float32, requires_grad=True), np.ndarray.tolist])
def test_tensors_and_lists_give_what_arrays_give(turn):
    assert metrics.forgetting(turn(A)) == pytest.approx(metrics.forgetting(A), abs=1e-6)
    assert metrics.forward_transfer(turn(A), turn(B)) == pytest.approx(metrics.forward_transfer(A, B), abs=1e-6)


def test_scores_are_left_as_they_were():
    before = A.copy()
    for name in ("average_accuracy", "forgetting", "min_accuracy", "worst_case_accuracy"):
        getattr(metrics, name)(A)
    metrics.forgetting(A, direction="lower")
    metrics.windowed_plasticity(A, 3)
    np.testing.assert_array_equal(A, before)
