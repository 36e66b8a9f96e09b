"""Generated dialogues: what is planted is there once, what is asked is answerable, nothing else gives a value away."""

import pytest

from remanence.data.dialogues import LATER, dialogue, found
from remanence.errors import Mistake
from remanence.recall.tokenizers import load_tokenizer


@pytest.mark.parametrize("turns", [50, 500, 1500])
def test_every_value_stands_in_exactly_the_turn_that_says_it(turns):
    talk = dialogue(turns, seed=3)
    assert len(talk.turns) == turns
    assert len(talk.facts) == turns // 10
    for fact in talk.facts:
        for value, at in ((fact.value, fact.at), (fact.newer, fact.corrected)):
            if value is not None:
                assert [turn.number for turn in talk.turns if found(value, turn.text)] == [at]
                assert fact.name in talk.turns[at - 1].text
                assert talk.turns[at - 1].role == "user"


def test_about_a_fifth_is_corrected_before_it_is_asked_for():
    talk = dialogue(1500, seed=0)
    corrected = [fact for fact in talk.facts if fact.newer]
    assert 0.1 < len(corrected) / len(talk.facts) < 0.3
    for fact in corrected:
        assert fact.at < fact.corrected < fact.at + LATER
        assert fact.right(fact.at + LATER) == fact.newer
        assert fact.right(fact.corrected) == fact.value
        assert fact.said(fact.at + LATER) == fact.corrected


def test_every_fact_is_asked_at_the_end_and_150_turns_after_planting_if_there_are_as_many():
    talk = dialogue(500, seed=1)
    assert sorted(asked.fact for asked in talk.asked if asked.kind == "end") == list(range(len(talk.facts)))
    for asked in talk.asked:
        fact = talk.facts[asked.fact]
        assert fact.name in asked.question
        assert not found(fact.right(asked.after), asked.question)
        if asked.kind == "later":
            assert asked.after == fact.at + LATER
    assert sum(asked.kind == "later" for asked in talk.asked) == sum(fact.at + LATER < 500 for fact in talk.facts)


def test_a_seed_is_a_dialogue():
    assert dialogue(100, seed=5) == dialogue(100, seed=5)
    assert dialogue(100, seed=5) != dialogue(100, seed=6)


def test_more_facts_than_values_are_refused():
    with pytest.raises(Mistake, match="every"):
        dialogue(5000, seed=0)
    assert len(dialogue(5000, seed=0, every=50).facts) == 100


def test_turns_are_long_enough_that_4000_tokens_are_fewer_than_150_turns():
    count = load_tokenizer("plain").count
    assert sum(count(turn.text) for turn in dialogue(500, seed=0).turns[-LATER:]) > 4000


def test_found_is_by_whole_words():
    assert found("French horn", "the french  Horn.")
    assert not found("cat", "the catalogue")
