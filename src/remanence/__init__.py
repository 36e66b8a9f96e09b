"""Remanence decides what a model remembers, and proves what remains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {  # public name -> module; imported on first use, so that `import remanence` is quick
    "Ledger": "remanence.ledger",
    "Life": "remanence.life",
    "Mistake": "remanence.errors",
    "Moment": "remanence.stream",
    "Recipe": "remanence.recipe",
    "Request": "remanence.stream",
    "Scores": "remanence.stream",
    "Settings": "remanence.training.trainer",
    "Stream": "remanence.stream",
    "Task": "remanence.stream",
    "Trainer": "remanence.training.trainer",
    "load_model": "remanence.models.load",
    "save_model": "remanence.models.load",
}
__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from remanence.errors import Mistake as Mistake
    from remanence.ledger import Ledger as Ledger
    from remanence.life import Life as Life
    from remanence.models.load import load_model as load_model
    from remanence.models.load import save_model as save_model
    from remanence.recipe import Recipe as Recipe
    from remanence.stream import Moment as Moment
    from remanence.stream import Request as Request
    from remanence.stream import Scores as Scores
    from remanence.stream import Stream as Stream
    from remanence.stream import Task as Task
    from remanence.training.trainer import Settings as Settings
    from remanence.training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'remanence' has no attribute {name!r}")
