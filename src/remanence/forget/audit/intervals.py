"""How sure a number is: the bootstrap over rows, and DeLong's interval of an AUC.

Rows count as independent. Where several rows say the same fact they are not, and intervals are too narrow: audit one row per fact, or read
them as a lower bound of the doubt.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from remanence.seeds import numpy_generator


def bootstrap(
    values: Float[np.ndarray, " N"], *, level: float = 0.95, resamples: int = 1000, seed: int = 0, share: bool = True
) -> tuple[float, float]:
    """Return the percentile interval of the mean (Efron 1979); O(N resamples). NaN without rows.

    Where all N values are equal the bootstrap sees no doubt at all: of `share`s of one that are all 0 or all 1 the exact one-sided bound stands in.
    """
    count, tail = len(values), (1 - level) / 2
    if count == 0:
        return math.nan, math.nan
    if share and values.min() == values.max() and values[0] in (0.0, 1.0):
        bound = 1 - tail ** (1 / count)  # Clopper and Pearson 1934 at 0 of N
        return (0.0, bound) if values[0] == 0 else (1 - bound, 1.0)
    draws = numpy_generator(seed, "bootstrap", count).multinomial(count, np.full(count, 1 / count), size=resamples)
    low, high = np.quantile(draws @ values / count, [tail, 1 - tail])
    return float(low), float(high)


def auc(inside: Float[np.ndarray, " M"], outside: Float[np.ndarray, " N"]) -> float:
    """Return P(inside > outside) + P(equal) / 2: 1 where the first are clearly recognisable, 0.5 for chance. O((M + N) log(M + N))."""
    return float(_placements(inside, outside)[0].mean())


def auc_interval(inside: Float[np.ndarray, " M"], outside: Float[np.ndarray, " N"], level: float = 0.95) -> tuple[float, float, float]:
    """Return the AUC and its interval (DeLong, DeLong and Clarke-Pearson 1988).

    At 0 and 1 that interval has no width; there the exact one-sided bound of the smaller sample stands in (ours). With fewer than two rows in a sample
    nothing is known: 0 to 1.
    """
    from scipy.special import ndtri

    first, second = _placements(inside, outside)
    value, tail = float(first.mean()), (1 - level) / 2
    if min(len(first), len(second)) < 2:
        return value, 0.0, 1.0
    half = float(ndtri(1 - tail)) * math.sqrt(first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second))
    if value in (0.0, 1.0):
        half = 1 - tail ** (1 / min(len(first), len(second)))
    return value, max(0.0, value - half), min(1.0, value + half)


def _placements(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of outside scores below each inside one, and of inside scores above each outside one; ties count half."""
    low, high = np.sort(outside), np.sort(inside)
    first = (np.searchsorted(low, inside, "left") + np.searchsorted(low, inside, "right")) / (2 * len(low))
    second = 1 - (np.searchsorted(high, outside, "left") + np.searchsorted(high, outside, "right")) / (2 * len(high))
    return first, second
