"""Semantic forgetting: how much a chunk is worth by age and recent use, and which ones are pruned.

HEMA (arXiv 2504.16754): w_i = lam * exp(-gamma * (t - i)) + beta * (...), where i is the turn a chunk was born in, t the present turn, and delta_i is 1 if it
entered a prompt in the last 100 turns, else 0. The paper contradicts itself about the bracket:

| `salience` | bracket | |
|---|---|---|
| `bonus` (default) | delta_i | as described: "a bonus for recent retrieval" |
| `as_printed` | 1 - delta_i | the equation as it stands: it rewards what was not used |

The default is the described one, because only it does what forgetting is for: what is asked for again and again stays, what nobody asks for goes. With the printed
sign a chunk loses beta at the moment in which it proves useful, and goes before unused ones of its age (`remanence reproduce hema` measures what that costs).

Age is counted in turns: a conversation that pauses for a year does not age. Cost: one pass over a conversation's chunks, every `period` turns.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, Int64

from remanence.recall.settings import HemaSettings


def salience(born: Int64[np.ndarray, "N"], retrieved: Int64[np.ndarray, "N"], now: int, settings: HemaSettings) -> Float64[np.ndarray, "N"]:
    """Return w_i of chunks born at turns `born`, last retrieved at turns `retrieved` (-1: never), at turn `now`."""
    delta = (retrieved >= 0) & (now - retrieved < settings.recent_window)
    bracket = delta if settings.salience == "bonus" else ~delta
    return settings.lam * np.exp(-settings.gamma * (now - born)) + settings.beta * bracket


def pruned(
    ids: Int64[np.ndarray, "N"], born: Int64[np.ndarray, "N"], retrieved: Int64[np.ndarray, "N"], now: int, settings: HemaSettings
) -> Int64[np.ndarray, "P"]:
    """Return the ids of ceil(prune_fraction * N) least salient chunks (ties: oldest first), and what `max_age` and `max_chunks` ask for beyond."""
    order = np.lexsort((ids, born, salience(born, retrieved, now, settings)))
    number = math.ceil(round(settings.prune_fraction * len(ids), 9))  # 0.005 * 600 is 3.0000000000000004 in some orders of multiplying
    if settings.max_chunks is not None:
        number = max(number, len(ids) - settings.max_chunks)
    gone = np.zeros(len(ids), dtype=bool)
    gone[order[:number]] = True
    if settings.max_age is not None:
        gone |= now - born > settings.max_age
    return ids[gone]
