"""What is carried out of a memory and in again: facts keep their sources, by whatever numbers the messages have there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remanence.errors import Mistake
from remanence.recall.embedders import load_embedder
from remanence.recall.items import Selection
from remanence.recall.service import Recall

FACTS = {"Ada lives in Bergen.": ("My sister is Ada.", "She lives in Bergen."), "By hand.": (), "A trip.": ("We fly to Lisbon.",)}


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens a store, and close them all in the end."""
    made: list[Recall] = []

    def open_one(name: str) -> Recall:
        made.append(Recall.open(tmp_path / name, embedder="hashing", tokenizer="plain"))
        return made[-1]

    yield open_one
    for memory in made:
        memory.close()


@pytest.fixture
def exported(opened, tmp_path) -> Path:
    """Export messages of two conversations, whose ids interleave, with facts of them."""
    memory, ids = opened("first"), {}
    for text, conversation in (
        ("My sister is Ada.", "family"),
        ("We fly to Lisbon.", "trips"),
        ("She lives in Bergen.", "family"),
        ("In May.", "trips"),
    ):
        ids[text] = memory.add(text, conversation=conversation, person="eva").id
    for fact, texts in FACTS.items():
        memory.add_fact("default", fact, sources=[ids[text] for text in texts], pinned=fact == "By hand.")
    memory.export(tmp_path / "all.jsonl")
    return tmp_path / "all.jsonl"


def drawn(memory: Recall, space: str = "default") -> dict[str, set[str]]:
    """Return for each fact the texts that it names as its sources."""
    texts = {message.id: message.text for message in memory.messages(Selection(space))}
    return {fact.text: {texts[source] for source in fact.sources} for fact in memory.facts(space)}


def keep(path: Path, wanted) -> Path:
    """Write the lines of an export that are wanted, changed or not, to another file."""
    lines = [changed for line in path.read_text().splitlines() if (changed := wanted(json.loads(line)))]
    other = path.with_name("some.jsonl")
    other.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return other


def test_facts_keep_their_sources_under_new_numbers_and_go_with_them(opened, exported):
    memory = opened("second")
    for number in range(5):
        memory.add(f"Here before, {number}.", conversation="family", turn=100 + number)
    assert memory.load(exported, "copy") == 4
    assert drawn(memory, "copy") == {fact: set(texts) for fact, texts in FACTS.items()}
    assert [fact.pinned for fact in memory.facts("copy")] == [False, True, False]
    ids = [fact.id for fact in memory.facts("copy")]
    assert memory.load(exported, "copy") == 0  # a second time
    assert [fact.id for fact in memory.facts("copy")] == ids
    (source,) = (message.id for message in memory.messages(Selection("copy")) if message.text == "She lives in Bergen.")
    memory.forget(Selection("copy", ids=(source,)))
    assert drawn(memory, "copy") == {"By hand.": set(), "A trip.": {"We fly to Lisbon."}}


def test_a_fact_whose_source_is_absent_keeps_what_is_present_and_gets_the_rest_later(opened, exported):
    memory = opened("second")
    some = keep(exported, lambda line: line if line.get("message", {}).get("text") not in ("She lives in Bergen.", "In May.") else None)
    assert memory.load(some, "default") == 2
    assert drawn(memory) == {"Ada lives in Bergen.": {"My sister is Ada."}, "By hand.": set(), "A trip.": {"We fly to Lisbon."}}
    assert memory.load(exported, "default") == 2
    assert drawn(memory) == {fact: set(texts) for fact, texts in FACTS.items()}
    none = keep(exported, lambda line: line if "fact" in line or line["message"]["text"] == "In May." else None)
    assert memory.load(none, "another") == 1
    assert drawn(memory, "another") == {key: set() for key in FACTS}


def test_a_file_of_before_is_taken_and_a_newer_one_brings_the_sources(opened, exported):
    def older(line: dict) -> dict:
        line.get("message", {}).pop("id", None)
        line.get("fact", {}).pop("sources", None)
        return line

    memory = opened("second")
    assert memory.load(keep(exported, older), "default") == 4
    assert drawn(memory) == {key: set() for key in FACTS}
    assert memory.load(exported, "default") == 0
    assert drawn(memory) == {fact: set(texts) for fact, texts in FACTS.items()}
    assert [fact.pinned for fact in sorted(memory.facts("default"), key=lambda fact: fact.text)] == [False, False, True]
    assert memory.load(keep(exported, older), "default") == 0
    assert drawn(memory) == {fact: set(texts) for fact, texts in FACTS.items()}


def test_two_exports_put_together_do_not_mix_their_numbers(opened, exported, tmp_path):
    other = opened("other")
    source = other.add("Otto is a cat.", conversation="pets").id
    other.add_fact("default", "The cat is Otto.", sources=[source])
    other.export(tmp_path / "pets.jsonl")
    both = tmp_path / "both.jsonl"
    for first, second in ((exported, tmp_path / "pets.jsonl"), (tmp_path / "pets.jsonl", exported)):
        both.write_text(first.read_text() + second.read_text())
        memory = opened(f"of {first.name}")
        assert memory.load(both, "default") == 5
        assert drawn(memory) == {fact: set(texts) for fact, texts in FACTS.items()} | {"The cat is Otto.": {"Otto is a cat."}}


def test_a_store_made_anew_keeps_the_sources(opened, exported, tmp_path):
    memory = opened("second")
    memory.add("Here before.")
    memory.forget(Selection(conversation="default"))
    memory.load(exported, "default")
    with memory.reindex(tmp_path / "new", load_embedder("hashing:32")) as made:
        assert drawn(made) == {fact: set(texts) for fact, texts in FACTS.items()}


@pytest.mark.parametrize("sources", [3, [[1]], {"a": 1}, "12"])
def test_sources_that_are_no_numbers_are_one_sentence_or_none(opened, exported, sources):
    def odd(line: dict) -> dict:
        if "fact" in line:
            line["fact"]["sources"] = sources
        return line

    memory = opened("second")
    try:
        memory.load(keep(exported, odd), "default")
    except Mistake as mistake:
        assert "line 5" in str(mistake)
        assert memory.spaces() == []
    else:
        assert drawn(memory) == {key: set() for key in FACTS}
