r"""Miras: a memory that learns while it reads, made of four choices: what holds it, what it stores, what it keeps, and how it learns.

Every recurrent layer solves, per token, W_t = argmin_W l(W; k_t, v_t) + Ret(W, W_{t-1}): the loss l (`bias.py`) says what to store, Ret (`retention.py`) what
to keep. Linear attention, RetNet, DeltaNet and Titans are the squared or dot-product corner of it. Other losses bound what one wild token can do, other
retentions give forget gates that are softmaxes, thresholds or norms.

Paper: Behrouz, Razaviyayn, Zhong and Mirrokni 2025, "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online
Optimization", arXiv 2504.13173. y_t = M(W_t; q_t), read after the write; Moneta: lp p=3, lq q=4, gd; Yaad: huber_mixed, l2, gd; Memora: l2, kl, gd.

| paper | here | shape | default |
|---|---|---|---|
| q_t, k_t, v_t | linear, causal convolution of width 4, SiLU; q and k of length 1 | (N, T, D), N = B H | |
| eta_t | max_step sigmoid(. - 2), the step size | (N, T, 1 or D) | max_step 1: near 0.12 |
| alpha_t | sigmoid(. + 7), what is kept; its own gate | (N, T, 1 or D) | near 0.999 |
| delta_t, Delta_t | softplus(.), the threshold of Huber losses | (N, T, 1) | near 1 for one feature's error, 4 sqrt(D) for a whole one |
| momentum (Titans' eta) | sigmoid(.) with optimizer: momentum | (N, T, 1) | |
| W_0, or its logits | begin, learned | per layer (H, I, O) | |
| b | chunk | tokens | 16 |
| rank of the gates' maps | gate_rank, with gates: channel | scalar | 32 |

Differs from the paper: gates per head are offered beside its channel-wise ones, and are the default, as every mode is exact with them; delta is per head always;
maps and start values of the gates, SiLU behind the convolution (as in Titans) and the run of a norm per head and matrix are ours. A softmax's weights are positive: sign comes from what stands around
the memory. Queries are read after the write. Masked tokens are invisible to the convolution as well.
Cost: that of `miras_rule.py`, with a Python loop over T / b chunks; the state is a constant number of weights, twice (chunk start and now).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake, nearest
from remanence.memory.bias import bias as bias_of
from remanence.memory.inner import NORM_SCALE, Norm
from remanence.memory.miras_rule import Carry, Choices, Written, read_write, recall
from remanence.memory.retention import retention as retention_of
from remanence.memory.state import MemoryState, check_input

WIDTH = 4  # of the convolution
EXPANSION = 4
PRESETS: dict[str, dict[str, Any]] = {
    "moneta": {"memory": "mlp2", "bias": "lp", "p": 3.0, "retention": "lq", "q": 4.0, "optimizer": "gd", "mode": "boundary"},
    "yaad": {"memory": "mlp2", "bias": "huber_mixed", "retention": "l2", "optimizer": "gd"},
    "memora": {"memory": "mlp2", "bias": "l2", "retention": "kl", "optimizer": "gd"},
}
KEEP = 7.0  # sigmoid(7) = 0.9991; at sigmoid(4) = 0.982 half of what was told is gone after 40 tokens, whatever they are
STEP = -2.0  # sigmoid(-2) = 0.12; a chunk's gradients are taken at one point, so that b equal tokens move the memory by b such steps
LENGTHS = ("huber_norm", "huber_mixed")  # biases whose threshold is held against the length of a whole error, which grows with sqrt(D)


class MirasMemory(nn.Module):
    """A memory of one network per sequence and head.

    Args:
        dim: d, width of the hidden states.
        heads: H, each with a memory of width D = d / H.
        memory: vector | matrix | mlp2.
        bias: a name of `bias.BIASES`.
        retention: a name of `retention.NAMES`, or a registered one.
        optimizer: gd | momentum.
        p: of the lp bias.
        q: of the lq retention.
        link: literal | mirror, of the lq retention.
        c: mass of a slice, of kl and f_divergence.
        sparsity: of the elastic nets.
        divergence: kl | chi2 | reverse_kl, of f_divergence.
        chunk: b, tokens whose gradients are taken at the same weights.
        mode: exact | boundary | paper_linear.
        gates: head | channel.
        gate_rank: of the channel-wise gates' maps.
        max_step: the largest step size.
        max_grad_norm: a token's gradient is scaled down to this norm.
        preset: moneta | yaad | memora, in place of the four choices and what belongs to them (`PRESETS`).

    Raises:
        Mistake: a value out of range, or choices that do not go together.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        memory: str = "mlp2",
        bias: str = "l2",
        retention: str = "l2",
        optimizer: str = "gd",
        p: float = 3.0,
        q: float = 4.0,
        link: str = "literal",
        c: float = 1.0,
        sparsity: float = 0.01,
        divergence: str = "kl",
        chunk: int = 16,
        mode: str = "exact",
        gates: str = "head",
        gate_rank: int = 32,
        max_step: float = 1.0,
        max_grad_norm: float | None = None,
        preset: str | None = None,
    ):
        super().__init__()
        self.settings: dict[str, Any] = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        if preset is not None:
            if preset not in PRESETS:
                raise Mistake("miras.preset", f"there is no preset '{preset}'", nearest(preset, PRESETS))
            self.settings |= PRESETS[preset]
        memory, bias, retention, optimizer, p, q, mode = map(
            self.settings.__getitem__, ("memory", "bias", "retention", "optimizer", "p", "q", "mode")
        )
        if heads < 1 or dim % heads:
            raise Mistake("miras.heads", f"{dim} is not divisible by {heads}", "choose a divisor of the width")
        known = {"memory": ("vector", "matrix", "mlp2"), "optimizer": ("gd", "momentum"), "gates": ("head", "channel")} | {
            "mode": ("exact", "boundary", "paper_linear")
        }
        for name, words in known.items():
            if self.settings[name] not in words:
                raise Mistake(f"miras.{name}", f"there is no {name} '{self.settings[name]}'", nearest(str(self.settings[name]), words))
        for name in ("chunk", "gate_rank", "max_step", *(["max_grad_norm"] if max_grad_norm is not None else [])):
            least = 1 if name in ("chunk", "gate_rank") else 0
            if not least <= self.settings[name] < float("inf") or self.settings[name] == 0:
                raise Mistake(f"miras.{name}", f"must be {'at least 1' if least else 'above 0'}, got {self.settings[name]!r}", "correct it")
        rule = retention_of(retention, q=q, link=link, c=c, sparsity=sparsity, divergence=divergence)
        if optimizer == "momentum" and (rule.mass or rule.step is not None):
            raise Mistake("miras.optimizer", f"momentum is not defined for the retention '{retention}'", "choose optimizer: gd")
        if mode == "paper_linear" and retention != "kl":
            raise Mistake("miras.mode", f"paper_linear belongs to kl, not to '{retention}'", "choose exact or boundary")
        if rule.step is not None and mode != "exact":
            raise Mistake("miras.mode", f"'{retention}' has no accumulator to read from inside a chunk", "choose mode: exact")
        if retention == "kl" and gates == "channel" and memory != "matrix" and mode != "paper_linear":
            raise Mistake(
                "miras.gates", "a gate that varies along the softmax does not cancel in it", "choose gates: head, or memory: matrix"
            )
        self.dim, self.heads, self.width, self.momentum = dim, heads, dim // heads, optimizer == "momentum"
        self.max_step, self.retention = max_step, rule
        self.choices = Choices(memory, bias_of(bias, p), rule, p, chunk, mode, max_grad_norm)
        self.project = nn.Linear(dim, 3 * dim, bias=False)  # q, k, v
        self.convolution = nn.Conv1d(3 * dim, 3 * dim, WIDTH, groups=3 * dim, bias=False)
        self.step, self.keep = (_gate(dim, heads, gates, gate_rank) for _ in range(2))
        self.threshold = nn.Linear(dim, heads) if self.choices.bias.threshold else None
        self.push = nn.Linear(dim, heads) if self.momentum else None
        D = self.width
        ordinary = 4 * D**0.5 if bias in LENGTHS else 1  # where thresholds begin; errors within a threshold teach it nothing
        self.ordinary = math.log(math.expm1(ordinary))  # before softplus
        shapes = {"vector": [(1, D)], "matrix": [(D, D)], "mlp2": [(D, EXPANSION * D), (EXPANSION * D, D)]}[memory]
        spread = (lambda size: 1.0) if rule.mass else (lambda size: size**-0.5)  # logits that differ, or weights that keep lengths
        self.begin = nn.ParameterList(torch.randn(heads, *shape) * spread(shape[0]) for shape in shapes)
        inside = memory == "mlp2"
        self.norm_scale = nn.Parameter(torch.full((heads, D), NORM_SCALE)) if inside else None
        self.norm_shift = nn.Parameter(torch.zeros(heads, D)) if inside else None
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.gate, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T d"], MemoryState]:
        """Read T tokens: the outputs, and the state behind them.

        Raises:
            Mistake: input, mask or state that does not fit.
        """
        y, state, _, _ = self._read(x, state, mask)
        return y, state

    def recall(self, x: Float[Tensor, "B T d"], state: MemoryState) -> Float[Tensor, "B T d"]:
        """Ask the memory as it stands, and write nothing."""
        check_input(x, self.dim, None, "miras")
        state.check("miras", self.settings, len(x))
        q, _, _, _ = self._project(x, state.tensors["conv"], torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        return self._finish(recall(self.choices, self._carry(state), q, self._norm(q), state.seen), x)

    def watch(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> dict[str, Float[Tensor, "B H T"]]:
        """Return per token and head `surprise` (the gradient's norm before it is scaled down), `write` (step size), `forget` (share that decays) and, where
        there are such, `momentum` and `threshold`. A retention without a forget gate (f_divergence) forgets 0."""
        _, _, tokens, surprise = self._read(x, state, mask)
        keeps = 1 if self.settings["retention"] == "f_divergence" else tokens.alpha
        shown = {"surprise": surprise[..., None], "write": tokens.eta, "forget": 1 - keeps + torch.zeros_like(tokens.eta)}
        if tokens.mu is not None:
            shown["momentum"] = tokens.mu
        if self.threshold is not None:
            shown["threshold"] = tokens.delta
        written = tokens.write[..., 0]
        return {name: (value.mean(-1) * written).unflatten(0, (len(x), self.heads)) for name, value in shown.items()}

    def _read(self, x: Tensor, state: MemoryState | None, mask: Tensor | None) -> tuple[Tensor, MemoryState, Written, Tensor]:
        check_input(x, self.dim, mask, "miras")
        if state is None:
            state = self.first_state(x)
        state.check("miras", self.settings, len(x))
        write = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        q, k, v, conv = self._project(x, state.tensors["conv"], write)
        tokens = self._gates(x, k, v, write)
        y, carry, surprise = read_write(self.choices, self._carry(state), q, tokens, self._norm(q), state.seen)
        named = {f"{name}_{l}": part.unflatten(0, (len(x), -1)) for name, parts in carry._asdict().items() for l, part in enumerate(parts)}
        after = MemoryState("miras", {"conv": conv, **named}, state.seen + x.shape[1], dict(self.settings))
        return self._finish(y, x), after, tokens, surprise

    def first_state(self, x: Float[Tensor, "B T d"]) -> MemoryState:
        """Return the learned beginning, a copy per row."""
        exact = torch.promote_types(x.dtype, torch.float32)  # accumulators do not fit into half precision
        tensors = {"conv": x.new_zeros(len(x), WIDTH - 1, 3 * self.dim)}
        for l, parameter in enumerate(self.begin):
            first = self.retention.begin(parameter.to(exact)).expand(len(x), *parameter.shape)
            tensors |= {f"start_{l}": first, f"now_{l}": first} | ({f"S_{l}": torch.zeros_like(first)} if self.momentum else {})
        return MemoryState("miras", tensors, 0, dict(self.settings))

    def _carry(self, state: MemoryState) -> Carry:
        def named(name: str) -> tuple[Tensor, ...]:
            return tuple(state.tensors[f"{name}_{l}"].flatten(0, 1) for l in range(len(self.begin)) if f"{name}_{l}" in state.tensors)

        return Carry(named("start"), named("now"), named("S"))

    def _project(self, x: Tensor, history: Tensor, write: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mixed, history = convolved(self.project(x), history, write, self.convolution.weight[:, 0])
        q, k, v = (self._heads(part) for part in F.silu(mixed).chunk(3, -1))
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, history

    def _heads(self, part: Float[Tensor, "B T HC"]) -> Float[Tensor, "N T C"]:
        exact = part.to(torch.promote_types(part.dtype, torch.float32))
        return exact.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def _gates(self, x: Tensor, k: Tensor, v: Tensor, write: Tensor) -> Written:
        delta = F.softplus(self._heads(self.threshold(x)) + self.ordinary) if self.threshold is not None else torch.ones_like(k[..., :1])
        mu = torch.sigmoid(self._heads(self.push(x))) if self.push is not None else None
        eta, alpha = self.max_step * torch.sigmoid(self._heads(self.step(x)) + STEP), torch.sigmoid(self._heads(self.keep(x)) + KEEP)
        return Written(k, v, eta, alpha, mu, delta, write.repeat_interleave(self.heads, 0)[..., None])

    def _norm(self, q: Tensor) -> Norm | None:
        if self.norm_scale is None or self.norm_shift is None:
            return None
        many = (len(q) // self.heads, 1, 1)
        return self.norm_scale.to(q.dtype)[:, None].repeat(many), self.norm_shift.to(q.dtype)[:, None].repeat(many)

    def _finish(self, y: Float[Tensor, "N T D"], x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        joined = self.norm(y.unflatten(0, (len(x), self.heads)).transpose(1, 2).to(x.dtype)).flatten(-2)
        return self.out(joined * torch.sigmoid(self.gate(x)))


def moneta(dim: int, heads: int = 1, **settings: Any) -> MirasMemory:
    """Make Moneta: cubic loss, l4 norm, normalised at chunk ends.

    Args:
        dim: d, width of the input and output.
        heads: H; each has a memory of width d / H.
        settings: others of `MirasMemory`.
    """
    return MirasMemory(dim, heads, **PRESETS["moneta"] | settings)


def yaad(dim: int, heads: int = 1, **settings: Any) -> MirasMemory:
    """Make Yaad: a Huber loss whose threshold depends on the token, and two l2 terms of retention.

    Args:
        dim: d, width of the input and output.
        heads: H; each has a memory of width d / H.
        settings: others of `MirasMemory`.
    """
    return MirasMemory(dim, heads, **PRESETS["yaad"] | settings)


def memora(dim: int, heads: int = 1, **settings: Any) -> MirasMemory:
    """Make Memora: squared loss on weights that stay distributions.

    Args:
        dim: d, width of the input and output.
        heads: H; each has a memory of width d / H.
        settings: others of `MirasMemory`.
    """
    return MirasMemory(dim, heads, **PRESETS["memora"] | settings)


def convolved(
    x: Float[Tensor, "B T C"], history: Float[Tensor, "B W C"], write: Bool[Tensor, "B T"], weight: Float[Tensor, "C K"]
) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W C"]]:
    """Convolve the tokens that count, each with the K - 1 = W such tokens before it (ours): outputs, and the last W such tokens."""
    place = write.long().cumsum(1)  # of a token among those that count, from 1
    kept = x.new_zeros(len(x), x.shape[1] + 1, x.shape[2])
    kept = kept.scatter(1, torch.where(write, place, 0)[..., None].expand_as(x), x)[:, 1:]  # the others all land in slot 0
    line = torch.cat((history.to(x.dtype), kept), 1)
    out = sum((line[:, i : i + x.shape[1]] * tap for i, tap in enumerate(weight.to(x.dtype).unbind(1))), torch.zeros_like(x))
    tail = (write.sum(1, keepdim=True) + torch.arange(history.shape[1], device=x.device))[..., None].expand(-1, -1, x.shape[2])
    return out.gather(1, (place - 1).clamp_min(0)[..., None].expand_as(x)), line.gather(1, tail)


def _gate(dim: int, heads: int, gates: str, rank: int) -> nn.Module:
    if gates == "head":
        return nn.Linear(dim, heads)
    return nn.Sequential(nn.Linear(dim, min(rank, dim), bias=False), nn.Linear(min(rank, dim), dim))
