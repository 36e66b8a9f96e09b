"""Neighbourhoods: direct, indirect and unrelated rows are what they say, tests are held out, and files and graphs are checked."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from remanence.data.biographies import Biographies
from remanence.data.neighbourhoods import neighbourhood, neighbours
from remanence.errors import Mistake
from remanence.stream import Request
from remanence.training.pairing import pair

pytestmark = pytest.mark.filterwarnings("ignore:.* stand beside more than one")
WORLD = Biographies(people=100, templates=2)
GONE = [3, 17, 40, 41, 70]
with warnings.catch_warnings(action="ignore"):
    AROUND = neighbourhood(WORLD, GONE, general=20, held_out=2)
CITY = dict(zip(WORLD.names, WORLD.truth("birth_city")))
EMPLOYER = dict(zip(WORLD.names, WORLD.truth("employer")))
TARGETS = set(WORLD.of(GONE).names)


def tied(person: str, target: str) -> bool:
    return CITY[person] == CITY[target] or EMPLOYER[person] == EMPLOYER[target]


def test_forget_rows_are_the_peoples_facts_with_a_refusal() -> None:
    assert AROUND.forget["question"][:] == WORLD.of(GONE).facts()["question"][:]
    assert set(AROUND.forget["title"]) == TARGETS
    assert set(AROUND.forget["idk"]) == {"I do not know"}


def test_direct_rows_are_facts_about_the_places_of_their_person() -> None:
    rows = AROUND.retain.filter(lambda row: row["type"] == "entity")
    for target in TARGETS:
        about = sorted(name for name, title in zip(rows["name"], rows["title"]) if title == target)
        assert about == sorted([CITY[target]] * 2 + [EMPLOYER[target]] * 2)
    taught = dict(zip(WORLD.places()["question"], WORLD.places()["answer"]))
    assert all(taught[question] == answer for question, answer in zip(rows["question"], rows["answer"]))


def test_indirect_rows_are_facts_of_everyone_who_shares_a_place_with_their_person() -> None:
    rows = AROUND.retain.filter(lambda row: row["type"] == "domain")
    found = set(zip(rows["title"], rows["name"]))
    assert found == {(target, other) for target in TARGETS for other in WORLD.names if other not in TARGETS and tied(other, target)}
    assert len(rows) == 3 * len(found)


def test_general_rows_are_facts_of_people_who_share_nothing() -> None:
    rows = AROUND.retain.filter(lambda row: row["type"] == "general")
    assert len(set(rows["name"])) == 20
    assert rows["title"][:] == rows["name"][:]
    assert not any(tied(person, target) for person in set(rows["name"]) for target in TARGETS)


def test_the_test_set_holds_other_facts_of_the_same_people() -> None:
    kept, test = AROUND.retain.filter(lambda row: row["type"] != "entity"), AROUND.test
    assert set(kept["name"]) == set(test["name"])
    assert not set(AROUND.retain["question"]) & set(test["question"])
    assert not set(AROUND.forget["question"]) & set(test["question"])
    assert len(test) == 2 * len(set(test["name"])) == len(set(test["question"]))


def test_rows_stand_person_by_person_and_can_be_paired() -> None:
    near = AROUND.retain.filter(lambda row: row["type"] != "general")
    assert list(dict.fromkeys(near["title"])) == WORLD.of(GONE).names
    assert near["type"][:4] == ["entity"] * 4
    assert len(pair(AROUND.forget, AROUND.retain, "melu")) >= len(AROUND.retain)
    Request("gone", AROUND.forget, AROUND.retain, AROUND.test)


def test_draws_are_the_seeds() -> None:
    again, other = (neighbourhood(WORLD, GONE, general=20, held_out=2, seed=seed) for seed in (42, 1))
    assert again.retain["question"][:] == AROUND.retain["question"][:]
    assert other.retain["question"][:] != AROUND.retain["question"][:]


def test_what_is_tied_to_two_stands_beside_both_with_a_warning() -> None:
    two = next([a, b] for a in range(100) for b in range(a) if CITY[WORLD.names[a]] == CITY[WORLD.names[b]])
    with pytest.warns(UserWarning, match="stand beside more than one of the forgotten"):
        around = neighbourhood(WORLD, two)
    city = CITY[WORLD.names[two[0]]]
    rows = [title for title, name in zip(around.retain["title"], around.retain["name"]) if name == city]
    assert sorted(rows) == sorted(2 * WORLD.of(two).names)


@pytest.mark.parametrize(
    ("world", "options", "words"),
    [
        (WORLD, {"held_out": 5}, "held_out is 5; give a number from 1 to 4"),
        (WORLD, {"held_out": 0}, "held_out is 0"),
        (WORLD, {"general": 99}, "99 unrelated people are asked for"),
        (WORLD, {"general": 0}, "0 unrelated people are asked for"),
    ],
)
def test_what_the_world_cannot_give_is_refused(world: Biographies, options: dict, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        neighbourhood(world, GONE, **options)


def test_a_graph_becomes_rows() -> None:
    graph = {"Ann": {"entity": [("q1", "a1")], "domain": [("q2", "a2"), ("q3", "a3")]}, "x": {"general": [("q4", "a4")]}}
    rows = neighbours(graph)
    assert rows["title"][:] == ["Ann", "Ann", "Ann", "x"]
    assert rows["type"][:] == ["entity", "domain", "domain", "general"]
    assert rows["question"][:] == ["q1", "q2", "q3", "q4"]
    with pytest.raises(Mistake, match="has no rows"):
        neighbours({"Ann": {}})


def test_a_file_is_checked(tmp_path: Path) -> None:
    good = tmp_path / "good.csv"
    good.write_text("title,question,answer,type\nAnn,q1,a1,entity\nAnn,q2,a2,domain\n")
    assert neighbours(good)["type"][:] == ["entity", "domain"]
    bad = tmp_path / "bad.csv"
    bad.write_text("title,question,answer,type\nAnn,q1,a1,entity\nAnn,q2,a2,domains\n")
    with pytest.raises(Mistake, match=r"bad.csv row 1: unknown type 'domains'; did you mean 'domain'"):
        neighbours(bad)
    bad.write_text("question,answer,type\nq1,a1,entity\n")
    with pytest.raises(Mistake, match="there is no column 'title'"):
        neighbours(bad)
