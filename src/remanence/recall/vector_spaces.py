"""Keep an index per space in step with the store: what was stored is found by the next search, what was removed by none.

The store's version of a space says whether anything changed. New rows have higher ids and are read alone; the number of chunks then says whether rows are gone,
and only then are all ids compared. Not to be asked inside an open transaction: what is rolled back would stay in memory. Cost: one look at the
version per search; one pass over new rows after a write; all ids after a removal.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Int64

from remanence.recall.items import Selection
from remanence.recall.protocols import Store
from remanence.recall.vector_index import Found, VectorIndex


@dataclass
class Held:
    """The index of a space as of a version of it."""

    index: VectorIndex
    version: int | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)


class VectorSpaces:
    """Search the vectors of a store's spaces; shared by the retrievers over it and safe to use from several threads."""

    def __init__(self, store: Store):
        self.store = store
        self._held: dict[str, Held] = {}
        self._turn = threading.Lock()

    def of(self, space: str) -> VectorIndex:
        """Return the index of a space as the store has it now.

        Raises:
            Mistake: there is no such space.
        """
        version = self.store.version(space)
        with self._turn:
            held = self._held.setdefault(space, Held(VectorIndex(self.store.dim)))
        if held.version != version:
            with held.turn:
                self._catch_up(space, held)
        return held.index

    def _catch_up(self, space: str, held: Held) -> None:
        version = self.store.version(space)  # taken first: what is written from here on is read again by the next search
        if held.version == version:
            return
        index = held.index
        for ids, vectors in self.store.vectors(space, above=index.last):
            index.append(ids, vectors)
        if len(index) != self.store.stats(space)["chunks"]:
            stored = self.store.chunk_ids(Selection(space=space))
            index.remove(np.setdiff1d(index.ids(), stored, assume_unique=True))
            missing = np.setdiff1d(stored, index.ids(), assume_unique=True)
            if len(missing):  # ids that came to light out of order
                index.clear(above=int(missing[0]) - 1)
                for ids, vectors in self.store.vectors(space, above=int(missing[0]) - 1):
                    index.append(ids, vectors)
        held.version = version

    def search(self, space: str, query: Float32[np.ndarray, "D"], k: int, among: Int64[np.ndarray, "S"] | None = None) -> Found:
        """Return the k nearest chunks of a space and their cosines, best first, ties by the higher id."""
        return self.of(space).search(query, k, among)

    def scores(self, space: str, query: Float32[np.ndarray, "D"], ids: Int64[np.ndarray, "S"]) -> Float32[np.ndarray, "S"]:
        """Return the cosine of each of some chunks; NaN for one that is not there."""
        return self.of(space).scores(query, ids)

    def refresh(self) -> None:
        """Let go now of what the store no longer has, in every space."""
        stored = set(self.store.spaces())
        with self._turn:
            for space in set(self._held) - stored:
                del self._held[space]
            spaces = list(self._held)
        for space in spaces:
            self.of(space)

    def nbytes(self) -> int:
        """Return the memory that the indexes take."""
        return sum(held.index.nbytes for held in list(self._held.values()))
