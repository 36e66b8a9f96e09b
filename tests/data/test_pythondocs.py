"""The standard library's docstrings as rows of kind text."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from remanence.data.pythondocs import SHORTEST, pythondocs
from remanence.errors import Mistake
from remanence.stream import Task


def test_texts_are_docstrings_of_the_named_module():
    rows = pythondocs(characters=20_000)
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in dict.fromkeys(rows["module"]):
        stem = root.joinpath(*module.split("."))
        source = (stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")).read_bytes()
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        known = {(ast.get_docstring(node) or "").strip() for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)}
        assert {row["text"] for row in rows if row["module"] == module} <= known
    Task("docs", rows, kind="text")


def test_fewer_characters_are_a_prefix_of_more():
    small, large = pythondocs(characters=10_000).to_list(), pythondocs(characters=60_000).to_list()
    assert large[: len(small)] == small
    sizes = [len(row["text"]) for row in large]
    assert sum(sizes) >= 60_000 > sum(sizes[:-1])
    assert min(sizes) >= SHORTEST
    assert len({row["text"] for row in large}) == len(large)


def test_train_and_test_share_no_top_level_module():
    train, test = ({name.split(".")[0] for name in pythondocs(characters=100_000, part=part)["module"]} for part in ("train", "test"))
    assert len(train) > 3
    assert len(test) > 3
    assert not train & test
    assert not {"test", "idlelib", "site-packages"} & (train | test)


def test_wrong_arguments_are_refused():
    with pytest.raises(Mistake, match="did you mean 'train'"):
        pythondocs(part="trian")
    with pytest.raises(Mistake, match="positive"):
        pythondocs(characters=0)
