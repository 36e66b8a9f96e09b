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
| f | base | a rule of `rules`, `deep_rules`, by name or made | linear |
| segment length C, or logarithmic | segment | tokens, or "log" | 256 |
| M_0^(s): M_init, or M^(s-1) | init: independent, checkpoint | name | independent |
| k (SSC) | top_k | caches per token | 4 |
| pool(S^(i)) | pool (mean, sum), pool_of (k, x) | (B, H, S, D) | mean of keys |
| u_t = x_t W_u | u: proj, query | (B, H, T, D) | proj |
| scale of the scores (ours) | temperature | scalar | 1 |

Differs from the paper: the online segment's pool is the running mean over what was read of it; SSC's shares are normalised over the chosen caches and the online
one; q and k have length one; an RMS norm per head precedes the output projection; memories are in fp32 where the model is in bf16. A segment ends when the token after it comes, so that the memory that was
just read is the online one. Logarithmic segments depend on the length of the whole sequence, so they are for one call, not for streaming.
A soup is exact at every token (no granularity): its layers are mixed one by one, at the cost of reading all caches.
Cost with a read of p operations and N = T / C caches: O(T (p + N p)), SSC O(T (p + k p + N D)); memory N |theta|, which grows with the text unless
`max_segments` bounds it, or rests on disk with `offload` (see `archive`); then SSC holds k caches at a time, and the pools. The only sequential loop is over segments; segments of their own are written side by side.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake, nearest
from remanence.memory.bases import base_rule
from remanence.memory.combine import RULES
from remanence.memory.recurrence import Rule
from remanence.memory.shelf import without
from remanence.memory.state import MemoryState, check_input
from remanence.memory.walk import Inputs, Plan, combine, is_layered, mean_or_sum, newest, parts, start, walk

KIND = "memory-caching"
CHOICES = {
    "rule": RULES,
    "init": ("independent", "checkpoint"),
    "pool": ("mean", "sum"),
    "pool_of": ("k", "x"),
    "u": ("proj", "query"),
    "evict": ("none", "oldest", "lowest_gate"),
}


