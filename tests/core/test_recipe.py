"""Recipes: what is written comes back, errors name the line, overrides land, equal clauses share a method."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from remanence.errors import Mistake
from remanence.recipe import ForgetEvent, LearnEvent, Recipe
from remanence.runs import dump

TEXT = """\
name: small
model: desk:mlp-digits
learn: {method: replay, capacity: 30}
training:
  steps: 3
measure: {every: 2, limit: 4}
events:
  - learn: one
    kind: classes
    data: {digits: {classes: [0, 1]}, limit: 8}
  - learn: two
    kind: classes
    data: {digits: {classes: [2, 3]}, limit: 8}
    training: {steps: 1}
  - forget: some
    kind: classes
    data: {digits: {classes: [0]}, limit: 2}
lives:
  careful: {}
  plain: {learn: sequential, training: {lr: 0.5}}
  oracle: {oracle: true}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(TEXT)
    return tmp_path / "small.yaml"


def test_a_dumped_recipe_reads_as_the_same_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    again = Recipe.of(yaml.safe_load(dump(recipe)), folder=recipe.folder)
    assert again == recipe
    assert dump(again) == dump(recipe)


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("training:\n", "trainin:\n", 4, "did you mean 'training'"),
        ("  steps: 3", "  steps: 3\n  steps: 4", 6, "'steps' stands twice"),
        ("learn: two\n    kind: classes", "learn: two\n    knd: classes", 12, "'events.1.knd'"),
        ("learn: two\n    kind: classes", "learn: two\n    kind: klasses", 12, "events.1.kind"),
        ("limit: 4}", "limit: no}", 6, "measure.limit"),
        ("oracle: {oracle: true}", "oracle: {orakel: true}", 21, "did you mean 'oracle'"),
        ("- learn: two", "- lern: two", 11, "either `learn: NAME` or `forget: NAME`"),
        ("    data: {digits: {classes: [0]}, limit: 2}\n", "", 15, "'events.2.data' is missing"),
        ("training: {steps: 1}", "training: 7", 14, "events.1.training"),
        ("learn: one", "learn: 1", 8, "events.0.learn"),
    ],
)
def test_an_error_names_file_line_and_field(old: str, new: str, line: int, words: str, path: Path) -> None:
    assert TEXT.count(old) == 1
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(Mistake) as refused:
        Recipe.load(path)
    assert refused.value.place == f"{path}:{line}"
    assert words in str(refused.value)


def test_overrides_reach_into_lists_and_make_missing_mappings(path: Path) -> None:
    recipe = Recipe.load(path, ["events.1.training.lr=0.25", "forgetting.steps=7", "lives.plain.oracle=true", "name='7'", "seed=9"])
    assert recipe.events[1].training == {"steps": 1, "lr": 0.25}
    assert recipe.forgetting == {"steps": 7}
    assert recipe.lives["plain"].oracle
    assert (recipe.name, recipe.seed) == ("7", 9)


def test_a_life_named_by_a_number_can_be_overridden(path: Path) -> None:
    path.write_text(TEXT.replace("plain:", "'1':"))
    assert Recipe.load(path, ["lives.1.learn=ewc"]).lives["1"].learn == "ewc"


def test_settings_go_from_the_recipe_to_the_life_to_the_event(path: Path) -> None:
    recipe = Recipe.load(path, ["forgetting.lr=0.125", "training.batch_size=5"])
    one, two, request = recipe.events
    assert isinstance(one, LearnEvent)
    assert isinstance(request, ForgetEvent)
    assert (recipe.settings("careful", one).steps, recipe.settings("careful", two).steps) == (3, 1)
    assert (recipe.settings("careful", request).lr, recipe.settings("plain", request).lr) == (0.125, 0.5)
    assert recipe.settings("plain", one).batch_size == 5


def test_equal_clauses_share_one_method_and_an_oracle_serves_no_request(path: Path) -> None:
    recipe = Recipe.load(path)
    one, two, request = recipe._methods("careful")
    assert one[0] is two[0]
    assert one[0].capacity == 30
    assert request[2] == "npo"
    assert [label for _, _, label in recipe._methods("plain")] == ["sequential", "sequential", "npo"]
    assert recipe._methods("oracle")[2][0] is None
    assert recipe._methods("oracle")[0][0] is not one[0]


def test_relative_paths_begin_at_the_recipe(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.txt").write_text("one\n\ntwo\n")
    monkeypatch.chdir("/")
    assert Recipe.load(path).rows("rows.txt", "text", "data")["text"][:] == ["one", "two"]


def test_probes_read_rows_as_training_lays_them_out(path: Path) -> None:
    template = "{question} = {answer}"
    tree = {
        "name": "x",
        "model": "desk:mlp-digits",
        "training": {"length": 99, "template": template},
        "events": [{"learn": "a", "kind": "qa", "data": {"biographies": {"people": 2}}}],
    }
    recipe = Recipe.of(tree)
    probes = recipe.probes(recipe.stream())["a"]
    assert set(probes) == {"recall", "loss"}
    assert all((probe.length, probe.template) == (99, template) for probe in probes.values())
    assert all(probe.limit is None for name, probe in probes.items() if name == "recall")


def test_a_life_may_forget_at_a_rate_of_its_own() -> None:
    tree = {
        "name": "rates",
        "model": "desk:mlp-digits",
        "training": {"lr": 0.1},
        "forgetting": {"lr": 0.2},
        "lives": {"a": {}, "b": {"training": {"lr": 0.3}}, "c": {"training": {"lr": 0.3}, "forgetting": {"lr": 0.4}}},
        "events": [
            {"learn": "x", "kind": "classes", "data": {"digits": {}}},
            {"forget": "y", "kind": "classes", "data": {"digits": {"classes": [3]}}},
        ],
    }
    recipe = Recipe.of(tree)
    rates = {life: [recipe.settings(life, event).lr for event in recipe.events] for life in "abc"}
    assert rates == {"a": [0.1, 0.2], "b": [0.3, 0.3], "c": [0.3, 0.4]}
    with pytest.raises(Mistake, match="lives.a.forgetting.lrr: unknown key; did you mean 'lr'"):
        Recipe.of(tree | {"lives": {"a": {"forgetting": {"lrr": 1}}}})
