"""Toy models for the tests: the real Hugging Face classes at toy width, with weights that depend on the seed alone."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HEADS, KEY_HEADS = 4, 2  # grouped queries where the family has them
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"

_PLAIN: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.1}
_SHARED: dict[str, Any] = {**_PLAIN, "attention_dropout": 0.0}
_GROUPED: dict[str, Any] = {**_SHARED, "num_key_value_heads": KEY_HEADS}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": {**_GROUPED, "head_dim": 8},
    "gpt2": {**_PLAIN, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {**_SHARED, "hidden_dropout": 0.0},
    "gemma": {**_GROUPED, "head_dim": 16},  # heads wider than width / heads, as in the real one
    "gemma2": {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi": {**_SHARED, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {**_GROUPED, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
FAMILIES = list(_EXTRA)


def toy_config(family: str, *, vocab: int = 64, width: int = 32, layers: int = 2) -> Any:
    """Return the configuration of `toy_lm`: 4 heads (2 key heads where the family groups them), 128 positions, no dropout."""
    shape: dict[str, Any] = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    if family == "gpt2":
        shape |= {"n_inner": 2 * width, "n_positions": 128}
    else:
        shape |= {"intermediate_size": 2 * width, "max_position_embeddings": 128}
    return AutoConfig.for_model(family, **shape, **_EXTRA[family])


def toy_lm(
    family: str, *, seed: int = 0, vocab: int = 64, width: int = 32, layers: int = 2, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a causal LM of the family in evaluation mode; the global generator is left as it was."""
    config = toy_config(family, vocab=vocab, width=width, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if dtype != torch.float32:  # the same draws, and buffers as a model of this precision has them (.to would round them)
            weights = model.state_dict()
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.load_state_dict(weights)
    return model.eval()


def toy_batch(*, seed: int = 0, rows: int = 3, tokens: int = 9, vocab: int = 64) -> dict[str, torch.Tensor]:
    """Return random `input_ids`, `attention_mask` and `labels`, each (rows, tokens), without padding."""
    ids = torch.randint(2, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def toy_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters with pad 0, eos 1, unk 2 and never more than `vocab` entries.

    From 99 entries on it knows all printable ASCII; below that it lowers the case and keeps the frequent punctuation.
    """
    whole = vocab >= 99
    letters = string.ascii_letters if whole else string.ascii_lowercase
    frequent = ".,:;?!'\"-()/_=+*&%$#@<>[]{}\\|~^`"
    known = [PAD, EOS, UNK, " ", "\n", *letters, *string.digits, *frequent][:vocab]
    plain = Tokenizer(models.WordLevel({token: number for number, token in enumerate(known)}, unk_token=UNK))
    if not whole:
        plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    plain.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=128)


def toy_classifier(seed: int = 0, *, features: int = 8, classes: int = 4, width: int = 16) -> nn.Module:
    """Return a plain two-layer perceptron (B, features) -> (B, classes); the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, classes))


class Double(nn.Module):
    """Layers in float64 that read float32 features."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.double())
