"""Keep an index per space in step with the store: what was stored is found by the next search, what was removed by none.

The store's version of a space says whether anything changed. New rows have higher ids and are read alone; the number of chunks then says whether rows are gone,
and only then are all ids compared. Above `above` vectors a graph (`vector_cache`) names the candidates: it is read or made in the background, follows every
change, and is kept beside the store. Not to be asked inside an open transaction: what is rolled back would stay in memory.

Cost: one look at the version per search; one pass over new rows after a write; all ids after a removal.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from remanence.recall import vector_cache
from remanence.recall.items import Selection
from remanence.recall.protocols import Store
from remanence.recall.vector_cache import Graph
from remanence.recall.vector_index import Found, VectorIndex, best

ABOVE = 200_000  # vectors of a space from which on a graph names the candidates
POOL, MOST = 200, 1000  # candidates asked of the graph at least; more than MOST results are searched exactly
GROWN, HOLED = 1.2, 0.1  # written again when it has grown so much; made anew when this share of it is gone
log = logging.getLogger(__name__)


@dataclass
class Held:
    """The index of a space as of a version of it, and its graph once there is one."""

    index: VectorIndex
    version: int | None = None
    graph: Graph | None = None
    saved: int = 0  # vectors in the graph when it was last read, written, or could not be
    worker: threading.Thread | None = None
    turn: threading.Lock = field(default_factory=threading.Lock)


class VectorSpaces:
    """Search the vectors of a store's spaces; shared by the retrievers over it and safe to use from several threads.

    Args:
        store: whose vectors.
        above: vectors of a space from which on a graph names the candidates; `None`: never, every search is exact.
        threads: that build a graph; all processors but one by default.
    """

    def __init__(self, store: Store, *, above: int | None = ABOVE, threads: int | None = None):
        self.store = store
        self.above = above if vector_cache.available() else None
        self.threads = threads or max(1, (os.cpu_count() or 2) - 1)
        self._held: dict[str, Held] = {}
        self._turn = threading.Lock()

    def search(self, space: str, query: Float32[np.ndarray, "D"], k: int, among: Int64[np.ndarray, "S"] | None = None) -> Found:
        """Return the k nearest chunks of a space and their cosines, best first, ties by the higher id."""
        held = self._up_to_date(space)
        graph = held.graph
        if graph is not None and among is None and 0 < k <= MOST and self._large(held):
            ids = graph.near(query, max(POOL, 2 * k))
            scores = held.index.scores(query, ids)
            there = ~np.isnan(scores)
            if there.sum() >= k:
                return best(ids[there], scores[there], k)
        return held.index.search(query, k, among)

    def scores(self, space: str, query: Float32[np.ndarray, "D"], ids: Int64[np.ndarray, "S"]) -> Float32[np.ndarray, "S"]:
        """Return the cosine of each of some chunks; NaN for one that is not there."""
        return self.of(space).scores(query, ids)

    def of(self, space: str) -> VectorIndex:
        """Return the index of a space as the store has it now.

        Raises:
            Mistake: there is no such space.
        """
        return self._up_to_date(space).index

    def refresh(self) -> None:
        """Let go now of what the store no longer has, in every space."""
        stored = set(self.store.spaces())
        with self._turn:
            for space in set(self._held) - stored:
                del self._held[space]
            spaces = list(self._held)
        for space in spaces:
            self.of(space)

    def wait(self) -> None:
        """Wait until no graph is being made or written."""
        for held in list(self._held.values()):
            if held.worker is not None:
                held.worker.join()

    def graph(self, space: str) -> bool:
        """Return whether a graph names the candidates of a space now."""
        held = self._up_to_date(space)
        return held.graph is not None and self._large(held)

    def nbytes(self) -> int:
        """Return the memory that the indexes take, graphs aside."""
        return sum(held.index.nbytes for held in list(self._held.values()))

    def _large(self, held: Held) -> bool:
        return self.above is not None and len(held.index) > self.above

    def _up_to_date(self, space: str) -> Held:
        version = self.store.version(space)
        with self._turn:
            held = self._held.setdefault(space, Held(VectorIndex(self.store.dim)))
        if held.version != version:
            with held.turn:
                self._catch_up(space, held)
        return held

    def _catch_up(self, space: str, held: Held) -> None:
        """Read what the store has more, drop what it has no more, and tell the graph."""
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
                held.graph = None
                index.clear(above=int(missing[0]) - 1)
                for ids, vectors in self.store.vectors(space, above=int(missing[0]) - 1):
                    index.append(ids, vectors)
            held.graph = self._followed(held.graph, index, removed=True)
        held.graph = self._followed(held.graph, index)
        held.version = version  # last: from here on other threads search without waiting
        grown = held.graph is None or len(held.graph) > GROWN * held.saved
        if self._large(held) and grown and (held.worker is None or not held.worker.is_alive()):
            held.worker = threading.Thread(target=self._work, args=(space, held), name="remanence vector cache", daemon=True)
            held.worker.start()

    def _followed(self, graph: Graph | None, index: VectorIndex, *, removed: bool = False) -> Graph | None:
        """Return a graph brought to the rows of the index; `None` if it is better made anew."""
        if graph is None:
            return None
        if removed:
            graph.remove(np.setdiff1d(graph.ids(), index.ids(), assume_unique=True))
            if graph.holes > HOLED * len(graph):
                return None
        for ids, rows in index.blocks():
            new = np.searchsorted(ids, graph.last, side="right")
            graph.add(ids[new:], rows[new:], self.threads)
        return graph if len(graph) == len(index) else None

    def _work(self, space: str, held: Held) -> None:
        """Read or make a space's graph, and write it if it has grown; a cache that cannot be kept is none, so no error of it stops anyone."""
        try:
            folder = self.store.cache(space)
            path = None if folder is None else vector_cache.cache_file(folder, space)
            if held.graph is None:
                graph = Graph.load(path, held.index) if path is not None else None
                saved = 0 if graph is None else len(graph)
                if graph is None:
                    graph = Graph(held.index.dim)
                    for ids, rows in held.index.blocks():
                        self.store.version(space)  # a store that was closed, or a space that was dropped, ends it here
                        graph.add(ids, rows, self.threads)
                with held.turn:
                    held.graph, held.saved = self._followed(graph, held.index, removed=True), saved
            if path is not None:
                self._keep(space, held, path)
            held.saved = len(held.graph or ())  # tried: again when it has grown
        except Exception as error:
            held.saved = len(held.graph or ())
            log.info("the vector cache of a space was not kept (%s)", type(error).__name__)

    def _keep(self, space: str, held: Held, path: Path) -> None:
        """Write the graph while no one else writes, so that nothing that is being erased gets into a file after it was scrubbed."""
        with self.store.transaction(), held.turn:
            self._catch_up(space, held)
            graph = held.graph
            if graph is not None and not graph.holes and len(graph) > GROWN * held.saved:
                graph.save(path, held.index)
