r"""The engine of test-time memories: a small network per sequence and head whose weights are rewritten by gradient descent while tokens are read.

Tokens are taken in chunks of b. All gradients of a chunk are taken at the weights that entered it, so they come at once; forgetting and momentum still run
token by token, folded into b x b matrices. The gradient of one token is rank one per layer (input outer error), so no token's weights are ever built:
reading is masked linear attention, layer by layer. b = 1 is the exact online rule.

Paper: Behrouz, Zhong and Mirrokni 2024, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663, sections 3.1 and 3.2; the rule's other choices
(bias, link) are those of "It's All Connected", arXiv 2504.13173. The dual form for deep memories with momentum is ours.
S_t = eta_t S_{t-1} - theta_t grad l(M_{t'}; k_t, v_t);  M_t = (1 - alpha_t) M_{t-1} + S_t;  y_t = M_t(q_t);  t' the last token of the previous chunk.

| paper | here | shape | default |
|---|---|---|---|
| M_t, S_t | Carry.W, Carry.S: at the start of the open chunk | per layer (N, D_in, D_out) | S = (): no momentum |
| k, v | Tokens.k, Tokens.v | (N, T, D) | |
| theta_t, eta_t, alpha_t | Tokens.theta, .eta, .alpha | (N, T) | eta, alpha: None (0) |
| write mask w_t (ours) | Tokens.write: False changes neither M nor S | (N, T) bool | |
| b | Rule.chunk | tokens | 32 |
| grad of l by the prediction | Rule.bias(prediction, v, extra) | (N, b, D) | 2 (prediction - v) |
| W = link(Z), Z what accumulates (Miras) | Rule.link on all layers | as W | None: W = Z |
| M(x) = x + LN(...) | norm: LN's scale and shift; None: M(x) = ... | (N, 1, D) each | |

Use: N is batch x heads, each with its own memory.
    carry = start(W, tokens, momentum=True)               # W from the learned beginning, expanded to N
    reading = read_write(rule, carry, q, tokens, norm)    # reading.y (N, T, D), reading.carry, reading.surprise
    reading = read_write(rule, reading.carry, q2, tokens2, norm)   # goes on where it stopped, in the middle of a chunk or not
    y = recall(rule, carry, q, norm)                      # writes nothing
`pack` and `unpack` turn a carry into the tensors of a MemoryState (constant size, axis 0 the batch) and back.
Without a link every way of reading is the same and exact. With one, Rule.within says how tokens inside a chunk read: "exact" builds Z_t for each
(memory b D_in D_out), "linear" reads link(Z) of the chunk's start plus the chunk's linear change, "start" reads link(Z) of the chunk's start.

Differs from the paper: it gives the chunk form for one matrix and says nothing of deeper ones; write masks, partial chunks, bounds and links are ours.
Cost per chunk and layer: O(b^2 D + b D^2) time; a Python loop over T / b chunks. The loop and its backward pass by hand are in scan.py;
with a link, a bound on the gradient or `watch`, autograd goes through the loop here, which says the same in plain form.
`read_write_reference` goes token by token with torch.func's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat, starmap
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from remanence.memory.gates import Gates, delayed, gate_matrices, steps
from remanence.memory.inner import Bias, Norm, Weights, finish, gelu_slope, layer_norm_backward, network, standardised
from remanence.memory.scan import Chunks, scan

Link = Callable[[Weights], Weights]


class Tokens(NamedTuple):
    """What is written, token by token; `extra` goes to the bias as it is."""

    k: Float[Tensor, "N T D"]
    v: Float[Tensor, "N T D"]
    theta: Float[Tensor, "N T"]
    eta: Float[Tensor, "N T"] | None
    alpha: Float[Tensor, "N T"] | None
    write: Bool[Tensor, "N T"]
    extra: Float[Tensor, "N T E"] | None = None


class Carry(NamedTuple):
    """Where the reading stands: weights and momentum at the start of the open chunk, and the r < b tokens read since."""

    W: Weights
    S: Weights
    open: Tokens


class Reading(NamedTuple):
    """The outputs, the state behind them and the norm of every token's gradient."""

    y: Float[Tensor, "N T D"]
    carry: Carry
    surprise: Float[Tensor, "N T"] | None


def squared_error(prediction: Float[Tensor, "N b D"], v: Float[Tensor, "N b D"], extra: Tensor | None) -> Float[Tensor, "N b D"]:
    """Return the gradient of ||prediction - v||^2, summed over features."""
    return 2 * (prediction - v)


