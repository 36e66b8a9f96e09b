"""The store: what is written is there, what is deleted is not, and no space sees another."""

from __future__ import annotations

import functools
import math
from collections import Counter

import numpy as np
import pytest

from recall.store_cases import DIM, everything, say, unit, whole
from remanence.errors import Mistake
from remanence.recall.items import Gist, NewChunk, NewMessage, Selection
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.words import words

ODD = [
    "'); DROP TABLE messages; --",
    '" OR 1=1 --',
    "words_1 MATCH 'x' NEAR(",
    "<script>alert(1)</script>",
    "{0} %s ? ?1 :a @b $c",
    "Straße İstanbul ﬁn",
    "👩‍👩‍👧 \u202eright",
    "line\nline\ttab\x01",
    "* AND OR NOT NEAR",
    "x" * 100_000,
]


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request, tmp_path):
    """Open one and the same store, as often as it is called."""
    if request.param == "sqlite":
        return functools.partial(SqliteStore, tmp_path / "store")
    return request.getfixturevalue("postgres")


@pytest.fixture
def store(opened):
    with opened(embedder="stub", dim=DIM) as store:
        yield store


@pytest.mark.parametrize("sealed", [False, True])
def test_what_was_written_is_read_back_after_reopening(opened, sealed):
    with opened(embedder="stub", dim=DIM) as store:
        store.make_space("a", encrypt=sealed)
        first, ids = say(store, "The otter sleeps.", "a", "c", 1, person="Ada", at=5.0, meta={"x": [1, "é"]}, key="k1")
        second, more = say(store, "The badger digs.", "a", "c", 2)
        store.put_gists("a", "c", [Gist("c", "running", 1, 1, 2, "otter, badger", 1)])
        fact = store.add_fact("a", "Ada likes otters", conversation="c", sources=[first.id], pinned=True)
        store.touch(ids, 2)
        vectors = list(store.vectors("a"))
    with opened() as store:
        assert store.messages(Selection("a")) == [first, second]
        assert (second.turn, store.last_turn("a", "c")) == (2, 2)
        assert (first.meta, first.person, first.at) == ({"x": [1, "é"]}, "Ada", 5.0)
        found = store.chunks([*more, 999, *ids])
        assert [chunk.text for chunk in found] == ["The badger digs.", "The otter sleeps."]
        assert [chunk.last_retrieved for chunk in found] == [None, 2]
        again = list(store.vectors("a"))
        assert np.array_equal(again[0][1], vectors[0][1])
        np.testing.assert_allclose(again[0][1], [unit(1), unit(2)], atol=1e-3)
        assert [fact] == store.facts("a") == store.facts("a", "c", pinned=True)
        assert store.facts("a", pinned=False) == []
        assert store.gists("a", "c") == [Gist("c", "running", 1, 1, 2, "otter, badger", 1)]
        assert store.gist_history("a", "c") == [(2, store.gists("a", "c")[0])]
        assert [id for id, _ in store.lexical("OTTER", 5, Selection("a"))] == ids
        assert store.messages(Selection(None, person="Ada")) == [first]
        assert store.conversations("a")[0] | {"last": 0} == {"name": "c", "messages": 2, "last_turn": 2, "first": 5.0, "last": 0}
        assert [part.tolist() for part in store.ages("a", "c")] == [[*ids, *more], [1, 2], [2, -1]]


@pytest.mark.parametrize("sealed", [False, True])
def test_a_deleted_message_takes_its_chunks_words_and_facts_with_it(store, sealed):
    store.make_space("a", encrypt=sealed)
    first, ids = say(store, "The otter sleeps.", "a", "c", key="k")
    second, _ = say(store, "The otter wakes.", "a", "c")
    store.add_fact("a", "otters", sources=[first.id, second.id])
    by_hand = store.add_fact("a", "by hand")
    assert len(store.lexical("otter", 5, Selection("a"))) == 2
    before = store.version("a")
    assert store.delete([first.id]) == {"messages": 1, "chunks": 1, "vectors": 1, "facts": 1}
    assert store.version("a") > before
    assert store.messages(Selection("a")) == [second]
    assert store.facts("a") == [by_hand]
    assert store.chunks(ids) == []
    assert len(store.lexical("otter", 5, Selection("a"))) == 1
    assert say(store, "said again", "a", "c", key="k")[0].id > second.id  # its key is gone as well
    assert store.delete([first.id, 12345]) == {"messages": 0, "chunks": 0, "vectors": 0, "facts": 0}


