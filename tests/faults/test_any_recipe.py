"""Whatever stands in a recipe, a `--set` or a data clause: it is taken, or refused by a Mistake, never by any other exception."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remanence.data.sources import check_source, load_rows
from remanence.errors import Mistake
from remanence.recipe import Recipe

quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

VALID: dict[str, Any] = {
    "name": "small",
    "model": "desk:mlp-digits",
    "learn": {"method": "replay", "capacity": 30, "memory": "balanced"},
    "forget": {"method": "npo", "beta": 0.1},
    "training": {"steps": 3, "lr": 0.1, "schedule": "cosine", "warmup": 0.5, "clip": None, "trackers": []},
    "forgetting": {"lr": 0.01},
    "measure": {
        "every": 2,
        "limit": 5,
        "sets": {"more": {"kind": "classes", "data": {"digits": {"part": "test"}}}},
        "probes": {"classes": ["accuracy", {"probe": "loss", "batch_size": 8}]},
    },
    "events": [
        {"learn": "one", "kind": "classes", "data": {"digits": {"classes": [0, 1]}, "where": {"label": [0]}, "split": {"train": 0.5}}},
        {"learn": "two", "kind": "text", "data": ["a.txt", {"file": "b.jsonl", "limit": 3}], "method": {"method": "ewc", "lam": 2.0}},
        {
            "learn": "three",
            "kind": "qa",
            "data": {"biographies": {"people": 3}},
            "method": {"method": "hft", "inner": {"method": "replay"}},
        },
        {"forget": "some", "kind": "classes", "data": {"digits": {}, "except": {"label": 3}, "skip": 1}, "training": {"steps": 1}},
    ],
    "lives": {"careful": {"learn": "ewc", "training": {"steps": 2}}, "oracle": {"oracle": True}},
    "seed": 3,
    "output": "runs/x",
    "keep_models": True,
    "dtype": "float32",
}

WORDS = sorted(
    {
        "method",
        "inner",
        "probe",
        "file",
        "digits",
        "classes",
        "hub:x",
        "..",
        "",
        "a/b",
        "\x00",
        "${HOME}",
        "$NOPE",
        "~",
        "replay",
        "npo",
        "loss",
        "1",
        "²",
    }
    | set(VALID)
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -1, 0, 2**63])
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=8)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every node below the root."""
    found = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += [(*path, key), *places(value, (*path, key))]
    return found


@st.composite
def mutants(draw: st.DrawFn, start: Any = VALID) -> Any:
    """Draw a valid tree with one to three nodes deleted, replaced, or joined by another."""
    tree = copy.deepcopy(start)
    for _ in range(draw(st.integers(1, 3))):
        there = places(tree)
        if not there:
            break
        *front, last = draw(st.sampled_from(there))
        node = tree
        for part in front:
            node = node[part]
        how = draw(st.sampled_from(["delete", "replace", "insert", "copy"]))
        if how == "delete":
            del node[last]
        elif how == "replace":
            node[last] = draw(trees)
        elif how == "copy":
            node[last] = copy.deepcopy(draw(st.sampled_from([VALID[key] for key in VALID])))
        elif isinstance(node, dict):
            node[draw(st.sampled_from(WORDS) | st.text(max_size=5) | st.integers())] = draw(trees)
        else:
            node.insert(last, draw(trees))
    return tree


def taken_or_refused(work: Any) -> Any:
    """Return what the work returns, or check the form of its refusal."""
    found, refusal = None, None
    try:
        found = work()
    except Mistake as mistake:
        refusal = mistake
    assert refusal is None or (refusal.place and refusal.problem and refusal.remedy)
    return found


def test_the_start_of_all_mutants_is_valid() -> None:
    assert Recipe.of(VALID).life_names == ["careful", "oracle"]


@quick
@given(trees)
def test_any_tree_is_a_recipe_or_a_mistake(tree: Any) -> None:
    assert taken_or_refused(lambda: Recipe.of(tree)) is None or isinstance(tree, dict)


@quick
@given(mutants())
def test_a_mutated_recipe_is_a_recipe_or_a_mistake(tree: Any) -> None:
    recipe = taken_or_refused(lambda: Recipe.of(tree))
    if recipe is not None:
        again = Recipe.of(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)))
        assert json.dumps(again.model_dump(mode="json")) == json.dumps(recipe.model_dump(mode="json"))


@quick
@given(
    text=st.text(max_size=60)
    | st.text(alphabet="{}[]:,-&*!|>'\"%@`#\n \tab01?.~<", max_size=40)
    | mutants().map(lambda t: yaml.safe_dump(t))
)
def test_any_text_is_a_recipe_or_a_mistake(text: str, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    taken_or_refused(lambda: Recipe.load(path))


@quick
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_recipe_or_a_mistake(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    taken_or_refused(lambda: Recipe.load(path))


KEYS = [".".join(map(str, path)) for path in places(VALID)]


@quick
@given(
    changes=st.lists(
        st.text(max_size=20)
        | st.tuples(
            st.sampled_from(KEYS) | st.text(alphabet="abc.019²-", max_size=8), st.sampled_from(["", "=", "=="]), st.text(max_size=12)
        ).map("".join)
        | st.tuples(st.sampled_from(KEYS), trees.map(lambda tree: yaml.safe_dump(tree, default_flow_style=True))).map("=".join),
        min_size=1,
        max_size=3,
    )
)
def test_any_set_is_taken_or_a_mistake(changes: list[str], tmp_path: Path) -> None:
    path = tmp_path / "valid.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(VALID))
    taken_or_refused(lambda: Recipe.load(path, changes))


SOURCES: dict[str, Any] = {
    "digits": {"digits": {"classes": [0, 1], "part": "test"}, "where": {"label": [0, 1]}, "except": {"label": 1}, "shuffle": 3, "limit": 4},
    "rows": {"file": "rows.jsonl", "columns": {"question": "q"}, "where": {"n": 1}, "split": {"train": 0.5}},
    "people": {"biographies": {"people": 3, "rows": "facts", "neighbours_of": {"people": 1}}, "skip": 1},
    "both": {"list": ["rows.jsonl", {"file": "rows.jsonl", "limit": 1}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that some of the sources name."""
    place = tmp_path_factory.mktemp("rows")
    (place / "rows.jsonl").write_text("".join(json.dumps({"q": f"q{n}", "answer": "a", "n": n % 2, "m": [n]}) + "\n" for n in range(6)))
    return place


@quick
@given(
    spec=st.sampled_from(sorted(SOURCES)).flatmap(lambda name: mutants(SOURCES[name])) | trees,
    kind=st.sampled_from(["qa", "classes", "text"]),
)
def test_any_data_clause_gives_rows_or_a_mistake(spec: Any, kind: str, folder: Path) -> None:
    spec = spec["list"] if isinstance(spec, dict) and "list" in spec else spec
    checked = taken_or_refused(lambda: check_source(spec, kind=kind))
    if checked is None or any(
        s.pythondocs or s.mnist or (s.biographies and s.biographies.people > 50) or str(s.file).startswith("hub:") for s in checked
    ):
        return
    rows = taken_or_refused(lambda: load_rows(spec, kind=kind, folder=folder))
    assert rows is None or len(rows) > 0