@dataclass(frozen=True)
class Rule:
    """How a memory learns.

    Args:
        chunk: b, tokens whose gradients are taken at the same weights.
        read: a token reads after its own write (M_t) or before it (M_{t-1}).
        max_grad_norm: a token's gradient, over all layers, is scaled down to this norm.
        bias: gradient of the inner loss by the prediction.
        link: weights from what accumulates.
        within: how tokens inside a chunk read through the link.
        recompute: chunks whose insides are computed again at a time in the backward pass; 0: all are kept. Not with a link or a bound on the gradient.
    """

    chunk: int = 32
    read: Literal["after", "before"] = "after"
    max_grad_norm: float | None = None
    bias: Bias = squared_error
    link: Link | None = None
    within: Literal["exact", "linear", "start"] = "exact"
    recompute: int = 0

    def weights(self, Z: Weights) -> Weights:
        """Return the network's weights."""
        return Z if self.link is None else self.link(Z)


def start(W: Weights, tokens: Tokens, momentum: bool) -> Carry:
    """Return the carry of a memory that has read nothing: these weights, no momentum yet, an empty chunk in the shape of `tokens`."""
    return Carry(W, tuple(torch.zeros_like(weight) for weight in W) if momentum else (), _cut(tokens, 0, 0))


def read_write(rule: Rule, carry: Carry, q: Float[Tensor, "N T D"], tokens: Tokens, norm: Norm | None, watch: bool = False) -> Reading:
    """Read T tokens in chunk-parallel form."""
    r, b = carry.open.k.shape[1], rule.chunk
    everything = _join(carry.open, tokens)
    total = everything.k.shape[1]
    closed = total // b
    filled = _map(lambda part: _chunks(part, b), everything)  # (C, N, b, ...), the rest not written
    gates = gate_matrices(filled.theta, filled.eta, filled.alpha, filled.write)
    reading_gates = gates if rule.read == "after" else delayed(gates)
    queries = _chunks(F.pad(q, (0, 0, r, 0)), b)
    if closed and rule.link is None and rule.max_grad_norm is None and not watch:
        chunks = Chunks(queries, filled.k, filled.v, filled.extra)
        y, W, S = scan(rule.bias, carry.W, carry.S, chunks, steps(gates, reading_gates), norm, closed, rule.recompute)
        return Reading(y.transpose(0, 1).flatten(1, 2)[:, r:total], Carry(W, S, _cut(everything, closed * b, total)), None)
    W, S, ys, norms = carry.W, carry.S, [], []
    per_chunk = zip(_each((queries, filled.k, filled.v, filled.extra)), starmap(Gates, _each(gates)), starmap(Gates, _each(reading_gates)))
    for c, ((x, k, v, extra), write_gates, read_gates) in enumerate(per_chunk):
        point = rule.weights(W)
        a, delta, surprise = rank_one_gradients(rule, point, k, v, extra, norm, watch)
        ys.append(_read(rule, W, point, S, a, delta, read_gates, x, norm))
        norms.append(surprise)
        if c < closed:
            W, S = write_chunk(W, S, a, delta, write_gates)
    y = torch.cat(ys, 1)[:, r:total] if ys else q
    surprise = torch.cat([one for one in norms if one is not None], 1)[:, r:total] if watch and norms else None
    return Reading(y, Carry(W, S, _cut(everything, closed * b, total)), surprise)


def settle(rule: Rule, carry: Carry, norm: Norm | None) -> tuple[Weights, Weights]:
    """Return what has accumulated, and the momentum, behind the last token read: the open chunk included."""
    tokens = carry.open
    if tokens.k.shape[1] == 0:
        return carry.W, carry.S
    a, delta, _ = rank_one_gradients(rule, rule.weights(carry.W), tokens.k, tokens.v, tokens.extra, norm, False)
    return write_chunk(carry.W, carry.S, a, delta, gate_matrices(tokens.theta, tokens.eta, tokens.alpha, tokens.write))


def recall(rule: Rule, carry: Carry, q: Float[Tensor, "N T D"], norm: Norm | None) -> Float[Tensor, "N T D"]:
    """Ask the memory as it stands behind the last token read, and write nothing."""
    return network(rule.weights(settle(rule, carry, norm)[0]), q, norm)