def test_a_conversation_in_which_nothing_is_left_leaves_no_name(store):
    message, _ = say(store, "hello", conversation="with Ada")
    store.put_gists("default", "with Ada", [Gist("with Ada", "running", 1, 1, 1, "hello")])
    store.delete([message.id])
    assert [one["messages"] for one in store.conversations("default")] == [0]  # its gist stands until it is rebuilt
    store.put_gists("default", "with Ada", [], clear=True)
    assert store.conversations("default") == []


def test_an_edited_message_has_the_new_text_alone(store):
    message, old = say(store, "The otter sleeps.", person="Ada", seed=1)
    edited, new = store.replace(message.id, "The badger digs.", whole("The badger digs.", 2), at=9.0)
    assert (edited.text, edited.edited, edited.person, edited.turn) == ("The badger digs.", 9.0, "Ada", 1)
    assert store.messages(Selection()) == [edited]
    assert (store.chunks(old), store.chunks(new)[0].text) == ([], "The badger digs.")
    assert store.lexical("otter", 5, Selection()) == []
    assert [id for id, _ in store.lexical("badger", 5, Selection())] == new
    with pytest.raises(Mistake, match="no message 77"):
        store.replace(77, "x", [], at=1.0)


def test_a_message_with_a_key_is_stored_once_per_space(store):
    first = say(store, "one", key="k")
    assert say(store, "two", conversation="other", key="k") == (first[0], [])
    assert say(store, "three", "b", key="k")[1] != []
    assert len(store.messages(Selection(None))) == 2


def test_pruned_chunks_are_gone_and_their_message_stays(store):
    _, ids = say(store, "The otter sleeps.")
    assert store.prune([*ids, 99]) == 1
    assert len(store.messages(Selection())) == 1
    assert (store.lexical("otter", 5, Selection()), list(store.vectors("default")), store.prune(ids)) == ([], [], 0)


def test_turns_are_given_in_order_and_a_turn_that_is_not_above_the_last_is_refused(store):
    say(store, "one", turn=5)
    for turn in (5, 4, 0, -1, True, 2**63):
        with pytest.raises(Mistake, match="turn"):
            say(store, "two", turn=turn)
    assert say(store, "three")[0].turn == 6
    assert say(store, "four", conversation="other")[0].turn == 1


@pytest.mark.parametrize("text", ["", "a\0b", "\ud800", 7])
def test_a_text_that_no_database_can_hold_is_refused(store, text):
    with pytest.raises(Mistake, match="text"):
        store.append("a", "c", NewMessage("user", text), [])
    assert store.spaces() == []


@pytest.mark.parametrize(
    "message",
    [
        NewMessage("robot", "x"),
        NewMessage("user", "x", at=math.nan),
        NewMessage("user", "x", meta={"x": {1}}),
        NewMessage("user", "x", person=""),
    ],
)
def test_an_unknown_role_a_time_that_is_none_and_meta_that_is_no_json_are_refused(store, message):
    with pytest.raises(Mistake):
        store.append("a", "c", message, [])
    assert store.spaces() == []


@pytest.mark.parametrize("vector", [np.zeros(DIM), np.full(DIM, np.nan), np.full(DIM, np.inf), np.ones(DIM + 1), np.full(DIM, 1e9)])
def test_a_vector_that_is_zero_not_finite_or_of_another_width_is_refused(store, vector):
    with pytest.raises(Mistake, match="vector"):
        store.append("a", "c", NewMessage("user", "x"), [NewChunk(0, 1, vector.astype(np.float32))])
    assert store.spaces() == []


