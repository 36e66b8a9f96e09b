"""A million vectors (D = 384) in one space: searched through the graph and exactly; how long the graph takes to make, and to read from its file.

The vectors are handed over by a stand-in for the store, which would take minutes to fill: what a read adds to the search is the fetch of ten texts by their
ids, a few tenths of a millisecond at any size (`recall_speed`). `found` is the share of the exact ten nearest that the graph leads to; queries are new draws
from the same distribution, not stored vectors with noise, which would be found more easily. The graph is made by all processors; searches take one.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from benchmarks.recall_peer import resident
from benchmarks.recall_speed import DIM, K, against_goal, milliseconds, unit_vectors
from benchmarks.timing import Figure, Seconds, clocked, figure
from remanence.recall.vector_index import Found
from remanence.recall.vector_spaces import VectorSpaces

GOAL = 0.020  # seconds, the median


class Bulk:
    """The part of a store that an index reads: so many vectors, ids from 1, as fp16 gives them back."""

    embedder, dim = "given", DIM

    def __init__(self, count: int, folder: Path):
        self.count, self.folder = count, folder

    def version(self, space: str) -> int:
        return 1

    def vectors(self, space: str, *, above: int = 0, block: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        first = 1
        for found in unit_vectors(self.count, "vectors"):
            yield np.arange(first, first + len(found)), found.astype(np.float16).astype(np.float32)
            first += len(found)

    def stats(self, space: str) -> dict[str, int]:
        return {"chunks": self.count}

    def cache(self, space: str) -> Path:
        return self.folder

    def transaction(self) -> nullcontext:
        return nullcontext()


def searched(search: Callable[[np.ndarray], Found], queries: np.ndarray) -> tuple[list[Seconds], list[set[int]]]:
    """Search each query; return seconds and ids."""
    found: list[set[int]] = []
    seconds = [clocked(lambda q=query: found.append(set(search(q)[0].tolist()))) for query in queries]
    return seconds, found


def run(tiny: bool = False) -> list[Figure]:
    """Return the figures."""
    count, asked, above = (2_000, 5, 1_000) if tiny else (1_000_000, 100, 200_000)
    queries = np.concatenate(list(unit_vectors(asked, "queries")))
    with tempfile.TemporaryDirectory() as folder:
        store = Bulk(count, Path(folder))
        made = VectorSpaces(store, above=above, threads=os.cpu_count())  # type: ignore[arg-type]
        before = resident()
        reading = clocked(lambda: made.of("default"))
        rows = resident() - before
        building = clocked(made.wait)
        both = resident() - before
        made.search("default", queries[0], K)
        near, found = searched(lambda query: made.search("default", query, K), queries)
        plain, truth = searched(lambda query: made.of("default").search(query, K), queries)
        more = milliseconds(near) | {
            "found": statistics.mean(len(one & gold) / K for one, gold in zip(found, truth, strict=True)),
            "MiB of rows": rows / 2**20,
            "MiB of the graph": (both - rows) / 2**20,
        }
        figures = [against_goal(f"{count:,} chunks, by the graph", near, None if tiny else GOAL, more)]
        figures.append(figure(f"{count:,} chunks, a search: exact / by the graph", near, plain, "speedup", None, milliseconds(plain)))
        del made
        again = VectorSpaces(store, above=above)  # type: ignore[arg-type]
        again.of("default")
        loading = clocked(again.wait)
        rates = {"made, vectors per second": count / building[1], "rows made and read, s": reading[1], "read from its file, s": loading[1]}
        figures.append(figure(f"the graph of {count:,}: made / read from its file", [loading], [building], "speedup", None, rates))
    return figures
