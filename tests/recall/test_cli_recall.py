"""The conversation memory on the command line: what the guide does not show, above all what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from remanence.cli import app
from remanence.errors import Mistake
from remanence.recall.service import Recall


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Make a store of two conversations with an embedder that needs no model; return a function that runs a command on it."""
    for name, value in (("REMANENCE_STORE", "store"), ("REMANENCE_KEYS", "keys"), ("REMANENCE_KEY", "signing.pem"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, str(tmp_path / value) if name != "COLUMNS" else value)
    monkeypatch.chdir(tmp_path)
    with Recall.open(tmp_path / "store", embedder="hashing", tokenizer="plain") as memory:
        memory.add("Ada lives in Bergen.", person="eva", conversation="family")
        memory.add("How nice!", role="assistant", conversation="family")
        memory.add("We fly to Lisbon in May.", person="tom", conversation="holidays")

    def run(*words, code=0):
        done = CliRunner().invoke(app, ["recall", *words])
        if isinstance(done.exception, Mistake):
            raise done.exception
        assert done.exit_code == code, (done.exception, done.output)
        return done.output

    return run


def test_what_was_added_is_found_shown_and_counted(store):
    store("add", "The cat is called Otto.", "--person", "eva", "--at", "2026-03-01")
    assert "Otto" in store("ask", "What is the cat called?", "-k", "1")
    found = json.loads(store("ask", "What is the cat called?", "--json", "--retrieval", "lexical"))
    assert found[0]["chunk"]["text"] == "The cat is called Otto."
    assert [row["text"] for row in json.loads(store("show", "messages", "--until", "2026-03-01", "--json"))] == ["The cat is called Otto."]
    assert {row["name"] for row in json.loads(store("show", "conversations", "--json"))} == {"default", "family", "holidays"}
    assert json.loads(store("stats", "--json"))["messages"] == 4
    assert "<user>" in store("ask", "And the cat?", "--prompt")


def test_a_key_of_ones_own_is_stored_once(store):
    first, second = (store("add", "Once.", "--key", "a") for _ in range(2))
    assert first == second


def test_nothing_is_erased_without_yes_and_everything_that_was_asked_with_it(store):
    assert "Nothing is erased yet" in store("forget", "--person", "eva")
    assert "Bergen" in store("show")
    store("forget", "--person", "eva", "--every-space", "--yes", "--reason", "ticket 1")
    assert "Bergen" not in store("show")
    receipt = json.loads(Path("receipt-1.json").read_text())
    assert receipt["erased"]["messages"] == 1
    assert "Bergen" not in json.dumps(receipt)


@pytest.mark.parametrize(
    "named", [["--id", "99"], ["--person", "nobody"], ["--conversation", "none"], ["--role", "tool"], ["--since", "2050-01-01"]]
)
def test_a_preview_of_nothing_is_refused_as_the_erasure_is(store, named):
    sentences = []
    for yes in ([], ["--yes"], ["--json"], ["--every-space"]):
        with pytest.raises(Mistake, match="selection: names no message; look up") as found:
            store("forget", *named, *yes)
        sentences.append(str(found.value))
    assert len(set(sentences)) == 1
    assert "3" in store("forget", "--whole-space")
    store("forget", "--whole-space", "--yes")
    for yes in ([], ["--yes"]):
        with pytest.raises(Mistake, match="there is no space 'default'"):
            store("forget", "--whole-space", *yes)


def test_a_number_that_is_not_there_is_named_beside_those_that_are(store):
    for yes in ([], ["--yes"]):
        said = store("forget", "--id", "1", "--id", "99", *yes)
        assert "no message 99 is among these" in said
    assert "Bergen" not in store("show")
    assert "is among these" not in store("forget", "--id", "2")


def test_a_receipt_is_checked_against_the_store_and_given_again(store):
    store("forget", "--contains", "Lisbon", "--yes", "--out", "gone.json")
    assert "FAILS" not in store("verify", "gone.json", "--text", "We fly to Lisbon in May.")
    assert "FAILS" in store("verify", "gone.json", "--text", "Ada lives in Bergen.", code=1)
    number = json.loads(Path("gone.json").read_text())["id"]
    assert [each["id"] for each in json.loads(store("receipts", "--json"))] == [number]
    store("receipts", "--out", "again")
    assert "FAILS" not in store("verify", f"again/{number}.json")


def test_facts_are_pinned_and_erased_by_number(store):
    store("pin", "No nuts.", "--source", "1")
    assert "No nuts." in store("ask", "Cake?", "--prompt")
    assert "Nothing is erased yet" in store("forget", "--fact", "1")
    store("forget", "--fact", "1", "--yes")
    assert store("show", "facts").strip() == "no facts"
    with pytest.raises(Mistake, match="no fact 1"):
        store("forget", "--fact", "1", "--yes")


def test_what_is_exported_is_imported_once(store):
    store("export", "all.jsonl")
    assert store("import", "all.jsonl", "--space", "copy", "--quiet").startswith("3 new")
    assert store("import", "all.jsonl", "--space", "copy", "--quiet").startswith("0 new")


def test_a_store_is_moved_to_another_embedder(store):
    assert store("reindex", "other", "--embedder", "hashing:64", "--quiet") == "other: 3 messages\n"
    assert json.loads(store("stats", "--store", "other", "--json"))["embedder"] == "hashing:64"
    assert "Bergen" in store("ask", "Ada in Bergen", "-k", "1", "--store", "other")


def test_keys_are_made_listed_and_revoked(store):
    secret = store("key", "--make", "laptop", "--space", "eva").strip()
    assert secret.startswith("rk_")
    assert "laptop" in store("key")
    store("key", "--revoke", "laptop")
    assert "laptop" not in store("key")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["forget", "--yes"], "nothing says what is to go"),
        (["forget", "--contains", "zebra", "--yes"], "names no message"),
        (["show", "mesages"], "did you mean 'messages'"),
        (["ask", "x", "--retrieval", "telepathy"], "there is no 'telepathy'"),
        (["show", "--since", "yesterday"], "is no ISO date"),
        (["verify", "nothing.json"], "does not exist"),
        (["import", "nothing.jsonl"], "nothing.jsonl"),
        (["edit", "99", "x"], "no message 99"),
        (["add", "x", "--role", "king"], "king"),
        (["ask", "x", "--prompt", "--budget", "1"], "budget"),
        (["ask", "x", "--store", "elsewhere"], "elsewhere"),
        (["key", "--make", ""], "printable name"),
        (["serve", "--scope", "world"], "there is no 'world'"),
        (["serve", "--host", "0.0.0.0"], "other machines"),
    ],
)
def test_a_mistake_is_one_sentence(store, words, sentence):
    with pytest.raises(Mistake, match=sentence):
        store(*words)


def test_the_benchmark_of_memories_writes_its_advice_and_goes_on_where_it_was(store, tmp_path):
    words = ["convomem", "bench", "--policy", "bm25,own", "--sizes", "1,3", "--limit", "1", "--embedder", "hashing", "--quiet"]
    first, again = (CliRunner().invoke(app, words) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.output == again.output
    assert {path.name for path in (tmp_path / "bench").iterdir()} >= {"results.csv", "answers.jsonl", "crossover.txt", "crossover.png"}
    for wrong, sentence in (
        (["--sizes", "1,x"], "no list"),
        (["--policy", "blox"], "did you mean"),
        (["--source", "locomo"], "desk reader"),
    ):
        done = CliRunner().invoke(app, ["convomem", "bench2", *wrong])
        assert isinstance(done.exception, Mistake)
        assert sentence in str(done.exception)
