"""Give the docstrings of Python's own standard library as rows of kind `text`: real text on any machine, no download.

The source files are read, never imported. The text depends on the Python version; order and split depend on module names alone.
Cost: parsing of about 4 source characters for every character of text.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from remanence.errors import Mistake, nearest
from remanence.seeds import derive

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "test")
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "turtledemo", "ensurepip", "lib-dynload"}
SHORTEST = 40  # characters: one-word docstrings teach nothing


def pythondocs(characters: int | None = 200_000, part: str = "train") -> Dataset:
    """Return docstrings until `characters` are reached (`None`: all), one row each: `module`, `text`.

    A top-level module belongs to `test` with probability 1/5, by the hash of its name, so the parts share no module.
    Fewer characters give a prefix of more; no text occurs twice in a part.

    Raises:
        Mistake: an unknown part, or more characters than there are.
    """
    if part not in PARTS:
        raise Mistake("pythondocs", f"no part '{part}'", nearest(part, PARTS))
    if characters is not None and characters < 1:
        raise Mistake("pythondocs", f"characters is {characters}", "give a positive number")
    from datasets import Dataset

    texts: dict[str, str] = {}
    total = 0
    for module, path in _modules(part):
        for text in _docstrings(path):
            if len(text) >= SHORTEST and text not in texts:
                texts[text] = module
                total += len(text)
                if characters is not None and total >= characters:
                    break
        if characters is not None and total >= characters:
            break
    else:
        if characters is not None:
            raise Mistake("pythondocs", f"the {part} part has only {total} characters, {characters} are asked for", "ask for fewer")
    return Dataset.from_dict({"module": list(texts.values()), "text": list(texts)})


def _modules(part: str) -> list[tuple[str, Path]]:
    """Return the (name, file) of the part's modules, in the order of a hash of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        package = Path(folder).relative_to(root).parts
        for name in files:
            parts = (*package, name.removesuffix(".py"))
            if name.endswith(".py") and (derive("pythondocs", parts[0]) % 5 == 0) == (part == "test"):
                found.append((".".join(parts).removesuffix(".__init__"), Path(folder) / name))
    return sorted(found, key=lambda pair: (derive("pythondocs", "order", pair[0]), pair[0]))


def _docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one source file; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    stack: list[ast.AST] = [tree]
    while stack:  # only bodies of modules, classes and functions hold docstrings; a walk over all expressions costs as much as the parsing
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text.strip()
            stack.extend(reversed(node.body))
