"""The slow part of TRC2: columns of rotary attention with grouped queries and a mixture of SwiGLU experts with one that all tokens share (see `trc2`).

    U = RMSNorm(H);  H~ = H + Drop(GQA(U; th));  H <- H~ + Drop(MoE(RMSNorm(H~)))        q <- q (1 + tanh(W_q th)),  W_q = 0 at the start

th is the side input of a column (thalamus and hippocampus); without one the column is a plain decoder layer.
Cost: O(T d^2 + T^2 d) per column; of the experts only the k chosen ones work on a token.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from remanence.memory.thalamus import Silent
from remanence.memory.trc2_config import TRC2Config


class Attention(nn.Module):
    """Causal attention with grouped queries, rotary positions, and queries that a side input scales."""

    def __init__(self, dim: int, heads: int, key_heads: int, layer: int, side: int | None):
        super().__init__()
        self.heads, self.key_heads, self.layer = heads, key_heads, layer
        self.size = dim // heads
        self.q_proj = nn.Linear(dim, heads * self.size, bias=False)
        self.k_proj = nn.Linear(dim, key_heads * self.size, bias=False)
        self.v_proj = nn.Linear(dim, key_heads * self.size, bias=False)
        self.o_proj = nn.Linear(heads * self.size, dim, bias=False)
        self.modulate = Silent(side, heads * self.size, bias=False) if side else None  # W_q

    def forward(
        self,
        u: Float[Tensor, "B T d"],
        turn: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 T S"] | None,
        side: Float[Tensor, "B T r"] | None = None,
        cache: DynamicCache | None = None,
    ) -> Float[Tensor, "B T d"]:
        """Return the mixed values; `mask` None is plain causal."""
        q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(u)
        if side is not None and self.modulate is not None:
            q = q * (1 + torch.tanh(self.modulate(side)))
        q, k, v = (x.unflatten(-1, (-1, self.size)).transpose(1, 2) for x in (q, k, v))
        q, k = rotated(q, *turn), rotated(k, *turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != self.key_heads)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """E SwiGLU experts, the k likeliest of which serve a token, and one that serves all."""

    def __init__(self, dim: int, inner: int, experts: int, chosen: int):
        super().__init__()
        self.experts, self.chosen = experts, chosen
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, inner))
        self.shared_gate_up = nn.Linear(dim, 2 * inner, bias=False)
        self.shared_down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "B T d"]) -> tuple[Float[Tensor, "B T d"], Float[Tensor, ""]]:
        """Return the mixture and the load-balance loss of these tokens."""
        flat = x.flatten(0, 1)
        odds = self.router(flat).float().softmax(-1) if x.dtype != torch.float64 else self.router(flat).softmax(-1)
        best, index = odds.sort(dim=-1, descending=True, stable=True)  # equal odds: the lower expert
        best, index = best[:, : self.chosen], index[:, : self.chosen]
        weight = best / best.sum(-1, keepdim=True) if self.chosen > 1 else best  # one expert: its odds, or the router would learn nothing
        out = swiglu(flat, self.shared_gate_up.weight, self.shared_down.weight)
        out = out + moe_grouped(flat, index, weight.to(flat.dtype), self.gate_up, self.down)
        return out.view_as(x), balance_loss(odds, index)


class Column(nn.Module):
    """One layer: attention, experts, and the deep output that the thalamus reads.

    Args:
        config: of the model.
        layer: number, from 0.
    """

    def __init__(self, config: TRC2Config, layer: int):
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        hears = layer > 0 and (config.thalamus or (config.hippocampus and layer > config.inject))
        side = config.side_rank if hears else None
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.self_attn = Attention(dim, config.num_attention_heads, config.num_key_value_heads, layer, side)
        self.mlp = Experts(dim, config.intermediate_size, config.num_experts, config.experts_per_token)
        speaks = config.thalamus and layer < config.num_hidden_layers - 1
        self.deep = nn.Linear(dim, dim, bias=False) if speaks else None  # W_L5
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        h: Float[Tensor, "B T d"],
        turn: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 T S"] | None,
        side: Float[Tensor, "B T r"] | None = None,
        cache: DynamicCache | None = None,
    ) -> tuple[Float[Tensor, "B T d"], Float[Tensor, ""]]:
        """Return the residual stream behind the column, and its load-balance loss."""
        h = h + self.drop(self.self_attn(self.attention_norm(h), turn, mask, side, cache))
        mixed, balance = self.mlp(self.mlp_norm(h))
        return h + self.drop(mixed), balance


def masks(
    input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, past: int
) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B 1 T S"] | None, Int[Tensor, "B T"]]:
    """Return which tokens are real, the mask of attention (None: plain causal), and the positions."""
    batch, length = input_ids.shape
    device = input_ids.device
    if attention_mask is None or (attention_mask.dim() == 2 and bool(attention_mask.all())):
        keys = torch.ones(batch, past + length, dtype=torch.bool, device=device)
        plain = past == 0
    else:
        keys, plain = attention_mask.bool(), False
    positions = (keys.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    if plain:
        return keys, None, positions
    own = torch.arange(past, past + length, device=device)[:, None]
    place = torch.arange(past + length, device=device)[None]
    mask = (place <= own) & keys[:, None] | (place == own)  # padding looks at itself, so that nothing is NaN
    return keys[:, past:], mask[:, None], positions


def borders(
    input_ids: Int[Tensor, "B T"], reset: int | None, state: dict[str, Tensor] | None
) -> tuple[Bool[Tensor, "B T"], dict[str, Tensor]]:
    """Return which tokens are the first behind a reset token, and whether the call's last token is one (for the cache's next call)."""
    if reset is None:
        return torch.zeros_like(input_ids, dtype=torch.bool), {}
    ends = input_ids == reset
    before = state["ended"] if state is not None else torch.zeros_like(ends[:, 0])
    return torch.cat([before[:, None], ends[:, :-1]], dim=1), {"ended": ends[:, -1]}


def angles(
    positions: Int[Tensor, "B T"], size: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T h"], Float[Tensor, "B 1 T h"]]:
    """Return the cosines and sines of rotary positions, h = size / 2 rates base^(-i/h)."""
    half = size // 2
    rate = base ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angle = positions[:, None, :, None].to(torch.float64) * rate
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x: Float[Tensor, "B H T D"], cos: Float[Tensor, "B 1 T h"], sin: Float[Tensor, "B 1 T h"]) -> Float[Tensor, "B H T D"]:
    """Return x turned by its positions, halves paired (RoPE)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(x: Float[Tensor, "N d"], gate_up: Float[Tensor, "2f d"], down: Float[Tensor, "d f"]) -> Float[Tensor, "N d"]:
    """Return W_down (silu(W_gate x) * W_up x)."""
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def moe_grouped(
    x: Float[Tensor, "N d"],
    index: Int[Tensor, "N k"],
    weight: Float[Tensor, "N k"],
    gate_up: Float[Tensor, "E 2f d"],
    down: Float[Tensor, "E d f"],
) -> Float[Tensor, "N d"]:
    """Return each token's weighted sum over its experts: tokens are sorted by expert, and each expert works once, on its own run of them.

    A run is filled up to a multiple of 8 rows: matrix products of fewer rows take another path on some machines, and the last bits of a token's result
    would depend on how many others, later ones too, chose its expert.
    """
    experts, k = len(gate_up), index.shape[1]
    order = index.flatten().sort(stable=True).indices
    token = order // k
    counts = index.flatten().bincount(minlength=experts).tolist()
    parts = []
    for expert, run in enumerate(x[token].split(counts)):
        filled = F.pad(run, (0, 0, 0, -len(run) % 8))
        parts.append(swiglu(filled, gate_up[expert], down[expert])[: len(run)] if len(run) else run)
    weighted = torch.cat(parts) * weight.flatten()[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].unflatten(0, (-1, k)).sum(1)


def moe_reference(
    x: Float[Tensor, "N d"],
    index: Int[Tensor, "N k"],
    weight: Float[Tensor, "N k"],
    gate_up: Float[Tensor, "E 2f d"],
    down: Float[Tensor, "E d f"],
) -> Float[Tensor, "N d"]:
    """Return the same with every expert at work on every token; the plain form, E / k times the work."""
    share = weight.new_zeros(len(x), len(gate_up)).scatter_add(1, index, weight)
    every = torch.stack([swiglu(x, up, back) for up, back in zip(gate_up, down, strict=True)], dim=1)  # (N, E, d)
    return torch.einsum("ne,ned->nd", share, every)


def balance_loss(odds: Float[Tensor, "N E"], index: Int[Tensor, "N k"]) -> Float[Tensor, ""]:
    """Return E sum_e f_e P_e: f the share of tokens' choices, P the mean odds; 1 where experts are used alike (Shazeer 2017, Fedus 2021)."""
    experts = odds.shape[1]
    share = index.flatten().bincount(minlength=experts).to(odds.dtype) / index.numel()
    return experts * (share * odds.mean(0)).sum()
