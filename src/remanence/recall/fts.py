"""FTS5 as the index of words on disk: one table per space, so that no space's words weigh in another's ranking; it keeps no text.

FTS5 hands out the postings of a word (`fts5vocab`), BM25 is computed over them here: its own `bm25()` looks up the size of every text that it ranks, at
2.5 microseconds each, which is 20 times the cost of this form for a common word. Sizes stay in memory: 16 bytes per chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from remanence.recall.sqlite_database import SqliteDatabase
from remanence.recall.words import best, bm25


class Fts:
    """The word indexes of a database."""

    def __init__(self, database: SqliteDatabase):
        self._database = database
        self._mutex = threading.Lock()
        self._kept: dict[int, tuple[int, Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]] = {}

    def make(self, space: int) -> None:
        """Make the index of a space."""
        # ascii: what is not ASCII is part of a word, so FTS5 cuts where `words` did and nowhere else
        self._database.do(f"CREATE VIRTUAL TABLE words_{space} USING fts5(text, content='', tokenize='ascii')")
        self._database.do(f"CREATE VIRTUAL TABLE postings_{space} USING fts5vocab(words_{space}, instance)")

    def drop(self, space: int) -> None:
        """Remove the index of a space."""
        self._database.do(f"DROP TABLE postings_{space}")
        self._database.do(f"DROP TABLE words_{space}")
        self._kept.pop(space, None)

    def add(self, space: int, chunk: int, said: Sequence[str]) -> None:
        """Index the words of a chunk."""
        self._database.do(f"INSERT INTO words_{space}(rowid, text) VALUES(?, ?)", chunk, " ".join(said))

    def remove(self, space: int, chunk: int, said: Sequence[str]) -> None:
        """Forget a chunk; `said` is what was given to `add`."""
        statement = f"INSERT INTO words_{space}(words_{space}, rowid, text) VALUES('delete', ?, ?)"
        self._database.do(statement, chunk, " ".join(said))

    def search(self, space: int, sought: Sequence[str], k: int, among: Int64[np.ndarray, "M"] | None) -> list[tuple[int, float]]:
        """Return (chunk, BM25 score) of chunks with any of the words, best first; `among`: of these chunks alone."""
        ids, sizes = self._sizes(space)
        postings = []
        for word in sought if len(ids) else ():
            listed = self._database.numbers(f"SELECT doc AS n FROM postings_{space} WHERE term = ?", word)
            if len(listed):
                found, counts = np.unique(listed, return_counts=True)
                rows = np.minimum(np.searchsorted(ids, found), len(ids) - 1)
                there = ids[rows] == found  # another thread may have added some meanwhile
                postings.append((rows[there], counts[there]))
        return best(ids, bm25(sizes, postings), k, among)

    def _sizes(self, space: int) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """Return ids and sizes in words of the chunks of a space, by id; from memory while nothing has changed."""
        version = self._database.one("SELECT version FROM spaces WHERE id = ?", space)
        with self._mutex:
            kept, ids, sizes = self._kept.get(space, (None, np.empty(0, np.int64), np.empty(0, np.int64)))
            if kept != version:
                if self._database.one(
                    "SELECT COUNT(*) FROM chunks WHERE space = ? AND id <= ?", space, int(ids[-1]) if len(ids) else 0
                ) != len(ids):
                    ids, sizes = ids[:0], sizes[:0]  # some are gone: all anew
                question = "SELECT group_concat(id), group_concat(words) FROM (SELECT id, words FROM chunks WHERE space = ? AND id > ? ORDER BY id)"
                fresh = self._database.all(question, space, int(ids[-1]) if len(ids) else 0)[0]
                if fresh[0]:
                    ids, sizes = (
                        np.concatenate([old, np.fromstring(new, dtype=np.int64, sep=",")]) for old, new in zip((ids, sizes), fresh)
                    )
                self._kept[space] = (version, ids, sizes)
                self._database.afterwards(None, self._kept.clear)  # numbers that are taken back are given again
            return ids, sizes

    def purge(self, space: int) -> None:
        """Merge the index into one piece: words of removed chunks stay in older pieces until then."""
        self._database.do(f"INSERT INTO words_{space}(words_{space}) VALUES('optimize')")
