r"""Recurrences whose state is a small network, as bases of a memory cache: deep linear attention (DLA) and the long-term memory of Titans.

Both write by gradient descent on an inner loss while they read; they stand on the engine of `dual`, which holds the sequential reference too. What is cached
are the weights behind the last token; momentum belongs to the live memory alone.

Papers: Behrouz et al. 2026, "Memory Caching", arXiv 2602.24281 (DLA: M_t = M_{t-1} - eta_t grad l, l = -<M(k), v>); Behrouz, Zhong and Mirrokni 2024, "Titans",
arXiv 2501.00663 (S_t = eta_t S_{t-1} - theta_t grad ||M(k) - v||^2, M_t = (1 - alpha_t) M_{t-1} + S_t).

| paper | here | shape | default |
|---|---|---|---|
| M | depth layers, hidden width expansion x D, gelu, no bias | W0, W1, ... (..., D_in, D_out) | 2 layers, 2 |
| M_init | `MemoryCache.initial`, one for all segments | (H, D_in, D_out) | normal, 1 / sqrt(D_in) |
| theta_t (eta_t of DLA) | max_step x gates["write"] | (..., T) | max_step 0.1 |
| eta_t | gates["momentum"] | (..., T) | |
| 1 - alpha_t | gates["decay"] | (..., T) | |
| b, tokens whose gradients are taken at the same weights | chunk | tokens | 16 |

Differs from the papers: chunks begin anew with every segment, in checkpoint mode too (there the open chunk is closed first); no norm and no skip around
M, so the step is smaller than that of `titans`: a larger one diverges over long segments.
Cost per chunk and layer O(b^2 D + b D^2); `trajectory`, which only the soup needs, holds the weights of every token of a segment.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.memory import dual
from remanence.memory.inner import network
from remanence.memory.recurrence import Gates, State, check_chunk


@dataclass(frozen=True)
class Deep:
    """The memory of Titans: gradient descent on the squared error, with momentum and decay.

    Args:
        depth: layers of the memory.
        expansion: hidden width over D.
        chunk: tokens whose gradients are taken at the same weights; 1 is the exact online rule.
        max_step: the step size where the write gate is fully open.
    """

    depth: int = 2
    expansion: int = 2
    chunk: int = 16
    max_step: float = 0.1

    name: ClassVar[str] = "titans"
    matrix: ClassVar[bool] = False
    gated: ClassVar[bool] = True  # momentum and decay

    def __post_init__(self) -> None:
        check_chunk(self.chunk)
        if self.depth < 1 or self.expansion < 1 or self.max_step <= 0:
            raise Mistake("base", f"depth {self.depth}, expansion {self.expansion}, max_step {self.max_step}", "all must be above zero")

    @property
    def biases(self) -> dict[str, float]:
        """The write and momentum gates start at a half, decay near one."""
        return {"write": 0.0, "momentum": 0.0, "decay": 4.0} if self.gated else {"write": 0.0}

    def initial(self, heads: int, width: int) -> State:
        """Draw the weights that every segment begins with."""
        sizes = [width, *[self.expansion * width] * (self.depth - 1), width]
        return {f"W{layer}": torch.randn(heads, a, b) / math.sqrt(a) for layer, (a, b) in enumerate(itertools.pairwise(sizes))}

    def begin(self, initial: Mapping[str, Tensor], like: Float[Tensor, "... T D"]) -> State:
        """Return the learned weights, no momentum, and an empty chunk."""
        lead = like.shape[:-2]
        weights = [initial[f"W{layer}"] for layer in range(self.depth)]
        wide = [w.view(1, len(w), *[1] * (len(lead) - 2), *w.shape[1:]).expand(*lead, -1, -1).flatten(0, -3) for w in weights]
        nothing = like[..., :0, :]
        opened = {name: like.new_zeros(*lead, 0) for name in self.biases}
        return self._pack(dual.start(tuple(wide), self._tokens(nothing, nothing, opened, None), self.gated), lead)

    def run(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read in the dual form."""
        reading = dual.read_write(self._rule, self._unpack(state), q.flatten(0, -3), self._tokens(k, v, gates, mask), None)
        return reading.y.view_as(q), self._pack(reading.carry, q.shape[:-2])

    def reference(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read token by token, from a state whose chunk is empty, and close the chunk."""
        carry = self._unpack(state)
        y, W, S = dual.read_write_reference(self._rule, carry.W, carry.S, q.flatten(0, -3), self._tokens(k, v, gates, mask), None)
        return y.view_as(q), self._pack(dual.Carry(W, S if self.gated else (), carry.open), q.shape[:-2])

    def close(self, state: State) -> State:
        """Write the open chunk, so that the next segment begins with an empty one."""
        carry = self._unpack(state)
        W, S = dual.settle(self._rule, carry, None)
        empty = dual.Tokens(*(None if part is None else part[:, :0] for part in carry.open))  # type: ignore[arg-type]
        return self._pack(dual.Carry(W, S, empty), state["read"].shape)

    def weights(self, state: State) -> State:
        """Return the weights behind the last token."""
        W, _ = dual.settle(self._rule, self._unpack(state), None)
        return {f"W{layer}": weight.unflatten(0, state["read"].shape) for layer, weight in enumerate(W)}

    def read(self, q: Tensor, weights: State) -> Tensor:
        """Return M(q)."""
        return network(tuple(weights[f"W{layer}"] for layer in range(self.depth)), q, None)

    def trajectory(self, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> State:
        """Build the weights after every token: M_t = beta_t M_0 + f_t S_0 - sum_{j<=t} G_tj a_j^T delta_j of its chunk."""
        carry, new, lead = self._unpack(state), self._tokens(k, v, gates, mask), k.shape[:-2]
        already = carry.open.k.shape[1]
        tokens = dual.Tokens(*(None if a is None or b is None else torch.cat((a, b), 1) for a, b in zip(carry.open, new)))  # type: ignore[arg-type]
        W, S, built = carry.W, carry.S, []
        for begin in range(0, tokens.k.shape[1], self.chunk):
            here = dual.Tokens(*(None if part is None else part[:, begin : begin + self.chunk] for part in tokens))  # type: ignore[arg-type]
            a, delta, _ = dual.rank_one_gradients(self._rule, W, here.k, here.v, None, None, False)
            matrices = dual.gate_matrices(here.theta, here.eta, here.alpha, here.write)
            built.append([self._after(*each, matrices) for each in zip(W, S or [None] * len(W), a, delta)])
            W, S = dual.write_chunk(W, S, a, delta, matrices)
        joined = [torch.cat(layer, 1)[:, already:] for layer in zip(*built)]
        return {f"W{layer}": weight.unflatten(0, lead) for layer, weight in enumerate(joined)}

    def soup(self, q: Tensor, shares: Tensor, weights: State, moving: State | None) -> Tensor:
        """Read from averaged weights, layer by layer: x sum_i gamma_i W_i = sum_i gamma_i (x W_i), so that no average is ever held."""
        x, still = q, shares if moving is None else shares[..., :-1]
        for layer in range(self.depth):
            x = F.gelu(x) if layer else x
            z = torch.einsum("...ts,...sto->...to", still, x[..., None, :, :] @ weights[f"W{layer}"])
            if moving is not None:
                z = z + shares[..., -1:] * (x[..., None, :] @ moving[f"W{layer}"])[..., 0, :]
            x = z
        return x

    def surprise(self, k: Tensor, v: Tensor, gates: Gates, state: State, mask: Tensor | None = None) -> Tensor:
        """Return the norm of each token's gradient over all layers."""
        reading = dual.read_write(self._rule, self._unpack(state), k.flatten(0, -3), self._tokens(k, v, gates, mask), None, watch=True)
        assert reading.surprise is not None
        return reading.surprise.view(k.shape[:-1])

    @property
    def _rule(self) -> dual.Rule:
        return dual.Rule(chunk=self.chunk)

    def _after(
        self, start: Tensor, momentum: Tensor | None, a: Tensor, delta: Tensor, gates: dual.Gates
    ) -> Float[Tensor, "N b D_in D_out"]:
        now = gates.beta[..., None, None] * start[:, None] - torch.einsum("ntj,njd,nje->ntde", gates.G, a, delta)
        return now if momentum is None or gates.f is None else now + gates.f[..., None, None] * momentum[:, None]

    def _tokens(self, k: Tensor, v: Tensor, gates: Gates, mask: Tensor | None) -> dual.Tokens:
        real = torch.ones_like(k[..., 0], dtype=torch.bool) if mask is None else mask.expand(k.shape[:-1])
        flat = {name: gates[name].flatten(0, -2) for name in self.biases}
        eta, alpha = (flat["momentum"], 1 - flat["decay"]) if self.gated else (None, None)
        return dual.Tokens(k.flatten(0, -3), v.flatten(0, -3), self.max_step * flat["write"], eta, alpha, real.flatten(0, -2))

    def _pack(self, carry: dual.Carry, lead: torch.Size) -> State:
        """Return the carry as tensors of constant size, with the tokens of the open chunk and how many there are."""
        flat = dual.pack(carry, len(carry.W[0]), self.chunk)
        count = torch.full(lead, carry.open.k.shape[1], dtype=torch.long, device=carry.W[0].device)
        return {name: tensor[:, 0].unflatten(0, lead) for name, tensor in flat.items()} | {"read": count}

    def _unpack(self, state: State) -> dual.Carry:
        lead = state["read"].ndim
        flat = {name: tensor.flatten(0, lead - 1)[:, None] for name, tensor in state.items() if name != "read"}
        return dual.unpack(flat, int(state["read"].flatten()[0]), self.chunk)


def dot_product(prediction: Float[Tensor, "N b D"], v: Float[Tensor, "N b D"], extra: Tensor | None) -> Float[Tensor, "N b D"]:
    """Return the gradient of -<prediction, v> (DLA)."""
    return -v


@dataclass(frozen=True)
class DeepLinear(Deep):
    """Deep linear attention: gradient descent on the dot-product loss, without momentum or decay."""

    name: ClassVar[str] = "dla"
    gated: ClassVar[bool] = False

    @property
    def _rule(self) -> dual.Rule:
        return dual.Rule(chunk=self.chunk, bias=dot_product)
