"""Every quick recipe finds its rows: nothing is empty, no request forgets what it retains."""

from __future__ import annotations

from pathlib import Path

import pytest

from remanence.recipe import Recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes" / "quick").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_quick_recipe_finds_its_rows(path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMANENCE_DATA", str(real_data))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = Recipe.load(path)
    assert len(recipe.stream()) == len(recipe.events)
