"""Erasure: what was erased is in no file and no answer, what stays is as if it had never been there, and a kill leaves nothing between."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
import time

import numpy as np
import pytest

from recall.store_cases import everything
from remanence.errors import Mistake
from remanence.recall import erasure
from remanence.recall.deletion import check_deletion, receipts_of
from remanence.recall.embedders import load_embedder
from remanence.recall.items import Gist, NewMessage, Selection
from remanence.recall.residue import scan_store
from remanence.recall.service import Recall
from remanence.recall.settings import HemaSettings
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.tokenizers import load_tokenizer

WORDS = [f"{first}{second}{third}" for first in "bdgklmnprst" for second in "aeiou" for third in ("dra", "fen", "gul", "kim", "lor", "mas")]
SETTINGS = HemaSettings(period=5, forgetting=False)


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "none.pem"))


def opened(folder, *, summarizer=None, retriever=None, **more):
    embedder = load_embedder("hashing:48")
    store = SqliteStore(folder, embedder=embedder.name, dim=embedder.dim, **more)
    return Recall(store, embedder, summarizer, load_tokenizer("plain"), SETTINGS, retriever and retriever(store, embedder))


def marker(number):
    """Return a name that nothing else holds any part of."""
    return "".join(random.Random(number).choices("bcdfghjklmnpqrstvwxz", k=14))


def said(number, own=True):
    words = random.Random(number).choices(WORDS, k=8)
    return " ".join([*words[:4], *([marker(number)] if own else []), *words[4:]]) + "."


def fill(recall, count=24, spaces=("default",)):
    """Add turns of two people in two conversations; everything about a message carries its marker."""
    stored = []
    for space in spaces:
        for number in range(count):
            message = NewMessage(
                ("user", "assistant")[number % 4 == 3],
                said(number + 1000 * spaces.index(space)),
                ("Wilhelmina Q", "bo")[number % 2],
                1000.0 + number,
                {"note": f"meta{marker(number + 500)}"},
                None,
                f"key{number}",
            )
            stored += recall.add_many([message], space=space, conversation=("work", "holiday")[number // 2 % 2])
    return stored


def traces(recall, folder, messages):
    """Return the markers that the files still hold, and what the scan says."""
    held = everything(folder).lower()
    found = [m.id for m in messages if marker_of(m).encode() in held or marker_of(m).encode("utf-16-le") in held]
    seen = scan_store(recall.store, [m.text for m in messages])
    assert seen.clean == (not found)
    return found


def marker_of(message):
    return next(word for word in message.text.replace(".", "").split() if len(word) == 14)


SELECTIONS = {
    "a message": Selection(ids=(3,)),
    "several": Selection(ids=(1, 2, 3, 24)),
    "a conversation": Selection(conversation="work"),
    "turns of a conversation": Selection(conversation="holiday", turns=(2, 7)),
    "a person": Selection(person="Wilhelmina Q"),
    "a role": Selection(role="assistant"),
    "a time": Selection(since=1003.0, until=1017.0),
    "a person in a time": Selection(person="bo", since=1010.0),
}


@pytest.mark.parametrize("which", SELECTIONS)
def test_what_was_erased_is_in_no_file_and_no_answer_and_the_rest_is_untouched(tmp_path, which):
    with opened(tmp_path / "store") as recall:
        fill(recall)
        before = recall.messages()
        gone = recall.messages(SELECTIONS[which])
        seen = recall.preview(SELECTIONS[which])
        assert all(marker_of(message).encode() in everything(tmp_path / "store") for message in gone)
        receipt = recall.forget(SELECTIONS[which])
        ids = {message.id for message in gone}
        assert receipt["erased"]["messages"] == len(gone) == seen.messages
        assert receipt["scan"]["found"] == 0
        assert recall.messages() == [message for message in before if message.id not in ids]
        assert traces(recall, tmp_path / "store", gone) == []
        for message in gone:
            assert not ids & {hit.chunk.message for hit in recall.search(message.text, 50)}
        for message in recall.messages():
            assert message.id in {hit.chunk.message for hit in recall.search(message.text, 50)}
        assert all(ok for what, ok, _ in check_deletion(receipt, recall, texts=[message.text for message in gone]) if what != "signature")
    assert not any(marker_of(message).encode() in everything(tmp_path / "store") for message in gone)


def test_a_person_is_erased_in_every_space_sealed_ones_too(tmp_path):
    with opened(tmp_path / "store") as recall:
        recall.store.make_space("sealed", encrypt=True)
        messages = fill(recall, 12, ("default", "sealed", "other"))
        gone = [message for message in messages if message.person == "Wilhelmina Q"]
        receipt = recall.forget(Selection(space=None, person="Wilhelmina Q"))
        assert receipt["erased"]["messages"] == len(gone) == 18
        assert len(recall.messages(Selection(space=None))) == len(messages) - 18
        assert traces(recall, tmp_path / "store", gone) == []
        held = everything(tmp_path / "store").lower()
        assert b"wilhelmina" not in held
        assert "wilhelmina".encode("utf-16-le") not in held
        assert not any(marker(500 + number).encode() in held for number in range(0, 12, 2)), "what hung on the messages is gone as well"


def test_gists_are_those_of_a_memory_that_never_saw_what_was_erased(tmp_path):
    with opened(tmp_path / "store") as recall, opened(tmp_path / "never") as never:
        messages = fill(recall, 48)
        recall.forget(Selection(ids=(9, 10, 33, 48)))
        for message in messages:
            if message.id not in (9, 10, 33, 48):
                never.add_many(
                    [NewMessage(message.role, message.text, at=message.at, turn=message.turn)], conversation=message.conversation
                )
        for name in ("work", "holiday"):
            left, right = ({(g.kind, g.segment): g.text for g in one.store.gists("default", name)} for one in (recall, never))
            assert left == right
            assert left


def test_history_of_gists_facts_keys_and_names_go_with_what_they_were_made_of(tmp_path):
    with opened(tmp_path / "store") as recall:
        fill(recall)
        drawn = recall.add_fact("default", f"It is {marker(7001)}.", sources=[3, 4], pinned=True)
        own = recall.add_fact("default", f"By hand {marker(7002)}.", conversation="work")
        kept = recall.add_fact("default", f"By hand {marker(7003)}.")
        history = [gist.text for _, gist in recall.store.gist_history("default", "work", 10_000)]
        assert any(marker(1) in text for text in history)
        recall.forget(Selection(ids=(3,)))
        assert [fact.id for fact in recall.facts()] == [own.id, kept.id] != [drawn.id]
        recall.forget(Selection(conversation="work"))
        assert [fact.id for fact in recall.facts()] == [kept.id]
        held = everything(tmp_path / "store")
        assert marker(7003).encode() in held
        assert not any(word in held for word in (marker(7001).encode(), marker(7002).encode(), b"key0", b'"work"'))
        assert [one["name"] for one in recall.conversations()] == ["holiday"]
        assert recall.add("anew", key="key0").text == "anew", "a key that is gone may be used again"


def test_an_edit_erases_the_old_text_everywhere(tmp_path):
    with opened(tmp_path / "store") as recall:
        messages = fill(recall)
        recall.add_fact("default", f"It is {marker(7001)}.", sources=[messages[4].id])
        new = recall.edit(messages[4].id, "Nothing to see here any longer.")
        assert (new.text, new.turn, new.person, new.id) == (
            "Nothing to see here any longer.",
            messages[4].turn,
            messages[4].person,
            messages[4].id,
        )
        assert traces(recall, tmp_path / "store", messages[4:5]) == []
        assert marker(7001).encode() not in everything(tmp_path / "store")
        assert recall.search("nothing to see here", 1)[0].chunk.message == new.id
        assert not recall.facts()
        receipt = receipts_of(recall.store)[-1]
        assert receipt["kind"] == "edit"
        assert receipt["scan"]["found"] == 0
        for message_id, text in ((9999, "x"), (messages[5].id, " ")):
            with pytest.raises(Mistake):
                recall.edit(message_id, text)


def test_a_whole_space_goes_with_its_key_and_its_backup_is_noise(tmp_path):
    with opened(tmp_path / "store") as recall:
        recall.store.make_space("sealed", encrypt=True)
        fill(recall, 8, ("sealed",))
        recall.add("stays")
        shutil.copytree(tmp_path / "store", tmp_path / "backup")
        keys = [path for path in (tmp_path / "keys").rglob("*") if path.is_file()]
        assert len(keys) == 1
        receipt = recall.forget(Selection("sealed"))
        assert receipt["erased"]["messages"] == 8
        assert receipt["erased"]["spaces"] == 1
        assert recall.spaces() == ["default"]
        assert not keys[0].exists()
    with SqliteStore(tmp_path / "backup") as backup, pytest.raises(Mistake, match="key is gone"):
        backup.messages(Selection("sealed"))


def test_a_plain_space_leaves_no_trace_of_itself_and_others_are_untouched(tmp_path):
    with opened(tmp_path / "store") as recall:
        gone = fill(recall, 20, ("Bergamotte tenant",))
        kept = recall.add_many([NewMessage("user", said(number + 9000), "bo") for number in range(9)])
        recall.add_fact("Bergamotte tenant", f"By hand {marker(7001)}.", pinned=True)
        vectors = np.concatenate([rows for _, rows in recall.store.vectors("Bergamotte tenant")])
        receipt = recall.forget(Selection("Bergamotte tenant"))
        assert (receipt["erased"]["messages"], receipt["erased"]["facts"], receipt["scan"]["found"]) == (20, 1, 0)
        assert traces(recall, tmp_path / "store", gone) == []
        held = everything(tmp_path / "store")
        assert not any(word in held for word in (b"Bergamotte", marker(7001).encode(), marker(501).encode()))
        assert scan_store(recall.store, [], list(vectors)).clean
        assert recall.messages() == kept
        assert recall.search(kept[3].text, 1)[0].chunk.message == kept[3].id


def test_a_preview_shows_what_goes_and_what_repeats_it_and_changes_nothing(tmp_path):
    with opened(tmp_path / "store") as recall:
        secret = f"The combination of the safe is {marker(1)}."
        first = recall.add(secret, person="Ana")
        quote = recall.add(f"You said: '{secret}' Shall I write it down?", role="assistant")
        named = recall.add("Ana was late again.", person="bo")
        fact = recall.add_fact("default", "Ana likes safes.")
        held = recall.store.audit_log()
        seen = recall.preview(Selection(person="Ana"))
        assert (seen.messages, seen.chunks, seen.people, seen.examples) == (1, 1, ("Ana",), (first,))
        assert (seen.echoes, seen.mentions, seen.fact_mentions) == ((quote.id,), (named.id,), (fact.id,))
        assert recall.store.audit_log() == held
        assert len(recall.messages()) == 3
        json.dumps(dataclasses.asdict(seen))
        receipt = recall.forget(seen.selection)
        assert (receipt["echoes"], receipt["scan"]["found"]) == (1, 0), "what is kept elsewhere is told, and is no residue"


def test_what_a_query_finds_is_previewed_and_goes_exactly_so(tmp_path):
    with opened(tmp_path / "store") as recall:
        messages = fill(recall)
        by_words = erasure.find(recall, Selection(), query=marker(5), k=1)
        by_text = erasure.find(recall, Selection(), contains=marker(5).upper())
        assert by_words.ids == by_text.ids == (messages[5].id,)
        recall.add(said(5))  # comes after the preview: not part of it
        assert recall.forget(by_text)["ids"] == [[messages[5].id, messages[5].id]]
        with pytest.raises(Mistake, match="names no message"):
            erasure.find(recall, Selection(), contains="nowhere said")


def test_what_would_erase_nothing_or_everything_or_keep_the_text_in_its_reason_is_refused(tmp_path):
    with opened(tmp_path / "store") as recall:
        messages = fill(recall, 4)
        for selection, reason, told in (
            (Selection(space=None), "", "every space"),
            (Selection(person="nobody"), "", "names no message"),
            (Selection(space="nowhere"), "", "no space"),
            (Selection(ids=(1,)), f"because of: {messages[0].text}", "repeats"),
            (Selection(person="Wilhelmina Q"), "asked by wilhelmina q.", "repeats"),
        ):
            with pytest.raises(Mistake, match=told):
                recall.forget(selection, reason=reason)
        assert len(recall.messages()) == 4
        assert recall.forget(Selection(ids=(1,)), reason="request 12")["asked"]["reason"] == "request 12"


class Broken:
    """A summariser that works until it is told not to."""

    name, window, fails = "broken", 512, False

    def __call__(self, earlier, new, tokens):
        if self.fails:
            raise RuntimeError(f"cannot reach the model for {new}")
        return f"{earlier} {new}"


def test_an_erasure_does_not_wait_for_a_model(tmp_path, caplog):
    summarizer = Broken()
    with opened(tmp_path / "store", summarizer=summarizer) as recall:
        messages = fill(recall)
        summarizer.fails = True
        recall.forget(Selection(ids=(messages[4].id,)))
        assert traces(recall, tmp_path / "store", messages[4:5]) == []
        assert recall.gist("default", "work") == ""
        assert "RuntimeError" in caplog.text
        assert not any(marker_of(message) in caplog.text for message in messages)
        summarizer.fails = False
        recall.maintain("default", "work")
        assert recall.gist("default", "work")
        assert traces(recall, tmp_path / "store", messages[4:5]) == []


def test_turns_that_come_while_gists_are_made_anew_are_in_them(tmp_path):
    slow = Broken()
    with opened(tmp_path / "store", summarizer=slow) as recall:
        messages = fill(recall, 8)
        plain, once = slow.__class__.__call__, threading.Event()

        def interrupted(earlier, new, tokens):
            if not once.is_set():
                once.set()
                recall.add_many([NewMessage("user", said(77))], conversation="work")
            return plain(slow, earlier, new, tokens)

        object.__setattr__(
            recall.compact, "summarizer", type("Slow", (), {"name": "s", "window": 512, "__call__": staticmethod(interrupted)})()
        )
        recall.forget(Selection(ids=(messages[0].id,)))
        gist = recall.gist("default", "work")
        assert marker(77) in gist
        assert marker_of(messages[0]) not in gist


def test_an_error_inside_leaves_the_old_state(tmp_path, monkeypatch):
    with opened(tmp_path / "store") as recall:
        fill(recall)
        state = (recall.messages(), recall.store.gists("default", "work"), recall.store.audit_log())

        def full(*_):
            raise Mistake("store", "cannot be written (disk full)", "free the disk")

        monkeypatch.setattr(recall.store, "log", full)
        for act in (lambda: recall.forget(Selection(person="bo")), lambda: recall.edit(2, "other"), lambda: recall.forget(Selection())):
            with pytest.raises(Mistake, match="disk full"):
                act()
        assert (recall.messages(), recall.store.gists("default", "work"), recall.store.audit_log()) == state


def test_a_scrub_that_cannot_run_is_told_and_the_next_opening_does_it(tmp_path, monkeypatch):
    recall = opened(tmp_path / "store")
    messages = fill(recall)

    def full():
        raise Mistake("store", "cannot be written (disk full)", "free the disk")

    monkeypatch.setattr(recall.store, "scrub", full)
    with pytest.raises(Mistake, match="the messages are gone, but traces"):
        recall.forget(Selection(ids=(1, 2)))
    recall.close()
    with opened(tmp_path / "store") as recall:
        assert traces(recall, tmp_path / "store", messages[:2]) == []
        assert len(recall.messages()) == 22
        (receipt,) = receipts_of(recall.store)
        assert receipt["scan"] is None
        assert ("scan", False) in [one[:2] for one in check_deletion(receipt, recall)]


def test_another_reader_finds_nothing_of_it_and_one_that_holds_the_log_is_told(tmp_path, monkeypatch):
    import sqlite3

    with opened(tmp_path / "store") as recall, opened(tmp_path / "store", write=False) as reader:
        messages = fill(recall)
        assert reader.search(messages[4].text, 1)[0].chunk.message == messages[4].id
        recall.forget(Selection(ids=(messages[4].id,)))
        assert messages[4].id not in {hit.chunk.message for hit in reader.search(messages[4].text, 50)}
        assert messages[4].id not in {m.id for m in reader.messages()}
        base = sqlite3.connect(tmp_path / "store" / "recall.sqlite", isolation_level=None)
        base.execute("BEGIN")
        base.execute("SELECT COUNT(*) FROM messages").fetchall()
        monkeypatch.setattr(time, "sleep", lambda _: None)
        with pytest.raises(Mistake, match="the messages are gone, but traces"):
            recall.forget(Selection(ids=(messages[5].id,)))
        base.close()
        erasure.finish(recall)
        assert traces(recall, tmp_path / "store", messages[4:6]) == []


def test_the_vector_cache_of_a_large_space_keeps_nothing(tmp_path):
    pytest.importorskip("usearch")
    from remanence.recall.retrieval import Dense
    from remanence.recall.vector_spaces import VectorSpaces

    with opened(tmp_path / "store", retriever=lambda s, e: Dense(s, e, VectorSpaces(s, above=20, threads=1))) as recall:
        messages = fill(recall, 40)
        recall.search("anything", 3)
        recall.retriever.vectors.wait()
        assert list((tmp_path / "store").rglob("*.usearch"))
        vectors = np.concatenate([rows for _, rows in recall.store.vectors("default")])
        receipt = recall.forget(Selection(ids=(messages[7].id,)))
        assert receipt["scan"]["found"] == 0
        recall.search("anything", 3)
        recall.retriever.vectors.wait()
        assert scan_store(recall.store, [messages[7].text], [vectors[7]]).clean


def test_nothing_that_others_add_meanwhile_is_lost_or_taken_along(tmp_path):
    with opened(tmp_path / "store") as recall:
        fill(recall, 12)
        added, errors = [], []

        def add(number):
            try:
                added.extend(recall.add(said(5000 + 100 * number + turn), person="cy", conversation=f"of {number}") for turn in range(12))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=add, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        receipts = [recall.forget(Selection(ids=(number,))) for number in range(1, 7)]
        for thread in threads:
            thread.join()
        assert not errors
        assert all(receipt["scan"]["found"] == 0 for receipt in receipts)
        there = {message.id: message.text for message in recall.messages()}
        assert all(there.get(message.id) == message.text for message in added)
        assert len(there) == 6 + 36


def test_a_message_that_fills_pages_leaves_no_part_of_itself(tmp_path):
    with opened(tmp_path / "store") as recall:
        for number in range(6):
            recall.add(" ".join(said(number * 1000 + part, own=number == 3) for part in range(300)), conversation=f"c{number % 2}")
        text = recall.messages()[3].text
        recall.edit(5, "short now")
        receipt = recall.forget(Selection(ids=(4,)))
        held = everything(tmp_path / "store").lower()
        assert receipt["scan"]["found"] == 0
        assert not any(marker(3000 + part).encode()[:10] in held for part in range(300))
        assert scan_store(recall.store, [text]).clean


def test_gists_of_flat_memories_and_gists_put_by_others_go_too(tmp_path):
    with opened(tmp_path / "store") as recall:
        messages = fill(recall, 6)
        recall.store.put_gists("default", "work", [Gist("work", "flat", 0, 1, 3, f"by hand {marker(7001)}", 3)])
        recall.forget(Selection(ids=(messages[0].id,)))
        assert marker(7001).encode() not in everything(tmp_path / "store")


# Killed at any instant.


def erase_in_a_process(folder, selection, when=None):
    """Erase in a process of its own; kill it after so many seconds; return how long it took, or `None` if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            erase_or_die(folder, selection)
        finally:
            os._exit(1)
    start = time.monotonic()
    if when is not None:
        time.sleep(when)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the erasure failed by itself"
    return None if os.WIFSIGNALED(status) else time.monotonic() - start