@pytest.mark.parametrize("sealed", [False, True])
def test_odd_strings_stay_in_their_place(store, sealed):
    names = [text[:500] for text in ODD]
    for name in names:
        store.make_space(name, encrypt=sealed)
        for text in ODD:
            say(store, text, name, name, person=name, key=text[:50], meta={name: text})
    assert store.spaces() == names
    for name in names:
        assert [message.text for message in store.messages(Selection(name, name, person=name))] == ODD
        for query in ODD:
            store.lexical(query, 3, Selection(name, person=name))
    assert len(store.lexical("STRASSE", 3, Selection(names[0]))) == 1  # ß is found by ss, in capitals too
    assert store.lexical("fin", 3, Selection(names[0]))[0][0] == store.lexical("ﬁn", 3, Selection(names[0]))[0][0]


@pytest.mark.parametrize("sealed", [False, True])
def test_words_are_ranked_by_bm25_of_their_own_space_alone(store, sealed):
    rng = np.random.default_rng(3)
    vocabulary = [f"w{number}" for number in range(30)]
    store.make_space("a", encrypt=sealed)
    for number in range(60):
        say(store, " ".join(rng.choice(vocabulary, rng.integers(1, 40))), "a", f"c{number % 3}", person=f"p{number % 4}")
        say(store, "w1 w2 w3 elsewhere", "b")
    store.delete([int(store.ids(Selection("a"))[7])])
    texts = {chunk.id: words(chunk.text) for chunk in store.chunks(store.chunk_ids(Selection("a")).tolist())}
    mean = sum(map(len, texts.values())) / len(texts)
    expected = {}
    for id, text in texts.items():  # by hand, as in the paper
        for word in ("w1", "w2"):
            n = sum(word in other for other in texts.values())
            idf = max(math.log((len(texts) - n + 0.5) / (n + 0.5)), 1e-6)
            count = Counter(text)[word]
            expected[id] = expected.get(id, 0) + idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(text) / mean))
    expected = {id: score for id, score in expected.items() if score > 0}
    found = store.lexical("W1, w2?", 1000, Selection("a"))
    assert dict(found) == pytest.approx(expected)
    assert found == sorted(found, key=lambda pair: (-pair[1], -pair[0]))
    assert [id for id, _ in store.lexical("w1 w2", 5, Selection("a"))] == [id for id, _ in found[:5]]
    narrow = Selection("a", "c1", person="p1")
    chosen = set(store.chunk_ids(narrow).tolist())
    assert store.lexical("w1 w2", 1000, narrow) == [pair for pair in found if pair[0] in chosen] != []


def test_a_selection_chooses_by_all_its_conditions(store):
    store.make_space("b", encrypt=True)
    rows = [
        say(store, f"text {space} {turn}", space, f"c{turn % 2}", person=f"p{turn % 3}", at=float(turn))[0]
        for space in "ab"
        for turn in range(12)
    ]
    for chosen, expected in {
        Selection("a"): [m for m in rows if m.space == "a"],
        Selection(None, person="p1"): [m for m in rows if m.person == "p1"],
        Selection(None, "c1", since=3.0, until=7.0): [m for m in rows if m.conversation == "c1" and 3 <= m.at <= 7],
        Selection("b", "c0", turns=(2, 4)): [m for m in rows if m.space == "b" and m.conversation == "c0" and 2 <= m.turn <= 4],
        Selection("b", ids=(rows[0].id, rows[15].id)): [rows[15]],
        Selection(None, role="tool"): [],
        Selection("a", "nowhere"): [],
    }.items():
        assert store.messages(chosen) == expected
        assert store.ids(chosen).tolist() == [message.id for message in expected]
        assert [chunk.message for chunk in store.chunks(store.chunk_ids(chosen).tolist())] == [message.id for message in expected]
        assert store.messages(chosen, limit=3) == expected[:3]
        assert store.messages(chosen, limit=3, newest=True) == expected[-3:]
        assert store.messages(chosen, after=rows[5].id) == [message for message in expected if message.id > rows[5].id]
    assert store.messages(Selection(None), contains="TEXT B", limit=2) == [m for m in rows if m.space == "b"][:2]
    for refused in (Selection("nowhere"), Selection(turns=(1, 2), space="a"), Selection("a", role="robot")):
        with pytest.raises(Mistake):
            store.messages(refused)


