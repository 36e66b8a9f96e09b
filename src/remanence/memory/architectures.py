"""What this room can build by name: the memories, and the language models that `AutoModelForCausalLM` must know before it reads one of their folders."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from remanence.errors import Mistake, nearest

MODELS: dict[str, tuple[str, str, str]] = {  # model type -> module, configuration class, model class
    "titans": ("lm", "TitansConfig", "TitansForCausalLM"),
    "miras": ("lm", "MirasConfig", "MirasForCausalLM"),
    "memory-caching": ("lm", "MemoryCachingConfig", "MemoryCachingForCausalLM"),
    "trc2": ("trc2", "TRC2Config", "TRC2ForCausalLM"),
    "rewoven": ("rewoven", "RewovenConfig", "Rewoven"),
}
MEMORIES: dict[str, str] = {  # name -> module:class; each obeys `state.Memory` and takes (dim, **settings)
    "titans": "remanence.memory.titans:NeuralMemory",
    "miras": "remanence.memory.miras:MirasMemory",
    "cache": "remanence.memory.caching:MemoryCache",
}
WORDS = {("cache", "segment")}  # settings that take a number or a word


def register() -> None:
    """Make transformers' Auto classes know every architecture of this room; a second call changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind, (module, config_name, model_name) in MODELS.items():
        home = importlib.import_module(f"remanence.memory.{module}")
        config = getattr(home, config_name)
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(home, model_name), exist_ok=True)


def build_memory(name: str, dim: int, **settings: Any) -> nn.Module:
    """Return a memory of width `dim` that obeys `state.Memory`.

    Raises:
        Mistake: an unknown memory, or a setting that it does not have.
    """
    check_settings(name, settings)
    return _class(name)(dim, **settings)


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a memory does not have, and values of another kind than the default's.

    Raises:
        Mistake: naming the setting.
    """
    known = memory_settings(name)
    for key, value in settings.items():
        if key not in known:
            raise Mistake(f"memory.{key}", f"the memory '{name}' has no such setting", nearest(key, known))
        numbers = isinstance(known[key], int | float) and not isinstance(known[key], bool)
        if numbers and (isinstance(value, bool) or not isinstance(value, int | float | str | None)):
            raise Mistake(f"memory.{key}", f"is no number, {value!r}", f"the default is {known[key]}")
        if numbers and isinstance(value, str) and (name, key) not in WORDS:
            raise Mistake(f"memory.{key}", f"is no number, {value!r}", f"the default is {known[key]}")


def memory_settings(name: str) -> dict[str, Any]:
    """Return the settings of a memory with their defaults.

    Raises:
        Mistake: an unknown memory.
    """
    parameters = list(inspect.signature(_class(name)).parameters.values())[1:]  # the first is the width
    return {parameter.name: parameter.default for parameter in parameters}


def _class(name: str) -> Any:
    if name not in MEMORIES:
        raise Mistake("memory", f"unknown memory '{name}'", nearest(name, MEMORIES))
    module, _, wanted = MEMORIES[name].partition(":")
    return getattr(importlib.import_module(module), wanted)
