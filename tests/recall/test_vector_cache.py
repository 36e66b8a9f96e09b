"""The graph above many vectors: disposable, rebuilt when damaged or stale, never wrong about a score, and without what was removed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from remanence.recall.items import NewChunk, NewMessage, Selection
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.vector_cache import Graph, cache_file
from remanence.recall.vector_index import VectorIndex
from remanence.recall.vector_spaces import Held, VectorSpaces
from remanence.seeds import numpy_generator

pytest.importorskip("usearch")
DIM, COUNT = 32, 600


def vectors(count: int, *parts: object) -> np.ndarray:
    found = numpy_generator(0, *parts).standard_normal((count, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def put(store: SqliteStore, rows: np.ndarray, space: str = "default") -> list[int]:
    """Store one message per vector and return the messages' ids."""
    with store.transaction():
        return [store.append(space, "talk", NewMessage("user", "words"), [NewChunk(0, 5, row)])[0].id for row in rows]


@pytest.fixture
def store(tmp_path: Path):
    with SqliteStore(tmp_path / "store", embedder="none", dim=DIM) as made:
        put(made, vectors(COUNT, "rows"))
        yield made


def spaces(store: SqliteStore, above: int = 100) -> VectorSpaces:
    """Return an index whose graph is there."""
    made = VectorSpaces(store, above=above, threads=1)
    made.of("default")
    made.wait()
    return made


def file_of(store: SqliteStore) -> Path:
    return cache_file(store.path / "vectors", "default")


def test_recall_at_10_of_the_graph_is_above_95_percent_and_its_scores_are_exact(store: SqliteStore) -> None:
    graph, exact = spaces(store), VectorSpaces(store, above=None)
    assert graph.graph("default")
    assert not exact.graph("default")
    hits = 0
    for query in vectors(50, "queries"):
        found, scores = graph.search("default", query, 10)
        wanted, _ = exact.search("default", query, 10)
        hits += len(set(found.tolist()) & set(wanted.tolist()))
        assert scores.tolist() == exact.scores("default", query, found).tolist()
    assert hits / 500 >= 0.95


def test_a_selection_and_small_spaces_are_searched_exactly(store: SqliteStore) -> None:
    put(store, vectors(50, "small"), "small")
    graph, exact = spaces(store), VectorSpaces(store, above=None)
    graph.of("small")
    graph.wait()
    assert not graph.graph("small")
    some = store.chunk_ids(Selection())[::7]
    for query in vectors(10, "queries"):
        assert graph.search("default", query, 10, some)[0].tolist() == exact.search("default", query, 10, some)[0].tolist()
        assert graph.search("small", query, 10)[0].tolist() == exact.search("small", query, 10)[0].tolist()
    assert len(graph.search("default", query, COUNT)[0]) == COUNT


def test_new_rows_are_found_and_removed_ones_are_not_and_their_file_is_gone(store: SqliteStore) -> None:
    held, query = spaces(store), vectors(1, "new")[0]
    assert file_of(store).exists()
    (message,) = put(store, query[None])
    (new,) = store.chunk_ids(Selection(ids=(message,))).tolist()
    assert held.search("default", query, 1)[0].tolist() == [new]
    store.prune([new])
    assert not list((store.path / "vectors").glob("*"))
    assert new not in held.search("default", query, 100)[0]
    assert held.graph("default")
    put(store, vectors(COUNT, "more"))
    held.of("default")
    held.wait()
    assert not file_of(store).exists()  # the graph in memory still has the removed row's bytes


@pytest.mark.parametrize("how", ["delete", "replace", "drop_space", "scrub"])
def test_no_removal_leaves_a_cache_behind(store: SqliteStore, how: str) -> None:
    spaces(store)
    assert file_of(store).exists()
    first = store.messages(Selection(), limit=1)[0].id
    if how == "delete":
        store.delete([first])
    elif how == "replace":
        store.replace(first, "other", [NewChunk(0, 5, vectors(1, "other")[0])], at=1.0)
    elif how == "drop_space":
        store.drop_space("default")
    else:
        store.scrub()
    assert not list((store.path / "vectors").glob("*"))


def test_many_removals_make_the_graph_anew(store: SqliteStore) -> None:
    held = spaces(store)
    store.prune(store.chunk_ids(Selection())[:200].tolist())
    held.of("default")
    held.wait()
    assert held.graph("default")
    assert file_of(store).exists()
    found = held.search("default", vectors(COUNT, "rows")[0], 100)[0]
    assert np.isin(found, store.chunk_ids(Selection())).all()


