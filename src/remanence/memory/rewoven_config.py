"""The configuration of a rewoven decoder: the decoder it stands on, its window, and how it holds what leaves it (see `reweaving`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from remanence.errors import Mistake, nearest
from remanence.memory.latent_buffer import BufferSettings
from remanence.memory.salience import SCORES, rule_of

RECONSTRUCTIONS = ("identity", "lowrank", "mean", "autoenc")
POSITIONS = ("original", "rebased")
UNBOUNDED = 2**31  # positions of a model that moves what it holds up to its window
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@strict
class RewovenConfig(PreTrainedConfig):
    """The configuration of a `Rewoven` decoder.

    Args:
        base: configuration of the decoder, or where its weights are (a spec of `load_model`, variables of the environment in it filled in): then they
            are read when the model is built.
        window: tokens that stay visible.
        budget: entries held of what left the window; 0: none.
        layers: all | third | numbers, where states are captured.
        score: a rule of `salience.RULES`, or weights of surprisal, attention and recency.
        reconstruct: identity | lowrank | mean | autoenc.
        positions: original | rebased.
        trained: whether the reconstructor may be trained.
        chunk: tokens between two updates; `None`: a quarter of the window.
        sinks: first tokens that are always held.
        group: neighbours in one entry (mean).
        rank: of the adapters (lowrank).
        seed: of the first adapters, and of the rule random.
    """

    model_type = "rewoven"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    base: dict | str | None = None
    window: int = 1024
    budget: int = 256
    layers: str | list[int] = "all"
    score: str | dict = "surprisal"
    reconstruct: str = "identity"
    positions: str = "original"
    trained: bool = False
    chunk: int | None = None
    sinks: int = 4
    group: int = 4
    rank: int = 16
    seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.base, dict):
            self.adopt(self.inner)

    @property
    def inner(self) -> PreTrainedConfig:
        """The decoder's configuration.

        Raises:
            Mistake: it names no architecture that transformers knows.
        """
        if not isinstance(self.base, dict) or "model_type" not in self.base:
            raise Mistake(
                "base", "is no configuration of a decoder", "name a folder or hub id, or give its config.json with its model_type"
            )
        try:
            return AutoConfig.for_model(**self.base)
        except ValueError as error:
            raise Mistake("base", f"has an unknown architecture, {self.base['model_type']!r}", "update transformers") from error
        except (TypeError, StrictDataclassError) as error:
            raise Mistake(
                "base", f"is no configuration of a decoder ({str(error).splitlines()[-1].strip()})", "copy its config.json again"
            ) from error

    def adopt(self, inner: PreTrainedConfig) -> None:
        """Take over a decoder's configuration: sizes and ends that others ask a configuration for."""
        self.base = inner.to_dict()
        text = inner.get_text_config()
        for name in (*SHARED, *ENDS):
            setattr(self, name, getattr(text, name, None))
        if self.positions == "rebased":
            self.max_position_embeddings = UNBOUNDED

    @property
    def step(self) -> int:
        """Tokens between two updates (c)."""
        return max(1, self.window // 4) if self.chunk is None else self.chunk

    @property
    def buffer(self) -> BufferSettings:
        """How the memory keeps."""
        name, weights = rule_of(self.score)
        sinks, group = self.sinks if self.budget else 0, self.group if self.reconstruct == "mean" else 1
        return BufferSettings(self.window, self.step, self.budget, sinks, name, weights, group, self.seed)

    def check(self) -> None:
        """Refuse what cannot work with any decoder.

        Raises:
            Mistake: naming the setting.
        """
        wrong = next((name for name, kind in COUNTS.items() if not _whole(getattr(self, name), kind)), None)
        if wrong is not None:
            raise Mistake(wrong, f"must be a whole number from {COUNTS[wrong]}, got {getattr(self, wrong)!r}", "correct it")
        kinds = {
            "chunk": self.chunk is None or _whole(self.chunk, 0),
            "seed": _whole(self.seed, 0),
            "trained": isinstance(self.trained, bool),
            "layers": isinstance(self.layers, str | list | tuple),
            "score": isinstance(self.score, str) or (isinstance(self.score, dict) and all(map(_number, self.score.values()))),
        }
        wrong = next((name for name, fits in kinds.items() if not fits), None)
        if wrong is not None:
            raise Mistake(wrong, f"is of the wrong kind, {getattr(self, wrong)!r}", "correct the configuration")
        if self.window < self.step or self.step < 1:
            raise Mistake(
                "window", f"is {self.window}, the chunk {self.step}", "let the window be at least a chunk, and the chunk at least 1"
            )
        if self.budget and self.budget < self.sinks:
            raise Mistake(
                "budget", f"is {self.budget}, below the {self.sinks} sinks", "hold at least the sinks, or give budget=0 for a window alone"
            )
        for place, value, known in (("reconstruct", self.reconstruct, RECONSTRUCTIONS), ("positions", self.positions, POSITIONS)):
            if value not in known:
                raise Mistake(place, f"unknown value '{value}'", nearest(str(value), known))
        group = self.buffer.group
        if self.window % group or self.step % group:
            raise Mistake("group", f"{group} does not divide window {self.window} and chunk {self.step}", "choose multiples of it")

    def captured(self, depth: int) -> list[int]:
        """Return the numbers of the layers whose states are held, of `depth` ones.

        Raises:
            Mistake: there is no such layer.
        """
        layers = self.layers
        if layers == "all":
            return list(range(depth))
        if layers == "third":
            return list(range(0, depth, 3))
        if isinstance(layers, str) or not layers or not all(isinstance(layer, int) and 0 <= layer < depth for layer in layers):
            raise Mistake("layers", f"cannot be {layers!r}", f"say 'all', 'third', or numbers from 0 to {depth - 1}")
        return sorted(set(layers))


def decoder(config: RewovenConfig) -> tuple[Any, Any]:
    """Return the decoder of a configuration and its tokenizer: read from where it says, or fresh weights and none."""
    if isinstance(config.base, str):
        from remanence.models.load import load_model  # which knows this module by name

        loaded = load_model(os.path.expandvars(config.base), dtype=torch.get_default_dtype())
        return loaded.model, loaded.processor
    return AutoModelForCausalLM.from_config(config.inner, dtype=torch.get_default_dtype()), None


COUNTS = {"window": 1, "budget": 0, "sinks": 0, "group": 1, "rank": 1}


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def config_of(signature: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `reweave` that a saved memory was made with, from its signature; those of the reconstructor's training apart."""
    names = {field.name for field in dataclasses.fields(BufferSettings)}
    lacking = (names | {"captured", "reconstruct", "rebased"}) - signature.keys()
    if lacking:
        raise Mistake("state", f"does not say its {sorted(lacking)[0]}", "make it again with remanence remember")
    kept = BufferSettings(**{name: signature[name] for name in names})
    score: Any = dict(zip(SCORES, kept.weights)) if kept.rule == "weights" else kept.rule
    return {
        "window": kept.window,
        "budget": kept.budget,
        "layers": list(signature["captured"]),
        "score": score,
        "reconstruct": signature["reconstruct"],
        "positions": "rebased" if signature["rebased"] else "original",
        "chunk": kept.chunk,
        "sinks": kept.sinks,
        "group": kept.group,
        "seed": kept.seed,
    }
