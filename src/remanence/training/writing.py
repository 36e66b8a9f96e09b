"""What a language model writes behind prompts.

Prompts of equal length are continued together, so nothing is padded and the words are those that each prompt alone would get. Cost: one step per generated
token and batch of prompts of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from remanence.errors import Mistake
from remanence.models.forward import evaluating


def continuations(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, *, size: int, processor: Any) -> list[list[int]]:
    """Continue prompts greedily, without the end token and what follows it.

    Raises:
        Mistake: the model cannot generate.
    """
    if not callable(getattr(model, "generate", None)):
        raise Mistake(type(model).__name__, "has no `generate`", "wrap it as a Hugging Face causal language model")
    lengths = np.array([len(prompt) for prompt in prompts])
    device, end = next(model.parameters()).device, processor.eos_token_id
    pad = processor.pad_token_id if processor.pad_token_id is not None else end
    said: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for length in np.unique(lengths):
            same = np.flatnonzero(lengths == length)
            for first in range(0, len(same), size):
                numbers = same[first : first + size]
                asked = torch.tensor([prompts[number] for number in numbers], device=device)
                found = model.generate(  # type: ignore[operator]
                    input_ids=asked,
                    attention_mask=torch.ones_like(asked),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=end,
                    pad_token_id=pad,
                )[:, length:].tolist()
                for number, ids in zip(numbers, found):
                    said[number] = ids[: ids.index(end)] if end in ids else ids
    return said
