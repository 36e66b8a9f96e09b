"""The configurations of the language models with a memory."""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from remanence.errors import Mistake, nearest
from remanence.memory.architectures import check_settings, memory_settings
from remanence.memory.blocks import VARIANTS


@strict
class MemoryConfig(PreTrainedConfig):
    """The configuration of a language model with a memory.

    Args:
        variant: lmm | mac | mag | mal | hybrid | swa (no memory).
        memory: settings of the memory layer, by name.
        layers_with_memory: numbers of the blocks that carry one; the others attend to a window. `None`: all.
        window: tokens that attention sees, the token itself among them.
        segment: tokens of a segment of MAC, a multiple of the memory's chunk.
        n_persistent: learned vectors before every sequence.
        rope_theta: base of the rotary positions.
        embedding_range: standard deviation of fresh embeddings; `None`: `initializer_range`, as of all other weights.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    memory_kind: ClassVar[str] = "titans"

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    embedding_range: float | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    variant: str = "mag"
    memory: dict | None = None
    layers_with_memory: list[int] | None = None
    window: int = 256
    segment: int = 256
    n_persistent: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        self.memory = {} if self.memory is None else self.memory
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Refuse what cannot be built.

        Raises:
            Mistake: naming the setting.
        """
        counts = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "window",
            "segment",
            "n_persistent",
        )
        layers = self.layers_with_memory
        kinds = {name: type(getattr(self, name)) is int for name in counts}
        kinds |= {"variant": isinstance(self.variant, str), "memory": isinstance(self.memory, dict)}
        kinds["layers_with_memory"] = layers is None or (isinstance(layers, list) and all(type(layer) is int for layer in layers))
        wrong = next((name for name, fits in kinds.items() if not fits), None)
        if wrong is not None:
            raise Mistake(wrong, f"is of the wrong kind, {getattr(self, wrong)!r}", "correct the configuration")
        check_settings(self.memory_kind, self.memory or {})
        if self.variant not in VARIANTS:
            raise Mistake("variant", f"unknown variant '{self.variant}'", nearest(self.variant, VARIANTS))
        for name in ("hidden_size", "num_hidden_layers", "window", "segment"):
            if getattr(self, name) < 1:
                raise Mistake(name, f"must be 1 or more, got {getattr(self, name)}", "correct the value")
        if self.n_persistent < 0:
            raise Mistake("n_persistent", f"must be 0 or more, got {self.n_persistent}", "correct the value")
        if self.hidden_size % (2 * self.num_attention_heads):
            problem = f"{self.hidden_size} is not divisible into {self.num_attention_heads} heads of even width"
            raise Mistake("hidden_size", problem, "change num_attention_heads")
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise Mistake("num_key_value_heads", f"{self.num_key_value_heads} does not divide {self.num_attention_heads}", "correct it")
        beyond = [layer for layer in self.layers_with_memory or () if not 0 <= layer < self.num_hidden_layers]
        if beyond:
            raise Mistake("layers_with_memory", f"there is no layer {beyond[0]}", f"the model has layers 0 to {self.num_hidden_layers - 1}")
        if self.variant == "mac" and self.n_persistent == 0:
            raise Mistake("n_persistent", "is 0, but the first segment of mac asks a memory that has read the prefix", "give at least 1")
        if self.variant == "mac":
            chunk = {**memory_settings(self.memory_kind), **(self.memory or {})}.get("chunk", 1)
            if chunk < 1 or self.segment % chunk:
                raise Mistake("segment", f"{self.segment} is not a multiple of the memory's chunk {chunk}", "change one of them")

    def variant_of(self, layer: int) -> str:
        """Return what a block is: the variant, or `swa` where it carries no memory."""
        return self.variant if self.layers_with_memory is None or layer in self.layers_with_memory else "swa"


@strict
class TitansConfig(MemoryConfig):
    """Titans: memories of `titans.NeuralMemory`."""

    model_type = "titans"
    memory_kind = "titans"


@strict
class MirasConfig(MemoryConfig):
    """Miras: memories of `miras.MirasMemory`."""

    model_type = "miras"
    memory_kind = "miras"


@strict
class MemoryCachingConfig(MemoryConfig):
    """Memory Caching: memories of `caching.MemoryCache`."""

    model_type = "memory-caching"
    memory_kind = "cache"