def erase_or_die(folder, selection):
    with opened(folder) as recall:
        recall.forget(selection)
    os._exit(0)


def old_or_finished(folder, state, gone):
    """Say which of the two a store is in after a kill; anything else fails."""
    with opened(folder) as recall:
        messages, gists = state
        now = recall.messages(Selection(space=None))
        if now == messages:
            assert gists == {name: recall.store.gists("default", name) for name in gists}
            assert not receipts_of(recall.store)
            return "old"
        ids = {message.id for message in gone}
        assert now == [message for message in messages if message.id not in ids]
        assert traces(recall, folder, gone) == []
        assert not recall.store.scrub_due()
        assert len(receipts_of(recall.store)) == 1
        assert not any(marker_of(m) in gist.text for m in gone for name in gists for gist in recall.store.gists("default", name))
        recall.maintain("default", "work")
        return "finished"


@pytest.mark.parametrize("instants", [int(os.environ.get("REMANENCE_KILLS", "8"))])
def test_a_kill_at_any_instant_leaves_the_old_state_or_an_erasure_that_finishes(tmp_path, instants):
    with opened(tmp_path / "store") as recall:
        fill(recall, 40)
        state = (recall.messages(), {name: recall.store.gists("default", name) for name in ("work", "holiday")})
        gone = recall.messages(Selection(person="Wilhelmina Q"))
    selection, draw = Selection(space=None, person="Wilhelmina Q"), random.Random(0)
    shutil.copytree(tmp_path / "store", tmp_path / "whole")
    takes = erase_in_a_process(tmp_path / "whole", selection)
    assert old_or_finished(tmp_path / "whole", state, gone) == "finished"
    for number in range(instants):
        folder = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "store", folder)
        erase_in_a_process(folder, selection, draw.uniform(0, takes))
        old_or_finished(folder, state, gone)
        shutil.rmtree(folder)


