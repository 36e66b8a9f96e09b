r"""One chunk of any Miras memory: gradients at the chunk's start, a dual accumulator that is linear in them, and weights that are its link.

The gradients of a chunk are all taken at the weights that opened it, so they come at once, each of rank one per layer (input a outer error delta). Whatever the
retention, what accumulates is Z_t = B_t Z_0 - sum_j G_tj a_j delta_j^T with B and G products of gates; only W_t = link(Z_t) differs. Where the link does
nothing, tokens read by masked linear attention and no token's weights are built; where it does something, `mode` says how exactly.

Paper: Behrouz, Razaviyayn, Zhong and Mirrokni 2025, "It's All Connected", arXiv 2504.13173, section 5.3; the products of gates are those of `gates.py` (Titans).
Z_t = alpha_t Z_{t-1} - eta_t g_t (gd), or Z_t = alpha_t Z_{t-1} + S_t, S_t = mu_t S_{t-1} - eta_t g_t (momentum).

| memory | M(x) | weights, per layer (N, I, O) | axis of a channel-wise gate |
|---|---|---|---|
| vector | w * x | (1, D) | O |
| matrix | x W | (D, D) | I (as in GLA) |
| mlp2 | x + LN(gelu(x W_2) W_1), scale and shift of LN slow | (D, 4D), (4D, D) | I of the first, O of the second |

| mode | tokens inside a chunk read at | cost per chunk and layer |
|---|---|---|
| exact | link(Z_t), built for every token (the l2 link: never built) | O(b I O) memory |
| boundary | the chunk's start: its factor times Z_t where the link is a factor (lq, literal), else its weights; the last token at link(Z_b) | O(b^2 D) |
| paper_linear | kl alone: the first token exactly, then W_t = alpha_t W_{t-1} - eta_t g_t until the chunk ends, where W is clamped into log's domain | O(b^2 D) |

Differs from the paper: Memora there has only paper_linear, which leaves the simplex. A softmax's normaliser is a shift of the slice that the next softmax
cancels, provided alpha is one number per slice; so `exact` and `boundary` run the logits linearly and stay on it. All modes agree at b = 1 and differ otherwise.
Retentions without an accumulator (`Retention.step`) run over the b tokens of a chunk one by one, in exact mode. The plain rule, token by token on W itself,
stands in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from remanence.memory.bias import Bias
from remanence.memory.dual import Rule, rank_one_gradients
from remanence.memory.gates import Gates, gate_matrices
from remanence.memory.inner import Norm, Weights, finish, network
from remanence.memory.retention import Retention, log_link


@dataclass(frozen=True)
class Choices:
    """The four choices, and how they are computed.

    Args:
        memory: vector | matrix | mlp2.
        bias: what is stored.
        retention: what is kept.
        p: of the lp bias.
        chunk: b.
        mode: exact | boundary | paper_linear.
        max_grad_norm: a token's gradient, over all layers, is scaled down to this norm.
    """

    memory: str
    bias: Bias
    retention: Retention
    p: float = 3.0
    chunk: int = 16
    mode: str = "exact"
    max_grad_norm: float | None = None

    def error(self, prediction: Tensor, value: Tensor, delta: Tensor | None) -> Tensor:
        """Return r = dl/dM."""
        return self.bias.error(prediction, value, self.p, prediction.new_ones(()) if delta is None else delta)


class Written(NamedTuple):
    """What is written, token by token: C is 1 (a gate per head) or D (a gate per channel)."""

    k: Float[Tensor, "N T D"]
    v: Float[Tensor, "N T D"]
    eta: Float[Tensor, "N T C"]
    alpha: Float[Tensor, "N T C"]
    mu: Float[Tensor, "N T 1"] | None
    delta: Float[Tensor, "N T 1"]
    write: Bool[Tensor, "N T 1"]

    def part(self, begin: int, end: int) -> Written:
        """Return some of the tokens."""
        return Written(*(None if tensor is None else tensor[:, begin:end] for tensor in self))  # type: ignore[arg-type]


class Carry(NamedTuple):
    """Where the reading stands: the accumulator at the start of the open chunk (the frozen point of its gradients), now, and the momentum now.

    Inside a chunk of mode paper_linear `now` holds weights.
    """

    start: Weights
    now: Weights
    S: Weights


def read_write(
    choices: Choices, carry: Carry, q: Float[Tensor, "N T D"], tokens: Written, norm: Norm | None, seen: int
) -> tuple[Float[Tensor, "N T D"], Carry, Float[Tensor, "N T"]]:
    """Read T tokens, `seen` having been read before: the outputs, the state behind them, and the norm of every token's gradient."""
    ys, norms, done, b = [], [], 0, choices.chunk
    while done < q.shape[1]:
        place = (seen + done) % b
        many = min(b - place, q.shape[1] - done)
        part, here = q[:, done : done + many], tokens.part(done, done + many)
        y, carry, surprise = _piece(choices, carry, part, here, norm, place)
        ys.append(y)
        norms.append(surprise)
        done += many
    empty = q.new_zeros(q.shape[:2])
    return (torch.cat(ys, 1), carry, torch.cat(norms, 1)) if ys else (torch.zeros_like(q), carry, empty)


