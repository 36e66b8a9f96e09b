r"""Sliding-window attention with a persistent prefix, and the attention inside a segment of MAC.

A token attends to the last W tokens, itself among them, and to N prefix tokens, which every window sees (Titans, arXiv 2501.00663, sections 3.3 and 4).
Positions are rotary and local to the window or the segment: only differences count, so nothing bounds the length of a text. The prefix has no position.

Cost: O(T W) in time and memory (queries go in blocks of W, each against 2 W keys); O(C^2) for a segment of C tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class WindowAttention(nn.Module):
    """Attend to the last W tokens and to the prefix."""

    def __init__(self, config: Any):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.key_heads, self.size = config.num_key_value_heads or config.num_attention_heads, width // config.num_attention_heads
        self.window, self.theta = config.window, config.rope_theta
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, self.key_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, self.key_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)

    def keys_values(self, x: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T D"]]:
        """Return keys and values, not yet rotated, of the key heads."""
        return split(self.k_proj(x), self.key_heads), split(self.v_proj(x), self.key_heads)

    def joined(self, attended: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T d"]:
        """Return the heads' outputs through the output projection."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def prefix(self, x: Float[Tensor, "1 N d"]) -> tuple[Float[Tensor, "1 N d"], dict[str, Tensor]]:
        """Read the prefix (causal, without positions): the outputs, and what later tokens see of it beside an empty window."""
        keys, values = self.keys_values(x)
        queries = split(self.q_proj(x), self.heads)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        out = attend(queries, keys, values, seen) if x.shape[1] else queries
        empty = keys.new_zeros(1, self.key_heads, self.window, self.size)
        real = torch.zeros(1, self.window, dtype=torch.bool, device=x.device)
        held = {"prefix_keys": keys, "prefix_values": values, "window_keys": empty, "window_values": empty, "window_real": real}
        return self.joined(out), held

    def forward(
        self, x: Float[Tensor, "B T d"], held: Mapping[str, Tensor], mask: Bool[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B T d"], dict[str, Tensor]]:
        """Read T tokens: the outputs, and what to hold for the next ones (the last W keys and values, and which are real)."""
        fresh = self.keys_values(x)
        keys, values = (torch.cat([held[name], new], 2) for name, new in zip(("window_keys", "window_values"), fresh, strict=True))
        real = torch.cat([held["window_real"], marked(mask, x)], 1)
        prefix = held["prefix_keys"], held["prefix_values"]
        out = window_attention(split(self.q_proj(x), self.heads), keys, values, real, *prefix, self.window, self.theta)
        kept = {"window_keys": keys[:, :, -self.window :], "window_values": values[:, :, -self.window :]}
        return self.joined(out), {**held, **kept, "window_real": real[:, -self.window :]}


def marked(mask: Bool[Tensor, "B T"] | None, x: Float[Tensor, "B T d"]) -> Bool[Tensor, "B T"]:
    """Return the mask, or that of real tokens alone."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask


def split(x: Float[Tensor, "B T HD"], heads: int) -> Float[Tensor, "B H T D"]:
    """Return the heads apart."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def rotated(x: Float[Tensor, "... T D"], positions: Int[Tensor, " T"], theta: float) -> Float[Tensor, "... T D"]:
    """Return queries or keys turned by their positions (RoPE, arXiv 2104.09864, in halves as Llama has it)."""
    half = x.shape[-1] // 2
    rates = theta ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(
    q: Float[Tensor, "... H T E"], k: Float[Tensor, "... K S E"], v: Float[Tensor, "... K S D"], seen: Bool[Tensor, "..."]
) -> Float[Tensor, "... H T D"]:
    """Return softmax attention over what is seen; every query must see something. Key heads serve H / K query heads each; the scale is 1 / sqrt(D)."""
    groups = q.shape[-3] // k.shape[-3]
    k, v = (k, v) if groups == 1 else (k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=v.shape[-1] ** -0.5)


def beside_prefix(
    q: Tensor, k: Tensor, q_turned: Tensor, k_turned: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of one attention in which tokens meet with positions and the prefix without.

    Queries are [turned, plain]; a token's key is [turned, 0], a prefix key [0, plain]: each product keeps one half.
    """
    keys = torch.cat([F.pad(k_turned, (0, k.shape[-1])), F.pad(prefix_k, (k.shape[-1], 0))], -2)
    return torch.cat([q_turned, q], -1), keys, torch.cat([v, prefix_v], -2)


def window_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S D"],
    real: Bool[Tensor, "B S"],
    prefix_k: Float[Tensor, "B K N D"],
    prefix_v: Float[Tensor, "B K N D"],
    window: int,
    theta: float,
) -> Float[Tensor, "B H T D"]:
    """Attend to the last `window` tokens (itself one of them) and to the prefix, block by block; S = window + T, the first `window` keys are held ones."""
    batch, tokens = len(q), q.shape[2]
    size = min(tokens, window)
    count = -(-tokens // size)
    spare = count * size - tokens
    span = window + size

    def blocks(x: Tensor) -> Tensor:  # (B, K, S, D) -> (B * count, K, span, D): each block behind the one before it
        x = F.pad(x, (0, 0, 0, spare))
        if count == 1:
            return x
        parts = x.unflatten(2, (count + 1, window))
        return torch.cat([parts[:, :, :-1], parts[:, :, 1:]], 3).transpose(1, 2).flatten(0, 1)

    def spread(x: Tensor) -> Tensor:  # the prefix, for every block
        return x.repeat_interleave(count, 0)

    q = F.pad(q, (0, 0, 0, spare)).unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    k, v = blocks(k), blocks(v)
    place = torch.arange(span, device=q.device)
    own = place[window:, None]
    near = (place > own - window) & (place <= own)  # (size, span)
    seen = (near & blocks(real[:, None, :, None])[:, :, :, 0]) | (place == own)  # a masked token sees itself
    seen = F.pad(seen, (0, prefix_k.shape[2]), value=True)[:, None]
    parts = beside_prefix(q, k, rotated(q, place[window:], theta), rotated(k, place, theta), v, spread(prefix_k), spread(prefix_v))
    return attend(*parts, seen).unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def segment_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K 2S D"],
    v: Float[Tensor, "B K 2S D"],
    real: Bool[Tensor, "B S"],
    prefix_k: Float[Tensor, "B K N D"],
    prefix_v: Float[Tensor, "B K N D"],
    theta: float,
) -> Float[Tensor, "B H T D"]:
    """Let the last T tokens of a segment attend to [prefix, recalled, segment]: to recalled and segment tokens up to themselves (MAC; the mask is ours)."""
    length = real.shape[1]
    place = torch.arange(length, device=q.device)
    own = place[length - q.shape[2] :, None]
    seen = ((place <= own) & real[:, None]) | (place == own)  # (B, T, S)
    seen = F.pad(torch.cat([seen, seen], 2), (0, prefix_k.shape[2]), value=True)[:, None]
    parts = beside_prefix(q, k, rotated(q, own[:, 0], theta), rotated(k, place.repeat(2), theta), v, prefix_k, prefix_v)
    return attend(*parts, seen)
