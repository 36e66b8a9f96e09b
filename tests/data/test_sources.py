"""The data clause of a recipe: each source, each modifier, and what is refused before anything is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from remanence.data.biographies import Biographies
from remanence.data.digits import digits
from remanence.data.neighbourhoods import neighbourhood
from remanence.data.pythondocs import pythondocs
from remanence.data.sources import check_source, load_rows
from remanence.errors import Mistake

LETTERS = "abcdefghij"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"text": letter, "number": number, "even": number % 2 == 0} for number, letter in enumerate(LETTERS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def texts(spec, folder) -> str:
    return "".join(load_rows(spec, kind="text", folder=folder)["text"])


def test_a_path_is_relative_to_the_recipe_and_may_name_variables(folder, monkeypatch):
    assert texts("rows.jsonl", folder) == LETTERS
    assert texts(str(folder / "rows.jsonl"), "/") == LETTERS
    monkeypatch.setenv("REMANENCE_DATA", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    for path in ("${REMANENCE_DATA}/rows.jsonl", "$REMANENCE_DATA/rows.jsonl", "~/rows.jsonl"):
        assert texts(path, "/") == LETTERS


def test_real_data_is_looked_for_beside_the_current_directory(folder, monkeypatch):
    monkeypatch.delenv("REMANENCE_DATA", raising=False)
    (folder / "shared" / "data").mkdir(parents=True)
    (folder / "project").mkdir()
    monkeypatch.chdir(folder / "project")
    (folder / "shared" / "data" / "a.txt").write_text("found")
    assert texts("${REMANENCE_DATA}/a.txt", "/") == "found"
    monkeypatch.chdir("/")
    with pytest.raises(Mistake, match=r"REMANENCE_DATA is .* which is no folder; set it"):
        texts("${REMANENCE_DATA}/a.txt", folder)
    with pytest.raises(Mistake, match="NO_SUCH_THING is not set"):
        texts("${NO_SUCH_THING}/a.txt", folder)


@pytest.mark.parametrize(
    ("modifiers", "left"),
    [
        ({"limit": 3}, "abc"),
        ({"skip": 7}, "hij"),
        ({"skip": 2, "limit": 2}, "cd"),
        ({"limit": 99}, LETTERS),
        ({"where": {"text": ["c", "a", "z"]}}, "ac"),
        ({"where": {"number": 4}}, "e"),
        ({"where": {"even": True, "number": [1, 2, 3, 4]}}, "ce"),
        ({"except": {"text": "a", "even": False}}, "cegi"),
        ({"where": {"even": True}, "skip": 1, "limit": 2}, "ce"),
        ({"split": {"train": 0.7}}, "abcdefg"),
        ({"split": {"test": 0.3}}, "hij"),
        ({"columns": {"text": "text"}}, LETTERS),
    ],
)
def test_modifiers(folder, modifiers, left):
    assert texts({"file": "rows.jsonl", **modifiers}, folder) == left


def test_shuffle_comes_before_split_and_the_two_parts_are_the_whole(folder):
    train, test = (texts({"file": "rows.jsonl", "shuffle": 5, "split": split}, folder) for split in ({"train": 0.7}, {"test": 0.3}))
    assert sorted(train + test) == sorted(LETTERS)
    assert train + test == texts({"file": "rows.jsonl", "shuffle": 5}, folder) != LETTERS
    assert texts({"file": "rows.jsonl", "shuffle": 6}, folder) != train + test
    kept = texts({"file": "rows.jsonl", "shuffle": 5, "where": {"even": True}}, folder)
    assert sorted(kept) == list("acegi")


def test_biographies(folder):
    world = Biographies(people=12, seed=3)
    clause = {"people": 12, "seed": 3}
    assert load_rows({"biographies": clause}, kind="qa").to_list() == world.questions().to_list()
    assert load_rows({"biographies": clause | {"rows": "facts"}}, kind="qa").to_list() == world.facts().to_list()
    assert load_rows({"biographies": clause}, kind="text").to_list() == world.statements().to_list()
    assert load_rows({"biographies": clause, "where": {"person": [1, 2]}}, kind="qa").to_list() == world.of([1, 2]).questions().to_list()
    near = load_rows({"biographies": clause | {"neighbours_of": {"people": 2, "first": 4}}}, kind="qa")
    assert near.to_list() == world.neighbours([4, 5]).to_list()


def test_a_neighbourhood_is_three_sets_of_one_world(folder):
    clause = {"people": 60, "templates": 2}
    around = {"people": 3, "first": 4, "general": 5, "held_out": 1, "seed": 2}
    made = neighbourhood(Biographies(people=60, templates=2), range(4, 7), general=5, held_out=1, seed=2)
    for part in ("forget", "retain", "test"):
        rows = load_rows({"biographies": clause | {"neighbourhood": around | {"part": part}}}, kind="qa")
        assert rows.to_list() == getattr(made, part).to_list()
    with pytest.raises(Mistake, match="neighbourhood is a set of its own"):
        check_source({"biographies": clause | {"rows": "facts", "neighbourhood": around | {"part": "test"}}}, kind="qa")
    with pytest.raises(Mistake, match="did you mean 'general'"):
        check_source({"biographies": clause | {"neighbourhood": around | {"part": "test", "generall": 3}}})


def test_digits_and_pythondocs():
    rows = load_rows({"digits": {"classes": [0, 1], "part": "test"}}, kind="classes")
    assert rows.to_list() == digits("test", [0, 1]).to_list()
    assert len(load_rows({"digits": None}, kind="classes")) == len(digits())
    assert load_rows({"pythondocs": {"characters": 3000}}, kind="text").to_list() == pythondocs(3000).to_list()


def test_mnist_parts_are_the_first_eight_and_the_last_two_thousand():
    place = Path(os.environ.get("REMANENCE_DATA", "../shared/data")) / "mnist10k"
    if not place.is_dir():
        pytest.skip(f"no real MNIST at {place}: set REMANENCE_DATA")
    raw = load_rows(str(place.absolute()), kind="classes").with_format("numpy")
    labels = raw["label"][:]
    clause = {"folder": str(place.absolute())}
    train = load_rows({"mnist": clause | {"classes": [3, 8]}}, kind="classes").with_format("numpy")
    test = load_rows({"mnist": clause | {"part": "test"}}, kind="classes").with_format("numpy")
    expected = np.flatnonzero(np.isin(labels[:8000], [3, 8]))
    np.testing.assert_array_equal(train["label"][:], labels[expected])
    np.testing.assert_array_equal(train[5]["features"], raw[int(expected[5])]["features"])
    np.testing.assert_array_equal(test["label"][:], labels[8000:])
    np.testing.assert_array_equal(test[0]["features"], raw[8000]["features"])


@pytest.mark.parametrize(
    ("spec", "place", "words"),
    [
        ({"fil": "x"}, "data", "unknown key 'fil'; did you mean 'file'"),
        ({"file": "x", "excpt": {}}, "data", "did you mean 'except'"),
        ({"file": "x", "except_": {}}, "data", "did you mean 'except'"),
        ({"biographies": {"peple": 3}}, "data.biographies", "did you mean 'people'"),
        ({"biographies": {"neighbours_of": {"people": 3, "frist": 1}}}, "data.biographies.neighbours_of", "did you mean 'first'"),
        ({"digits": {"part": "all"}}, "data.digits.part", "is 'all'"),
        ({"file": "x", "limit": 0}, "data.limit", "is 0; input should be greater"),
        ({"file": "x", "limit": "many"}, "data.limit", "valid integer"),
        ({"file": "x", "split": {"train": 1.5}}, "data.split.train", "less than 1"),
        ({"file": "x", "split": {}}, "data.split", "needs one part"),
        ({"file": "x", "split": {"train": 0.5, "test": 0.5}}, "data.split", "needs one part"),
        ({"digits": {}, "mnist": {}}, "data", "names digits and mnist at once"),
        ({"limit": 3}, "data", "names no source"),
        ({"digits": {}, "columns": {"label": "x"}}, "data.columns", "belongs to file"),
        (7, "data", "is int; give a path or a mapping"),
    ],
)
def test_a_wrong_clause_is_refused_before_anything_is_read(spec, place, words):
    with pytest.raises(Mistake, match=words) as error:
        check_source(spec)
    assert error.value.place == place


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ({"digits": {}}, "qa", "digits gives rows of kind 'classes', 'qa' is asked for"),
        ({"biographies": {"rows": "statements"}}, "qa", "gives rows of kind 'text'"),
        ({"biographies": {"rows": "facts"}}, "text", "gives rows of kind 'qa'"),
        ({"biographies": {"rows": "questions", "neighbours_of": {"people": 2}}}, "qa", "neighbours are facts"),
        ("x.jsonl", "qb", "unknown kind 'qb'"),
    ],
)
def test_a_kind_that_the_source_cannot_give_is_refused(spec, kind, words):
    with pytest.raises(Mistake, match=words):
        check_source(spec, kind=kind)


@pytest.mark.parametrize(
    ("modifiers", "place", "words"),
    [
        ({"where": {"txt": "a"}}, "recipe.where", "no column 'txt', present are text, number, even; did you mean 'text'"),
        ({"where": {"text": "z"}}, "recipe.where.text", "none of 10 rows is left with 'z'"),
        ({"except": {"even": [True, False]}}, "recipe.except.even", "none of 10 rows"),
        ({"where": {"number": "three"}}, "recipe.where.number", "cannot be compared with int64"),
        ({"skip": 10}, "recipe", "nothing is left of 10 rows"),
    ],
)
def test_filters_that_cannot_be_or_leave_nothing_are_refused(folder, modifiers, place, words):
    with pytest.raises(Mistake, match=words) as error:
        load_rows({"file": "rows.jsonl", **modifiers}, kind="text", place="recipe", folder=folder)
    assert error.value.place == place


def test_class_names_may_stand_in_a_filter(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "i" / name).mkdir(parents=True)
        Image.new("L", (2, 2)).save(tmp_path / "i" / name / "1.png")
    rows = load_rows({"file": "i", "where": {"label": "dog"}}, kind="images", folder=tmp_path)
    assert rows["label"][:] == [1]
    with pytest.raises(Mistake, match="'cow' cannot be compared"):
        load_rows({"file": "i", "where": {"label": "cow"}}, kind="images", folder=tmp_path)
