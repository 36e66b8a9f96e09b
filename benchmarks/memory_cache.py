"""A memory cache: the vectorised form against the loop over tokens, and what recall and time do as segments become shorter.

The loop writes and reads one token at a time through the same cache, as decoding does. Then 512 random pairs in 64 dimensions are written by the delta rule in one text and
asked for by their keys, with 1 to 64 segments: `recall` is the share whose nearest value is right, `N` the number of segments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.timing import Figure, figure, paired
from remanence.memory.caching import MemoryCache
from remanence.memory.combine import cached_sum, shares
from remanence.memory.rules import Delta
from remanence.seeds import generator


def loop(cache: MemoryCache, x: torch.Tensor) -> None:
    """Read token by token."""
    state = None
    with torch.no_grad():
        for t in range(x.shape[1]):
            _, state = cache(x[:, t : t + 1], state)


def at_once(cache: MemoryCache, x: torch.Tensor) -> None:
    """Read in one call."""
    with torch.no_grad():
        cache(x)


def ask(keys: torch.Tensor, values: torch.Tensor, segment: int) -> float:
    """Write all pairs in segments, ask for each by its key, and return the share of right answers."""
    base, rows = Delta(), len(keys)
    folded_keys, folded_values = (x.unflatten(2, (-1, segment)) for x in (keys, values))
    _, state = base.run(
        folded_keys, folded_keys, folded_values, {"write": torch.ones_like(folded_keys[..., 0])}, base.begin({}, folded_keys)
    )
    pools, count = folded_keys.mean(3), state["M"].shape[2]
    gamma, _ = shares(30.0 * keys @ pools.mT, torch.ones(rows, 1, count, dtype=torch.bool), "grm", 1)
    read = gamma[..., -1:] * (keys @ state["M"][:, :, -1])
    read = read + cached_sum(base, keys, gamma, {"M": state["M"][:, :, :-1]}, None)
    return (torch.cdist(read, values).argmin(-1) == torch.arange(keys.shape[2])).double().mean().item()


def run(*, tiny: bool = False) -> list[Figure]:
    """Time both comparisons."""
    tokens, width, rounds = (32, 16, 1) if tiny else (1024, 64, 3)
    segment, found = tokens // 8, []
    for base in ("linear", "swla", "delta", "dla", "titans"):
        for rule in ("grm", "ssc") if base in ("linear", "titans") else ("grm",):
            torch.manual_seed(0)
            cache = MemoryCache(width, base, heads=2, rule=rule, segment=segment, top_k=2)
            x = torch.randn(1, tokens, width, generator=generator(0, base))
            ours, peer = paired(partial(at_once, cache, x), partial(loop, cache, x), rounds)
            found.append(figure(f"{tokens} tokens, {base}, {rule}, N=8: token loop / vectorised", ours, peer, "speedup", None, {}))
    pairs = 64 if tiny else 512
    noise = torch.randn(2, 8, 1, pairs, width, generator=generator(0, "pairs", pairs))
    keys, values = F.normalize(noise, dim=-1)
    for count in (2, 4) if tiny else (2, 4, 8, 16, 32, 64):
        ours, peer = paired(partial(ask, keys, values, pairs // count), partial(ask, keys, values, pairs), rounds)
        more = {"recall": ask(keys, values, pairs // count), "recall_of_one_memory": ask(keys, values, pairs)}
        found.append(figure(f"{pairs} pairs, {width} dimensions, N={count} / one memory", ours, peer, "overhead", None, more))
    return found
