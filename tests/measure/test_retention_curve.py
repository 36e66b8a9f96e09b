"""Forgetting along a run, against a table worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.measure.retention_curve import at_boundaries, aufc, forgetting_curve, write_curves

STEPS = [100, 200, 300, 400]
LOSSES = [[2.0, 9.0], [2.5, 3.0], [1.5, 3.5], [3.0, 3.2]]  # task 1 ends at 100, task 2 at 200
BY_HAND = [0.0, (0.5 + 0.0) / 2, (0.0 + 0.5) / 2, (1.5 + 0.2) / 2]


def test_forgetting_of_losses_by_hand() -> None:
    np.testing.assert_allclose(forgetting_curve(LOSSES, STEPS, [100, 200]), BY_HAND)


def test_forgetting_of_scores_is_that_of_negated_losses() -> None:
    scores = [[-value for value in row] for row in LOSSES]
    np.testing.assert_allclose(forgetting_curve(scores, STEPS, [100, 200], direction="higher"), BY_HAND)


def test_aufc_by_hand() -> None:
    # (0 + 0.25)/2 * 100 + (0.25 + 0.25)/2 * 100 + (0.25 + 0.85)/2 * 100 = 92.5 over 300
    assert aufc(BY_HAND, STEPS) == pytest.approx(92.5 / 300)
    assert aufc([1.0, 1.0], [0, 7]) == 1.0


def test_before_any_task_has_ended_nothing_is_forgotten() -> None:
    curve = forgetting_curve([[float("nan"), 1.0], [2.0, float("nan")], [2.5, 5.0]], [1, 2, 3], [2, 3])
    np.testing.assert_allclose(curve, [0.0, 0.0, (0.5 + 4.0) / 2])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(Mistake, match="increase"):
        forgetting_curve(LOSSES, [1, 2, 2, 3], [1, 2])
    with pytest.raises(Mistake):
        forgetting_curve([[float("nan")], [1.0]], [1, 2], [1])
    with pytest.raises(Mistake, match="row per step"):
        forgetting_curve(LOSSES, STEPS, [1])
    with pytest.raises(Mistake, match="two or more"):
        aufc([1.0], [1])


def test_boundaries_and_file_by_hand(tmp_path: Path) -> None:
    np.testing.assert_allclose(at_boundaries(LOSSES, STEPS, [100, 350]), [[2.0, 9.0], [1.5, 3.5]])
    with pytest.raises(Mistake, match="before the first"):
        at_boundaries(LOSSES, STEPS, [50, 350])
    write_curves(tmp_path / "curves.csv", LOSSES, STEPS, [100, 200], ["one", "two, too"])
    lines = (tmp_path / "curves.csv").read_text().splitlines()
    assert lines[0] == 'step,one,"two, too",forgetting,aufc'
    assert lines[1:3] == ["100,2,9,0,0", "200,2.5,3,0.25,0.125"]
    assert len(lines) == 5
