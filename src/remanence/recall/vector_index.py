"""Search the vectors of one space in memory, exactly: blocked matrix products, then the candidates again in double precision.

Rows lie in blocks by id, as fp16 where that loses nothing (a store's default precision) and as fp32 else. One pass gives every row's product with the query in
fp32, whose rounding is at most `slack`; all rows within it of the k-th best are multiplied again in fp64, so that the answer is that of brute force over the
stored vectors in fp64, whatever the order in which a kernel adds. Readers take a snapshot and never wait; writers take turns.

Measured on one core of an AMD EPYC (AVX-512), 100,000 rows, D = 384, milliseconds: fp32 rows by numpy 20 to 24, by torch 28; fp16 rows widened in blocks of
1,024 by torch 14 to 16 (the form here), by numpy 67; usearch's exact search on fp16 15 to 18, on int8 12 to 16. torch's product in fp16 itself takes 5 to 9 and is
wrong in the fourth digit, by an amount that no bound of its own limits. Cost: O(N D), 2 D + 8 bytes a row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64

BLOCK = 16384  # rows of a block: what a removal copies
PIECE = 1024  # rows that are widened at a time, so that they stay in the processor's cache
Found = tuple[Int64[np.ndarray, "K"], Float32[np.ndarray, "K"]]


@dataclass(frozen=True)
class Block:
    """Rows by id; those from `count` on are free, and a snapshot with a smaller count does not see what is written there."""

    ids: Int64[np.ndarray, "M"]
    rows: Float[np.ndarray, "M D"]
    count: int


class VectorIndex:
    """Hold the vectors of one space and find the nearest ones exactly; safe to use from several threads."""

    def __init__(self, dim: int, block: int = BLOCK):
        self.dim, self.block = dim, block
        self._blocks: tuple[Block, ...] = ()
        self._turn = threading.RLock()

    def __len__(self) -> int:
        return sum(block.count for block in self._blocks)

    @property
    def last(self) -> int:
        """The highest id, 0 where there is none."""
        blocks = self._blocks
        return int(blocks[-1].ids[blocks[-1].count - 1]) if blocks else 0

    @property
    def nbytes(self) -> int:
        """The memory that rows and ids take, free rows included."""
        return sum(block.rows.nbytes + block.ids.nbytes for block in self._blocks)

    def ids(self) -> Int64[np.ndarray, "N"]:
        """Return all ids, sorted."""
        return np.concatenate([np.zeros(0, np.int64), *(block.ids[: block.count] for block in self._blocks)])

    def blocks(self) -> Iterator[tuple[Int64[np.ndarray, "M"], Float[np.ndarray, "M D"]]]:
        """Yield ids and rows of each block, as they are held."""
        for block in self._blocks:
            yield block.ids[: block.count], block.rows[: block.count]

    def append(self, ids: Int64[np.ndarray, "N"], vectors: Float32[np.ndarray, "N D"]) -> None:
        """Add rows whose ids rise and are above all others."""
        with self._turn:
            if len(ids) and (ids[0] <= self.last or (np.diff(ids) <= 0).any()):
                raise ValueError("ids must rise")
            narrow = vectors.astype(np.float16)
            dtype = np.float16 if np.array_equal(narrow.astype(np.float32), vectors) else np.float32
            blocks = list(self._blocks)
            done = 0
            while done < len(ids):
                last = (
                    blocks.pop()
                    if blocks and blocks[-1].count < self.block and blocks[-1].rows.dtype.itemsize >= dtype().itemsize
                    else None
                )
                count = last.count if last else 0
                take = min(len(ids) - done, self.block - count)
                last = self._room(last, count + take, np.dtype(dtype))
                last.ids[count : count + take] = ids[done : done + take]
                last.rows[count : count + take] = vectors[done : done + take]
                blocks.append(Block(last.ids, last.rows, count + take))
                done += take
            self._blocks = tuple(blocks)

    def _room(self, block: Block | None, count: int, dtype: np.dtype) -> Block:
        """Return the block, or a larger copy of it, with room for so many rows."""
        if block and len(block.ids) >= count:
            return block
        room = min(self.block, max(64, 2 * count))
        larger = Block(np.zeros(room, np.int64), np.zeros((room, self.dim), block.rows.dtype if block else dtype), 0)
        if block:
            larger.ids[: block.count] = block.ids[: block.count]
            larger.rows[: block.count] = block.rows[: block.count]
        return larger

    def remove(self, ids: Int64[np.ndarray, "N"]) -> int:
        """Take rows out; their bytes go with the last search that still reads them. Return how many there were."""
        with self._turn:
            gone, blocks = np.unique(ids), []
            before = len(self)
            for block in self._blocks:
                own = block.ids[: block.count]
                places = places_of(own, gone)
                if not len(places):
                    blocks.append(block)
                elif len(places) < block.count:
                    keep = np.ones(block.count, bool)
                    keep[places] = False
                    blocks.append(Block(own[keep], block.rows[: block.count][keep], block.count - len(places)))
            self._blocks = tuple(blocks)
            return before - len(self)

    def clear(self, above: int = 0) -> None:
        """Take out all rows with ids above `above`."""
        with self._turn:
            ids = self.ids()
            self.remove(ids[ids > above])

    def search(self, query: Float32[np.ndarray, "D"], k: int, among: Int64[np.ndarray, "S"] | None = None) -> Found:
        """Return the k ids with the highest products with the query and the products, ties by the higher id; `among` (sorted) limits the ids."""
        query = np.ascontiguousarray(query, np.float32)
        parts = [(block, None if among is None else places_of(block.ids[: block.count], among)) for block in self._blocks]
        rough = [products(block.rows[: block.count], query, places) for block, places in parts]
        total = sum(map(len, rough))
        if not total or k < 1:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        scores = np.concatenate(rough)
        least = np.partition(scores, total - k)[total - k] - slack(query) if k < total else -np.inf
        ids, exact = [], []
        for (block, places), one in zip(parts, rough, strict=True):
            chosen = np.flatnonzero(one >= least)
            at = chosen if places is None else places[chosen]
            ids.append(block.ids[at])
            exact.append(products_fp64(block.rows, query, at))
        return best(np.concatenate(ids), np.concatenate(exact), k)

    def scores(self, query: Float32[np.ndarray, "D"], ids: Int64[np.ndarray, "S"]) -> Float32[np.ndarray, "S"]:
        """Return the exact product of the query with each of some ids, in their order; NaN where an id is not here."""
        order = np.argsort(ids, kind="stable")
        among, found = ids[order], np.full(len(ids), np.nan, np.float32)
        for block in self._blocks:
            own = block.ids[: block.count]
            if not len(own):
                continue
            at = np.searchsorted(own, among).clip(max=len(own) - 1)
            here = np.flatnonzero(own[at] == among)
            found[order[here]] = products_fp64(block.rows, query, at[here])
        return found


def places_of(own: Int64[np.ndarray, "M"], among: Int64[np.ndarray, "S"]) -> Int64[np.ndarray, "P"]:
    """Return where in `own` the ids of `among` stand; both are sorted."""
    if not len(own):
        return np.zeros(0, np.int64)
    near = among[np.searchsorted(among, own[0]) : np.searchsorted(among, own[-1], side="right")]
    at = np.searchsorted(own, near)
    return at[own[at] == near]


def products(
    rows: Float[np.ndarray, "M D"], query: Float32[np.ndarray, "D"], places: Int64[np.ndarray, "P"] | None
) -> Float32[np.ndarray, "P"]:
    """Return the products of rows, or of those at some places, with a query in fp32, PIECE rows at a time."""
    import torch  # here: a second of every command that searches nothing

    held, asked = torch.from_numpy(rows), torch.from_numpy(query)
    chosen = None if places is None or len(places) == len(rows) else torch.from_numpy(places)
    count = len(rows) if chosen is None else len(chosen)
    found, wide = torch.empty(count), torch.empty(min(PIECE, count), rows.shape[1])
    for first in range(0, count, PIECE):
        end = min(first + PIECE, count)
        part = held[first:end] if chosen is None else held[chosen[first:end]]
        torch.mv(part if part.dtype == torch.float32 else wide[: end - first].copy_(part), asked, out=found[first:end])
    return found.numpy()


def products_fp64(
    rows: Float[np.ndarray, "M D"], query: Float32[np.ndarray, "D"], places: Int64[np.ndarray, "P"]
) -> Float32[np.ndarray, "P"]:
    """Return the products of the rows at some places with a query: in fp64, one row like another, then rounded to fp32."""
    wide = query.astype(np.float64)
    parts = [places[first : first + PIECE] for first in range(0, len(places), PIECE)]
    found = [np.einsum("nd,d->n", rows[part].astype(np.float64), wide) for part in parts]  # not BLAS: no row's sum depends on its place
    return np.concatenate([np.zeros(0), *found]).astype(np.float32)


def slack(query: Float32[np.ndarray, "D"]) -> float:
    """Return how far apart two fp32 products of a query with rows of length 1.1 at most can stand in the wrong order (twice D u |q| |x|, and the last rounding)."""
    return 2 * (1.01 * len(query) + 2) * 2.0**-24 * 1.1 * float(np.linalg.norm(query.astype(np.float64)))


def best(ids: Int64[np.ndarray, "N"], scores: Float32[np.ndarray, "N"], k: int) -> Found:
    """Return the k ids with the highest scores, ties by the higher id."""
    order = np.lexsort((-ids, -scores))[:k]
    return ids[order], scores[order]
