"""The way of a memory cache through a piece of text: write every segment, put the closed ones on the shelf, and read at every token over what it may see.

Segments of their own are written side by side (a fold of the batch); those that go on from each other one after the other. Then each segment's tokens read the caches
before it, all at once. Where the base is linear attention and a segment is shorter than a key, the whole is one masked attention, without a state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from remanence.memory.archive import Hold
from remanence.memory.combine import cached_sum, masked_attention, pool_so_far, shares, split
from remanence.memory.recurrence import Layered, Rule, State
from remanence.memory.rules import Linear
from remanence.memory.shelf import PLACE, Shelf, admit, closed, empty, first, joined, take, weights_of, without_old_gradients
from remanence.memory.shelved import Kept, Shelved, whole


class Inputs(NamedTuple):
    """What the heads read."""

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B H T D"]
    v: Float[Tensor, "B H T D"]
    u: Float[Tensor, "B H T D"]
    pooled: Float[Tensor, "B H T D"]
    gates: dict[str, Float[Tensor, "B H T"]]

    def at(self, part: slice) -> Inputs:
        """Return a span of tokens."""
        q, k, v, u, pooled = (x[:, :, part] for x in (self.q, self.k, self.v, self.u, self.pooled))
        return Inputs(q, k, v, u, pooled, {name: gate[:, :, part] for name, gate in self.gates.items()})


class Walk(NamedTuple):
    """The reads, the online memory's share in them, each token's surprise (if it was watched), the tensors of the state, and its hold on what rests on disk."""

    read: Float[Tensor, "B H T D"]
    online: Float[Tensor, "B H T"]
    surprise: Float[Tensor, "B H T"]
    tensors: dict[str, Tensor]
    hold: Hold | None


@dataclass(frozen=True)
class Plan:
    """How a cache reads; the fields are `MemoryCache`'s."""

    base: Rule
    rule: str
    segment: int | str
    init: str
    top_k: int
    pool: str
    temperature: float
    max_segments: int | None
    evict: str
    offload: str | None
    detach_cache_after: int | None


def walk(
    plan: Plan,
    initial: Mapping[str, Tensor],
    inputs: Inputs,
    mask: Bool[Tensor, "B T"] | None,
    tensors: dict[str, Tensor],
    hold: Hold | None,
    seen: int,
    watched: bool = False,
) -> Walk:
    """Read T tokens behind `seen` ones."""
    q, base = inputs.q, plan.base
    real = mask if mask is not None else torch.ones(len(q), q.shape[2], dtype=torch.bool, device=q.device)
    tensors = tensors or start(base, initial, q[:, :, 0])
    lengths = split(q.shape[2], plan.segment, seen)
    spans = [slice(*pair) for pair in itertools.pairwise([0, *itertools.accumulate(lengths)])]
    live, shelves = parts(tensors, "live."), [parts(tensors, "cache.")]
    total, count, number = tensors["pool.total"], tensors["pool.count"], newest(plan.segment, seen)
    old = shelves[0]["id"].shape[1]
    full = seen > 0 and plan.segment != "log" and seen % int(plan.segment) == 0
    if full:  # a token follows the newest segment's last: now it is closed
        pool = mean_or_sum(plan.pool, total[:, :, None], count[:, None])[:, :, 0]
        shelves.append(closed(base.weights(live), pool, count, number))
        total, count = torch.zeros_like(total), torch.zeros_like(count)
    online, begun, ended = write_segments(plan, initial, inputs, mask, live, lengths, carried=seen > 0 and not full)
    number += int(full)  # of the first piece
    pools = []
    for index, span in enumerate(spans):
        sums, counts = pool_so_far(inputs.pooled[:, :, span], real[:, span], total, count)
        pools.append(mean_or_sum(plan.pool, sums, counts))
        if index < len(spans) - 1:
            shelves.append(closed(base.weights(ended[index]), pools[-1][:, :, -1], counts[:, -1], number + index))
            total, count = torch.zeros_like(total), torch.zeros_like(count)
    everything, hold = joined(shelves, plan.offload, hold)
    if _short_linear(plan, lengths, q.shape[-1], seen):
        read, share = read_without_states(plan, inputs, mask, torch.cat(pools, 2), everything, lengths)
        shelf = everything
    else:
        read, share, shelf = read_segments(plan, inputs, mask, online, begun, pools, everything, hold, spans, old, full)
        if hold is not None and plan.max_segments is not None:
            hold = hold.archive.hold(shelf[PLACE])  # what went may be wiped
    found = {f"live.{name}": value for name, value in ended[-1].items()} | {f"cache.{name}": value for name, value in shelf.items()}
    surprise = share
    if watched:
        surprise = torch.cat([base.surprise(*_written(inputs, span, begun[index], mask)) for index, span in enumerate(spans)], 2)
    return Walk(read, share, surprise, found | {"pool.total": sums[:, :, -1], "pool.count": counts[:, -1]}, hold)


