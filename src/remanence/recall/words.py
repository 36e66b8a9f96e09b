"""Words of a text, and BM25 over them in memory, for the spaces that no full-text index on disk may know.

BM25 (Robertson and Zaragoza 2009) as SQLite's FTS5 computes it: k1 = 1.2, b = 0.75, idf = ln((N - n + 0.5) / (n + 0.5)), at least 1e-6. Cost: the postings
of a space in memory, about 16 bytes per different word of a text; a query touches the postings of its own words alone.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from array import array
from collections import Counter

import numpy as np
from jaxtyping import Float64, Int64

MOST = 256  # different words of a query that are looked for; the rest of a longer one adds next to nothing to a ranking
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def words(text: str) -> list[str]:
    """Return the words of a text: letters and digits, lower case, without diacritics; a Chinese or Japanese sign is a word of its own."""
    if text.isascii():
        return _WORD.findall(text.lower())
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(sign))
    return _WORD.findall(unicodedata.normalize("NFC", plain))  # composed again: a Korean syllable is one sign


def asked(query: str) -> list[str]:
    """Return the different words of a query, at most `MOST`."""
    return list(dict.fromkeys(words(query)))[:MOST]


class Bm25:
    """Rank texts by the words that they share with a query; texts come with growing ids and may go."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._ids, self._sizes, self._alive = array("q"), array("q"), array("b")
        self._postings: dict[str, tuple[array[int], array[int]]] = {}

    def ids(self) -> Int64[np.ndarray, "N"]:
        """Return the ids of the texts that are there."""
        with self._mutex:
            return np.array(self._ids, dtype=np.int64)[np.array(self._alive, dtype=bool)]

    def add(self, id: int, text: str) -> None:
        """Add a text whose id is above all others."""
        counts = Counter(words(text))
        with self._mutex:
            row = len(self._ids)
            self._ids.append(id)
            self._sizes.append(counts.total())
            self._alive.append(1)
            for word, count in counts.items():
                rows, times = self._postings.setdefault(word, (array("q"), array("q")))
                rows.append(row)
                times.append(count)

    def remove(self, ids: Int64[np.ndarray, "M"]) -> None:
        """Let texts go: they count no more."""
        with self._mutex:
            for row in np.flatnonzero(np.isin(np.array(self._ids, dtype=np.int64), ids)):
                self._alive[row] = 0

    def search(self, query: str, k: int, among: Int64[np.ndarray, "M"] | None = None) -> list[tuple[int, float]]:
        """Return at most `k` (id, score) of texts that share a word with the query, best first, ties by the higher id; `among`: of these ids alone."""
        with self._mutex:
            ids, scores = np.array(self._ids, dtype=np.int64), self._scores(query)
        if among is not None:
            scores[~np.isin(ids, among)] = 0.0
        found = np.flatnonzero(scores > 0)
        best = found[np.lexsort((-ids[found], -scores[found]))][:k]
        return [(int(ids[row]), float(scores[row])) for row in best]

    def _scores(self, query: str) -> Float64[np.ndarray, "N"]:
        alive = np.array(self._alive, dtype=bool)
        sizes = np.array(self._sizes, dtype=np.float64)
        scores, total = np.zeros(len(alive)), int(alive.sum())
        mean = sizes[alive].mean() if total else 1.0
        for word in asked(query):
            if word not in self._postings:
                continue
            rows, times = (np.array(part, dtype=np.int64) for part in self._postings[word])
            there = alive[rows]
            rows, counts, n = rows[there], times[there].astype(np.float64), int(there.sum())
            idf = max(float(np.log((total - n + 0.5) / (n + 0.5))), 1e-6)
            scores[rows] += idf * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * sizes[rows] / mean))
        return scores
