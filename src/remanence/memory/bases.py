"""The recurrences that a memory cache can be built on by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.memory.deep_rules import Deep, DeepLinear
from remanence.memory.recurrence import Rule
from remanence.memory.rules import Delta, Linear, SlidingWindow

BASES: dict[str, Any] = {base.name: base for base in (Linear, SlidingWindow, Delta, DeepLinear, Deep)}


def base_rule(base: str | Mapping[str, Any] | Rule) -> Rule:
    """Return a base rule from its name, from {"name": ..., and its settings}, or as it is.

    Raises:
        Mistake: an unknown name or setting.
    """
    if not isinstance(base, str | Mapping):
        return base
    settings = {"name": base} if isinstance(base, str) else dict(base)
    name = settings.pop("name", None)
    if name not in BASES:
        raise Mistake("cache.base", f"there is no base '{name}'", nearest(str(name), BASES))
    known = [item.name for item in dataclasses.fields(BASES[name])]
    if unknown := [key for key in settings if key not in known]:
        raise Mistake(f"cache.base.{unknown[0]}", f"'{name}' has no such setting", nearest(unknown[0], known))
    return BASES[name](**settings)