def write_segments(
    plan: Plan,
    initial: Mapping[str, Tensor],
    inputs: Inputs,
    mask: Bool[Tensor, "B T"] | None,
    live: State,
    lengths: list[int],
    *,
    carried: bool,
) -> tuple[Float[Tensor, "B H T D"], list[State], list[State]]:
    """Return the online reads, and each segment's first and last state; `carried`: the first one goes on from the live state."""
    read: list[Tensor] = []
    begun: list[State] = []
    ended: list[State] = []
    at = 0
    for length, run in _runs(lengths, alone=plan.init == "checkpoint", carried=carried):

        def fold(x: Tensor, at: int = at, length: int = length, run: int = run) -> Tensor:
            return x[:, :, at : at + length * run].unflatten(2, (run, length))

        q, k, v = fold(inputs.q), fold(inputs.k), fold(inputs.v)
        if at == 0 and carried:
            state = {name: value[:, :, None] for name, value in live.items()}
        elif plan.init == "checkpoint":
            state = {name: value[:, :, None] for name, value in plan.base.close(ended[-1] if ended else live).items()}
        else:
            state = plan.base.begin(initial, q)
        gates = {name: fold(gate) for name, gate in inputs.gates.items()}
        y, last = plan.base.run(q, k, v, gates, state, None if mask is None else fold(mask[:, None]))
        read.append(y.flatten(2, 3))
        begun += [{name: value[:, :, one] for name, value in state.items()} for one in range(run)]
        ended += [{name: value[:, :, one] for name, value in last.items()} for one in range(run)]
        at += length * run
    return torch.cat(read, 2), begun, ended


