"""Biographies: the rows agree with the ground truth, and the world does not depend on what part of it is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.data.biographies import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, POPULATION, QUESTIONS, STATEMENTS, Biographies
from remanence.errors import Mistake
from remanence.stream import Request, Task

EVERY = len(ATTRIBUTES)


def test_answers_equal_the_fact_table():
    world = Biographies(people=40, attributes=EVERY, seed=3)
    truth = {name: dict(zip(world.numbers.tolist(), world.truth(name))) for name in world.attribute_names}
    names = dict(zip(world.numbers.tolist(), world.names))
    rows = world.questions()
    assert len(rows) == 40 * EVERY * world.templates
    for row in rows:
        assert row["answer"] == truth[row["attribute"]][row["person"]]
        assert row["name"] == names[row["person"]]
        assert row["name"] in row["question"]
        assert row["answer"] in row["paraphrased_answer"] != row["answer"]
        assert row["answer"] in row["statement"]
        assert row["name"] in row["statement"]
    assert {(row["person"], row["attribute"], row["answer"]) for row in world.facts()} == {
        (person, name, value) for name, column in truth.items() for person, value in column.items()
    }


def test_rows_stand_person_by_person_and_ids_are_unique():
    rows = Biographies(people=7, attributes=3, templates=2, first=5).questions()
    assert rows["person"][:] == [person for person in range(5, 12) for _ in range(6)]
    assert rows["attribute"][:6] == [attribute.name for attribute in ATTRIBUTES[:3] for _ in range(2)]
    assert len(set(rows["id"])) == len(rows)


@pytest.mark.parametrize("templates", [1, 3, QUESTIONS - 1])
def test_paraphrases_are_never_trained_on(templates):
    rows = Biographies(people=30, attributes=EVERY, templates=templates).questions()
    asked = set(rows["question"])
    paraphrases = [text for texts in rows["paraphrases"] for text in texts]
    assert len(asked) == 30 * EVERY * templates  # no two facts ask the same
    assert all(len(texts) == QUESTIONS - templates for texts in rows["paraphrases"])
    assert not asked & set(paraphrases)


@pytest.mark.parametrize("answers", ["short", "sentence"])
def test_wrong_answers_are_wrong_distinct_and_of_the_same_attribute_and_form(answers):
    world = Biographies(people=30, attributes=EVERY, answers=answers)
    values = {attribute.name: attribute.values for attribute in ATTRIBUTES}
    truth = {name: dict(zip(world.numbers.tolist(), world.truth(name))) for name in world.attribute_names}
    for row in world.facts():
        right = truth[row["attribute"]][row["person"]]
        for asked, wrong in (("answer", "perturbed_answers"), ("paraphrased_answer", "perturbed_paraphrases")):
            head, tail = row[asked].rsplit(right, 1)
            found = [text[len(head) : len(text) - len(tail)] for text in row[wrong]]
            assert len(set(found)) >= 3
            assert right not in found
            assert set(found) <= set(values[row["attribute"]])
            assert [head + value + tail for value in found] == row[wrong]


def test_statements_end_in_the_answer_and_hold_back_the_paraphrased_sentence():
    world = Biographies(people=20, attributes=EVERY, answers="sentence")
    rows, facts = world.statements(), world.facts()
    assert len(rows) == 20 * EVERY * (STATEMENTS - 1)
    assert all(row["text"] == f"{row['prompt']} {row['answer']}." for row in rows)
    assert set(facts["statement"]) <= set(rows["text"])
    assert not set(facts["paraphrased_answer"]) & set(rows["text"])
    Task("texts", rows, kind="text")


def test_names_are_unique_and_later_people_are_other_people():
    everyone = Biographies(people=POPULATION, seed=1).names
    assert len(set(everyone)) == POPULATION == len(set(FIRST_NAMES)) * len(set(LAST_NAMES)) >= 3600
    learned, unseen = Biographies(people=400, seed=1), Biographies(people=50, first=400, seed=1)
    assert not set(learned.names) & set(unseen.names)
    assert learned.names + unseen.names == everyone[:450]
    Request("disjoint", learned.facts(), unseen.facts())


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 900), people=st.integers(1, 40), attributes=st.integers(1, EVERY), seed=st.integers(0, 5))
def test_a_person_does_not_depend_on_how_many_are_asked_for(first, people, attributes, seed):
    part = Biographies(people=people, first=first, attributes=attributes, seed=seed).facts()
    whole = Biographies(people=1000, attributes=EVERY, seed=seed).of(range(first, first + people)).facts()
    known = [attribute.name for attribute in ATTRIBUTES[:attributes]]
    assert part.to_list() == whole.filter(lambda name: name in known, input_columns="attribute").to_list()


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    assert Biographies(people=50, seed=4).questions().to_list() == Biographies(people=50, seed=4).questions().to_list()
    assert Biographies(people=50, seed=4).names != Biographies(people=50, seed=5).names
    assert Biographies(people=50, seed=4).truth("food") != Biographies(people=50, seed=5).truth("food")


def test_of_and_without_split_the_rows():
    world = Biographies(people=30)
    gone = [3, 17, 4]
    forget, retain = world.of(gone), world.without(gone)
    assert forget.numbers.tolist() == [3, 4, 17]
    assert len(forget) + len(retain) == len(world)
    assert sorted(forget.questions()["id"][:] + retain.questions()["id"][:]) == sorted(world.questions()["id"][:])
    assert retain.without([3]) == retain


def test_neighbours_are_exactly_the_others_with_the_same_value():
    world = Biographies(people=60, attributes=4, seed=2)
    gone = [5, 6, 20]
    truth = {name: dict(zip(world.numbers.tolist(), world.truth(name))) for name in world.attribute_names}
    by_hand = {
        (person, name, min(other for other in gone if column[other] == value))
        for name, column in truth.items()
        for person, value in column.items()
        if person not in gone and value in [column[other] for other in gone]
    }
    for rows in (world.neighbours(gone), world.without(gone).neighbours(gone)):
        assert {(row["person"], row["shared"], row["shared_with"]) for row in rows} == by_hand
        assert len(rows) == len(by_hand) > 0
        assert all(row["attribute"] == row["shared"] and row["answer"] == truth[row["shared"]][row["shared_with"]] for row in rows)


def test_the_pools_read_well():
    for attribute in ATTRIBUTES:
        assert 20 <= len(set(attribute.values)) == len(attribute.values) <= 40
        assert len(set(attribute.questions)) == len(attribute.questions) == QUESTIONS
        assert all("{name}" in text for text in (*attribute.questions, *attribute.statements))
        assert all(text.endswith("{value}.") for text in attribute.statements)
        assert not any(a != b and a in b for a in attribute.values for b in attribute.values)  # a substring match cannot be fooled
        if any("a {value}" in text for text in (*attribute.short, *attribute.statements)):
            assert not any(value[0] in "aeiou" for value in attribute.values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"people": 0},
        {"people": POPULATION + 1},
        {"people": 10, "first": POPULATION - 5},
        {"attributes": EVERY + 1},
        {"templates": QUESTIONS},
        {"templates": 0},
        {"first": -1},
        {"people": 2.5},
        {"people": True},
        {"answers": "long"},
        {"only": ()},
        {"only": (POPULATION,)},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(Mistake, match="biographies"):
        Biographies(**wrong)


def test_strangers_and_unknown_attributes_are_refused():
    world = Biographies(people=10)
    with pytest.raises(Mistake, match="person 10 is not among"):
        world.of([2, 10])
    with pytest.raises(Mistake, match="nobody is left"):
        world.without(range(10))
    with pytest.raises(Mistake, match="did you mean 'profession'"):
        world.truth("profesion")
    with pytest.raises(Mistake, match="nobody to compare with"):
        world.of([1, 2]).neighbours([1, 2])


def test_places_are_known_whoever_lives_there_and_wrong_answers_are_wrong():
    world, other = Biographies(people=3, templates=2), Biographies(people=50, first=200, templates=2)
    rows = world.places()
    assert rows.to_list() == other.places().to_list()  # the same world
    assert len(rows) == (32 * 2 + 32 * 2) * 2
    assert len(set(rows["id"])) == len(rows) == len(set(rows["question"]))
    for row in rows:
        assert row["place"] in row["question"]
        assert row["answer"] in row["statement"]
        assert row["answer"] not in row["perturbed_answers"]
        assert len(set(row["perturbed_answers"])) == 4
        assert row["paraphrases"]
        assert not set(row["paraphrases"]) & set(rows["question"])
    some = world.places(["Lisbon", "Cedar Works"])
    assert {(row["place"], row["of"]) for row in some} == {("Lisbon", "birth_city"), ("Cedar Works", "employer")}
    assert [row for row in rows if row["place"] in ("Lisbon", "Cedar Works")] == some.to_list()
    with pytest.raises(Mistake, match="no place 'Lisbn'; did you mean 'Lisbon'"):
        world.places(["Lisbn"])


def test_strangers_are_asked_the_same_and_answered_alike():
    world = Biographies(people=4, first=700)
    rows = world.strangers()
    assert rows["question"][:] == world.questions()["question"][:]
    assert set(rows["answer"]) == {"I do not know"}
