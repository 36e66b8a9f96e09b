"""Receipts of deletion: they say what went without saying it, hold where they are true, and fall where anything was changed."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import sqlite3

import pytest

from remanence.errors import Mistake
from remanence.recall.deletion import check_deletion, hasher, ranges, read_deletion, receipts_of
from remanence.recall.embedders import load_embedder
from remanence.recall.items import Selection
from remanence.recall.service import Recall
from remanence.recall.sqlite_store import SqliteStore
from remanence.recall.tokenizers import load_tokenizer
from remanence.receipts import local_key, make_key, public_key

SECRET = "The combination of Ottokar's safe is 48151623."


@pytest.fixture(autouse=True)
def key(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "key.pem"))
    return make_key()


def opened(folder):
    embedder = load_embedder("hashing:48")
    return Recall(SqliteStore(folder, embedder=embedder.name, dim=embedder.dim), embedder, None, load_tokenizer("plain"))


@pytest.fixture
def erased(tmp_path):
    with opened(tmp_path / "store") as recall:
        for number in range(4):
            recall.add(f"Something else, number {number}.", space="tenant Zog", conversation="talks")
        recall.add(SECRET, person="Ottokar", space="tenant Zog", conversation="vault room")
        yield recall, recall.forget(Selection("tenant Zog", "vault room", person="Ottokar"), reason="request 9")


def failing(checked):
    return {what for what, holds, _ in checked if not holds}


def test_a_receipt_holds_where_it_is_true(erased):
    recall, receipt = erased
    checked = check_deletion(receipt, recall, texts=[SECRET], trusted=public_key(local_key()))
    assert {what for what, _, _ in checked} == {"signature", "scan", "texts", "store", "ids", "log", "chain", "kept", "residue"}
    assert not failing(checked)
    assert not failing(check_deletion(json.loads(json.dumps(receipt)), recall.store)), "as JSON, and by the store alone"
    assert not failing(check_deletion(receipt)), "and away from the store"


def test_a_text_that_was_said_again_or_stays_in_a_fact_is_told(erased):
    recall, receipt = erased
    recall.add(f"Again: {SECRET}", space="other")
    assert failing(check_deletion(receipt, recall, texts=[SECRET])) == {"kept"}
    recall.forget(Selection("other"))
    recall.add_fact("tenant Zog", SECRET)
    assert failing(check_deletion(receipt, recall, texts=[SECRET])) == {"kept"}


def test_a_receipt_says_nothing_of_what_went(erased):
    recall, receipt = erased
    told = json.dumps([receipt, recall.store.audit_log()])
    assert not any(word in told for word in ("combination", "Ottokar", "48151623", "Zog", "vault"))
    assert receipt["asked"]["reason"] == "request 9"
    assert receipt["erased"]["messages"] == 1
    assert receipt["ids"] == [[5, 5]]


def test_a_text_that_can_be_guessed_cannot_be_confirmed_without_the_key(erased, tmp_path, monkeypatch):
    recall, receipt = erased
    assert hasher(receipt["id"], local_key())(SECRET) in receipt["texts"]
    told = json.dumps(receipt)
    for by in (hashlib.sha256, hashlib.sha1, hashlib.md5, hashlib.blake2b):
        for salt in ("", receipt["id"], receipt["store"], receipt["signature"]["public_key"]):
            assert by((salt + SECRET).encode()).hexdigest()[:16] not in told
    recall.add(SECRET, space="again")
    second = recall.forget(Selection("again", conversation="default"))
    assert not set(second["texts"]) & set(receipt["texts"]), "two receipts of one text have nothing in common"
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "other.pem"))
    make_key()
    assert ("texts", False) in [one[:2] for one in check_deletion(receipt, texts=[SECRET])]


def test_a_text_that_was_not_among_the_erased_is_told(erased):
    recall, receipt = erased
    checked = {what: (holds, words) for what, holds, words in check_deletion(receipt, recall, texts=[SECRET, "Never said by anyone here."])}
    assert checked["texts"] == (False, "1 of 2 texts are among those erased, by their hashes")
    assert checked["residue"][0]


def test_every_change_of_a_receipt_is_seen(erased):
    recall, receipt = erased
    for name in receipt.keys() - {"signature", "format", "kind"}:
        changed = copy.deepcopy(receipt)
        changed[name] = {str: "0" * 32, float: 1.0, int: 7, dict: {"messages": 0}, list: []}[type(changed[name])]
        assert "signature" in failing(check_deletion(changed, recall)), name
    again = {**receipt, "erased": {**receipt["erased"], "messages": 2}}
    assert {"signature", "log"} <= failing(check_deletion(again, recall))


def test_a_text_that_came_back_is_found(erased, tmp_path):
    recall, receipt = erased
    (tmp_path / "store" / "notes.txt").write_text(f"remember: {SECRET}")
    checked = check_deletion(receipt, recall, texts=[SECRET])
    assert failing(checked) == {"residue"}
    told = next(words for what, _, words in checked if what == "residue")
    assert "notes.txt at byte" in told
    assert "combination" not in told


def test_messages_that_are_there_and_logs_that_were_changed_are_told(erased, tmp_path):
    recall, receipt = erased
    recall.close()
    base = sqlite3.connect(tmp_path / "store" / "recall.sqlite")
    base.execute("UPDATE messages SET id = 5 WHERE id = 4")
    base.execute("UPDATE audit SET detail = replace(detail, '\"messages\": 1', '\"messages\": 0')")
    base.commit()
    base.close()
    with opened(tmp_path / "store") as recall:
        assert failing(check_deletion(receipt, recall)) == {"ids", "log", "chain"}
    with opened(tmp_path / "another") as other:
        assert failing(check_deletion(receipt, other)) == {"store"}


def test_without_a_key_a_receipt_has_no_signature_and_no_hashes(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "none.pem"))
    with opened(tmp_path / "store") as recall:
        recall.add(SECRET, person="Ottokar")
        receipt = recall.forget(Selection(person="Ottokar"))
        assert "signature" not in receipt
        assert receipt["texts"] is None
        assert receipt["asked"] == {"space": True, "person": True}
        assert not failing(check_deletion(receipt, recall, texts=[SECRET]))
        assert failing(check_deletion(receipt, recall, trusted="abc")) == {"signature"}


def test_the_log_gives_receipts_again(erased):
    recall, receipt = erased
    assert receipts_of(recall.store) == [receipt]


def test_without_a_scan_a_receipt_says_so(tmp_path):
    from remanence.recall.erasure import erase

    with opened(tmp_path / "store") as recall:
        recall.add(SECRET)
        receipt = erase(recall, Selection(ids=(1,)), scan=False)
        assert receipt["scan"] is None
        assert failing(check_deletion(receipt, recall, texts=[SECRET])) == {"scan"}


def test_what_is_no_receipt_is_refused_in_a_sentence(erased, tmp_path):
    _, receipt = erased
    odd = (
        None,
        [],
        "x",
        1,
        1.5,
        {},
        {"a": 1},
        [[1]],
        [[1, "2"]],
        [[2**80, 2**80]],
        [[True, 1]],
        True,
        "\ud800",
        ["\ud800"],
        {"a": "\ud800"},
    )
    for name, value in itertools.product(("kind", "format", "id", "store", "asked", "erased", "ids", "texts", "scan", "signature"), odd):
        try:
            check_deletion({**receipt, name: value}, texts=["some text"])
        except Mistake as mistake:
            assert "\n" not in str(mistake)
    for content in ("", "[", "{}", "[]", '{"kind": "deletion"}', "[" * 100_000, "\x00"):
        (tmp_path / "receipt.json").write_text(content)
        with pytest.raises(Mistake):
            read_deletion(tmp_path / "receipt.json")
    with pytest.raises(Mistake, match="does not exist"):
        read_deletion(tmp_path / "nowhere.json")
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    assert read_deletion(tmp_path / "receipt.json") == receipt


def test_ids_are_told_as_ranges():
    assert ranges([5, 3, 4, 9, 4, 11, 12]) == [[3, 5], [9, 9], [11, 12]]
    assert ranges([]) == []
