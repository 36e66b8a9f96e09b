"""Series of events: fifty requests in three lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from remanence.errors import Mistake
from remanence.recipe import Recipe
from remanence.unroll import filled, unrolled

RECIPE = """\
name: series
model: desk:bio
events:
  - {learn: people, kind: qa, data: {biographies: {first: 120, people: 30}}}
  - forget: request
    repeat: 3
    data: {biographies: {people: 1, first: "{n+120}"}}
    retain: {biographies: {people: 10, first: "{2*n}"}}
  - {learn: "more {n}", repeat: 2, kind: text, data: "part-{n+7}.txt"}
"""


def test_a_repeated_event_is_written_out_with_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    names = [getattr(event, "learn", None) or event.forget for event in recipe.events]  # type: ignore[union-attr]
    assert names == ["people", "request 1", "request 2", "request 3", "more 0", "more 1"]
    assert [event.data["biographies"]["first"] for event in recipe.events[1:4]] == [120, 121, 122]  # type: ignore[index, call-overload]
    assert [event.retain["biographies"]["first"] for event in recipe.events[1:4]] == [0, 2, 4]  # type: ignore[union-attr, index, call-overload]
    assert [event.data for event in recipe.events[4:]] == ["part-7.txt", "part-8.txt"]
    assert all(event.repeat == 1 for event in recipe.events)


def test_a_mistake_in_a_copy_names_the_line_that_it_was_made_of(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("more {n}", "more {n}").replace("kind: text, data", "knd: text, data"))
    with pytest.raises(Mistake, match=r"recipe.yaml:9: unknown key 'events.4.knd'; did you mean 'kind'"):
        Recipe.load(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("count", ["0", "-1", "1001", "many", "true", "1.5"])
def test_a_count_out_of_range_is_refused_with_its_line(count: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("repeat: 3", f"repeat: {count}"))
    with pytest.raises(Mistake, match=r"recipe.yaml:6: events.1.repeat"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_places_are_filled_as_numbers_where_they_stand_alone_and_as_text_elsewhere() -> None:
    assert filled({"a": ["{n}", "{n + 2}", "{3 * n+1}", "x{n}y{n+1}", "{m}", 5, True, None]}, 4) == {
        "a": [4, 6, 13, "x4y5", "{m}", 5, True, None]
    }


def test_a_recipe_without_repeats_is_left_alone() -> None:
    tree, lines = {"events": [{"learn": "{n}"}]}, {("events", 0): 1}
    assert unrolled(tree, lines) == (tree, lines)
    assert unrolled({"events": 3}, {}) == ({"events": 3}, {})
