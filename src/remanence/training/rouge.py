"""ROUGE-L: how much of one text stands in another, by the longest common subsequence of their words (Lin 2004).

Words are runs of letters and digits in lower case. They are not stemmed, unlike in the package behind TOFU's and MUSE's tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from remanence.errors import Mistake


class Rouge(NamedTuple):
    """ROUGE-L of N pairs."""

    recall: Float[np.ndarray, " N"]
    precision: Float[np.ndarray, " N"]
    f1: Float[np.ndarray, " N"]


def rouge_l(true: Sequence[str], said: Sequence[str]) -> Rouge:
    """Return ROUGE-L of each pair: LCS over words of the truth (recall), over words said (precision), their harmonic mean; 0 where either is empty."""
    if len(true) != len(said):
        raise Mistake("rouge_l", f"{len(said)} texts against {len(true)}", "give one for each")
    known: dict[str, int] = {}
    first, second = ([[known.setdefault(word, len(known)) for word in words(text)] for text in texts] for texts in (true, said))
    shared = lcs(_padded(first, -1), _padded(second, -2))
    lengths = [np.array([max(1, len(row)) for row in rows]) for rows in (first, second)]
    recall, precision = shared / lengths[0], shared / lengths[1]
    return Rouge(recall, precision, 2 * recall * precision / np.maximum(recall + precision, 1e-300))


def words(text: str) -> list[str]:
    """Return the lower-case runs of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


def lcs(first: Int[np.ndarray, "B N"], second: Int[np.ndarray, "B M"]) -> Int[np.ndarray, " B"]:
    """Return the length of the longest common subsequence of each pair; pads of the two must differ. O(B N M), vectorised but for N."""
    best = np.zeros((len(first), second.shape[1] + 1), np.int64)  # of the words so far against each prefix of the second
    for column in first.T:
        best[:, 1:] = np.maximum.accumulate(np.where(second == column[:, None], best[:, :-1] + 1, best[:, 1:]), axis=1)
    return best[:, -1]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Int[np.ndarray, "B N"]:
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    inside = np.arange(out.shape[1]) < np.array([len(row) for row in rows])[:, None]
    out[inside] = [word for row in rows for word in row]
    return out