def pack(carry: Carry, batch: int, chunk: int) -> dict[str, Tensor]:
    """Return a carry as tensors whose axis 0 is the batch; the open chunk is filled up with zeros, so that the size never changes."""
    named = {f"W{l}": weight for l, weight in enumerate(carry.W)} | {f"S{l}": weight for l, weight in enumerate(carry.S)}
    for name, part in carry.open._asdict().items():
        if part is not None:
            named[f"open_{name}"] = F.pad(part, (0, 0) * (part.ndim - 2) + (0, chunk - part.shape[1]))
    return {name: tensor.unflatten(0, (batch, -1)) for name, tensor in named.items()}


def unpack(tensors: dict[str, Tensor], seen: int, chunk: int) -> Carry:
    """Return the carry that `pack` packed after `seen` tokens; tensors of other names are left alone."""
    flat = {name: tensor.flatten(0, 1) for name, tensor in tensors.items() if name[0] in "WS" or name.startswith("open_")}
    W, S = (tuple(flat[f"{letter}{l}"] for l in range(len(flat)) if f"{letter}{l}" in flat) for letter in "WS")
    parts = {name: flat.get(f"open_{name}") for name in Tokens._fields}
    return Carry(W, S, _cut(Tokens(**parts), 0, seen % chunk))  # type: ignore[arg-type]


def rank_one_gradients(
    rule: Rule, W: Weights, k: Tensor, v: Tensor, extra: Tensor | None, norm: Norm | None, watch: bool
) -> tuple[list[Float[Tensor, "N b D_in"]], list[Float[Tensor, "N b D_out"]], Float[Tensor, "N b"] | None]:
    """Return a and delta of every layer, whose outer products are the gradients of the tokens at W, and the norms of those gradients."""
    a, z = [k], []
    for weight in W[:-1]:
        z.append(a[-1] @ weight)
        a.append(F.gelu(z[-1]))
    out = a[-1] @ W[-1]
    if norm is None:
        error = rule.bias(out, v, extra)
    else:
        zhat, std = standardised(out)
        error = layer_norm_backward(rule.bias(k + zhat * norm[0] + norm[1], v, extra) * norm[0], zhat, std)
    delta = [error]
    for weight, before in zip(reversed(W[1:]), reversed(z)):
        delta.append(delta[-1] @ weight.mT * gelu_slope(before))
    delta.reverse()
    if not watch and rule.max_grad_norm is None:
        return a, delta, None
    square = sum((one.square().sum(-1) * other.square().sum(-1) for one, other in zip(a, delta)), torch.zeros_like(k[..., 0]))
    length = (square + torch.finfo(square.dtype).tiny).sqrt()
    scale = 1 if rule.max_grad_norm is None else (rule.max_grad_norm / length).clamp(max=1)[..., None]
    return a, [one * scale for one in delta], length


def write_chunk(W: Weights, S: Weights, a: list[Tensor], delta: list[Tensor], gates: Gates) -> tuple[Weights, Weights]:
    """Return weights and momentum behind a chunk: W <- beta_b W_0 + f_b S_0 - a^T diag(G_b) delta, S <- m_b S_0 - a^T diag(n_b) delta."""
    last_G, beta = gates.G[:, -1, :, None], gates.beta[:, -1, None, None]
    new_W = tuple(beta * weight - one.mT @ (last_G * other) for weight, one, other in zip(W, a, delta))
    if gates.f is None or gates.m is None or gates.n is None:
        return new_W, S
    f, m, last_n = gates.f[:, -1, None, None], gates.m[:, -1, None, None], gates.n[:, -1, :, None]
    new_W = tuple(weight + f * momentum for weight, momentum in zip(new_W, S))
    return new_W, tuple(m * momentum - one.mT @ (last_n * other) for momentum, one, other in zip(S, a, delta))


def read_chunk(
    W: Weights, S: Weights, a: list[Tensor], delta: list[Tensor], gates: Gates, q: Float[Tensor, "N b D"], norm: Norm | None
) -> Float[Tensor, "N b D"]:
    """Read at every token's own weights, layer by layer: z_t = beta_t x_t W_0 + f_t x_t S_0 - sum_j G_tj (x_t . a_j) delta_j."""
    x = z = q
    for l, weight in enumerate(W):
        x = F.gelu(z) if l else q
        z = gates.beta[..., None] * (x @ weight) - (gates.G * (x @ a[l].mT)) @ delta[l]
        if gates.f is not None:
            z = z + gates.f[..., None] * (x @ S[l])
    return finish(z, q, norm)


