"""The house rules that a machine can hold: who imports whom, quick imports, help that works, recipes that read, a catalogue without strays."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import remanence
from remanence.catalogue import ENTRIES
from remanence.cli import app
from remanence.recipe import Recipe
from remanence.stream import Forgetter, Learner, Probe
from remanence.systems import system_rows

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "peft", "accelerate", "sklearn")
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


def test_rooms_import_each_other_only_as_the_design_allows() -> None:
    done = subprocess.run([sys.executable, "-m", "importlinter.cli", "lint"], cwd=ROOT, capture_output=True, text=True)
    if "No module named" in done.stderr:
        pytest.skip("import-linter is not installed")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["remanence", "remanence.cli", "remanence.catalogue", "remanence.ledger", "remanence.stream"])
def test_nothing_heavy_is_imported_at_the_top(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names_resolve() -> None:
    for name in remanence.__all__:
        assert getattr(remanence, name) is not None


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(inspect.getfile(remanence)).parent / "py.typed").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_of_the_command(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert f"remanence {command}" in re.sub(r"\s+", " ", shown.output)


PROTOCOLS = {"learn": Learner, "forget": Forgetter, "measure": Probe}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.verb in PROTOCOLS], ids=lambda entry: entry.name)
def test_every_entry_of_the_catalogue_is_there_and_keeps_its_protocol(entry) -> None:
    made = entry.load()
    for name, value in vars(PROTOCOLS[entry.verb]).items():
        if callable(value) and not name.startswith("_"):
            assert callable(getattr(made, name, None)), f"{entry.home} lacks {name}"
    assert made.__doc__
    assert sys.modules[made.__module__].__doc__


def test_every_method_file_is_in_the_catalogue() -> None:
    homes = {entry.home.partition(":")[0] for entry in ENTRIES}
    for room in ("learn", "forget"):
        for path in (ROOT / "src/remanence" / room).glob("*.py"):
            if path.stem != "__init__":
                assert f"{room}.{path.stem}" in homes, f"{path.name} is in no entry"


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path: Path) -> None:
    if path.parent.name == "accelerate":
        pytest.skip("a configuration of Accelerate, tested with it")
    recipe = Recipe.load(path)
    assert recipe.events


def test_systems_are_listed_as_json_and_in_the_readme() -> None:
    shown = CliRunner().invoke(app, ["systems", "--json"])
    rows = json.loads(shown.stdout)
    assert {row["name"] for row in rows} == {entry.name for entry in ENTRIES}
    readme = (ROOT / "README.md").read_text()
    for row in system_rows(ROOT / "docs/claims"):
        assert f"`{row['name']}`" in readme
