"""The mean over seeds and how sure of it we are: the two-sided t-interval."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def t_interval(values: Float[np.ndarray, "... seeds"], level: float = 0.95) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Return the mean over the last axis and the half-width of its t-interval.

    Missing seeds are NaN and count for nothing. The half-width is `t(level, n - 1) * s / sqrt(n)` with the sample standard deviation `s`
    (Student 1908); it is NaN where fewer than two seeds are present, and so is the mean where there is none. O(values).

    Args:
        values: one number per seed on the last axis, in any unit.
        level: coverage, strictly between 0 and 1.

    Raises:
        ValueError: `level` is not between 0 and 1.
    """
    from scipy.special import stdtrit  # imports in a fraction of the time that scipy.stats needs

    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    values = np.asarray(values, dtype=np.float64)
    present = np.isfinite(values)
    count = present.sum(-1)
    mean = np.where(count > 0, np.where(present, values, 0.0).sum(-1) / np.maximum(count, 1), np.nan)
    # a seed that is missing deviates by nothing and is not counted
    deviation = np.where(present, values, mean[..., None]) - mean[..., None]
    spread = np.sqrt(np.where(present, deviation, 0.0) ** 2 @ np.ones(values.shape[-1]) / np.maximum(count - 1, 1))
    half = stdtrit(np.maximum(count - 1, 1), 0.5 + level / 2) * spread / np.sqrt(np.maximum(count, 1))
    return mean, np.where(count > 1, half, np.nan)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927), NaN where nothing was counted.

    Args:
        successes: of `n` trials.
        level: coverage, strictly between 0 and 1.
    """
    from scipy.special import ndtri

    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if n == 0:
        return float("nan"), float("nan")
    z = float(ndtri(0.5 + level / 2))
    share, scale = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
