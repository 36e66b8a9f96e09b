r"""Memory caching: a recurrent memory that keeps its state at the end of every segment, and reads all of them beside the one it is writing.

A recurrence forgets because its state has one size for every length; here the sequence is cut into segments, each ends as a cached memory (a compressed map, not
tokens), and a token's read combines its live memory with the cached ones. One segment is the plain recurrence, segments of one token are attention: the length of
a segment is the dial between them. In independent mode a segment's trace is its cache alone, so forgetting what was read in it is dropping one tensor.

Paper: Behrouz, Li, Deng, Zhong, Razaviyayn and Mirrokni 2026, "Memory Caching: RNNs with Growing Memory", arXiv 2602.24281.
Within segment s: M_t = f(M_{t-1}; k_t, v_t); at its end M^(s) is cached. With gamma_t = softmax_i <u_t, pool(S^(i))> over i <= s:
residual  y_t = M_t(q_t) + sum_{i<s} M^(i)(q_t);  grm  y_t = gamma_t^(s) M_t(q_t) + sum_{i<s} gamma_t^(i) M^(i)(q_t);  soup  theta*_t = sum_i gamma_t^(i) theta^(i),
y_t = M(theta*_t)(q_t);  ssc  as grm, over the k cached segments of highest score;  average  the mean of all reads (for a trained recurrence, nothing is learned).

| paper | here | shape | default |
|---|---|---|---|
| f | base | a rule of `rules`, `deep_rules` | required |
| segment length C, or logarithmic | segment | tokens, or "log" | 256 |
| M_0^(s): M_init, or M^(s-1) | init: independent, checkpoint | name | independent |
| k (SSC) | top_k | caches per token | 4 |
| pool(S^(i)) | pool (mean, sum), pool_of (k, x) | (B, H, S, D) | mean of keys |
| u_t = x_t W_u | u: proj, query | (B, H, T, D) | proj |
| scale of the scores (ours) | temperature | scalar | 1 |

Differs from the paper: the online segment's pool is the running mean over what was read of it; SSC's shares are normalised over the chosen caches and the online
one; q and k have length one; an RMS norm per head precedes the output projection. A segment ends when the token after it comes, so that the memory that was
just read is the online one. Logarithmic segments depend on the length of the whole sequence, so they are for one call, not for streaming.
A soup is exact at every token (no granularity): its layers are mixed one by one, at the cost of reading all caches.
Cost with a read of p operations and N = T / C caches: O(T (p + N p)), SSC O(T (p + k p + N D)); memory N |theta|, which grows with the text unless
`max_segments` bounds it. The only sequential loop is over segments; segments of their own are written side by side.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake, nearest
from remanence.memory.combine import RULES, cached_sum, pool_so_far, shares, split
from remanence.memory.rules import Layered, Rule, State
from remanence.memory.shelf import Shelf, admit, closed, empty, first, joined, take, weights_of, without, without_old_gradients
from remanence.memory.state import MemoryState, check_input

KIND = "memory-caching"
CHOICES = {
    "rule": RULES,
    "init": ("independent", "checkpoint"),
    "pool": ("mean", "sum"),
    "pool_of": ("k", "x"),
    "u": ("proj", "query"),
    "evict": ("none", "oldest", "lowest_gate"),
    "offload": (None, "cpu"),
}


class MemoryCache(nn.Module):
    """Read with a base memory and with all its cached states.

    Args:
        dim: width of the input.
        base: the recurrence (`Linear()`, `SlidingWindow()`, `Delta()`, `DeepLinear()`, `Deep()`, or one's own `rules.Rule`).
        heads: memories side by side.
        rule: grm | residual | soup | ssc | average.
        segment: tokens per segment, or "log".
        init: independent | checkpoint: what a segment starts from.
        top_k: caches that SSC reads per token.
        pool: mean | sum, of a segment's features.
        pool_of: k | x: of its keys, or of its input.
        u: proj | query: a projection of its own for the scores, or the query.
        temperature: multiplies the scores.
        max_segments: caches kept at most (with `evict`); None: all.
        evict: none | oldest | lowest_gate: the cache with the smallest mean share goes.
        offload: cpu: caches rest there, and come to the device when they are read.
        detach_cache_after: caches older than so many segments pass no gradient on; None: all do.

    Raises:
        Mistake: an unknown name or a value out of range.
    """

    def __init__(
        self,
        dim: int,
        base: Rule,
        *,
        heads: int = 1,
        rule: str = "grm",
        segment: int | str = 256,
        init: str = "independent",
        top_k: int = 4,
        pool: str = "mean",
        pool_of: str = "k",
        u: str = "proj",
        temperature: float = 1.0,
        max_segments: int | None = None,
        evict: str = "none",
        offload: str | None = None,
        detach_cache_after: int | None = None,
    ):
        super().__init__()
        self.dim, self.base, self.heads, self.rule, self.segment, self.init = dim, base, heads, rule, segment, init
        self.top_k, self.pool, self.pool_of, self.u, self.temperature = top_k, pool, pool_of, u, temperature
        self.max_segments, self.evict, self.offload, self.detach_cache_after = max_segments, evict, offload, detach_cache_after
        self._check()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(dim // heads)
        self.gates = nn.Linear(dim, heads * len(base.biases)) if base.biases else None
        self.connector = nn.Linear(dim, dim, bias=False) if u == "proj" and rule not in ("residual", "average") else None
        self.initial = nn.ParameterDict({name: nn.Parameter(value) for name, value in base.initial(heads, dim // heads).items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the base's gate biases, and with nearly uniform shares."""
        if self.gates is not None:
            nn.init.zeros_(self.gates.weight)
            with torch.no_grad():
                self.gates.bias.copy_(torch.tensor(list(self.base.biases.values())).repeat(self.heads))
        if self.connector is not None:
            nn.init.normal_(self.connector.weight, std=0.02)

    def _check(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise Mistake(
                    f"cache.{name}", f"there is no {getattr(self, name)!r}", nearest(str(getattr(self, name)), [str(a) for a in allowed])
                )
        for name in ("heads", "top_k", "max_segments", "detach_cache_after"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Mistake(f"cache.{name}", f"must be at least 1, got {getattr(self, name)}", "correct the value")
        if self.segment != "log" and (not isinstance(self.segment, int) or isinstance(self.segment, bool) or self.segment < 1):
            raise Mistake("cache.segment", f"must be a number of tokens from 1, or 'log', got {self.segment!r}", "correct the value")
        if self.dim % self.heads:
            raise Mistake("cache.heads", f"{self.heads} heads do not divide the width {self.dim}", "choose a divisor")
        if (self.max_segments is None) != (self.evict == "none"):
            raise Mistake("cache.evict", "max_segments and evict go together", "give both, or neither")
        if self.rule == "soup" and not (self.base.matrix or hasattr(self.base, "soup")):
            raise Mistake("cache.rule", f"the states of '{self.base.name}' are no weights of one architecture", "take rule='grm'")

    @property
    def config(self) -> dict[str, Any]:
        """What a state of this cache must have been made with."""
        settings: dict[str, Any] = dataclasses.asdict(self.base) if dataclasses.is_dataclass(self.base) else {}
        own = ("dim", "heads", "rule", "segment", "init", "top_k", "pool", "pool_of", "u", "temperature", "max_segments", "evict")
        return {name: getattr(self, name) for name in own} | {"base": {"name": self.base.name} | settings}

    def forward(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T d"], MemoryState]:
        """Read T tokens with the online memory and the cached ones; write the online one.

        Raises:
            Mistake: input or state that do not fit; a second call with logarithmic segments.
        """
        read, _, _, state = self._walk(x, state, mask)
        return self._leave(read), state

    def recall(self, x: Float[Tensor, "B T d"], state: MemoryState) -> Float[Tensor, "B T d"]:
        """Ask the online memory and all caches as they stand; write nothing."""
        check_input(x, self.dim, None, KIND)
        state.check(KIND, self.config, len(x))
        q, _, _, u, _, _ = self._project(x)
        live, shelf = _parts(state.tensors, "live."), _parts(state.tensors, "cache.")
        online = self._pooled(state.tensors["pool.total"][:, :, None], state.tensors["pool.count"][:, None])
        weights = self.base.weights(live)
        moving = {name: value[:, :, None] for name, value in weights.items()} if self.rule == "soup" and _is_layered(self.base) else None
        read, _ = self._combine(q, self.base.read(q, weights), u, online.expand_as(q), shelf, moving)
        return self._leave(read)

    def watch(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> dict[str, Float[Tensor, "B H T"]]:
        """Return `surprise`, `write`, `forget`, and `online`, the share of the live memory in each read."""
        _, online, surprise, _ = self._walk(x, state, mask, watched=True)
        gates, ones = self._project(x)[-1], torch.ones_like(online)
        real = ones if mask is None else mask[:, None].to(ones.dtype).expand_as(ones)
        write, decay = gates.get("write", ones), gates.get("decay", ones)
        return {"surprise": surprise * real, "write": write * real, "forget": (1 - decay) * real, "online": online}

    def forget(self, state: MemoryState, segments: Iterable[int]) -> MemoryState:
        """Return the state without what was read in some segments (numbered from 0): as if their tokens had been masked.

        Raises:
            Mistake: later states contain it (checkpoint mode), or no such segment is held.
        """
        state.check(KIND, self.config, state.batch)
        if self.init == "checkpoint":
            raise Mistake(
                "cache.forget", "in checkpoint mode later memories contain the segment", "use init='independent', or read again without it"
            )
        gone, tensors = sorted(set(segments)), dict(state.tensors)
        newest = self._newest(state.seen)
        held = set(tensors["cache.id"].flatten().tolist()) | {newest}
        if unknown := [number for number in gone if number not in held]:
            raise Mistake("cache.forget", f"no segment {unknown[0]} is held", f"there are {sorted(held)}")
        tensors |= {f"cache.{name}": tensor for name, tensor in without(_parts(tensors, "cache."), gone).items()}
        if newest in gone:
            fresh = self._start(tensors["pool.total"])
            tensors |= {name: value for name, value in fresh.items() if not name.startswith("cache.")}
        return dataclasses.replace(state, tensors=tensors)

    def post_training(self, segment: int) -> MemoryCache:
        """Return a copy that reads the average of the online memory and a cache per `segment` tokens, the length this one was trained on; nothing is learned."""
        other = copy.deepcopy(self)
        other.rule, other.segment, other.init, other.connector = "average", segment, "independent", None
        other._check()
        return other

    def _walk(
        self, x: Tensor, state: MemoryState | None, mask: Tensor | None, *, watched: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, MemoryState]:
        """Return what each head reads, the online memory's share, each token's surprise (if watched), and the state."""
        check_input(x, self.dim, mask, KIND)
        if state is not None:
            state.check(KIND, self.config, len(x))
            if self.segment == "log" and state.seen:
                raise Mistake(
                    "cache.segment", "logarithmic segments are of the whole sequence", "read it in one call, or choose a constant segment"
                )
        q, k, v, u, pooled, gates = self._project(x)
        real = mask if mask is not None else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        tensors, seen = (state.tensors, state.seen) if state is not None else (self._start(q[:, :, 0]), 0)
        lengths = split(x.shape[1], self.segment, seen)
        bounds = [0, *itertools.accumulate(lengths)]
        parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        closing = (
            self.segment != "log" and seen > 0 and seen % int(self.segment) == 0
        )  # the newest segment is full: it goes on the shelf now that a token follows
        live, shelf = _parts(tensors, "live."), _parts(tensors, "cache.")
        total, count = tensors["pool.total"], tensors["pool.count"]
        shelves = [shelf]
        if closing:
            shelves.append(
                closed(self.base.weights(live), self._pooled(total[:, :, None], count[:, None])[:, :, 0], count, self._newest(seen))
            )
            total, count = torch.zeros_like(total), torch.zeros_like(count)
        online, begun, ended = self._online(q, k, v, gates, mask, live, lengths, carried=seen > 0 and not closing)
        pools = []
        for number, part in enumerate(parts):
            sums, counts = pool_so_far(pooled[:, :, part], real[:, part], total, count)
            means = self._pooled(sums, counts)
            pools.append(means)
            if number < len(parts) - 1:
                shelves.append(
                    closed(
                        self.base.weights(ended[number]),
                        means[:, :, -1],
                        counts[:, -1],
                        self._newest(seen) + number + (closing or not seen),
                    )
                )
                total, count = torch.zeros_like(total), torch.zeros_like(count)
        everything = joined(shelves, self.offload)
        held = sum(each["id"].shape[1] for each in shelves) - len(parts) + 1
        kept = None
        if self.max_segments is not None:
            kept = torch.arange(shelf["id"].shape[1], device=x.device).expand(len(x), -1)
            kept = admit(everything, kept, held - 1, self.max_segments, self.evict) if closing else kept
        reads, portions, surprises = [], [], []
        for number, part in enumerate(parts):
            if number:
                held += 1
                kept = kept if kept is None else admit(everything, kept, held - 1, int(self.max_segments or 0), self.evict)
            here, inner = None if mask is None else mask[:, None, part], {name: gate[:, :, part] for name, gate in gates.items()}
            written = (k[:, :, part], v[:, :, part], inner, begun[number], here)
            visible = first(everything, held) if kept is None else take(everything, kept)
            moving = self.base.trajectory(*written) if self.rule == "soup" and _is_layered(self.base) else None
            read, gamma = self._combine(q[:, :, part], online[:, :, part], u[:, :, part], pools[number], visible, moving)
            if kept is not None:  # what `lowest_gate` goes by
                asked = real[:, part].to(gamma.dtype)
                everything["used"] = everything["used"].scatter_add(1, kept, torch.einsum("bhts,bt->bs", gamma[..., :-1].detach(), asked))
                everything["reads"] = everything["reads"].scatter_add(1, kept, asked.sum(1, keepdim=True).long().expand_as(kept))
            if watched:
                surprises.append(self.base.surprise(*written))
            reads.append(read)
            portions.append(gamma[..., -1])
        shelf = everything if kept is None else take(everything, kept)
        held_tensors = {f"live.{name}": value for name, value in ended[-1].items()} | {
            f"cache.{name}": value for name, value in shelf.items()
        }
        held_tensors |= {"pool.total": sums[:, :, -1], "pool.count": counts[:, -1]}
        after = MemoryState(KIND, held_tensors, seen + x.shape[1], self.config)
        return torch.cat(reads, 2), torch.cat(portions, 2), torch.cat(surprises, 2) if watched else online, after

    def _online(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: dict[str, Tensor],
        mask: Tensor | None,
        live: State,
        lengths: list[int],
        *,
        carried: bool,
    ) -> tuple[Tensor, list[State], list[State]]:
        """Write every segment: the online reads (B, H, T, D), and each segment's first and last state. Segments of their own are run side by side."""
        read: list[Tensor] = []
        begun: list[State] = []
        ended: list[State] = []
        start = 0
        for number, (length, run) in enumerate(_runs(lengths, alone=self.init == "checkpoint", carried=carried)):
            part = slice(start, start + length * run)

            def fold(x: Tensor, part: slice = part, length: int = length, run: int = run) -> Tensor:
                return x[:, :, part].unflatten(2, (run, length))

            queries, keys, values = fold(q), fold(k), fold(v)
            state = self.base.begin(dict(self.initial), queries)
            if number == 0 and carried:
                state = {name: value[:, :, None] for name, value in live.items()}
            elif self.init == "checkpoint":
                state = {name: value[:, :, None] for name, value in self.base.close(ended[-1] if ended else live).items()}
            here = None if mask is None else fold(mask[:, None])
            y, last = self.base.run(queries, keys, values, {name: fold(gate) for name, gate in gates.items()}, state, here)
            read.append(y.flatten(2, 3))
            begun += [{name: value[:, :, one] for name, value in state.items()} for one in range(run)]
            ended += [{name: value[:, :, one] for name, value in last.items()} for one in range(run)]
            start = part.stop
        return torch.cat(read, 2), begun, ended

    def _combine(
        self, q: Tensor, online: Tensor, u: Tensor, pools: Tensor, shelf: Shelf, moving: State | None
    ) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H T S1"]]:
        """Return the read of every token over the caches and the online memory, and all shares."""
        if self.detach_cache_after is not None:
            shelf = without_old_gradients(shelf, self.detach_cache_after)
        scores = torch.cat([u @ shelf["pool"].mT, (u * pools).sum(-1, keepdim=True)], -1) * self.temperature
        present = F.pad(shelf["count"] > 0, (0, 1), value=True)
        gamma, chosen = shares(scores, present, self.rule, self.top_k)
        if moving is not None and _is_layered(self.base):
            cached = {name: tensor.to(q.device) for name, tensor in weights_of(shelf).items()}
            return self.base.soup(q, gamma, cached, moving), gamma
        return gamma[..., -1:] * online + cached_sum(self.base, q, gamma, weights_of(shelf), chosen), gamma

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Return q, k, v, u and the features to pool, (B, H, T, D) each, and the gates (B, H, T)."""

        def split_heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k = (F.normalize(split_heads(layer(x)), dim=-1) for layer in (self.q, self.k))
        u = split_heads(self.connector(x)) if self.connector is not None else q
        gates: dict[str, Tensor] = {}
        if self.gates is not None:
            opened = self.gates(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).sigmoid()
            gates = dict(zip(self.base.biases, opened.unbind(-1), strict=True))
        return q, k, split_heads(self.v(x)), u, k if self.pool_of == "k" else split_heads(x), gates

    def _pooled(self, sums: Float[Tensor, "B H T D"], counts: Int[Tensor, "B T"]) -> Float[Tensor, "B H T D"]:
        return sums / counts.clamp(min=1)[:, None, :, None].to(sums.dtype) if self.pool == "mean" else sums

    def _start(self, like: Float[Tensor, "B H D"]) -> dict[str, Tensor]:
        """Return the tensors before the first token."""
        live = self.base.begin(dict(self.initial), like[:, :, None])
        tensors = {f"live.{name}": value for name, value in live.items()}
        tensors |= {f"cache.{name}": value for name, value in empty(self.base.weights(live), like).items()}
        return tensors | {"pool.total": torch.zeros_like(like), "pool.count": torch.zeros(len(like), dtype=torch.long, device=like.device)}

    def _newest(self, seen: int) -> int:
        """Return the number of the segment that holds the last of `seen` tokens."""
        return seen.bit_count() - 1 if self.segment == "log" else (seen - 1) // int(self.segment)

    def _leave(self, read: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T d"]:
        return self.out(self.norm(read).transpose(1, 2).flatten(2))


def _parts(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _runs(lengths: list[int], *, alone: bool, carried: bool) -> list[tuple[int, int]]:
    """Return (length, how many) of segments that can be written side by side."""
    if alone:
        return [(length, 1) for length in lengths]
    first_one = [(lengths[0], 1)] if carried else []
    return first_one + [(length, len(list(group))) for length, group in itertools.groupby(lengths[len(first_one) :])]


def _is_layered(base: Rule) -> TypeGuard[Layered]:
    return not base.matrix
