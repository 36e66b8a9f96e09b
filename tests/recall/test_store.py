"""The store: what is written is there, what is deleted is not."""

from __future__ import annotations

import numpy as np
import pytest

from remanence.errors import Mistake
from remanence.recall.items import Gist, NewChunk, NewMessage, Selection
from remanence.recall.sqlite_store import SqliteStore

DIM = 8


def unit(seed):
    vector = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def whole(text, seed=0):
    return [NewChunk(0, len(text), unit(seed))]


def say(store, text, space="default", conversation="default", seed=0, **more):
    return store.append(space, conversation, NewMessage("user", text, **more), whole(text, seed))


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def store(tmp_path):
    with SqliteStore(tmp_path / "store", embedder="stub", dim=DIM) as store:
        yield store


@pytest.mark.parametrize("sealed", [False, True])
def test_what_was_written_is_read_back_after_reopening(tmp_path, sealed):
    with SqliteStore(tmp_path / "s", embedder="stub", dim=DIM) as store:
        store.make_space("a", encrypt=sealed)
        first, ids = say(store, "The otter sleeps.", "a", "c", 1, person="Ada", at=5.0, meta={"x": [1, "é"]}, key="k1")
        second, more = say(store, "The badger digs.", "a", "c", 2)
        store.put_gists("a", "c", [Gist("c", "running", 1, 1, 2, "otter, badger", 1)])
        fact = store.add_fact("a", "Ada likes otters", conversation="c", sources=[first.id], pinned=True)
        store.touch(ids, 2)
        vectors = [block for block in store.vectors("a")]
    with SqliteStore(tmp_path / "s", embedder="stub", dim=DIM) as store:
        assert store.messages(Selection("a")) == [first, second]
        assert [second.turn, store.last_turn("a", "c")] == [2, 2]
        assert first.meta == {"x": [1, "é"]} and first.person == "Ada"
        found = store.chunks([*more, *ids])
        assert [chunk.text for chunk in found] == ["The badger digs.", "The otter sleeps."]
        assert found[1].last_retrieved == 2
        again = [block for block in store.vectors("a")]
        assert np.array_equal(again[0][1], vectors[0][1])
        np.testing.assert_allclose(again[0][1], [unit(1), unit(2)], atol=1e-3)
        assert store.facts("a") == [fact] == store.facts("a", "c", pinned=True)
        assert store.gists("a", "c")[0].text == "otter, badger" and store.gist_history("a", "c")[0][0] == 2
        assert [id for id, _ in store.lexical("OTTER", 5, Selection("a"))] == ids
        assert store.messages(Selection(None, person="Ada")) == [first]
        assert say(store, "again", "a", "c", key="k1") == (first, [])
        assert store.conversations("a")[0]["messages"] == 2
        assert list(store.ages("a", "c")[2]) == [2, -1]
        assert store.delete([first.id]) == {"messages": 1, "chunks": 1, "vectors": 1, "facts": 1}
        store.scrub()
        assert store.messages(Selection("a")) == [second] and store.facts("a") == []
        assert store.lexical("otter", 5, Selection("a")) == []


def test_a_turn_that_is_not_above_the_last_is_refused(store):
    say(store, "one", turn=5)
    with pytest.raises(Mistake, match="not above the last"):
        say(store, "two", turn=5)
    assert say(store, "three")[0].turn == 6


def test_a_second_writer_is_refused_and_a_reader_let_in(store):
    say(store, "one")
    with pytest.raises(Mistake, match="being written by process"):
        SqliteStore(store.path, embedder="stub", dim=DIM)
    with SqliteStore(store.path, write=False) as reader:
        assert reader.messages(Selection())[0].text == "one"
        with pytest.raises(Mistake, match="open for reading"):
            say(reader, "two")


def test_a_transaction_that_fails_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.transaction():
        say(store, "one", "new")
        raise ZeroDivisionError
    assert store.spaces() == []