def read_chunk_built(
    rule: Rule, Z: Weights, S: Weights, a: list[Tensor], delta: list[Tensor], gates: Gates, q: Float[Tensor, "N b D"], norm: Norm | None
) -> Float[Tensor, "N b D"]:
    """Read through the link at every token's own weights, built one by one: O(b D_in D_out) memory."""
    built = []
    for l, start in enumerate(Z):
        now = gates.beta[..., None, None] * start[:, None] - torch.einsum("ntj,njd,nje->ntde", gates.G, a[l], delta[l])
        built.append(now if gates.f is None else now + gates.f[..., None, None] * S[l][:, None])
    wide = None if norm is None else (norm[0][..., None, :], norm[1][..., None, :])
    return network(rule.weights(tuple(built)), q[..., None, :], wide)[..., 0, :]


def read_write_reference(
    rule: Rule, W: Weights, S: Weights, q: Tensor, tokens: Tokens, norm: Norm | None
) -> tuple[Tensor, Weights, Weights]:
    """Read token by token, each gradient by torch.func at the weights that entered its chunk; return y, W and S. Links are applied exactly."""
    ys, point, zero = [], rule.weights(W), torch.zeros_like(tokens.theta)
    S = S or tuple(torch.zeros_like(weight) for weight in W)
    eta, alpha = (zero if gate is None else gate for gate in (tokens.eta, tokens.alpha))
    for t in range(q.shape[1]):
        point = rule.weights(W) if t % rule.chunk == 0 else point
        here = slice(t, t + 1)
        if rule.read == "before":
            ys.append(network(rule.weights(W), q[:, here], norm))
        prediction, pull_back = torch.func.vjp(partial(network, x=tokens.k[:, here], norm=norm), point)  # type: ignore[misc]
        (u,) = pull_back(rule.bias(prediction, tokens.v[:, here], None if tokens.extra is None else tokens.extra[:, here]))
        if rule.max_grad_norm is not None:
            length = sum(one.square().sum((1, 2), keepdim=True) for one in u).sqrt()
            u = tuple(one * (rule.max_grad_norm / length).clamp(max=1) for one in u)
        written, theta_t, eta_t, alpha_t = (gate[:, t, None, None] for gate in (tokens.write, tokens.theta, eta, alpha))
        after = tuple(eta_t * momentum - theta_t * one for momentum, one in zip(S, u))
        W = tuple(torch.where(written, (1 - alpha_t) * weight + momentum, weight) for weight, momentum in zip(W, after))
        S = tuple(torch.where(written, new, old) for new, old in zip(after, S))
        if rule.read == "after":
            ys.append(network(rule.weights(W), q[:, here], norm))
    return torch.cat(ys, 1), W, S


def _read(
    rule: Rule, Z: Weights, point: Weights, S: Weights, a: list[Tensor], delta: list[Tensor], gates: Gates, q: Tensor, norm: Norm | None
):
    if rule.link is not None and rule.within == "start":
        return network(point, q, norm)
    if rule.link is not None and rule.within == "exact":
        return read_chunk_built(rule, Z, S, a, delta, gates, q, norm)
    return read_chunk(point, S, a, delta, gates, q, norm)


def _chunks(part: Float[Tensor, "N T *D"], b: int) -> Float[Tensor, "C N b *D"]:
    short = -part.shape[1] % b
    filled = F.pad(part, (0, 0) * (part.ndim - 2) + (0, short)) if short else part
    return filled.unflatten(1, (-1, b)).transpose(0, 1)


def _each(parts: Iterable[Tensor | None]) -> Iterator[tuple[Any, ...]]:
    return zip(*(repeat(None) if part is None else part.unbind(0) for part in parts))


def _join(first: Tokens, second: Tokens) -> Tokens:
    if first.k.shape[1] == 0:
        return second
    return Tokens(*(None if a is None or b is None else torch.cat((a, b), 1) for a, b in zip(first, second)))  # type: ignore[arg-type]


def _cut(tokens: Tokens, begin: int, end: int) -> Tokens:
    return _map(lambda part: part[:, begin:end], tokens)


def _map(change: Callable[[Tensor], Tensor], tokens: Tokens) -> Tokens:
    return Tokens(*(None if part is None else change(part) for part in tokens))  # type: ignore[arg-type]
