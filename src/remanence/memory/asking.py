"""What every model with a memory does with words: tokens from a text, and the continuation of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from remanence.errors import Mistake


def tokens_of(text: Any, processor: Any, device: torch.device, *, begin: bool = False) -> Int[Tensor, "B T"]:
    """Return the tokens of a string, behind what opens a text if it is to `begin` one, or tokens (T,) or (B, T) as they are.

    Raises:
        Mistake: nothing to read, or a string without a tokenizer.
    """
    if isinstance(text, str):
        if processor is None:
            raise Mistake("processor", "a string needs a tokenizer", "give the model's processor, or tokens")
        found = processor(text, add_special_tokens=False, verbose=False)["input_ids"]  # it may be longer than the model's positions
        text = (opening(processor) if begin else []) + found
    ids = torch.as_tensor(text, dtype=torch.int64, device=device)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise Mistake("text", "there is nothing to read", "give at least one token")
    return ids


def opening(processor: Any) -> list[int]:
    """Return what a tokenizer puts in front of every text: its begin-of-text token, which pre-trained decoders want to see first, or nothing."""
    first = getattr(processor, "bos_token_id", None)
    return [first] if first is not None and processor("", verbose=False)["input_ids"][:1] == [first] else []


def copies(rows: int, generation: dict[str, Any]) -> Int[Tensor, " N"]:
    """Return, for every continuation that `generate` makes of `rows` prompts, the row that it goes on from."""
    many = max(generation.get("num_beams") or 1, generation.get("num_return_sequences") or 1)
    return torch.arange(rows).repeat_interleave(many)


def continued(model: Any, ids: Int[Tensor, "B T"], cache: Any, processor: Any, generation: dict[str, Any]) -> Any:
    """Generate behind a prompt and a cache; return the new text (a list of texts, if there are several), or the new tokens without a processor."""
    if processor is not None:
        generation.setdefault("pad_token_id", processor.pad_token_id)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **generation)
    fresh = out[:, ids.shape[1] :]
    if processor is None:
        return fresh
    texts = processor.batch_decode(fresh, skip_special_tokens=True)
    return texts[0] if len(texts) == 1 else texts