def test_a_transaction_that_fails_leaves_nothing_and_a_nested_one_takes_back_its_own_alone(store, keys):
    with pytest.raises(ZeroDivisionError), store.transaction():
        say(store, "one", "new")
        store.make_space("sealed", encrypt=True)
        assert len(store.messages(Selection("new"))) == 1  # its own writes are seen inside
        raise ZeroDivisionError
    assert (store.spaces(), list(keys.rglob("*.*"))) == ([], [])
    assert not [path for path in keys.rglob("*") if path.is_file()]
    with store.transaction():
        say(store, "kept")
        with pytest.raises(Mistake):
            say(store, "refused", turn=1)
    assert [message.text for message in store.messages(Selection())] == ["kept"]


@pytest.mark.parametrize(("precision", "error"), [("float32", 0.0), ("float16", 5e-4), ("int8", 5e-3)])
def test_vectors_are_kept_in_the_precision_asked_for_and_reading_again_changes_nothing(opened, precision, error):
    vectors = np.stack([unit(seed) for seed in range(20)])
    with opened(embedder="stub", dim=DIM, precision=precision) as store:
        for seed in range(20):
            say(store, "x", seed=seed)
        first = np.concatenate([block for _, block in store.vectors("default", block=7)])
    with opened() as store:
        again = np.concatenate([block for _, block in store.vectors("default")])
        assert [ids.tolist() for ids, _ in store.vectors("default", above=18)] == [[19, 20]]
    assert np.array_equal(first, again)
    assert np.abs(first - vectors).max() <= error


def test_every_entry_of_the_audit_log_carries_the_hash_of_the_one_before(store):
    for number in range(5):
        store.log("forget", {"messages": number})
    entries = store.audit_log()
    assert [entry["previous"] for entry in entries] == ["", *(entry["hash"] for entry in entries[:-1])]
    assert store.audit_log(after=3) == entries[3:]
    assert store.audit_broken_at() is None
    for change in ("UPDATE audit SET detail = '{}' WHERE id = 3", "DELETE FROM audit WHERE id = 2"):
        with pytest.raises(ZeroDivisionError), store.transaction():
            store._database.do(change)
            assert store.audit_broken_at() == (3 if "UPDATE" in change else 2)
            raise ZeroDivisionError


def test_a_space_that_is_made_again_never_repeats_a_version(store):
    say(store, "one", "a")
    version = store.version("a")
    store.touch([1], 3)
    assert store.version("a") == version  # nothing that is cached has changed
    assert store.drop_space("a") == 1
    say(store, "one", "a")
    assert store.version("a") > version
    with pytest.raises(Mistake, match="no space"):
        store.version("b")


@pytest.mark.parametrize("opened", ["sqlite"], indirect=True)
def test_deleted_words_texts_and_vectors_are_in_no_file_after_a_scrub(store):
    rng = np.random.default_rng(1)
    gone = []
    for number in range(120):
        text = " ".join(rng.choice(["otter", "badger", "stoat"], rng.integers(1, 60))) + f" quetzal{number:03d}x"
        message, _ = say(store, text, conversation=f"c{number}", seed=number, person=f"person{number:03d}x")
        gone += [(message.id, number)] if number % 3 == 0 else []
    for id, _ in gone:
        store.delete([id])
    assert store.scrub_due()
    store.scrub()
    assert not store.scrub_due()
    held = everything(store.path)
    assert not [n for _, n in gone if f"quetzal{n:03d}x".encode() in held or f"person{n:03d}x".encode() in held]
    assert not [n for _, n in gone if unit(n).astype(np.float16).tobytes() in held]
    assert unit(1).astype(np.float16).tobytes() in held  # what stays is found by the same search
    assert b"quetzal001x" in held
    assert len(store.lexical("quetzal001x", 5, Selection())) == 1


def test_numbers_of_rows_and_bytes_are_told(store):
    say(store, "one", "a")
    say(store, "two", "b")
    assert store.stats() | {"bytes": 0} == {"spaces": 2, "conversations": 2, "messages": 2, "chunks": 2, "facts": 0, "bytes": 0}
    assert store.stats("a")["messages"] == 1
    assert store.stats()["bytes"] > 10_000


def test_a_fact_draws_on_messages_of_its_own_space(store):
    message, _ = say(store, "one", "a")
    with pytest.raises(Mistake, match="not all of them are messages of space 'b'"):
        store.add_fact("b", "x", sources=[message.id])
