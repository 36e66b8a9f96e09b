"""A recipe may name a class of the user's, `module:Class`; what is wrong with it is said in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from remanence.catalogue import build, entry
from remanence.errors import Mistake

GOOD = '''
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Mine:
    """Do nothing."""
    keep: float = 0.5
    def learn(self, model, task, trainer): return model
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

class Plain:
    def learn(self, model, task, trainer): return model
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

@dataclass
class Forgets:
    def forget(self, model, request, trainer): return model

@dataclass
class Looks:
    rows: object
    kind: str
    def measure(self, model, at): pass

thing = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of a fresh name into the working directory and return the name."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def write(text: str) -> str:
        name = f"own_{tmp_path.name.replace('-', '_')}_{len(made)}"
        (tmp_path / f"{name}.py").write_text(text)
        made.append(name)
        return name

    yield write
    for name in made:
        sys.modules.pop(name, None)


def test_class_of_the_working_directory_is_built_with_its_fields(module: Callable[[str], str]) -> None:
    name, path = module(GOOD), list(sys.path)
    made = build({"method": f"{name}:Mine", "keep": 0.25}, "learn", "learn")
    assert (type(made).__name__, made.keep) == ("Mine", 0.25)
    assert sys.path == path
    assert entry(f"{name}:Looks", "measure").load().__name__ == "Looks"
    assert entry(f"{name}:Mine", "learn").summary == "Do nothing."


def test_one_wraps_another(module: Callable[[str], str]) -> None:
    name = module(GOOD.replace("keep: float = 0.5", "keep: float = 0.5\n    inner: object = None"))
    made = build({"method": f"{name}:Mine", "inner": {"method": f"{name}:Mine", "keep": 0.1}}, "learn", "learn")
    assert made.inner.keep == 0.1


@pytest.mark.parametrize(
    ("spec", "verb", "said"),
    [
        ("nowhere_at_all:Mine", "learn", "no module named 'nowhere_at_all'"),
        ("{}:Mime", "learn", "did you mean 'Mine'?"),
        ("{}:thing", "learn", "has no class 'thing'"),
        ("{}:Plain", "learn", "is not a dataclass"),
        ("{}:Forgets", "learn", "has no method `learn`, so it is no learner; a learner has learn, state_dict, load_state_dict"),
        ("{}:Mine", "forget", "so it is no forgetter"),
        ("{}:Mine", "measure", "so it is no probe"),
        ("{}:", "learn", "has no class ''"),
    ],
)
def test_misfit_is_refused_in_one_sentence(module: Callable[[str], str], spec: str, verb: str, said: str) -> None:
    spec = spec.format(module(GOOD))
    with pytest.raises(Mistake) as caught:
        entry(spec, verb, "lives.mine.learn.method")
    assert said in str(caught.value)
    assert caught.value.place == "lives.mine.learn.method"


@pytest.mark.parametrize("text", ["import a_module_that_is_not_there", "1 / 0", "def broken(:"])
def test_module_that_fails_is_named_with_its_error(module: Callable[[str], str], text: str) -> None:
    name = module(text)
    with pytest.raises(Mistake, match=f"the module '{name}' fails"):
        entry(f"{name}:Mine", "learn")


def test_unknown_key_suggests_the_nearest(module: Callable[[str], str]) -> None:
    with pytest.raises(Mistake, match="did you mean 'keep'"):
        build({"method": f"{module(GOOD)}:Mine", "kept": 1}, "learn", "learn")