def recall(choices: Choices, carry: Carry, q: Float[Tensor, "N T D"], norm: Norm | None, seen: int) -> Float[Tensor, "N T D"]:
    """Ask the memory as it stands, and write nothing."""
    inside = choices.mode == "paper_linear" and seen % choices.chunk > 0
    return answer(choices.memory, carry.now if inside else _weights(choices, carry.now), q, norm)


def _piece(choices: Choices, carry: Carry, q: Tensor, tokens: Written, norm: Norm | None, place: int) -> tuple[Tensor, Carry, Tensor]:
    """Read tokens of one chunk, of which `place` tokens were read before."""
    point, ends = _weights(choices, carry.start), place + q.shape[1] == choices.chunk
    a, delta, surprise = gradients(choices, point, tokens, norm)
    if choices.retention.step is not None:
        now = _steps(choices, carry.now, a, delta, tokens)
        y = answer_each(choices.memory, now, q, norm)
        last = tuple(weight[:, -1] for weight in now)
        return y, Carry(last if ends else carry.start, last, carry.S), surprise
    if choices.mode == "paper_linear":
        y, last = _paper_linear(choices, carry.now, a, delta, tokens, q, norm, place)
        last = tuple(log_link(weight) for weight in last) if ends else last
        return y, Carry(last if ends else carry.start, last, carry.S), surprise
    gates = _gates(tokens)
    last, S = _behind(choices.memory, carry.now, carry.S, a, delta, gates)
    if choices.retention.linear:
        y = read_chunk(choices.memory, carry.now, carry.S, a, delta, gates, q, norm)
    elif choices.mode == "exact":
        y = answer_each(choices.memory, _weights(choices, built(choices.memory, carry.now, carry.S, a, delta, gates)), q, norm)
    else:
        scale = choices.retention.scale
        if scale is None:
            y = answer(choices.memory, point, q, norm)
        else:
            factors = tuple(scale(weight) for weight in carry.start)
            y = read_chunk(choices.memory, carry.now, carry.S, a, delta, gates, q, norm, factors)
        if ends:
            y = torch.cat((y[:, :-1], answer(choices.memory, _weights(choices, last), q[:, -1:], norm)), 1)
    return y, Carry(last if ends else carry.start, last, S), surprise


def gradients(choices: Choices, W: Weights, tokens: Written, norm: Norm | None) -> tuple[list[Tensor], list[Tensor], Float[Tensor, "N b"]]:
    """Return a (N, b, I) and delta (N, b, O) of every layer, whose outer products are the tokens' gradients at W, and the norms of those."""
    k, v, threshold = tokens.k, tokens.v, tokens.delta
    if choices.memory != "vector":
        rule = Rule(chunk=choices.chunk, max_grad_norm=choices.max_grad_norm, bias=choices.error)
        a, delta, surprise = rank_one_gradients(rule, W, k, v, threshold, norm, watch=True)
        assert surprise is not None
        return a, delta, surprise
    slope = k * choices.error(k * W[0], v, threshold)  # a layer of one constant input
    length = (slope.square().sum(-1) + torch.finfo(slope.dtype).tiny).sqrt()
    if choices.max_grad_norm is not None:
        slope = slope * (choices.max_grad_norm / length).clamp(max=1)[..., None]
    return [torch.ones_like(k[..., :1])], [slope], length


def _weights(choices: Choices, Z: Weights) -> Weights:
    return tuple(choices.retention.link(weight) for weight in Z)


def _gates(tokens: Written) -> Gates:
    """Return B (N, C, b) and G (N, C, b, b), and with momentum f, m and n."""
    eta, alpha, write = tokens.eta.mT, tokens.alpha.mT, tokens.write.mT
    return gate_matrices(eta, None if tokens.mu is None else tokens.mu.mT, 1 - alpha, write)


def _outward(memory: str, layer: int) -> bool:
    """Say whether a channel-wise gate runs along the layer's output axis."""
    return memory == "vector" or layer == 1


def _behind(memory: str, Z: Weights, S: Weights, a: list[Tensor], delta: list[Tensor], gates: Gates) -> tuple[Weights, Weights]:
    """Return the accumulator and the momentum behind the last token."""

    def along(gate: Tensor, layer: int) -> Tensor:  # (N, C) -> (N, C, 1) or (N, 1, C)
        return gate[:, None, :] if _outward(memory, layer) else gate[..., None]

    def push(gate: Tensor, layer: int) -> Tensor:  # (N, C, b): how much of each token's gradient is in it
        if _outward(memory, layer):
            return a[layer].mT @ (gate.mT * delta[layer])
        return (gate.mT * a[layer]).mT @ delta[layer]

    new = tuple(along(gates.beta[..., -1], l) * weight - push(gates.G[..., -1, :], l) for l, weight in enumerate(Z))
    if gates.f is None or gates.m is None or gates.n is None:
        return new, S
    f, m, n = gates.f[..., -1], gates.m[..., -1], gates.n[..., -1, :]
    return (
        tuple(weight + along(f, l) * S[l] for l, weight in enumerate(new)),
        tuple(along(m, l) * momentum - push(n, l) for l, momentum in enumerate(S)),
    )


