r"""How a token reads many memories at once: segments, gates, and the four rules of memory caching as functions of tensors.

Paper: Behrouz et al. 2026, "Memory Caching: RNNs with Growing Memory", arXiv 2602.24281. The scores r_t^(i) = <u_t, pool(S^(i))> over the cached segments and
the online one become shares gamma_t^(i); the read is the sum of all reads by shares (residual: by ones), or the read of the averaged weights (soup).
Shapes: B rows, H heads, T tokens, S caches, D width of a head. The online memory is the last of S + 1.
Differs from the paper: empty segments (all tokens masked, or forgotten) have no share; SSC's shares are normalised over the chosen caches and the online one;
`average` is the paper's post-training mode. Cost: S reads per token, k in SSC; the soup's layers are mixed one by one, so that no averaged weight is ever held.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.memory.recurrence import Rule, State
from remanence.memory.rules import pair_decay
from remanence.memory.shelved import Kept, Shelved, pieces

RULES = ("grm", "residual", "soup", "ssc", "average")


def split(tokens: int, segment: int | str, seen: int = 0) -> list[int]:
    """Return the lengths of the pieces that `tokens` new tokens fall into, behind `seen` ones; the first may go on in an open segment.

    `log` is the binary expansion of the length: 37 is 32, 4, 1.
    """
    if segment == "log":
        return [1 << bit for bit in reversed(range(tokens.bit_length())) if tokens >> bit & 1]
    size = int(segment)
    first = min(tokens, -seen % size)
    whole, rest = divmod(tokens - first, size)
    return [length for length in [first, *[size] * whole, rest] if length]


def pool_so_far(
    pooled: Float[Tensor, "B H T D"], mask: Bool[Tensor, "B T"], total: Float[Tensor, "B H D"], count: Int[Tensor, "B"]
) -> tuple[Float[Tensor, "B H T D"], Int[Tensor, "B T"]]:
    """Return, at every token, the sum over the tokens of its segment up to it, and their number: the online pool, causal by construction."""
    return total[:, :, None] + (pooled * mask[:, None, :, None]).cumsum(2), count[:, None] + mask.cumsum(1)


def shares(
    logits: Float[Tensor, "B H T S1"], present: Bool[Tensor, "B T S1"], rule: str, top_k: int
) -> tuple[Float[Tensor, "B H T S1"], Int[Tensor, "B H T k"] | None]:
    """Return every memory's share in every token's read, and in SSC the chosen caches (None: all)."""
    here = present[:, None]  # T may be 1: the same for all tokens
    if rule == "residual":
        return here.to(logits.dtype).expand_as(logits), None
    if rule == "average":
        return (here / here.sum(-1, keepdim=True)).to(logits.dtype).expand_as(logits), None
    logits = logits.masked_fill(~here, float("-inf"))
    caches = logits.shape[-1] - 1
    if rule != "ssc" or top_k >= caches:
        return logits.softmax(-1), None
    chosen = logits[..., :-1].topk(top_k, dim=-1).indices
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
    kept[..., -1] = True
    return logits.masked_fill(~kept, float("-inf")).softmax(-1), chosen


def cached_sum(
    base: Rule,
    q: Float[Tensor, "B H T D"],
    gamma: Float[Tensor, "B H T S1"],
    weights: State | Shelved,
    chosen: Int[Tensor, "B H T k"] | None,
) -> Float[Tensor, "B H T D"]:
    """Return sum_{i<s} gamma_t^(i) M^(i)(q_t), over the chosen caches or over all."""
    if chosen is not None:
        return (gamma.gather(-1, chosen)[..., None] * selected_reads(base, q, weights, chosen)).sum(-2)
    caches = weights if isinstance(weights, Shelved) else Kept(weights)
    spans = pieces(caches.caches, caches.bytes * q.shape[0] * q.shape[1])
    answers = [base.read(q[:, :, None], caches.part(span, q.device)) for span in spans]
    return torch.einsum("bhts,bhstd->bhtd", gamma[..., :-1], torch.cat(answers, 2) if len(answers) > 1 else answers[0])


def selected_reads(
    base: Rule, q: Float[Tensor, "B H T D"], weights: State | Shelved, chosen: Int[Tensor, "B H T k"]
) -> Float[Tensor, "B H T k D"]:
    """Read k caches per token: the pairs (token, cache) are sorted by cache, each chosen cache is fetched once and answers all its tokens in one product."""
    rows, heads, tokens, width = q.shape
    caches, k = weights if isinstance(weights, Shelved) else Kept(weights), chosen.shape[-1]
    memory = torch.arange(rows * heads, device=q.device)[:, None] * caches.caches + chosen.reshape(rows * heads, -1)
    order = memory.flatten().argsort(stable=True)
    groups, counts = memory.flatten()[order].unique_consecutive(return_counts=True)
    group = torch.arange(len(groups), device=q.device).repeat_interleave(counts)
    slot = torch.arange(len(order), device=q.device) - (counts.cumsum(0) - counts)[group]
    padded = q.new_zeros(len(groups), int(counts.max()), width)
    padded[group, slot] = q.reshape(-1, width)[order // k]  # pair p belongs to token p // k
    read = [base.read(padded[span], caches.fetch(groups[span], q.device)) for span in pieces(len(groups), caches.bytes)]
    answers = torch.cat(read)[group, slot] if len(read) > 1 else read[0][group, slot]
    return torch.zeros_like(answers).index_copy(0, order, answers).view(rows, heads, tokens, k, width)


def masked_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    decay: Float[Tensor, "B H T"],
    write: Float[Tensor, "B H T"],
    gamma: Float[Tensor, "B H T N"],
    lengths: list[int],
    carried: bool,
) -> Float[Tensor, "B H T D"]:
    """Read linear attention and all its caches without a state: y_t = sum_{j<=t} w_tj (q_t.k_j) v_j (ours, by the sheet of equations).

    With segments of their own, w_tj = gamma_t^(seg j) D(j -> min(t, end of seg j)), where D is the product of decays after j; where each goes on from the last
    (`carried`), w_tj = sum of gamma_t^(i) D(j -> min(t, end_i)) over i from seg j on. `gamma` has a share for every segment, the token's own included, and
    zero for later ones. It costs O(T^2 D), so it pays where a segment is shorter than D.
    """
    total = decay.clamp(min=torch.finfo(decay.dtype).tiny).log().cumsum(-1)  # (B, H, T)
    segment = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))  # (T,)
    ends = torch.tensor(lengths, device=q.device).cumsum(0) - 1
    last = total[..., ends]  # (B, H, N)
    tokens = torch.arange(len(segment), device=q.device)
    own = segment[:, None] == segment[None, :]
    weight = pair_decay(total) * gamma.gather(-1, segment.expand(*gamma.shape[:2], -1)[..., None])  # read through the online memory
    if carried:  # every memory from the segment of j on, up to the one before t's, holds j
        held = (last[..., None, :] - total[..., None]).masked_fill(ends < tokens[:, None], float("-inf")).exp()  # (B, H, j, N)
        earlier = gamma * (torch.arange(len(lengths), device=q.device) < segment[:, None])
        weight = weight + earlier @ held.mT
    else:
        left = (last[..., segment] - total).exp()  # (B, H, j)
        weight = torch.where(own, weight, gamma[..., segment] * left[..., None, :])
    causal = tokens[None, :] <= tokens[:, None]
    return ((q @ k.mT) * weight.masked_fill(~causal, 0.0) * write[..., None, :]) @ v
