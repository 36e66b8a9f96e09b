"""Rank a store's chunks for a query: by meaning, by words, or by both.

| retriever | score | parts of a hit |
|---|---|---|
| `Dense` | cosine of the query's vector and the chunk's | cosine |
| `Lexical` | BM25 over the words | bm25 |
| `Hybrid`, how=`rrf` | reciprocal rank fusion of both lists, sum of 1 / (60 + rank) (Cormack et al. 2009) | cosine, bm25 (where it was found by words), rrf |
| `Hybrid`, how=`weighted` | weight * cosine + (1 - weight) * bm25 / highest bm25 | cosine, bm25, weighted |

All obey the selection, whose messages the store names, and break ties by the higher (younger) id. Cost: one embedding and one pass over the vectors (Dense), one
look into the full-text index (Lexical), both (Hybrid).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from remanence.errors import Mistake, nearest
from remanence.recall.embedders import embed
from remanence.recall.items import Hit, Selection
from remanence.recall.protocols import Embedder, Retriever, Store
from remanence.recall.vector_spaces import VectorSpaces

HOW = ("rrf", "weighted")
RANK = 60  # of reciprocal rank fusion
Ranked = list[tuple[int, float]]  # (chunk id, score), best first


class Dense:
    """Rank by cosine, exactly.

    Args:
        store: whose chunks.
        embedder: must be the one that the store was made with.
        vectors: an index to share with other retrievers; by default one is made.
    """

    name = "dense"

    def __init__(self, store: Store, embedder: Embedder, vectors: VectorSpaces | None = None):
        fits(store, embedder)
        self.store, self.embedder = store, embedder
        self.vectors = vectors or VectorSpaces(store)

    def search(self, query: str, k: int, selection: Selection) -> list[Hit]:
        """Return the k chunks nearest to the query."""
        found = self.ranked(embed(self.embedder, [query])[0], k, selection)
        return hits(self.store, found, {id: {"cosine": score} for id, score in found})

    def ranked(self, vector: Float32[np.ndarray, "D"], k: int, selection: Selection) -> Ranked:
        """Return the k chunks of a selection that are nearest to a vector, with their cosines."""
        found: Ranked = []
        for space in [selection.space] if selection.space is not None else self.store.spaces():
            here = replace(selection, space=space)
            among = None if here == Selection(space=space) else self.store.chunk_ids(here)
            ids, scores = self.vectors.search(space, vector, k, among)
            found += zip(ids.tolist(), scores.tolist(), strict=True)
        return in_order(found)[:k]

    def refresh(self) -> None:
        """Let go now of vectors that the store no longer has."""
        self.vectors.refresh()

    def cosines(self, vector: Float32[np.ndarray, "D"], ids: Sequence[int], selection: Selection) -> dict[int, float]:
        """Return the cosine of each of some chunks of the selection's space, or of all spaces; an id that is not there is left out."""
        found: dict[int, float] = {}
        for space in [selection.space] if selection.space is not None else self.store.spaces():
            left = np.array([id for id in ids if id not in found], np.int64)
            scores = self.vectors.scores(space, vector, left)
            found |= {int(id): float(score) for id, score in zip(left, scores, strict=True) if not np.isnan(score)}
        return found


class Lexical:
    """Rank by BM25, as the store's full-text index gives it."""

    name = "lexical"

    def __init__(self, store: Store):
        self.store = store

    def search(self, query: str, k: int, selection: Selection) -> list[Hit]:
        """Return the k best chunks with any of the query's words."""
        found = self.ranked(query, k, selection)
        return hits(self.store, found, {id: {"bm25": score} for id, score in found})

    def ranked(self, query: str, k: int, selection: Selection) -> Ranked:
        """Return the k best chunks with any of the query's words, with their scores."""
        return in_order(self.store.lexical(query, k, selection))[:k] if k > 0 else []

    def refresh(self) -> None:
        """Do nothing: the words are the store's."""


