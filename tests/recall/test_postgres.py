"""What only the PostgreSQL store does; all that both do is in test_store.py."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from recall.store_cases import DIM, say, unit
from remanence.errors import Mistake
from remanence.recall.items import Selection
from remanence.recall.postgres_store import PostgresDense, PostgresStore
from remanence.recall.service import Recall


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("sealed", [False, True])
def test_dense_search_on_the_server_equals_brute_force(postgres, precision, sealed):
    with postgres(embedder="stub", dim=DIM, precision=precision) as store:
        store.make_space("a", encrypt=sealed)
        for seed in range(40):
            say(store, f"text {seed}", "a", f"c{seed % 2}", seed % 30, person=f"p{seed % 3}")  # ten of them twice: ties
        store.replace(7, "edited", [], at=1.0)
        store.delete([9])
        query = unit(100)
        ids, vectors = next(store.vectors("a"))
        cosines = dict(zip(ids.tolist(), (vectors @ query / np.linalg.norm(vectors, axis=1)).tolist()))
        for chosen in (Selection("a"), Selection("a", "c1", person="p1"), Selection("a", person="nobody")):
            there = set(store.chunk_ids(chosen).tolist())
            expected = sorted(
                ((id, cosine) for id, cosine in cosines.items() if id in there), key=lambda pair: (-round(pair[1], 5), -pair[0])
            )
            found = store.nearest(query, 10, chosen)
            assert [id for id, _ in found] == [id for id, _ in expected[:10]]
            assert [cosine for _, cosine in found] == pytest.approx([cosine for _, cosine in expected[:10]], abs=1e-5)


def test_the_retriever_on_the_server_hands_out_hits(postgres):
    class Stub:
        name, dim = "stub", DIM

        def __call__(self, texts):
            return np.stack([unit(len(text)) for text in texts])

    with postgres(embedder="stub", dim=DIM) as store:
        for seed in range(10):
            say(store, f"text {seed}", seed=seed)
        hits = PostgresDense(store, Stub()).search("xxxx", 3, Selection())
        assert (hits[0].chunk.text, hits[0].parts["cosine"], len(hits)) == ("text 4", hits[0].score, 3)
        assert hits[0].score == pytest.approx(1.0, abs=1e-3)


def test_several_writers_lose_nothing_and_double_nothing(postgres):
    with postgres(embedder="stub", dim=DIM):
        pass
    stores = [postgres() for _ in range(3)]
    failures = []

    def work(store, number):
        try:
            for step in range(10):
                say(store, f"{number} {step}", key=f"{number % 3} {step}")  # two of six threads send the same
        except BaseException as error:  # reported below: a thread cannot fail a test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(store, number)) for number, store in enumerate(stores * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [message.turn for message in stores[0].messages(Selection())] == list(range(1, 31))
    assert len(stores[1].lexical("5", 100, Selection())) == sum("5" in m.text.split() for m in stores[2].messages(Selection()))
    for store in stores:
        store.close()


def test_after_a_scrub_no_table_or_index_file_holds_what_was_deleted(postgres, server):
    def found(word):
        with store._postgres._writer.cursor() as cursor:
            cursor.execute("CHECKPOINT")
        return any(word in path.read_bytes() for path in (Path(server[1]) / "base").rglob("*") if path.is_file())

    with postgres(embedder="stub", dim=DIM) as store:
        messages = [say(store, f"quetzal{number}x", person=f"person{number}x")[0] for number in range(30)]
        assert found(b"quetzal7x")
        store.delete([message.id for message in messages[:10]])
        store.scrub()
        assert not found(b"quetzal7x")
        assert not found(b"person7x")
        assert found(b"quetzal17x")


def test_a_scrub_that_was_cut_short_is_done_at_the_next_opening(postgres):
    with postgres(embedder="stub", dim=DIM) as store:
        store.delete([say(store, "x")[0].id])
        assert store.scrub_due()
    with postgres(write=False) as reader:
        assert reader.scrub_due()
    with postgres() as store:
        assert not store.scrub_due()


def test_a_reader_may_not_write(postgres):
    with pytest.raises(Mistake, match="there is no store here"):
        postgres(write=False)
    with postgres(embedder="stub", dim=DIM) as store, postgres(write=False) as reader:
        say(store, "one")
        assert len(reader.messages(Selection())) == 1
        for write in (lambda: say(reader, "two"), reader.scrub):
            with pytest.raises(Mistake, match="open for reading"):
                write()


def test_another_embedder_and_a_newer_format_are_refused(postgres):
    with postgres(embedder="stub", dim=DIM) as store:
        with pytest.raises(Mistake, match="was made with the embedder 'stub'"):
            postgres(embedder="another", dim=DIM)
        with store.transaction():
            store._database.do("UPDATE about SET value = '99' WHERE name = 'format'")
    with pytest.raises(Mistake, match="has format 99"):
        postgres()


@pytest.mark.parametrize("dsn", ["postgresql://u:hunter2@127.0.0.1:1/x", "nonsense hunter2", "postgresql://u:hunter2@127.0.0.1:99999/x"])
def test_a_server_that_cannot_be_reached_is_one_sentence_without_the_password(dsn):
    with pytest.raises(Mistake) as caught:
        PostgresStore(dsn, embedder="stub", dim=DIM)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_schema_whose_name_is_no_plain_name_is_refused(server):
    with pytest.raises(Mistake, match="no plain name"):
        PostgresStore(server[0], schema='x"; DROP SCHEMA public; --', embedder="stub", dim=DIM)


def test_a_lost_connection_is_made_again(postgres):
    with postgres(embedder="stub", dim=DIM) as store, postgres() as other:
        say(store, "one")
        with other.transaction():
            other._database.do(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        for _ in range(2):
            try:
                say(store, "two", key="two")
            except Mistake as error:
                assert "cannot be reached" in str(error)
        assert [message.text for message in store.messages(Selection())][-1] == "two"


@pytest.mark.parametrize("retrieval", ["dense", "hybrid"])
def test_the_whole_memory_stands_on_a_server_by_its_address(server, retrieval):
    address = f"{server[0]}{'&' if '?' in server[0] else '?'}schema=whole_{retrieval}"
    with Recall.open(address, embedder="hashing", retrieval=retrieval) as memory:
        memory.add("My sister Ada lives in Bergen.", person="eva")
        memory.add("The boat leaves at nine.", person="tom")
        assert memory.search("Ada in Bergen", 1)[0].chunk.text == "My sister Ada lives in Bergen."
    with Recall.open(address, retrieval=retrieval) as memory:  # the store knows its embedder
        assert memory.embedder.name.startswith("hashing")
        assert "Bergen" in memory.compose("Where is Ada in Bergen?").text
        receipt = memory.forget(Selection(None, person="eva"))
        assert receipt["erased"]["messages"] == 1
        assert receipt["scan"] is None or receipt["scan"]["found"] == 0
        assert [hit.chunk.text for hit in memory.search("Ada in Bergen", 5)] == ["The boat leaves at nine."]


def test_a_server_that_is_not_there_is_one_sentence():
    with pytest.raises(Mistake, match="reached"):
        Recall.open("postgresql://nobody@127.0.0.1:1/none")