def test_a_kept_graph_is_read_again(store: SqliteStore, monkeypatch) -> None:
    spaces(store)
    put(store, vectors(3, "later"))  # after it was written
    monkeypatch.setattr(Graph, "save", lambda *_: pytest.fail("written again"))
    loaded, load = [], Graph.load.__func__
    monkeypatch.setattr(Graph, "load", classmethod(lambda cls, *given: loaded.append(load(cls, *given)) or loaded[-1]))
    held = spaces(store)
    assert held.graph("default")
    assert len(loaded) == 1
    assert loaded[0] is not None
    assert held.search("default", vectors(3, "later")[2], 1)[0].tolist() == [int(store.chunk_ids(Selection())[-1])]


@pytest.mark.parametrize(
    "harm", ["torn", "flipped", "empty", "stampless", "bad stamp", "listed stamp", "stale", "other format", "a folder"]
)
def test_a_damaged_or_stale_cache_is_made_anew(store: SqliteStore, harm: str) -> None:
    spaces(store)
    file, stamp = file_of(store), file_of(store).with_suffix(".json")
    whole, told = file.read_bytes(), json.loads(stamp.read_text())
    if harm == "torn":
        file.write_bytes(whole[: len(whole) // 2])
    elif harm == "flipped":
        file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 255]) + whole[1001:])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "stampless":
        stamp.unlink()
    elif harm == "bad stamp":
        stamp.write_bytes(b"\xff{")
    elif harm == "listed stamp":
        stamp.write_text("[1]")
    elif harm == "stale":
        stamp.write_text(json.dumps(told | {"rows": told["rows"] ^ 1}))
    elif harm == "other format":
        stamp.write_text(json.dumps(told | {"format": 99}))
    else:
        file.unlink()
        file.mkdir()
    index = VectorSpaces(store, above=None).of("default")
    assert Graph.load(file, index) is None
    held = spaces(store)
    assert held.graph("default")
    assert held.search("default", vectors(COUNT, "rows")[7], 1)[0].tolist() == [8]
    assert harm == "a folder" or Graph.load(file, index) is not None


def test_a_sealed_space_leaves_no_vector_on_the_disk_in_the_clear(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    with SqliteStore(tmp_path / "store", embedder="none", dim=DIM) as store:
        store.make_space("secret", encrypt=True)
        put(store, vectors(200, "rows"), "secret")
        held = VectorSpaces(store, above=100, threads=1)
        held.of("secret")
        held.wait()
        assert held.graph("secret")
        assert not (store.path / "vectors").exists()


def test_a_graph_with_removed_rows_is_never_written(tmp_path: Path) -> None:
    index, graph = VectorIndex(DIM), Graph(DIM)
    index.append(np.arange(1, 101), vectors(100, "rows"))
    graph.add(np.arange(1, 101), vectors(100, "rows"))
    graph.remove(np.array([4, 4000]))
    assert (len(graph), graph.holes) == (99, 1)
    with pytest.raises(ValueError, match="bytes"):
        graph.save(tmp_path / "x.usearch", index)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_stops_no_search(store: SqliteStore) -> None:
    (store.path / "vectors").write_text("in the way")
    held = spaces(store)
    assert held.search("default", vectors(COUNT, "rows")[7], 1)[0].tolist() == [8]


def test_closing_the_store_ends_the_making_of_a_graph(store: SqliteStore, monkeypatch) -> None:
    held = VectorSpaces(store, above=100, threads=1)
    held._held["default"] = Held(VectorIndex(DIM, 64))
    added, add = [], Graph.add
    monkeypatch.setattr(
        Graph, "add", lambda graph, ids, rows, threads=1: (store.close(), added.append(len(ids)), add(graph, ids, rows, threads))
    )
    held.of("default")
    held.wait()
    assert added == [64]
    assert not (store.path / "vectors").exists()


def test_readers_beside_a_writer_find_what_is_there_and_nothing_that_was_taken(store: SqliteStore) -> None:
    held, wrong, done = VectorSpaces(store, above=500, threads=1), [], threading.Event()
    rows = vectors(120, "live")

    def read() -> None:
        while not done.is_set():
            before = {int(id) for id in store.chunk_ids(Selection())}
            found = {int(id) for id in held.search("default", rows[0], 10)[0]}
            after = {int(id) for id in store.chunk_ids(Selection())}
            if len(found) != 10 or not found <= before | after:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number, row in enumerate(rows):
        (message,) = put(store, row[None])
        (chunk,) = store.chunk_ids(Selection(ids=(message,))).tolist()
        if chunk not in held.search("default", row, 5)[0]:
            wrong.append(chunk)
        if number % 3 == 0:
            store.prune([chunk])
            if chunk in held.search("default", row, 50)[0]:
                wrong.append(-chunk)
    done.set()
    for reader in readers:
        reader.join()
    held.wait()
    assert not wrong
    assert held.of("default").ids().tolist() == store.chunk_ids(Selection()).tolist()