def read_chunk(
    memory: str,
    Z: Weights,
    S: Weights,
    a: list[Tensor],
    delta: list[Tensor],
    gates: Gates,
    q: Float[Tensor, "N b D"],
    norm: Norm | None,
    scale: Weights | None = None,
) -> Float[Tensor, "N b D"]:
    """Read every token at its own accumulator (times a factor per layer), layer by layer, by masked linear attention."""
    x = z = torch.ones_like(q[..., :1]) if memory == "vector" else q
    for l, weight in enumerate(Z):
        x = F.gelu(z) if l else x
        beta, f, G = gates.beta.mT, None if gates.f is None else gates.f.mT, gates.G  # (N, b, C), (N, C, b, b)
        if _outward(memory, l):
            z = beta * (x @ weight) - torch.einsum("notj,ntj,njo->nto", G.expand(-1, weight.shape[-1], -1, -1), x @ a[l].mT, delta[l])
            z = z if f is None else z + f * (x @ S[l])
        else:
            scores = G[:, 0] * (x @ a[l].mT) if G.shape[1] == 1 else torch.einsum("nti,nji,nitj->ntj", x, a[l], G)
            z = (beta * x) @ weight - scores @ delta[l]
            z = z if f is None else z + (f * x) @ S[l]
        z = z if scale is None else z * scale[l]
    return q * z if memory == "vector" else finish(z, q, norm)


def built(memory: str, Z: Weights, S: Weights, a: list[Tensor], delta: list[Tensor], gates: Gates) -> Weights:
    """Build Z_t for every token: (N, b, I, O) per layer."""
    out = []
    for l, start in enumerate(Z):
        letter = "o" if _outward(memory, l) else "i"
        beta, G = gates.beta.mT, gates.G.expand(-1, start.shape[-1 if letter == "o" else -2], -1, -1)
        pushed = torch.einsum(f"n{letter}tj,nji,njo->ntio", G, a[l], delta[l])
        if gates.f is None:
            out.append(_along(beta, letter) * start[:, None] - pushed)
        else:
            out.append(_along(beta, letter) * start[:, None] + _along(gates.f.mT, letter) * S[l][:, None] - pushed)
    return tuple(out)


def _along(gate: Float[Tensor, "N b C"], letter: str) -> Tensor:
    return gate[..., None, :] if letter == "o" else gate[..., None]


def _steps(choices: Choices, W: Weights, a: list[Tensor], delta: list[Tensor], tokens: Written) -> Weights:
    """Run a rule without an accumulator over the tokens: W_t (N, b, I, O) per layer."""
    assert choices.retention.step is not None
    out = []
    for l, now in enumerate(W):
        letter, seen = "o" if _outward(choices.memory, l) else "i", []
        eta, alpha = _along(tokens.eta, letter), _along(tokens.alpha, letter)
        for t in range(a[l].shape[1]):
            push = eta[:, t] * (a[l][:, t, :, None] * delta[l][:, t, None, :])
            now = torch.where(tokens.write[:, t, :, None], choices.retention.step(now, push, alpha[:, t], eta[:, t]), now)
            seen.append(now)
        out.append(torch.stack(seen, 1))
    return tuple(out)


def _paper_linear(
    choices: Choices, now: Weights, a: list[Tensor], delta: list[Tensor], tokens: Written, q: Tensor, norm: Norm | None, place: int
) -> tuple[Tensor, Weights]:
    """Apply the softmax rule to the first token of a chunk, and the linear one to the rest (Memora as printed)."""
    ys = []
    if place == 0:
        first = [one[:, :1] for one in a], [one[:, :1] for one in delta]
        now = _weights(choices, _behind(choices.memory, now, (), *first, _gates(tokens.part(0, 1)))[0])
        ys.append(answer(choices.memory, now, q[:, :1], norm))
    many = len(ys)
    if q.shape[1] > many:
        rest = [one[:, many:] for one in a], [one[:, many:] for one in delta]
        gates = _gates(tokens.part(many, q.shape[1]))
        ys.append(read_chunk(choices.memory, now, (), *rest, gates, q[:, many:], norm))
        now = _behind(choices.memory, now, (), *rest, gates)[0]
    return torch.cat(ys, 1), now


def answer(memory: str, W: Weights, x: Float[Tensor, "N b D"], norm: Norm | None) -> Float[Tensor, "N b D"]:
    """Return M(x), one memory for all tokens."""
    return x * W[0] if memory == "vector" else network(W, x, norm)


def answer_each(memory: str, W: Weights, x: Float[Tensor, "N b D"], norm: Norm | None) -> Float[Tensor, "N b D"]:
    """Return M_t(x_t), a memory for every token: (N, b, I, O) per layer."""
    wide = None if norm is None else (norm[0][..., None, :], norm[1][..., None, :])
    return answer(memory, W, x[..., None, :], wide)[..., 0, :]
