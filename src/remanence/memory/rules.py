r"""Recurrences whose state is a matrix, as bases of a memory cache: linear attention with an optional decay, sliding-window linear attention, the delta rule.

A base rule writes key-value pairs into a state, one token after the other, and answers a query from that state. Each has its sequential reference and a
chunk form with an initial state; both take leading axes of any shape, so that rows, heads and segments run side by side. What `read` needs of the state is
what a cache keeps (`weights`).

Papers: Katharopoulos et al. 2020, arXiv 2006.16236 (linear attention); Yang et al. 2023, arXiv 2312.06635 (decay); Behrouz et al. 2026, "Memory Caching: RNNs
with Growing Memory", arXiv 2602.24281 (sliding-window linear attention, window 2); Schlag et al. 2021, arXiv 2102.11174 and Yang et al. 2024, arXiv 2406.06484
(the delta rule and its chunk form).
Recurrences, with M of shape (D keys, D values) and y_t = q_t M_t (the transpose of the papers'):
linear  M_t = a_t M_{t-1} + k_t^T v_t;  swla  M_t = a_t M_{t-1} + b_t k_{t-1}^T v_{t-1} + l_t k_t^T v_t;  delta  M_t = M_{t-1} + beta_t k_t^T (v_t - k_t M_{t-1}).

| paper | here | shape | default |
|---|---|---|---|
| q, k, v | q, k, v | (..., T, D) | |
| alpha_t (decay) | gates["decay"] | (..., T) in (0, 1] | 1 in `Linear` |
| beta_t, lambda_t of SWLA | gates["previous"], gates["write"] | (..., T) | |
| beta_t of the delta rule | gates["write"] | (..., T) | |
| M_t | state["M"] | (..., D, D) | zeros |
| chunk | chunk | tokens | 64 |

Differs from the papers: a masked token leaves the state as it is; SWLA's window then holds the last token that was not masked.
Cost of T tokens in chunks of b: O(T (b D + D^2)) time, O(b^2 + D^2) memory per sequence and head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.recurrence import Gates, State, check_chunk


@dataclass(frozen=True)
class Linear:
    """Add each pair; with `decay`, what came before fades by a gate per token.

    Args:
        decay: whether there is a decay gate.
        chunk: tokens per chunk of the parallel form.
    """

    decay: bool = False
    chunk: int = 64

    name: ClassVar[str] = "linear"
    matrix: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_chunk(self.chunk)

    @property
    def biases(self) -> dict[str, float]:
        """The decay gate starts near one."""
        return {"decay": 4.0} if self.decay else {}

    def initial(self, heads: int, width: int) -> State:
        """Begin with zeros."""
        return {}

    def begin(self, initial: Mapping[str, Tensor], like: Tensor) -> State:
        """Return M = 0."""
        return {"M": zeros(like)}

    def run(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read in chunks."""
        decay, write = self.opened(k, gates, mask)
        y, memory = decayed_attention(q, [(k, v, write)], decay, state["M"], self.chunk)
        return y, {"M": memory}

    def reference(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read token by token."""
        (decay, write), memory, read = self.opened(k, gates, mask), state["M"], []
        for t in range(q.shape[-2]):
            memory = decay[..., t, None, None] * memory + write[..., t, None, None] * k[..., t, :, None] * v[..., t, None, :]
            read.append(torch.einsum("...k,...kv->...v", q[..., t, :], memory))
        return torch.stack(read, -2), {"M": memory}

    def close(self, state: State) -> State:
        """Carry everything over."""
        return state

    def weights(self, state: State) -> State:
        """Keep M."""
        return {"M": state["M"]}

    def read(self, q: Tensor, weights: State) -> Tensor:
        """Return q M."""
        return q @ weights["M"]

    def surprise(self, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> Tensor:
        """Return the norm of k^T v, the gradient of -<k M, v>."""
        return k.norm(dim=-1) * v.norm(dim=-1)

    def opened(self, k: Tensor, gates: Gates, mask: Tensor | None) -> tuple[Float[Tensor, "... T"], Float[Tensor, "... T"]]:
        """Return the decay and the write of each token, masked ones silent."""
        ones = torch.ones_like(k[..., 0])
        return silent(gates.get("decay", ones), mask, 1.0), silent(ones, mask, 0.0)


@dataclass(frozen=True)
class SlidingWindow(Linear):
    """Write the last two pairs at each token, each with a gate of its own."""

    name: ClassVar[str] = "swla"

    @property
    def biases(self) -> dict[str, float]:
        """Decay starts near one, the two writes at a half."""
        return {"decay": 4.0, "previous": 0.0, "write": 0.0}

    def begin(self, initial: Mapping[str, Tensor], like: Tensor) -> State:
        """Return M = 0 and no token before the first."""
        return {"M": zeros(like), "k": torch.zeros_like(like[..., 0, :]), "v": torch.zeros_like(like[..., 0, :])}

    def run(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read in chunks: linear attention over twice the tokens."""
        decay, previous, write = silent(gates["decay"], mask, 1.0), silent(gates["previous"], mask, 0.0), silent(gates["write"], mask, 0.0)
        (k_before, k_last), (v_before, v_last) = shifted(k, state["k"], mask), shifted(v, state["v"], mask)
        y, memory = decayed_attention(q, [(k_before, v_before, previous), (k, v, write)], decay, state["M"], self.chunk)
        return y, {"M": memory, "k": k_last, "v": v_last}

    def reference(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read token by token."""
        memory, k_last, v_last, read = state["M"], state["k"], state["v"], []
        real = torch.ones_like(k[..., 0], dtype=torch.bool) if mask is None else mask.expand(k.shape[:-1])
        for t in range(q.shape[-2]):
            decay, previous, write = (gates[name][..., t, None, None] for name in ("decay", "previous", "write"))
            new = decay * memory + previous * k_last[..., None] * v_last[..., None, :] + write * k[..., t, :, None] * v[..., t, None, :]
            here = real[..., t, None]
            memory = torch.where(here[..., None], new, memory)
            k_last, v_last = torch.where(here, k[..., t, :], k_last), torch.where(here, v[..., t, :], v_last)
            read.append(torch.einsum("...k,...kv->...v", q[..., t, :], memory))
        return torch.stack(read, -2), {"M": memory, "k": k_last, "v": v_last}


@dataclass(frozen=True)
class Delta(Linear):
    """Replace what the memory answers to a key by the value, as far as the write gate opens (DeltaNet)."""

    name: ClassVar[str] = "delta"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay:
            raise Mistake("base", "the delta rule has no decay gate", "leave out `decay`")

    @property
    def biases(self) -> dict[str, float]:
        """The write gate starts at a half."""
        return {"write": 0.0}

    def run(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read in chunks."""
        y, _, memory = delta_chunks(q, k, v, silent(gates["write"], mask, 0.0), state["M"], self.chunk)
        return y, {"M": memory}

    def reference(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read token by token."""
        memory, beta, read = state["M"], silent(gates["write"], mask, 0.0), []
        for t in range(q.shape[-2]):
            key = k[..., t, :]
            error = v[..., t, :] - torch.einsum("...k,...kv->...v", key, memory)
            memory = memory + beta[..., t, None, None] * key[..., None] * error[..., None, :]
            read.append(torch.einsum("...k,...kv->...v", q[..., t, :], memory))
        return torch.stack(read, -2), {"M": memory}

    def surprise(self, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> Tensor:
        """Return the norm of k^T (k M - v), the gradient of half the squared error."""
        _, error, _ = delta_chunks(k, k, v, silent(gates["write"], mask, 0.0), state["M"], self.chunk)
        return k.norm(dim=-1) * error.norm(dim=-1)


def zeros(like: Float[Tensor, "... T D"]) -> Float[Tensor, "... D D"]:
    """Return an empty matrix memory."""
    return like.new_zeros(*like.shape[:-2], like.shape[-1], like.shape[-1])


def silent(gate: Float[Tensor, "... T"], mask: Bool[Tensor, "... T"] | None, value: float) -> Float[Tensor, "... T"]:
    """Return the gate with `value` at masked tokens: the one that changes nothing."""
    return gate if mask is None else torch.where(mask, gate, value)


def shifted(
    x: Float[Tensor, "... T D"], last: Float[Tensor, "... D"], mask: Bool[Tensor, "... T"] | None
) -> tuple[Float[Tensor, "... T D"], Float[Tensor, "... D"]]:
    """Return for every token the one before it that was not masked (`last` before the first), and the last of all."""
    joined = torch.cat([last[..., None, :], x], -2)
    if mask is None:
        return joined[..., :-1, :], joined[..., -1, :]
    places = torch.arange(1, x.shape[-2] + 1, device=x.device)
    newest = torch.where(mask, places, 0).cummax(-1).values.expand(x.shape[:-1])  # 0 is `last`
    index = torch.cat([torch.zeros_like(newest[..., :1]), newest], -1)[..., None].expand(joined.shape)
    found = joined.gather(-2, index)
    return found[..., :-1, :], found[..., -1, :]


def decayed_attention(
    q: Float[Tensor, "... T D"],
    sources: Sequence[tuple[Float[Tensor, "... T D"], Float[Tensor, "... T D"], Float[Tensor, "... T"]]],
    decay: Float[Tensor, "... T"],
    memory: Float[Tensor, "... D D"],
    chunk: int,
) -> tuple[Float[Tensor, "... T D"], Float[Tensor, "... D D"]]:
    """Return y_t = q_t M_t for M_t = a_t M_{t-1} + sum over sources of c_t k_t^T v_t, in chunks (arXiv 2312.06635, sec. 4)."""
    log_decay, read = decay.clamp(min=torch.finfo(decay.dtype).tiny).log(), []
    for begin in range(0, q.shape[-2], chunk):
        part = slice(begin, begin + chunk)
        here = q[..., part, :]
        total = log_decay[..., part].cumsum(-1)
        since = pair_decay(total)
        y = total.exp()[..., None] * (here @ memory)
        memory = total[..., -1, None, None].exp() * memory
        left = (total[..., -1:] - total).exp()
        for k, v, write in sources:
            key, value, opened = k[..., part, :], v[..., part, :], write[..., part]
            y = y + ((here @ key.mT) * since * opened[..., None, :]) @ value
            memory = memory + (key * (left * opened)[..., None]).mT @ value
        read.append(y)
    return torch.cat(read, -2), memory


def pair_decay(total: Float[Tensor, "... T"]) -> Float[Tensor, "... T T"]:
    """Return exp(total_t - total_j) for j <= t, else 0: what is left at t of what was written at j."""
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()


def delta_chunks(
    q: Float[Tensor, "... T D"],
    k: Float[Tensor, "... T D"],
    v: Float[Tensor, "... T D"],
    beta: Float[Tensor, "... T"],
    memory: Float[Tensor, "... D D"],
    chunk: int,
) -> tuple[Float[Tensor, "... T D"], Float[Tensor, "... T D"], Float[Tensor, "... D D"]]:
    """Return reads, errors v_t - k_t M_{t-1}, and the last memory, in chunks (arXiv 2406.06484, sec. 3).

    The errors of a chunk solve (I + tril(k k^T, -1) diag(beta)) e = v - k M_0.
    """
    read, errors = [], []
    for begin in range(0, q.shape[-2], chunk):
        part = slice(begin, begin + chunk)
        here, key, opened = q[..., part, :], k[..., part, :], beta[..., part]
        system = (key @ key.mT).tril(-1) * opened[..., None, :]
        wanted = v[..., part, :] - key @ memory
        exact = torch.float64 if wanted.dtype == torch.float64 else torch.float32  # no triangular solver in half precision
        error = torch.linalg.solve_triangular(system.to(exact), wanted.to(exact), upper=False, unitriangular=True).to(wanted.dtype)
        written = opened[..., None] * error
        read.append(here @ memory + (here @ key.mT).tril() @ written)
        memory = memory + key.mT @ written
        errors.append(error)
    return torch.cat(read, -2), torch.cat(errors, -2), memory
