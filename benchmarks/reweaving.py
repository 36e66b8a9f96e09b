"""Memory reweaving: what held states cost over a window alone, and against attention to everything, as the text grows.

A fresh Llama (4 layers, width 256, 8 heads) reads one text. `window`: 256 tokens and nothing else. `woven`: the window and 256 held tokens, chosen by surprisal.
`dense`: the same decoder with a key and value for every token, read 64 tokens at a time, as the others are. `KiB` is what each holds behind the text.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Figure, figure, paired
from remanence.memory.reweaving import reweave
from remanence.memory.rewoven import Rewoven
from remanence.models.forward import fresh_weights
from remanence.seeds import generator

WINDOW, CHUNK, BUDGET = 256, 64, 256


@torch.no_grad()
def dense(model: Any, ids: torch.Tensor) -> DynamicCache:
    """Read with everything in the cache; return it."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(CHUNK, 1):
        model(input_ids=part, cache=cache, use_cache=True, logits_to_keep=1)
    return cache


def woven(model: Rewoven, ids: torch.Tensor) -> int:
    """Read with a window and what is held; return the bytes of both."""
    model.memory.clear()
    model.read(ids)
    stats = model.memory.stats()
    return int(stats["held bytes"] + stats["window bytes"])


def run(*, tiny: bool = False) -> list[Figure]:
    """Time both comparisons over the lengths."""
    rounds, found = 1 if tiny else 3, []
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    with fresh_weights(0):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=1024, max_position_embeddings=1 << 15, **shape)).eval()
    window, held = reweave(model, WINDOW, 0, chunk=CHUNK), reweave(model, WINDOW, BUDGET, chunk=CHUNK)
    for tokens in (512, 1024) if tiny else (1024, 4096, 16384):
        ids = torch.randint(1024, (1, tokens), generator=generator(0, "reweaving", tokens))
        ours, peer = paired(partial(woven, held, ids), partial(woven, window, ids), rounds)
        kib = {"KiB_woven": woven(held, ids) / 1024, "KiB_window": woven(window, ids) / 1024}
        found.append(figure(f"{tokens} tokens, window and 256 held / window alone", ours, peer, "overhead", None, kib))
        ours, peer = paired(partial(woven, held, ids), partial(dense, model, ids), rounds)
        keys = sum(layer.keys.numel() * 2 * layer.keys.element_size() for layer in dense(model, ids).layers)
        more = {
            "KiB_woven": kib["KiB_woven"],
            "KiB_dense": keys / 1024,
            "ms_per_token_woven": 1e3 * min(seconds for seconds, _ in ours) / tokens,
        }
        found.append(figure(f"{tokens} tokens, attention to everything / window and 256 held", ours, peer, "speedup", None, more))
    return found
