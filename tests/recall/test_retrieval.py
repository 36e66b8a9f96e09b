"""Retrievers rank what the selection holds and nothing else, as brute force would, whatever is written or removed meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.recall.embedders import embed, load_embedder
from remanence.recall.items import Chunk, Selection
from remanence.recall.retrieval import Dense, Hybrid, Lexical, fused, load_retriever

EMBEDDER = load_embedder("hashing:64")


class ToyStore:
    """The reading side of a store, in a dictionary: one chunk per message."""

    embedder, dim = EMBEDDER.name, EMBEDDER.dim

    def __init__(self) -> None:
        self.held: dict[int, tuple[Chunk, np.ndarray]] = {}
        self.given, self.stamps = 0, {"default": 0}

    def add(
        self, text: str, space: str = "default", conversation: str = "default", person: str | None = None, id: int | None = None
    ) -> int:
        self.given = id or self.given + 1
        vector = embed(EMBEDDER, [text])[0].astype(np.float16).astype(np.float32)
        self.held[self.given] = Chunk(self.given, self.given, space, conversation, self.given, "user", text, person, 0.0), vector
        self.stamps[space] = self.stamps.get(space, 0) + 1
        return self.given

    def take(self, *ids: int) -> None:
        for id in ids:
            self.stamps[self.held.pop(id)[0].space] += 1

    def spaces(self) -> list[str]:
        return list(self.stamps)

    def version(self, space: str) -> int:
        if space not in self.stamps:
            raise Mistake("space", f"there is no '{space}'", "make it")
        return self.stamps[space]

    def of(self, selection: Selection) -> list[int]:
        chosen = [id for id, (chunk, _) in self.held.items() if selection.space in (None, chunk.space)]
        for name in ("conversation", "person", "role"):
            wanted = getattr(selection, name)
            chosen = [id for id in chosen if wanted is None or getattr(self.held[id][0], name) == wanted]
        return sorted(chosen)

    def chunk_ids(self, selection: Selection) -> np.ndarray:
        return np.array(self.of(selection), np.int64)

    def chunks(self, ids) -> list[Chunk]:
        return [self.held[id][0] for id in ids if id in self.held]

    def vectors(self, space: str, *, above: int = 0, block: int = 3):
        ids = [id for id in self.of(Selection(space=space)) if id > above]
        for first in range(0, len(ids), block):
            part = ids[first : first + block]
            yield np.array(part, np.int64), np.stack([self.held[id][1] for id in part])

    def stats(self, space: str | None = None) -> dict[str, int]:
        return {"chunks": len(self.of(Selection(space=space)))}

    def lexical(self, query: str, k: int, selection: Selection) -> list[tuple[int, float]]:
        words = set(query.split())
        found = [(id, float(len(words & set(self.held[id][0].text.split())))) for id in self.of(selection)]
        return sorted([pair for pair in found if pair[1]], key=lambda pair: (-pair[1], -pair[0]))[:k]


WORDS = ["red", "green", "blue", "house", "boat", "anna", "lisbon", "tea", "rain", "clock"]


@pytest.fixture
def store() -> ToyStore:
    made = ToyStore()
    rng = np.random.default_rng(0)
    for number in range(200):
        text = " ".join(rng.choice(WORDS, 4))
        made.add(text, "default" if number % 3 else "other", f"talk{number % 4}", ["anna", "ben", None][number % 3])
    return made


def brute(store: ToyStore, query: str, k: int, selection: Selection) -> list[int]:
    vector = embed(EMBEDDER, [query])[0].astype(np.float64)
    scores = {id: np.float32((store.held[id][1].astype(np.float64) * vector).sum()) for id in store.of(selection)}
    return sorted(scores, key=lambda id: (-scores[id], -id))[:k]


@pytest.mark.parametrize(
    "selection",
    [Selection(), Selection(space="other"), Selection(space=None), Selection(conversation="talk1"), Selection(space=None, person="ben")],
)
def test_dense_search_is_brute_force_over_the_selection(store: ToyStore, selection: Selection) -> None:
    dense = Dense(store, EMBEDDER)
    for query in ("red house", "anna lisbon tea", "nothing of it"):
        found = dense.search(query, 12, selection)
        assert [hit.chunk.id for hit in found] == brute(store, query, 12, selection)
        assert all(hit.parts == {"cosine": hit.score} for hit in found)


def test_what_was_stored_is_found_by_the_next_search_and_what_was_removed_by_none(store: ToyStore) -> None:
    retrievers = [Dense(store, EMBEDDER), Hybrid(store, EMBEDDER), Lexical(store)]
    for retriever in retrievers:
        retriever.search("red", 5, Selection())
    new = store.add("violet umbrella")
    for retriever in retrievers:
        assert retriever.search("violet umbrella", 1, Selection())[0].chunk.id == new
    store.take(new, *store.of(Selection(conversation="talk2")))
    again = store.add("violet umbrella")  # as many as before a removal and an addition
    for retriever in retrievers:
        found = retriever.search("violet umbrella", 300, Selection())
        assert found[0].chunk.id == again
        assert all(hit.chunk.id in store.held for hit in found)
        assert not any(hit.chunk.conversation == "talk2" for hit in found)


def test_ids_that_come_to_light_out_of_order_are_found(store: ToyStore) -> None:
    dense = Dense(store, EMBEDDER)
    store.add("late comer", id=500)
    assert dense.search("late comer", 1, Selection())[0].chunk.id == 500
    store.add("even later", id=450)
    store.add("after all", id=501)
    for query in ("late comer", "even later", "after all"):
        assert [hit.chunk.id for hit in dense.search(query, 9, Selection())] == brute(store, query, 9, Selection())


def test_spaces_never_see_each_other(store: ToyStore) -> None:
    for name in ("dense", "lexical", "hybrid", "weighted"):
        retriever = load_retriever(name, store, EMBEDDER)
        assert {hit.chunk.space for hit in retriever.search("red green blue", 300, Selection())} == {"default"}
        assert {hit.chunk.space for hit in retriever.search("red green blue", 300, Selection(space="other"))} == {"other"}


def test_a_space_that_is_made_again_shows_nothing_of_the_old_one(store: ToyStore) -> None:
    dense = Dense(store, EMBEDDER)
    dense.search("red", 5, Selection(space="other"))
    store.take(*store.of(Selection(space="other")))
    new = store.add("red house", "other")
    assert [hit.chunk.id for hit in dense.search("red", 5, Selection(space="other"))] == [new]


def test_refresh_lets_go_of_vectors_at_once(store: ToyStore) -> None:
    dense = Dense(store, EMBEDDER)
    dense.search("red", 5, Selection())
    index = dense.vectors.of("default")
    store.take(*store.of(Selection()))
    dense.vectors.refresh()
    assert len(index) == 0


def test_reciprocal_rank_fusion_by_hand() -> None:
    scores = fused([[(7, 0.9), (3, 0.5)], [(3, 4.0)]], [1, 1])
    assert scores == {7: 1 / 61, 3: 1 / 62 + 1 / 61}


def test_hybrid_tells_what_its_score_is_made_of(store: ToyStore) -> None:
    only = store.add("zebra")
    for how in ("rrf", "weighted"):
        found = Hybrid(store, EMBEDDER, how=how).search("zebra red", 10, Selection())
        assert only in [hit.chunk.id for hit in found]
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
        for hit in found:
            assert hit.parts[how] == hit.score
            assert hit.parts["cosine"] == pytest.approx(float(embed(EMBEDDER, ["zebra red"])[0] @ store.held[hit.chunk.id][1]), abs=1e-6)
            assert ("bm25" in hit.parts) == bool({"zebra", "red"} & set(hit.chunk.text.split()))


def test_weighted_by_hand(store: ToyStore) -> None:
    wanted = Hybrid(store, EMBEDDER, how="weighted", weight=1.0).search("anna tea", 20, Selection())
    assert [hit.chunk.id for hit in wanted] == brute(store, "anna tea", 20, Selection())
    words = Hybrid(store, EMBEDDER, how="weighted", weight=0.0).search("anna tea", 3, Selection())
    assert [hit.score for hit in words] == [1.0, 1.0, 1.0]


def test_another_embedder_is_refused(store: ToyStore) -> None:
    with pytest.raises(Mistake, match="holds vectors of hashing:64 .*reindex"):
        Dense(store, load_embedder("hashing:32"))


def test_unknown_names_and_spaces_are_refused(store: ToyStore) -> None:
    with pytest.raises(Mistake, match="did you mean 'dense'"):
        load_retriever("dence", store, EMBEDDER)
    with pytest.raises(Mistake, match="no way 'sum'"):
        Hybrid(store, EMBEDDER, how="sum")
    with pytest.raises(Mistake, match="no 'nowhere'"):
        Dense(store, EMBEDDER).search("x", 3, Selection(space="nowhere"))


def test_fewer_than_one_result_is_none(store: ToyStore) -> None:
    for name in ("dense", "lexical", "hybrid"):
        assert load_retriever(name, store, EMBEDDER).search("red", 0, Selection()) == []
