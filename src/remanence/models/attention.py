"""Attention as plain matrix products, for methods that differentiate twice: the fused kernels have no second derivative."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from remanence.errors import Mistake
from remanence.models.forward import unwrapped

PLAIN = ("sdpa", "eager", None)  # what can be differentiated twice; None: a model without attention


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[nn.Module]:
    """Let attention run without fused kernels inside the block; afterwards it is computed as before.

    `scaled_dot_product_attention` takes torch's plain form of it, in the precision of its inputs; a Hugging Face model with any other kernel is
    switched to its `eager` attention.

    Raises:
        Mistake: the model's attention is a kernel that cannot be switched off.
    """
    core = unwrapped(model)
    if not isinstance(core, PreTrainedModel):
        with sdpa_kernel(SDPBackend.MATH):
            yield model
        return
    config = core.config
    parts = {key: getattr(config, key) for key in config.sub_configs if getattr(config, key) is not None}
    before = {"": config._attn_implementation} | {key: part._attn_implementation for key, part in parts.items()}
    try:
        if config._attn_implementation not in PLAIN:
            core.set_attn_implementation("eager")
        if config._attn_implementation not in PLAIN:
            raise Mistake(
                type(core).__name__,
                f"its attention '{config._attn_implementation}' has no second derivative and cannot be switched to eager",
                "load it with another attention implementation",
            )
        with sdpa_kernel(SDPBackend.MATH):
            yield model
    finally:
        if {"": config._attn_implementation} | {key: part._attn_implementation for key, part in parts.items()} != before:
            core.set_attn_implementation(before if parts else before[""])