def read_segments(
    plan: Plan,
    inputs: Inputs,
    mask: Bool[Tensor, "B T"] | None,
    online: Float[Tensor, "B H T D"],
    begun: list[State],
    pools: list[Float[Tensor, "B H L D"]],
    everything: Shelf,
    hold: Hold | None,
    spans: list[slice],
    old: int,
    full: bool,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"], Shelf]:
    """Return the reads, the online share, and the shelf that is left. Behind the `old` caches stand those of this call, in their order, first the one that was
    `full` before it."""
    held, kept, rows = old + full, None, len(inputs.q)
    if plan.max_segments is not None:
        kept = torch.arange(old, device=inputs.q.device).expand(rows, -1)
        kept = admit(everything, kept, old, plan.max_segments, plan.evict) if full else kept
    reads, portions = [], []
    for index, span in enumerate(spans):
        if index:
            kept = (
                admit(everything, kept, held, plan.max_segments, plan.evict) if kept is not None and plan.max_segments is not None else None
            )
            held += 1
        visible = first(everything, held) if kept is None else take(everything, kept)
        here, moving = inputs.at(span), None
        if plan.rule == "soup" and is_layered(plan.base):
            moving = plan.base.trajectory(*_written(inputs, span, begun[index], mask))
        read, gamma = combine(plan, here.q, online[:, :, span], here.u, pools[index], visible, moving, hold)
        if kept is not None:  # what `lowest_gate` goes by
            asked = torch.ones_like(gamma[:, 0, :, 0]) if mask is None else mask[:, span].to(gamma.dtype)
            everything["used"] = everything["used"].scatter_add(1, kept, torch.einsum("bhts,bt->bs", gamma[..., :-1].detach(), asked))
            everything["reads"] = everything["reads"].scatter_add(1, kept, asked.sum(1, keepdim=True).long().expand_as(kept))
        reads.append(read)
        portions.append(gamma[..., -1])
    return torch.cat(reads, 2), torch.cat(portions, 2), everything if kept is None else take(everything, kept)


def read_without_states(
    plan: Plan, inputs: Inputs, mask: Bool[Tensor, "B T"] | None, pools: Float[Tensor, "B H T D"], closed_ones: Shelf, lengths: list[int]
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T"]]:
    """Return reads and online shares of a fresh text by one masked attention: every segment has a column of scores, a token's own the online one."""
    number = torch.arange(len(lengths), device=pools.device)
    segment = number.repeat_interleave(torch.tensor(lengths, device=pools.device))  # (T,)
    own = segment[:, None] == number
    scores = F.pad(inputs.u @ closed_ones["pool"].mT, (0, 1))
    scores = torch.where(own, (inputs.u * pools).sum(-1, keepdim=True), scores) * plan.temperature
    filled = F.pad(closed_ones["count"] > 0, (0, 1))[:, None]  # (B, 1, N)
    gamma, _ = shares(scores, own | (filled & (number < segment[:, None])), plan.rule, plan.top_k)
    assert isinstance(plan.base, Linear)
    decay, write = plan.base.opened(inputs.k, inputs.gates, None if mask is None else mask[:, None])
    read = masked_attention(inputs.q, inputs.k, inputs.v, decay, write, gamma, lengths, plan.init == "checkpoint")
    return read, gamma.gather(-1, segment.expand(*gamma.shape[:2], -1)[..., None])[..., 0]


def combine(
    plan: Plan,
    q: Float[Tensor, "B H T D"],
    online: Float[Tensor, "B H T D"],
    u: Float[Tensor, "B H T D"],
    pools: Float[Tensor, "B H T D"],
    shelf: Shelf,
    moving: State | None,
    hold: Hold | None = None,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T S1"]]:
    """Return the read of every token over a shelf and the online memory, and all shares, the online one last."""
    if plan.detach_cache_after is not None:
        shelf = without_old_gradients(shelf, plan.detach_cache_after)
    scores = torch.cat([u @ shelf["pool"].mT, (u * pools).sum(-1, keepdim=True)], -1) * plan.temperature
    present = F.pad(shelf["count"] > 0, (0, 1), value=True)[:, None]
    gamma, chosen = shares(scores, present, plan.rule, plan.top_k)
    weights = weights_of(shelf) if hold is None else Shelved(hold.archive, shelf[PLACE])
    if moving is not None and is_layered(plan.base):
        return plan.base.soup(q, gamma, whole(weights if isinstance(weights, Shelved) else Kept(weights), q.device), moving), gamma
    return gamma[..., -1:] * online + cached_sum(plan.base, q, gamma, weights, chosen), gamma


def start(base: Rule, initial: Mapping[str, Tensor], like: Float[Tensor, "B H D"]) -> dict[str, Tensor]:
    """Return the tensors of a state before the first token."""
    live = base.begin(initial, like[:, :, None])
    tensors = {f"live.{name}": value for name, value in live.items()}
    tensors |= {f"cache.{name}": value for name, value in empty(base.weights(live), like).items()}
    return tensors | {"pool.total": torch.zeros_like(like), "pool.count": torch.zeros(len(like), dtype=torch.long, device=like.device)}


def mean_or_sum(pool: str, sums: Float[Tensor, "B H T D"], counts: Int[Tensor, "B T"]) -> Float[Tensor, "B H T D"]:
    """Return the pool from the sum over tokens and their number."""
    return sums / counts.clamp(min=1)[:, None, :, None].to(sums.dtype) if pool == "mean" else sums


def newest(segment: int | str, seen: int) -> int:
    """Return the number of the segment that holds the last of `seen` tokens."""
    return max(seen.bit_count() - 1, 0) if segment == "log" else max((seen - 1) // int(segment), 0)


def parts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def is_layered(base: Rule) -> TypeGuard[Layered]:
    """Return whether a soup must average the weights themselves."""
    return not base.matrix


def _written(
    inputs: Inputs, span: slice, begun: State, mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor], State, Tensor | None]:
    here = inputs.at(span)
    return here.k, here.v, here.gates, begun, None if mask is None else mask[:, None, span]


def _runs(lengths: list[int], *, alone: bool, carried: bool) -> list[tuple[int, int]]:
    """Return (length, how many) of segments that can be written side by side."""
    if alone:
        return [(length, 1) for length in lengths]
    first_one = [(lengths[0], 1)] if carried else []
    return first_one + [(length, len(list(group))) for length, group in itertools.groupby(lengths[len(first_one) :])]


def _short_linear(plan: Plan, lengths: list[int], width: int, seen: int) -> bool:
    """Return whether the masked attention gives the same at a lower cost: O(T^2 D) against O(T N D^2)."""
    plain = type(plan.base) is Linear and plan.rule != "ssc" and plan.max_segments is None and plan.detach_cache_after is None
    return plain and not seen and len(lengths) > 1 and max(lengths) < width