class MemoryCache(nn.Module):
    """Read with a base memory and with all its cached states.

    Args:
        dim: width of the input.
        base: the recurrence: linear | swla | delta | dla | titans, {"name": ..., and its settings}, or any `recurrence.Rule`.
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
        offload: cpu | disk | a folder: caches rest there (disk: where temporary files go), and come to the device when they are read.
        detach_cache_after: caches older than so many segments pass no gradient on; None: all do.

    Raises:
        Mistake: an unknown name or a value out of range.
    """

    def __init__(
        self,
        dim: int,
        base: str | Mapping[str, Any] | Rule = "linear",
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
        offload: str | os.PathLike[str] | None = None,
        detach_cache_after: int | None = None,
    ):
        super().__init__()
        self.base = base_rule(base)
        self.dim, self.heads, self.rule, self.segment, self.init = dim, heads, rule, segment, init
        self.top_k, self.pool, self.pool_of, self.u, self.temperature = top_k, pool, pool_of, u, temperature
        self.max_segments, self.evict, self.offload, self.detach_cache_after = (
            max_segments,
            evict,
            resting_place(offload),
            detach_cache_after,
        )
        self._check()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.RMSNorm(dim // heads)
        self.gates = nn.Linear(dim, heads * len(self.base.biases)) if self.base.biases else None
        self.connector = nn.Linear(dim, dim, bias=False) if u == "proj" and rule not in ("residual", "average") else None
        self.initial = nn.ParameterDict({name: nn.Parameter(value) for name, value in self.base.initial(heads, dim // heads).items()})
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
        inputs, live, shelf = self._project(x), parts(state.tensors, "live."), parts(state.tensors, "cache.")
        pool = mean_or_sum(self.pool, state.tensors["pool.total"][:, :, None], state.tensors["pool.count"][:, None])
        with torch.autocast(x.device.type, enabled=False):
            weights = self.base.weights(live)
            moving = {name: value[:, :, None] for name, value in weights.items()} if self.rule == "soup" and is_layered(self.base) else None
            read, _ = combine(
                self._plan, inputs.q, self.base.read(inputs.q, weights), inputs.u, pool.expand_as(inputs.q), shelf, moving, state.hold
            )
        return self._leave(read)

    def watch(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> dict[str, Float[Tensor, "B H T"]]:
        """Return `surprise`, `write`, `forget`, and `online`, the share of the live memory in each read."""
        _, online, surprise, _ = self._walk(x, state, mask, watched=True)
        gates, ones = self._project(x).gates, torch.ones_like(online)
        real = ones if mask is None else mask[:, None].to(ones.dtype).expand_as(ones)
        write, decay = gates.get("write", ones), gates.get("decay", ones)
        return {"surprise": surprise * real, "write": write * real, "forget": (1 - decay) * real, "online": online}

    def forget(self, state: MemoryState, segments: Iterable[int]) -> MemoryState:
        """Return the state without what was read in some segments (numbered from 0): as if their tokens had been masked.

        A cache that rests on disk is wiped there before this returns; an older state that is still held has it in memory from then on.

        Raises:
            Mistake: later states contain it (checkpoint mode), no such segment is held, or the disk cannot be written.
        """
        state.check(KIND, self.config, state.batch)
        if self.init == "checkpoint":
            raise Mistake(
                "cache.forget", "in checkpoint mode later memories contain the segment", "use init='independent', or read again without it"
            )
        gone, tensors = sorted(set(segments)), dict(state.tensors)
        last = newest(self.segment, state.seen)
        held = set(tensors["cache.id"].flatten().tolist()) | {last}
        if unknown := [number for number in gone if number not in held]:
            raise Mistake("cache.forget", f"no segment {unknown[0]} is held", f"there are {sorted(held)}")
        tensors |= {f"cache.{name}": tensor for name, tensor in without(parts(tensors, "cache."), gone).items()}
        if last in gone:
            fresh = start(self.base, self._initial, tensors["pool.total"])
            tensors |= {name: value for name, value in fresh.items() if not name.startswith("cache.")}
        hold = state.hold and state.hold.archive.forget(state.tensors["cache.place"], tensors["cache.place"])
        return dataclasses.replace(state, tensors=tensors, hold=hold)

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
        tensors, hold, seen = (state.tensors, state.hold, state.seen) if state is not None else ({}, None, 0)
        inputs = self._project(x)
        with torch.autocast(x.device.type, enabled=False):
            walked = walk(self._plan, self._initial, inputs, mask, tensors, hold, seen, watched)
        return walked.read, walked.online, walked.surprise, MemoryState(KIND, walked.tensors, seen + x.shape[1], self.config, walked.hold)

    @property
    def _initial(self) -> dict[str, Tensor]:
        return {name: exact(value) for name, value in self.initial.items()}

    @property
    def _plan(self) -> Plan:
        return Plan(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Plan)})

    def _project(self, x: Float[Tensor, "B T d"]) -> Inputs:
        """Return what the heads read: q, k, v, u, the features to pool, and the gates."""

        def split_heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k = (F.normalize(split_heads(layer(x)), dim=-1) for layer in (self.q, self.k))
        u = split_heads(self.connector(x)) if self.connector is not None else q
        gates: dict[str, Tensor] = {}
        if self.gates is not None:
            opened = self.gates(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).sigmoid()
            gates = dict(zip(self.base.biases, opened.unbind(-1), strict=True))
        pooled = exact(k if self.pool_of == "k" else split_heads(x))
        return Inputs(
            exact(q), exact(k), exact(split_heads(self.v(x))), exact(u), pooled, {name: exact(gate) for name, gate in gates.items()}
        )

    def _leave(self, read: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T d"]:
        return self.out(self.norm(read.to(self.norm.weight.dtype)).transpose(1, 2).flatten(2))


def resting_place(offload: str | os.PathLike[str] | None) -> str | None:
    """Return where caches rest: None, "cpu", "disk", or a folder.

    Raises:
        Mistake: a word that is neither of these nor a path.
    """
    if offload is None or offload in ("cpu", "disk"):
        return offload  # type: ignore[return-value]
    if isinstance(offload, os.PathLike) or (isinstance(offload, str) and os.sep in offload):
        return os.fspath(offload)
    known = nearest(str(offload), ["cpu", "disk"])
    raise Mistake("cache.offload", f"there is no {offload!r}", f"{known} a folder is written with a '{os.sep}', as in '.{os.sep}caches'")


def exact(x: Tensor) -> Tensor:
    """Return what a memory computes with: fp32 for anything shorter, because it adds up over the whole text."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