class Hybrid:
    """Rank by meaning and by words together.

    Args:
        store: whose chunks.
        embedder: must be the one that the store was made with.
        how: rrf | weighted.
        weight: of the cosine, 0 to 1 (weighted; in rrf it weighs the two lists, 0.5 each by default).
        pool: candidates taken from each list, at least k.
        vectors: an index to share with other retrievers.
    """

    name = "hybrid"

    def __init__(
        self,
        store: Store,
        embedder: Embedder,
        *,
        how: str = "rrf",
        weight: float = 0.5,
        pool: int = 50,
        vectors: VectorSpaces | None = None,
    ):
        if how not in HOW:
            raise Mistake("hybrid", f"there is no way '{how}' to put two rankings together", nearest(how, HOW))
        if not 0 <= weight <= 1:
            raise Mistake("hybrid", f"the weight of the cosine is {weight}", "take one from 0 to 1")
        self.how, self.weight, self.pool = how, weight, pool
        self.store = store
        self.dense, self.lexical = Dense(store, embedder, vectors), Lexical(store)
        self.vectors = self.dense.vectors

    def search(self, query: str, k: int, selection: Selection) -> list[Hit]:
        """Return the k chunks that both rankings together put first."""
        if k < 1:
            return []
        pool, vector = max(k, self.pool), embed(self.dense.embedder, [query])[0]
        near = self.dense.ranked(vector, pool, selection)
        worded = self.lexical.ranked(query, pool, selection)
        cosines = dict(near)
        cosines |= self.dense.cosines(vector, [id for id, _ in worded if id not in cosines], selection)
        worded = [(id, score) for id, score in worded if id in cosines]  # one that went meanwhile is gone
        bm25 = dict(worded)
        if self.how == "rrf":
            scores = fused([near, worded], [2 * self.weight, 2 - 2 * self.weight])
        else:
            top = max([*bm25.values(), 1e-9])
            scores = {id: self.weight * cosine + (1 - self.weight) * max(0.0, bm25.get(id, 0.0)) / top for id, cosine in cosines.items()}
        found = in_order(scores.items())[:k]
        parts = {id: {"cosine": cosines[id], **({"bm25": bm25[id]} if id in bm25 else {}), self.how: score} for id, score in found}
        return hits(self.store, found, parts)

    def refresh(self) -> None:
        """Let go now of vectors that the store no longer has."""
        self.vectors.refresh()


def load_retriever(name: str, store: Store, embedder: Embedder) -> Retriever:
    """Make a retriever by name: dense, lexical, hybrid (rrf) or weighted.

    Raises:
        Mistake: there is no such retriever, or the store was made with another embedder.
    """
    if name == "lexical":
        return Lexical(store)
    if name == "dense":
        return Dense(store, embedder)
    if name in ("hybrid", "weighted"):
        return Hybrid(store, embedder, how="rrf" if name == "hybrid" else name)
    raise Mistake("retriever", f"there is no '{name}'", nearest(name, ("dense", "lexical", "hybrid", "weighted")))


def fits(store: Store, embedder: Embedder) -> None:
    """Refuse an embedder whose vectors are not those of the store.

    Raises:
        Mistake: the names or the dimensions differ.
    """
    if (store.embedder, store.dim) != (embedder.name, embedder.dim):
        problem = f"the store holds vectors of {store.embedder} ({store.dim} dimensions), not of {embedder.name} ({embedder.dim})"
        raise Mistake("embedder", problem, f"take {store.embedder}, or embed the store again (reindex)")


def fused(rankings: Sequence[Ranked], weights: Sequence[float]) -> dict[int, float]:
    """Return the sum of weight / (60 + rank) of each id over the rankings it is in (reciprocal rank fusion)."""
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, (id, _) in enumerate(ranking, 1):
            scores[id] = scores.get(id, 0.0) + weight / (RANK + rank)
    return scores


def in_order(found: Iterable[tuple[int, float]]) -> Ranked:
    """Return pairs by falling score, ties by the higher id."""
    return sorted(found, key=lambda pair: (-pair[1], -pair[0]))


def hits(store: Store, found: Ranked, parts: Mapping[int, Mapping[str, float]]) -> list[Hit]:
    """Return the hits of ranked ids; what was erased meanwhile is left out."""
    scores = dict(found)
    return [Hit(chunk, scores[chunk.id], parts[chunk.id]) for chunk in store.chunks([id for id, _ in found])]
