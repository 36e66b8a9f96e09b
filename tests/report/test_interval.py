"""The t-interval equals scipy's, and missing seeds count for nothing."""

import numpy as np
import pytest
from scipy import stats

from remanence.report.interval import t_interval, wilson_interval
from remanence.seeds import numpy_generator


@pytest.mark.parametrize("seeds", [2, 3, 7, 40])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_interval_equals_scipys(seeds, level):
    values = numpy_generator(0, "interval", seeds).normal(3, 2, (4, 5, seeds))
    mean, half = t_interval(values, level)
    low, high = stats.t.interval(level, seeds - 1, loc=values.mean(-1), scale=stats.sem(values, axis=-1))
    assert mean.shape == half.shape == (4, 5)
    np.testing.assert_allclose(mean, values.mean(-1), rtol=1e-12)
    np.testing.assert_allclose(half, (high - low) / 2, rtol=1e-12)  # not the ends: one near 0 has lost its digits to cancellation


def test_missing_seeds_count_for_nothing():
    table = np.array([[1.0, np.nan, 3.0, 8.0], [np.nan, 5.0, np.nan, np.nan], [np.nan] * 4, [2.0, np.inf, 4.0, np.nan]])
    mean, half = t_interval(table)
    full_mean, full_half = t_interval(np.array([1.0, 3.0, 8.0]))
    assert mean[0] == pytest.approx(float(full_mean))
    assert half[0] == pytest.approx(float(full_half))
    assert mean[1] == 5.0
    assert np.isnan(half[1])
    assert np.isnan(mean[2])
    assert np.isnan(half[2])
    assert mean[3] == 3.0


def test_two_seeds_by_hand():
    mean, half = t_interval(np.array([1.0, 3.0]))  # s = sqrt(2), s / sqrt(2) = 1, t(0.975, 1) = 12.706
    assert float(mean) == 2.0
    assert float(half) == pytest.approx(12.7062047, abs=1e-6)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_impossible_level_is_refused(level):
    with pytest.raises(ValueError, match="level"):
        t_interval(np.zeros(3), level)


def test_wilson_interval_by_hand() -> None:
    z = 1.959963984540054
    low, high = wilson_interval(8, 10)
    middle, half = (0.8 + z * z / 20) / (1 + z * z / 10), z * (0.016 + z * z / 400) ** 0.5 / (1 + z * z / 10)
    assert (low, high) == pytest.approx((middle - half, middle + half))
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_wilson_interval_of_none_and_all_stays_within_0_and_1() -> None:
    assert wilson_interval(0, 20)[0] == pytest.approx(0.0)
    assert wilson_interval(20, 20)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 20)[1] > 0.1
    assert np.isnan(wilson_interval(0, 0)).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 2, level=1.0)
