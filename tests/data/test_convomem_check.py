"""Which conversations hold an evidence message, and which do not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.data.convomem import Conversation, Utterance
from remanence.data.convomem_check import Leaks, check_conversations, check_item, levenshtein
from remanence.data.convomem_templates import template_items
from remanence.errors import Mistake

TEXT = "I finally booked the cabin near the lake for the last weekend of September, it costs 240 euros."


def talk(*messages: str, speaker: str = "User") -> Conversation:
    return Conversation(tuple(Utterance(speaker, text) for text in ("Hello there.", *messages)), "c")


def kinds(*conversations: Conversation, evidence: tuple[str, ...] = (TEXT,)) -> list[str]:
    return [fault.kind for fault in check_conversations([Utterance("User", text) for text in evidence], conversations)]


def test_the_validator_accepts_the_exact_message_and_one_that_contains_it() -> None:
    assert kinds(talk(TEXT)) == []
    assert kinds(talk(f"By the way: {TEXT} Nice, no?")) == []


def test_the_validator_accepts_a_message_that_is_80_percent_of_the_evidence_and_not_less() -> None:
    assert kinds(talk(TEXT[: int(0.8 * len(TEXT)) + 1])) == []
    assert kinds(talk(TEXT[: int(0.8 * len(TEXT)) - 1])) == ["not found"]


def test_the_validator_accepts_15_percent_of_edits_and_not_more() -> None:
    limit = int(0.15 * len(TEXT))
    assert limit > 10
    assert kinds(talk("#" * limit + TEXT[limit:])) == []
    assert kinds(talk("#" * (limit + 1) + TEXT[limit + 1 :])) == ["not found"]


def test_short_evidence_may_differ_by_ten_edits() -> None:
    assert kinds(talk("##########lake house"), evidence=("We have a lake house",)) == []
    assert kinds(talk("###########ake house"), evidence=("We have a lake house",)) == ["not found"]


def test_the_validator_rejects_duplicates_the_wrong_conversation_other_speakers_and_other_numbers() -> None:
    second = "My cousin Amelie will drive us there and back, she has a van with seven seats and a roof rack."
    assert kinds(talk(TEXT), talk(TEXT, second), evidence=(TEXT, second)) == ["several"]
    assert kinds(talk(second), talk(TEXT), evidence=(TEXT, second)) == ["wrong conversation", "wrong conversation"]
    assert kinds(talk(TEXT), talk(second), evidence=(TEXT,)) == ["count"]
    assert kinds(talk(TEXT, speaker="Assistant")) == ["not found"]
    assert "speaker" in kinds(talk(TEXT, speaker="System"))


def slow(one: str, two: str) -> int:
    row = list(range(len(two) + 1))
    for n, a in enumerate(one, 1):
        new = [n]
        for m, b in enumerate(two, 1):
            new.append(min(row[m] + 1, new[-1] + 1, row[m - 1] + (a != b)))
        row = new
    return row[-1]


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=12), st.text("abc", max_size=12), st.integers(0, 14))
def test_the_distance_is_that_of_the_plain_recursion_up_to_its_limit(one: str, two: str, limit: int) -> None:
    assert levenshtein(one, two, limit) == min(slow(one, two), limit + 1)


def test_a_filler_with_an_evidence_message_in_it_is_refused() -> None:
    item = template_items(("user_facts",), (1,), each=1, persons=1)[0]
    text = item.evidence[0].text
    Leaks([item]).refuse([talk("Something else altogether.")])
    for leak in (text, f"As I said: {text} Right?"):
        with pytest.raises(Mistake, match=item.id):
            Leaks([item]).refuse([talk(leak)])
    Leaks([item]).refuse([talk(text, speaker="Assistant")])


def test_an_abstention_item_with_another_answer_is_found() -> None:
    item = template_items(("abstention",), (2,), each=1, persons=1)[0]
    assert check_item(item) == []
    object.__setattr__(item, "answer", "green")
    assert [fault.kind for fault in check_item(item)] == ["answer"]


def test_long_texts_are_compared_quickly() -> None:
    draw = random.Random(0)
    one = "".join(draw.choice("abcdefgh ") for _ in range(4000))
    two = one[:2000] + "x" + one[2000:]
    assert levenshtein(one, two, 600) == 1