@pytest.mark.parametrize("place", ["before the commit", "after the commit", "in the scrub", "before the mark goes", "before the scan"])
def test_a_kill_at_each_step_leaves_the_old_state_or_an_erasure_that_finishes(tmp_path, monkeypatch, place):
    with opened(tmp_path / "store") as recall:
        fill(recall, 20)
        state = (recall.messages(), {name: recall.store.gists("default", name) for name in ("work", "holiday")})
        gone = recall.messages(Selection(person="bo"))
    here = os.getpid()

    def dying(act):
        def step(*values, **more):
            if os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*values, **more)

        return step

    owner, name = {
        "before the commit": (SqliteStore, "log"),
        "after the commit": (SqliteStore, "scrub"),
        "in the scrub": ("remanence.recall.sqlite_database.SqliteDatabase", "compact"),
        "before the mark goes": ("remanence.recall.spaces.Spaces", "unmark"),
        "before the scan": (erasure, "scan_store"),
    }[place]
    with monkeypatch.context() as patched:
        if isinstance(owner, str):
            patched.setattr(
                f"{owner}.{name}",
                dying(getattr(__import__(owner.rpartition(".")[0], fromlist=["x"]), owner.rpartition(".")[2]).__dict__[name]),
            )
        else:
            patched.setattr(owner, name, dying(getattr(owner, name)))
        assert erase_in_a_process(tmp_path / "store", Selection(person="bo")) is None
    assert old_or_finished(tmp_path / "store", state, gone) == ("old" if place == "before the commit" else "finished")


def test_on_a_server_nothing_is_said_about_files_that_cannot_be_read(postgres):
    embedder = load_embedder("hashing:48")
    with Recall(postgres(embedder=embedder.name, dim=embedder.dim), embedder, None, load_tokenizer("plain"), SETTINGS) as recall:
        messages = fill(recall)
        gone = [message for message in messages if message.person == "bo"]
        receipt = recall.forget(Selection(space=None, person="bo"))
        assert receipt["scan"] is None
        assert receipt["erased"]["messages"] == len(gone)
        assert recall.messages() == [message for message in messages if message.person != "bo"]
        checked = check_deletion(receipt, recall, texts=[gone[0].text])
        assert {what for what, holds, _ in checked if not holds} == {"scan", "residue"}
        edited = recall.edit(messages[0].id, "Nothing to see here.")
        assert recall.messages(Selection(ids=(edited.id,))) == [edited]
