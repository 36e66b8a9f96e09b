"""The stand-in for the PCH benchmark: who is in it, what comes again, and that it is the same every time."""

from __future__ import annotations

import re

import numpy as np
import pytest

from remanence.data.pch import GROUPS, MOST, PCH
from remanence.data.sources import check_source, guess_kind, load_rows
from remanence.errors import Mistake


def test_the_three_groups_are_there_alike_and_no_record_stands_twice() -> None:
    rows = PCH(requests=60, retained=60, again=0.0).everything()
    assert len(rows) == 120
    assert {group: rows["group"][:].count(group) for group in GROUPS} == dict.fromkeys(GROUPS, 40)
    for column in ("text", "question", "id"):
        assert len(set(rows[column])) == 120


@pytest.mark.parametrize("again", [0.2, 0.5])
def test_a_share_of_the_later_requests_comes_again(again: float) -> None:
    rows = PCH(requests=300, again=again).deletions()
    forms = np.array(rows["form"])
    assert rows["request"][:] == list(range(300))
    assert set(forms[:10]) == {"original"}
    assert abs((forms[10:] != "original").mean() - again) < 0.06
    records, first = np.array(rows["record"]), {}
    for number, (record, form) in enumerate(zip(records.tolist(), forms.tolist())):
        if form == "original":
            assert record not in first
            first[record] = number
            continue
        assert first[record] < number
        earlier, now = rows[first[record]], rows[number]
        assert (earlier["text"] == now["text"]) == (form == "again")
        assert earlier["answer"] == now["answer"]


def test_a_reworded_record_says_the_same() -> None:
    rows = PCH(requests=200, again=0.6).deletions()
    for row in rows:
        if row["form"] == "reworded" and row["group"] == "personal":
            assert all(part in row["text"] for part in row["answer"].split(", "))
            assert re.search(r"555-01\d\d", row["text"])


def test_what_is_deleted_and_what_stays_are_apart_and_both_are_taught() -> None:
    world = PCH(requests=40, retained=30, again=0.4)
    gone, kept, taught = set(world.deletions()["record"]), set(world.retain()["record"]), world.everything()["record"][:]
    assert not gone & kept
    assert sorted(taught) == sorted(gone | kept)


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert PCH(requests=30).deletions()[:] == PCH(requests=30).deletions()[:]
    assert PCH(requests=30, seed=1).deletions()["text"][:] != PCH(requests=30).deletions()["text"][:]


def test_numbers_out_of_range_are_refused() -> None:
    for options in ({"requests": 0}, {"retained": 0}, {"again": 1.5}, {"requests": MOST}):
        with pytest.raises(Mistake, match="pch"):
            PCH(**options)


def test_a_recipe_reaches_each_part_as_text_and_as_questions() -> None:
    one = {"pch": {"rows": "deletions", "requests": 30}, "where": {"request": 3}}
    text, asked = load_rows(one, kind="text"), load_rows(one, kind="qa")
    assert len(text) == len(asked) == 1
    assert text["text"][0]
    assert asked["question"][0].endswith(("?", "."))
    assert len(load_rows({"pch": {"rows": "retain", "retained": 7}}, kind="text")) == 7
    assert guess_kind({"pch": {}}) == "text"
    with pytest.raises(Mistake, match="pch gives rows of kind 'text', 'images' is asked for"):
        check_source({"pch": {}}, kind="images")
    with pytest.raises(Mistake, match="did you mean 'rows'"):
        check_source({"pch": {"row": "retain"}})
