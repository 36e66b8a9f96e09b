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

Ours: every constant; rewards scaled by 1 - gamma, so that V is in nats per token; keys and values made by fixed random maps (slots carry no gradient, so nothing
could train them; W_mq starts as the map of the keys and is trained); candidates of one flush that are near copies of a more surprising one are dropped.
Cost: O(T M d) to read, O(B m (M + B m) d) to write; M (2 d + 3) numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.storage import load_tree, save_tree
from remanence.training.processes import world_size

State = dict[str, Tensor]


class SlotMemory(nn.Module):
    """Slots of keys and values: buffers, saved with the model and trained by nobody.

    Args:
        slots: M.
        dim: d.
        merge: cosine from which a candidate is merged into its nearest slot.
        keep: share of the old value in a merge.
        age_decay: of a slot's strength per flush.
    """

    keys: Tensor
    values: Tensor
    strength: Tensor
    written: Tensor
    filled: Tensor
    time: Tensor

    def __init__(self, slots: int, dim: int, merge: float = 0.9, keep: float = 0.9, age_decay: float = 0.999):
        super().__init__()
        self.merge, self.keep, self.age_decay = merge, keep, age_decay
        self.register_buffer("keys", torch.zeros(slots, dim))
        self.register_buffer("values", torch.zeros(slots, dim))
        self.register_buffer("strength", torch.zeros(slots))
        self.register_buffer("written", torch.zeros(slots, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(slots, dtype=torch.bool))
        self.register_buffer("time", torch.zeros((), dtype=torch.int64))

    def read(self, query: Float[Tensor, "B T d"], k: int, sharpness: float) -> Float[Tensor, "B T d"]:
        """Return the softmax mixture of the k nearest filled slots; exactly zero where none is filled."""
        score = (query @ self.keys.mT).masked_fill(~self.filled, -torch.inf)
        best, index = score.sort(dim=-1, descending=True, stable=True)  # equal scores: the lower index, in every precision
        best, index = best[..., :k], index[..., :k]
        live = self.filled[index]
        weight = torch.where(
            live, torch.exp(sharpness * (best.masked_fill(~live, -1.0) - best[..., :1].masked_fill(~live[..., :1], 0.0))), 0.0
        )
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
        return torch.einsum("btk,btkd->btd", weight, self.values[index])

    @torch.no_grad()
    def write(self, key: Float[Tensor, "N d"], value: Float[Tensor, "N d"], surprise: Float[Tensor, " N"]) -> None:
        """Merge each candidate into the slot that it resembles, or give it the slot of least strength * decay^age."""
        self.time += 1
        order = surprise.sort(descending=True, stable=True).indices
        key, value, surprise = key[order], value[order], surprise[order]
        best, slot = (key @ self.keys.mT).masked_fill(~self.filled, -torch.inf).max(-1)
        near = best > self.merge
        if bool(near.any()):
            total = torch.zeros_like(self.values).index_add_(0, slot[near], value[near])
            count = torch.zeros_like(self.strength).index_add_(0, slot[near], torch.ones_like(surprise[near]))
            hit = count > 0
            merged = self.keep * self.values + (1 - self.keep) * total / count.clamp(min=1)[:, None]
            self.values.copy_(torch.where(hit[:, None], merged, self.values))
            self.written.masked_fill_(hit, int(self.time))
        fresh = ~near
        copies = torch.tril((key @ key.mT > self.merge) & fresh[None], diagonal=-1).any(1)  # of a more surprising candidate
        chosen = torch.nonzero(fresh & ~copies)[: len(self.keys), 0]
        score = self.strength * self.age_decay ** (self.time - self.written)
        place = (
            score.masked_fill(~self.filled, -1.0).masked_fill(self.written == self.time, torch.inf).sort(stable=True).indices[: len(chosen)]
        )
        self.keys[place], self.values[place] = key[chosen], value[chosen]
        self.strength[place] = torch.sigmoid(surprise[chosen])  # positive, and rising with surprise
        self.written[place], self.filled[place] = self.time, True

    @torch.no_grad()
    def forget(self, mask: Bool[Tensor, " M"]) -> int:
        """Empty the slots of a mask, nothing of them stays; return how many held something.

        Raises:
            Mistake: the mask is not one boolean per slot.
        """
        if mask.dtype != torch.bool or mask.shape != self.filled.shape:
            raise Mistake(
                "slot memory", f"expected {len(self.filled)} booleans, got {mask.dtype} {tuple(mask.shape)}", "True marks a slot to empty"
            )
        gone = int((mask & self.filled).sum())
        for buffer in (self.keys, self.values, self.strength, self.written, self.filled):
            buffer[mask] = 0
        return gone

    def clear(self) -> None:
        """Empty all slots."""
        self.forget(torch.ones_like(self.filled))

    def save(self, path: str | Path) -> None:
        """Write the slots as one safetensors file, whole or not at all."""
        save_tree(path, {"kind": "trc2 slots", "slots": dict(self.state_dict())})

    def load(self, path: str | Path) -> None:
        """Take over what `save` wrote.

        Raises:
            Mistake: the file holds no slots, or slots of another number or width.
        """
        tree = load_tree(path)
        if not isinstance(tree, dict) or tree.get("kind") != "trc2 slots":
            raise Mistake(path, "holds no slots", "name a file that SlotMemory.save wrote")
        found = tree["slots"]["keys"].shape
        if found != self.keys.shape:
            raise Mistake(path, f"holds slots {tuple(found)}, this memory {tuple(self.keys.shape)}", "load it into a model of its settings")
        self.load_state_dict(tree["slots"])


class Stash(NamedTuple):
    """What one forward pass would write: the chosen positions, and all surprises for the threshold."""

    key: Float[Tensor, "N d"]
    value: Float[Tensor, "N d"]
    surprise: Float[Tensor, " N"]
    all: Float[Tensor, " A"]


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
    def stash(self, h: Float[Tensor, "B T d"], surprise: Float[Tensor, "B T"], known: Bool[Tensor, "B T"]) -> None:
        """Note the positions of highest s_t of each sequence; s_t stands at t + 1."""
        if h.shape[1] < 2:
            return
        own, valid = surprise[:, 1:], known[:, 1:]  # s_t at t = 0..T-2
        best, place = own.masked_fill(~valid, -torch.inf).topk(min(self.write_m, own.shape[1]), dim=1)
        row, column = best.isfinite().nonzero(as_tuple=True)
        chosen = h[row, place[row, column]]
        self.waiting.append(Stash(F.normalize(self.to_key(chosen), dim=-1), self.to_value(chosen), best[row, column], own[valid]))

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
        key, value, surprise, every = (torch.cat(parts).to(kind) for parts in zip(*self.waiting, strict=True))
        self.waiting.clear()
        if len(key):
            self.memory.write(key, value, surprise)
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
