"""What the documentation says is true: its examples run, its generated parts are the code's own words, and the site builds without the network.

A code block under the comment `<!-- test -->` is run, in the order of its page and in one empty folder per page: Python in one namespace, YAML is read as a
recipe, of a console block every line that begins with `$ `. `<!-- file: NAME -->` writes the block below it to a file instead.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from remanence.catalogue import ENTRIES
from remanence.cli import app
from remanence.ledger import TABLES
from remanence.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
BLOCK = re.compile(r"^<!-- (test|file: \S+) -->\n+```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The generator of the documentation's parts."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make

    return make


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in; modules written there are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / ".keys"))
    known, environment = set(sys.modules), dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (mark, language, text) of the blocks of a page that are to be run."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run_console(text: str) -> list[str]:
    """Run the commands of a console block in this process and return what each printed."""
    printed = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.startswith("$ "):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[0] == "remanence":
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, f"{line}: {done.exception}\n{''.join(traceback.format_exception(done.exception))}{done.output}"
            printed.append(done.output)
        elif words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value
        else:
            assert words[0] == "python", f"a tested console block may not run {words[0]}"
            runpy.run_path(words[1], run_name="__main__")
            printed.append("")
    return printed


def run_page(page: Path, desk: Path) -> list[str]:
    """Run the blocks of a page in order and return what its commands printed."""
    namespace: dict[str, Any] = {"__name__": "example"}
    printed: list[str] = []
    for number, (mark, language, text) in enumerate(blocks(page)):
        if mark.startswith("file: "):
            (desk / mark.removeprefix("file: ")).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{page.name}, block {number + 1}", "exec"), namespace)
        elif language == "yaml":
            (desk / "block.yaml").write_text(text, encoding="utf-8")
            assert Recipe.load(desk / "block.yaml").life_names
        else:
            assert language == "console", f"{page.name}: a block of {language} cannot be run"
            printed += run_console(text)
    return printed


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_examples_run(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(os.environ.get("REMANENCE_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not data.is_dir() and any("REMANENCE_DATA" in text for _, _, text in blocks(page)):
        pytest.skip(f"the real data is not at {data} (set REMANENCE_DATA)")
    monkeypatch.setenv("REMANENCE_DATA", str(data))
    monkeypatch.setenv("REMANENCE_KEY", str(desk / "key.pem"))
    printed = run_page(page, desk)
    assert blocks(page)
    assert all(text.strip() for text in printed if text)


def test_readme_has_an_example_in_python_and_a_recipe() -> None:
    assert {language for _, language, _ in blocks(ROOT / "README.md")} >= {"python", "yaml"}


def test_readme_table_is_up_to_date(make: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert make.with_systems(text) == text, "run python docs/make.py"


def test_readme_picture_is_there() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")


def test_every_mark_is_made(make: Any) -> None:
    used = {name for page in PAGES for name in make.MARK.findall(page.read_text(encoding="utf-8"))}
    assert used <= set(make.MADE)
    assert set(make.MADE) <= used, "something is made that no page shows"


def test_every_key_of_every_method_and_of_training_is_explained(make: Any) -> None:
    from remanence.training.trainer import Settings

    for made in [Settings, *(entry.load() for entry in ENTRIES)]:
        made, keys = make.settings_of(made)
        silent = [name for name, _, _ in keys if name not in make.argument_docs(made)]
        assert not silent, f"the docstring of {made.__name__} says nothing about {silent}"


def test_every_field_of_a_recipe_is_explained(make: Any) -> None:
    from remanence import recipe

    for made in (recipe.Recipe, recipe.LearnEvent, recipe.ForgetEvent, recipe.Measuring, recipe.MeasuredSet, recipe.LifeClause):
        for name, field in made.model_fields.items():
            assert field.description, f"{made.__name__}.{name} has no description"
            assert field.exclude or f"`{name}`" in make.recipe()


def test_reference_names_every_command_option_table_and_system(make: Any) -> None:
    cli, ledger = make.cli(), make.ledger()
    for command in app.registered_commands:
        assert f"## `{command.name or command.callback.__name__}`" in cli
    assert all(f"## `receipt {name}`" in cli for name in ("verify", "key", "list"))
    assert all(f"`{option}" in cli for option in ("--set", "--resume", "--quiet, -q", "--json", "--seeds N"))
    assert "`--folder`" not in cli.partition("## `learn`")[0], "a hidden option is shown"
    assert all(f"### `{table}`" in ledger for table in TABLES)
    methods = "\n".join(make.methods(verb) for verb in ("learn", "forget", "measure"))
    assert all(f"### `{entry.name}`" in methods for entry in ENTRIES if entry.verb in ("learn", "forget", "measure"))


def test_a_recorded_claim_becomes_a_section(make: Any) -> None:
    record = {
        "slug": "half",
        "title": "Half of it",
        "claim": "Half keeps more.",
        "verdict": "mixed",
        "reasons": ["on one of two"],
        "paper": ["51.3 against 45.7"],
        "notes": [],
        "seeds": [0, 1, 2],
        "table": {
            "half": {"op": {"mean": 0.5, "half": 0.125}, "bwt": {"mean": -0.25, "half": None}},
            "full": {"op": {"mean": 0.25, "half": 0.0}},
        },
        "show": ["op", "bwt"],
        "seconds": 90.0,
        "versions": {"torch": "2"},
    }
    text = make.claim_section(record)
    assert "| `half` | 0.500 ± 0.125 | -0.250 |" in text
    assert "| `full` | 0.250 ± 0.000 |  |" in text
    assert "**Verdict: mixed.**" in text
    assert "- on one of two" in text
    assert "- 51.3 against 45.7" in text


def test_site_builds_strictly_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs and mkdocs-material are not installed (pip install 'remanence[docs]')")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    pages = list((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in PAGES if page.parent == ROOT / "docs"} <= {page.stem for page in pages}
    fetched = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*rel=\"(?!canonical)[^\"]*\"[^>]*href=\"(?:https?:)?//|<link[^>]*href=\"(?:https?:)?//[^>]*rel=\"(?!canonical)"
    )
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<!-- made:" not in text
        assert not fetched.search(text), f"{page.name} loads something from the network"
    assert "ledger.sqlite" in (tmp_path / "site/index.html").read_text(encoding="utf-8")
