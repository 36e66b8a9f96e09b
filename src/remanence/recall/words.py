"""Words of a text and BM25 over them in memory, for the spaces that no full-text index on disk may know.

BM25 (Robertson and Zaragoza 2009) as SQLite's FTS5 computes it: k1 = 1.2, b = 0.75, idf = ln((N - n + 0.5) / (n + 0.5)), at least 1e-6. Cost: the postings
of a space in memory, about 12 bytes per word of a text; a query touches the postings of its own words alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int64

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    """Return the words of a text: letters and digits, lower case, without diacritics."""
    plain = "".join(sign for sign in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(sign))
    return _WORD.findall(plain)


class Bm25:
    """Rank texts by the words that they share with a query.

    Args:
        texts: (id, text); ids grow.
    """

    def __init__(self, texts: Iterable[tuple[int, str]]):
        ids, sizes = [], []
        postings: dict[str, list[tuple[int, int]]] = {}
        for number, (key, text) in enumerate(texts):
            counts = Counter(words(text))
            ids.append(key)
            sizes.append(counts.total())
            for word, count in counts.items():
                postings.setdefault(word, []).append((number, count))
        self.ids: Int64[np.ndarray, "N"] = np.array(ids, dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.float64)
        self._postings = {word: np.array(found, dtype=np.int64) for word, found in postings.items()}

    def scores(self, query: str) -> Float64[np.ndarray, "N"]:
        """Return BM25 of every text, 0 where no word is shared."""
        scores = np.zeros(len(self.ids))
        mean = self._sizes.mean() if len(self.ids) else 1.0
        for word in dict.fromkeys(words(query)):
            found = self._postings.get(word)
            if found is None:
                continue
            rows, counts = found[:, 0], found[:, 1].astype(np.float64)
            idf = max(float(np.log((len(self.ids) - len(rows) + 0.5) / (len(rows) + 0.5))), 1e-6)
            scores[rows] += idf * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * self._sizes[rows] / mean))
        return scores

    def search(self, query: str, k: int, among: Int64[np.ndarray, "M"] | None = None) -> list[tuple[int, float]]:
        """Return at most `k` (id, score) of texts that share a word with the query, best first, ties by the higher id; `among`: of these ids alone."""
        scores = self.scores(query)
        if among is not None:
            scores[~np.isin(self.ids, among)] = 0.0
        found = np.flatnonzero(scores > 0)
        best = found[np.lexsort((-self.ids[found], -scores[found]))][:k]
        return [(int(self.ids[row]), float(scores[row])) for row in best]
