"""Keep events of the stream in slots: read when surprised, write behind the optimizer's step, never in a way that lets a read see its own future.

The hippocampus of "Efficient Continual Learning in Language Models via Thalamically Routed Cortical Columns", Khadangi 2026 (arXiv 2602.22479, v3 and later;
see `trc2`). H is the residual stream behind the injection column, sg stops the gradient.

    read    q = norm(H W_mq); the k filled slots of highest cosine (ties: the lower index); M = e_t sum softmax(beta cos) value;   M = 0 while memory is empty
    event   e_t = [s_{t-1} > threshold], a sigmoid in training; the threshold follows the 80th percentile of s
    out     F_hip = sigmoid(a) W_out(G * M),   G = sigmoid(W_g[sg(H), M] + b)
    critics delta_t = (1 - gamma) NLL_t + gamma V(t+1) - V(t), V_fast trained on delta^2, V_slow its moving average
    write   s_t = delta_fast,t - delta_slow,t; the m positions of highest s per sequence are stashed, and written by `flush`

The reward cancels in s: s_t = gamma D(t+1) - D(t) with D = V_fast - V_slow. So position t + 1 knows s_t from hidden states alone, and one parallel pass equals
decoding token by token. (NLL_t is used to train the critics, nowhere else.)

| symbol | here | shape | default |
|---|---|---|---|
| N_slots | `slots` | M | 512 |
| k, beta | `read_k`, `sharpness` | | 8, 8 |
| m | `write_m` | | 4 |
| merging cosine, share of the old | `merge`, `keep` | | 0.9, 0.9 |
| decay^age | `age_decay` | | 0.999 |
| gamma | `discount` | | 0.9 |

The slots, how they are merged and how they age, are in `slots`.

Ours: every constant; rewards scaled by 1 - gamma, so that V is in nats per token; keys and values made by fixed random maps (slots carry no gradient, so nothing
could train them; W_mq starts as the map of the keys and is trained); candidates of one flush that are near copies of a more surprising one are dropped.
Cost: O(T M d) to read, O(B m (M + B m) d) to write; M (2 d + 3) numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.memory.slots import SlotMemory
from remanence.memory.spans import Spans, Trail
from remanence.training.processes import world_size

State = dict[str, Tensor]


class Seen(NamedTuple):
    """What the critics saw at the injection, and the tokens that led there (`None` where slots keep none)."""

    h: Float[Tensor, "B T d"]
    value: Float[Tensor, "B T"]
    ahead: Float[Tensor, "B T"]
    surprise: Float[Tensor, "B T"]
    known: Bool[Tensor, "B T"]
    trail: Trail | None


class Stash(NamedTuple):
    """What one forward pass would write: the chosen positions with the tokens that end there, and all surprises for the threshold."""

    key: Float[Tensor, "N d"]
    value: Float[Tensor, "N d"]
    surprise: Float[Tensor, " N"]
    all: Float[Tensor, " A"]
    span: Spans | None


class Hippocampus(nn.Module):
    """Read events, judge them, and remember them behind the step.

    Args:
        dim: d.
        rank: r of the thalamus that takes what was read.
        memory: the slots.
        read_k, sharpness, write_m, discount: see the module.
        slow: rate at which V_slow follows V_fast.
        quantile: of the surprises, above which a position is an event.
    """

    threshold: Tensor
    spread: Tensor
    slow_value: Tensor

    def __init__(
        self,
        dim: int,
        rank: int,
        memory: SlotMemory,
        read_k: int,
        sharpness: float,
        write_m: int,
        discount: float,
        slow: float,
        quantile: float,
    ):
        super().__init__()
        self.memory, self.read_k, self.sharpness, self.write_m = memory, read_k, sharpness, write_m
        self.discount, self.slow, self.quantile = discount, slow, quantile
        self.query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False).requires_grad_(False)
        self.to_value = nn.Linear(dim, dim, bias=False).requires_grad_(False)
        self.gate = nn.Linear(2 * dim, dim)
        self.out = nn.Linear(dim, rank, bias=False)
        self.openness = nn.Parameter(torch.zeros(()))  # a of sigmoid(a)
        self.fast = nn.Linear(dim + 1, 1, bias=False)  # V_fast; the last weight is its constant
        self.register_buffer("slow_value", torch.zeros(1, dim + 1))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.waiting: list[Stash] = []

    def judge(
        self, h: Float[Tensor, "B T d"], real: Bool[Tensor, "B T"], state: State | None
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"], Float[Tensor, "B T"], Bool[Tensor, "B T"], State]:
        """Return V_fast (with gradient), the next value, s_{t-1} as position t knows it (0 at the first), where it is known, and the state."""
        seen = critic_input(h.detach())
        value = self.fast(seen)[..., 0]
        gap = (value - F.linear(seen, self.slow_value)[..., 0]).detach()
        if state is None:
            state = {"gap": gap.new_zeros(len(gap)), "known": torch.zeros(len(gap), dtype=torch.bool, device=gap.device)}
        before = torch.cat([state["gap"][:, None], gap[:, :-1]], dim=1)
        known = torch.cat([state["known"][:, None], real[:, :-1]], dim=1) & real
        surprise = torch.where(known, self.discount * gap - before, 0.0)
        return value, value.detach(), surprise, known, {"gap": gap[:, -1], "known": real[:, -1]}

    def forward(self, h: Float[Tensor, "B T d"], surprise: Float[Tensor, "B T"], known: Bool[Tensor, "B T"]) -> Float[Tensor, "B T r"]:
        """Return F_hip: what the slots say at the events, on its way to the thalamus."""
        excess = (surprise - self.threshold) / self.spread
        event = (torch.sigmoid(excess) if self.training else (excess > 0).to(h.dtype)) * known
        read = self.memory.read(F.normalize(self.query(h), dim=-1), self.read_k, self.sharpness) * event[..., None].to(h.dtype)
        gate = torch.sigmoid(self.gate(torch.cat([h.detach(), read], dim=-1)))
        return torch.sigmoid(self.openness) * self.out(gate * read)

    @torch.no_grad()
    def entry(self, h: Float[Tensor, "N d"]) -> tuple[Float[Tensor, "N d"], Float[Tensor, "N d"]]:
        """Return key and value of positions."""
        return F.normalize(self.to_key(h), dim=-1), self.to_value(h)

    @torch.no_grad()
    def stash(
        self, h: Float[Tensor, "B T d"], surprise: Float[Tensor, "B T"], known: Bool[Tensor, "B T"], trail: Trail | None = None
    ) -> None:
        """Note the positions of highest s_t of each sequence; s_t stands at t + 1."""
        if h.shape[1] < 2:
            return
        own, valid = surprise[:, 1:], known[:, 1:]  # s_t at t = 0..T-2
        best, place = own.masked_fill(~valid, -torch.inf).topk(min(self.write_m, own.shape[1]), dim=1)
        row, column = best.isfinite().nonzero(as_tuple=True)
        chosen = place[row, column]
        span = trail.ending_at(row, chosen) if trail is not None else None
        self.waiting.append(Stash(*self.entry(h[row, chosen]), best[row, column], own[valid], span))

    @torch.no_grad()
    def refresh(self, encode: Callable[[Int[Tensor, "n s"]], Float[Tensor, "n s d"]], batch: int) -> int:
        """Give each slot of a known span the key and value of what its span encodes to, all at the end; return their number.

        Raises:
            Mistake: writes wait, whose keys are of the weights before; or the slots keep no spans.
        """
        memory, slots = self.memory, self.memory.with_span()
        if self.waiting:
            raise Mistake("hippocampus", "slots cannot be encoded anew while writes wait", "call after_step() first")
        found = []
        for part in slots.split(batch) if len(slots) else ():
            length = memory.span_length[part]
            h = encode(
                memory.span_ids[part, : int(length.max())]
            )  # what fills a row up stands behind its span, where no causal model looks
            found.append(self.entry(h[torch.arange(len(part), device=h.device), length - 1]))
        if found:
            keys, values = (torch.cat(parts).to(memory.keys.dtype) for parts in zip(*found, strict=True))
            memory.keys[slots], memory.values[slots] = keys, values
        return len(slots)

    @torch.no_grad()
    def flush(self) -> None:
        """Write what waits, let the threshold follow the surprises and V_slow follow V_fast.

        Raises:
            Mistake: several processes, whose memories would differ.
        """
        if not self.waiting:
            return
        if world_size() > 1:
            raise Mistake(
                "hippocampus", "each process would write other slots", "train with the hippocampus in one process, or switch it off"
            )
        kind = self.memory.keys.dtype  # autocast may have stashed in a lower one
        *parts, spans = zip(*self.waiting, strict=True)
        key, value, surprise, every = (torch.cat(part).to(kind) for part in parts)
        self.waiting.clear()
        if len(key):
            self.memory.write(key, value, surprise, Spans.joined(spans))
            wide = every.to(torch.promote_types(every.dtype, torch.float32))  # there are no quantiles in half precision
            self.threshold.lerp_(wide.quantile(self.quantile).to(kind), 0.1)
            self.spread.lerp_(every.std(correction=0).clamp(min=1e-6), 0.1)
        self.slow_value.lerp_(self.fast.weight, self.slow)


def critic_input(h: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d+1"]:
    """Return hidden states of unit RMS with a one behind them."""
    return F.pad(F.rms_norm(h, h.shape[-1:]), (0, 1), value=1.0)


def td_loss(
    value: Float[Tensor, "B T"], ahead: Float[Tensor, "B T"], reward: Float[Tensor, "B T-1"], valid: Bool[Tensor, "B T-1"], discount: float
) -> Float[Tensor, ""]:
    """Return the mean of delta_t^2, delta_t = (1 - gamma) NLL_t + gamma V(t+1) - V(t), the target without gradient."""
    delta = (1 - discount) * reward + discount * ahead[:, 1:] - value[:, :-1]
    return (delta.square() * valid).sum() / valid.sum().clamp(min=1)
