"""Runs on disk: what lies in an output, seeds side by side, resuming what is complete."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from remanence.errors import Mistake
from remanence.ledger import Ledger
from remanence.models.load import load_model, weights_hash
from remanence.recipe import Recipe
from remanence.runs import locked, run_recipe

TREE: dict[str, Any] = {
    "name": "small",
    "model": "desk:mlp-digits",
    "training": {"steps": 2, "batch_size": 4},
    "events": [
        {"learn": name, "kind": "classes", "data": {"digits": {"classes": classes}, "limit": 8}}
        for name, classes in (("a", [0, 1]), ("b", [2]))
    ],
}


def run(place: Path, **options: Any) -> Path:
    return run_recipe(Recipe.of(TREE), output=place, progress=False, report=False, **options)


def files(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def test_an_output_holds_ledger_recipe_and_model_and_no_working_files(tmp_path: Path) -> None:
    place = run(tmp_path / "out")
    names = set(files(place))
    assert {"ledger.sqlite", "recipe.yaml", "life/model/model.safetensors"} <= names
    assert not [name for name in names if "work" in name or name.endswith((".part", ".old"))]
    assert Recipe.load(place / "recipe.yaml") == Recipe.of(TREE, folder=place)


def test_a_complete_run_resumed_changes_nothing(tmp_path: Path) -> None:
    place = run(tmp_path / "out")
    before = files(place)
    run(place, resume=True)
    assert files(place) == before


def test_another_seed_leaves_the_state_of_an_interrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import remanence.life as module

    live = module.Life._live

    def stop_in_b(self: Any, number: int, deed: Any) -> None:
        if deed.event.name == "b" and self.seed == 0:
            raise KeyboardInterrupt
        live(self, number, deed)

    monkeypatch.setattr(module.Life, "_live", stop_in_b)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    run(tmp_path / "out", seed=1, resume=True)
    monkeypatch.undo()
    run(tmp_path / "out", seed=0, resume=True)
    run(tmp_path / "whole")
    assert (tmp_path / "out/life/model/model.safetensors").read_bytes() == (tmp_path / "whole/life/model/model.safetensors").read_bytes()
    with Ledger(tmp_path / "out/ledger.sqlite", create=False) as one, Ledger(tmp_path / "whole/ledger.sqlite", create=False) as other:
        for table in ("events", "steps", "scores", "items", "moved"):
            assert one.rows(table, "small/life/0", clocks=False) == other.rows(table, "small/life/0", clocks=False)


def test_a_model_that_was_not_saved_yet_is_saved_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import remanence.life as module

    def dies(self: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Life, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out")
    monkeypatch.undo()
    run(tmp_path / "out", resume=True)
    run(tmp_path / "whole")
    assert (tmp_path / "out/life/model/model.safetensors").read_bytes() == (tmp_path / "whole/life/model/model.safetensors").read_bytes()


def test_a_lock_holds_one_run_and_is_free_afterwards(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(Mistake, match="another run is writing here"), locked(tmp_path):
        pass
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]


def test_kept_models_are_ordinary_folders_that_stay_when_the_run_is_over(tmp_path: Path) -> None:
    recipe = Recipe.of(TREE | {"keep_models": True})
    place = run_recipe(recipe, output=tmp_path / "out", progress=False, report=False)
    folders = sorted(place.glob("life/models/seed-0/*"))
    assert [folder.name for folder in folders] == [f"event-{number:04d}" for number in range(1, len(recipe.events) + 1)]
    with Ledger(place / "ledger.sqlite", create=False) as ledger:
        after = [row["weights_after"] for row in ledger.rows("events")]
    assert [weights_hash(load_model(folder).model) for folder in folders] == after
