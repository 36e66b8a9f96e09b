"""Let each column's deep output modulate the queries of the next one: a focal and a past-only diffuse path whose channel groups compete.

The thalamus of "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", Khadangi 2026 (arXiv 2602.22479, v3 and later; see
`trc2`). With c the deep output compressed to rank r and s the causal surprise of the hippocampus's critics:

    F_local,t = causal depthwise convolution of c, width 4         F_past,t = mean of c_i over i < t of the same document (0 at its first token)
    [g_foc, g_dif]_t = sigmoid(W_g [c_t ; s_{t-1}] + b)            Z = TRN(g_foc F_local + g_dif F_past)
    TRN: z_g = u_g ||u_g|| / (eps + mean_h ||u_h||), norms are RMS over the channels of a group

| symbol | here | shape | default |
|---|---|---|---|
| c | `deep` W_down | (B, T, r) | r = d/8 |
| W_g, b | `gates` | (2, r + 1) | 0 |
| groups of TRN | `groups` | G | r/8 |
| forgetting of the diffuse path | `decay` | | None: the mean; else an exponential average, F_t = decay F_{t-1} + (1 - decay) c_{t-1} |

The compression, the mean, the convolution, the gates and the norm of TRN are ours: the paper's page names the parts, not their formulas.
Cost: O(T r d) for the compression, O(T r) for all else (one cumulative sum; the exponential average takes log2 T passes).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]


class Silent(nn.Linear):
    """A linear map that starts at zero: what it adds is learned."""


class Thalamus(nn.Module):
    """The side-channel from one column to the next.

    Args:
        dim: d, width of the deep output.
        rank: r.
        groups: channel groups that compete.
        width: of the causal convolution.
        decay: of the diffuse path; `None` takes the mean of the document so far.
    """

    def __init__(self, dim: int, rank: int, groups: int, width: int = 4, decay: float | None = None):
        super().__init__()
        self.rank, self.groups, self.width, self.decay = rank, groups, width, decay
        self.compress = nn.Linear(dim, rank, bias=False)
        self.focal = nn.Conv1d(rank, rank, width, groups=rank, bias=False)
        self.gates = Silent(rank + 1, 2)

    def forward(
        self,
        deep: Float[Tensor, "B T d"],
        surprise: Float[Tensor, "B T"],
        real: Bool[Tensor, "B T"],
        first: Bool[Tensor, "B T"],
        state: State | None = None,
    ) -> tuple[Float[Tensor, "B T r"], State]:
        """Return Z and the state behind the last token.

        Args:
            deep: C, the column's deep output.
            surprise: the newest surprise that position t may know, that of t - 1.
            real: False at padding, which enters neither path.
            first: the first tokens of documents, whose diffuse path is empty.
            state: behind the tokens before these.
        """
        c = self.compress(deep) * real[..., None]
        batch, wide = len(c), torch.promote_types(c.dtype, torch.float32)  # a long sum in half precision would stand still
        if state is None:
            state = {
                "tail": c.new_zeros(batch, self.width - 1, self.rank),
                "past": c.new_zeros(batch, self.rank, dtype=wide),
                "count": c.new_zeros(batch, dtype=wide),
            }
        window = torch.cat([state["tail"], c], dim=1)
        local = self.focal(window.mT).mT
        if self.decay is None:
            past, total, count = past_mean(c.to(wide), real, first, state["past"], state["count"])
        else:
            past, total = past_average(c.to(wide), real, first, state["past"], self.decay)
            count = state["count"]
        gate = torch.sigmoid(self.gates(torch.cat([c, surprise[..., None].to(c.dtype)], dim=-1)))
        z = trn(gate[..., :1] * local + gate[..., 1:] * past.to(c.dtype), self.groups)
        return z, {"tail": window[:, window.shape[1] - self.width + 1 :], "past": total, "count": count}


def trn(u: Float[Tensor, "B T r"], groups: int, eps: float = 1e-6) -> Float[Tensor, "B T r"]:
    """Return z_g = u_g ||u_g|| / (eps + mean over groups ||u_h||): groups of channels suppress each other at their own position (ours)."""
    split = u.unflatten(-1, (groups, -1))
    norm = (split.square().mean(-1, keepdim=True) + eps**2).sqrt()
    return (split * norm / (eps + norm.mean(-2, keepdim=True))).flatten(-2)


def past_mean(
    c: Float[Tensor, "B T r"],
    real: Bool[Tensor, "B T"],
    first: Bool[Tensor, "B T"],
    total: Float[Tensor, "B r"],
    count: Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B T r"], Float[Tensor, "B r"], Float[Tensor, " B"]]:
    """Return the mean of c over the strictly earlier tokens of each token's document, and the sum and the number behind the last token.

    One cumulative sum: what stood before a document began is taken off again. `c` is zero at padding.
    """
    sums = total[:, None] + F.pad(c.cumsum(1), (0, 0, 1, 0))  # (B, T+1, r): sums[:, t] is over what comes before t
    numbers = count[:, None] + F.pad(real.to(c.dtype).cumsum(1), (1, 0))
    begin = document_start(first)  # (B, T), -1 where the document began before these tokens
    inside = begin >= 0
    at = begin.clamp(min=0)
    before = sums.gather(1, at[..., None].expand(-1, -1, c.shape[-1])) * inside[..., None]
    older = numbers.gather(1, at) * inside
    mean = (sums[:, :-1] - before) / (numbers[:, :-1] - older).clamp(min=1)[..., None]
    return mean * ~first[..., None], sums[:, -1] - before[:, -1], numbers[:, -1] - older[:, -1]


def past_average(
    c: Float[Tensor, "B T r"], real: Bool[Tensor, "B T"], first: Bool[Tensor, "B T"], state: Float[Tensor, "B r"], decay: float
) -> tuple[Float[Tensor, "B T r"], Float[Tensor, "B r"]]:
    """Return F_t = decay F_{t-1} + (1 - decay) c_{t-1}, cleared at the first token of a document, by doubling; and F behind the last token."""
    keep = (1 - (1 - decay) * real.to(c.dtype))[..., None] * ~first[..., None]  # what is left of F_t in F_{t+1}
    gain = (1 - decay) * real.to(c.dtype)[..., None] * c
    gain = torch.cat([gain[:, :1] + keep[:, :1] * state[:, None], gain[:, 1:]], dim=1)
    span = 1
    while span < c.shape[1]:  # log2 T passes
        gain = torch.cat([gain[:, :span], gain[:, span:] + keep[:, span:] * gain[:, :-span]], dim=1)
        keep = torch.cat([keep[:, :span], keep[:, span:] * keep[:, :-span]], dim=1)
        span *= 2
    return torch.cat([state[:, None], gain[:, :-1]], dim=1) * ~first[..., None], gain[:, -1]


def document_start(first: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the position of the newest document start at or before each position, -1 where there is none."""
    place = torch.arange(first.shape[1], device=first.device).expand_as(first)
    return torch.where(first, place, -1).cummax(1).values
