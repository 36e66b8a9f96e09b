"""The language models of this room, by model type: what `AutoModelForCausalLM` must know before it reads one of their folders."""

from __future__ import annotations

import importlib

MODELS: dict[str, tuple[str, str, str]] = {  # model type -> module, configuration class, model class
    "trc2": ("trc2", "TRC2Config", "TRC2ForCausalLM"),
}


def register() -> None:
    """Make transformers' Auto classes know every architecture of this room; a second call changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind, (module, config_name, model_name) in MODELS.items():
        home = importlib.import_module(f"remanence.memory.{module}")
        config = getattr(home, config_name)
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(home, model_name), exist_ok=True)
