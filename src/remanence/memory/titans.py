r"""Titans' neural memory: a small network per head that is trained on every token while the layer reads, by surprise, momentum and forgetting.

Each token yields a key and a value; the gradient of "predict the value from the key" is its surprise, momentum lets a surprising event write for a while, and
weight decay forgets. Reading is a forward pass with a query. Projections, gates and the initial network are learned by back-propagation through all of it.

Paper: Behrouz, Zhong and Mirrokni 2024, "Titans: Learning to Memorize at Test Time", arXiv 2501.00663, section 3.
q, k = l2norm(SiLU(conv(x W_Q))), ...(x W_K), v = SiLU(conv(x W_V)); l(M; t) = ||M(k_t) - v_t||^2;
S_t = eta_t S_{t-1} - theta_t grad l(M_{t'}; t); M_t = (1 - alpha_t) M_{t-1} + S_t; y_t = M_t(q_t); out = (norm(y) * sigmoid(x W_g)) W_O.

| paper | here | shape | default |
|---|---|---|---|
| M_0 | start: per layer | (H, D_in, D_out) | learned |
| L_M, hidden width | depth, expansion D | layers, factor | 2, 4 |
| b | chunk | tokens | 32 |
| theta_t = max_step sigmoid(x w + b) | write | (B, H, T) | max_step 1, b = -2 |
| eta_t = sigmoid(x w + b) | momentum | (B, H, T) | b = 0 |
| alpha_t = sigmoid(x w + b) | forget | (B, H, T) | b = -7: keeps |
| per-chunk gates | gates = "chunk": those of the chunk's first token | | "token" |
| M(x) = x + LN(...) | residual_norm; LN's scale begins at 0.1 | | True |
| conv | conv: width of the causal depthwise convolution, 1: none | tokens | 4 |

Differs from the paper: values that it does not give (b, the gates' biases, max_step, heads) are ours, as are the residual form of M, a per-chunk gate taken from
the chunk's first token (a mean over the chunk would look ahead), and `max_grad_norm`. The paper does not say whether y_t reads M_t or M_{t-1}: `read`.
With residual_norm the inner rule is sensitive: over 2,048 tokens of noise, with LN's scale at 1, a rounding error grew 10^7 times, so that float32
outputs of two forms agree for some hundred tokens and float64 outputs throughout. Without it keep max_step near 1 / b (at 1, noise drove it to infinity), and at
two layers or more without decay: once all weights have faded, their gradients are zero as well.
A masked token is passed over by the convolution too. State: fp32 or finer, also when x is bf16.
Cost per token and head: O(b D + D E) times depth, E = expansion D; state O(D E) numbers per head and layer, twice with momentum, and one chunk of tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.memory import dual
from remanence.memory.dual import Carry, Rule, Tokens
from remanence.memory.inner import NORM_SCALE, Norm, Weights
from remanence.memory.state import MemoryState, check_input

GATE_BIASES = {"write": -2.0, "momentum": 0.0, "forget": -7.0}  # 0.12, 0.5 and 0.0009: with forget at -4, half is gone after 40 tokens


class NeuralMemory(nn.Module):
    """A sequence layer whose state is the weights of a network per head.

    Args:
        dim: d, width of the input and output.
        heads: H; each has a memory of width d / H.
        depth: layers of the network.
        expansion: hidden width over D.
        chunk: b; all gradients of a chunk are taken at the weights that entered it.
        momentum: whether surprise carries over.
        decay: whether the memory forgets.
        gates: of every token, or held over a chunk.
        residual_norm: M(x) = x + LN(.).
        read: a token reads after its own write, or before.
        max_step: bound of theta.
        max_grad_norm: bound of one token's gradient; None: none.
        conv: width of the causal convolution over queries, keys and values.
        recompute: chunks computed again at a time in the backward pass, for less memory; 0: none. Not with max_grad_norm.

    Raises:
        Mistake: a value out of range, or heads that do not divide d.
    """

    kind = "titans"

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        depth: int = 2,
        expansion: int = 4,
        chunk: int = 32,
        momentum: bool = True,
        decay: bool = True,
        gates: Literal["token", "chunk"] = "token",
        residual_norm: bool = True,
        read: Literal["after", "before"] = "after",
        max_step: float = 1.0,
        max_grad_norm: float | None = None,
        conv: int = 4,
        recompute: int = 0,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "__class__", "recompute")}
        _check(self.settings)
        self.dim, self.heads, self.head_gates, self.max_step = dim, heads, gates, max_step
        self.rule = Rule(chunk, read, max_grad_norm, recompute=recompute)
        self.gate_names = ["write"] + ["momentum"] * momentum + ["forget"] * decay
        D, E = dim // heads, expansion * dim // heads
        widths = [D] + [E] * (depth - 1) + [D]
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = nn.Conv1d(3 * dim, 3 * dim, conv, groups=3 * dim, bias=False)
        self.gates = nn.Linear(dim, len(self.gate_names) * heads, bias=False)
        self.gate_bias = nn.Parameter(torch.empty(len(self.gate_names), heads))
        self.start = nn.ParameterList(nn.Parameter(torch.empty(heads, fan_in, out)) for fan_in, out in pairwise(widths))
        self.norm_scale = nn.Parameter(torch.empty(heads, 1, D)) if residual_norm else None
        self.norm_shift = nn.Parameter(torch.empty(heads, 1, D)) if residual_norm else None
        self.out_norm = nn.RMSNorm(D, eps=1e-6)
        self.out_gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial memory and set the gates' biases anew; the layers inside have their own."""
        for weight in self.start:
            weight.normal_(std=weight.shape[1] ** -0.5)
        for bias, name in zip(self.gate_bias, self.gate_names):
            bias.fill_(GATE_BIASES[name])
        if self.norm_scale is not None and self.norm_shift is not None:
            self.norm_scale.fill_(NORM_SCALE)
            self.norm_shift.zero_()

    def forward(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T d"], MemoryState]:
        """Read T tokens; return what the memory says at each, and the state behind them.

        Raises:
            Mistake: input of another width or not finite, a mask that is not (B, T) of booleans, or a state of another memory or batch.
        """
        reading, _, tail = self._read(x, state, mask, watch=False)
        tensors = dual.pack(reading.carry, len(x), self.rule.chunk) | {"tail": tail}
        seen = (0 if state is None else state.seen) + x.shape[1]
        return self._out(x, reading.y), MemoryState(self.kind, tensors, seen, dict(self.settings))

    def recall(self, x: Float[Tensor, "B T d"], state: MemoryState) -> Float[Tensor, "B T d"]:
        """Ask the memory as it stands, and write nothing; the tokens of x follow one another, and what was read last, in the convolution alone.

        Raises:
            Mistake: as `forward`.
        """
        self._check(x, state, None)
        q = self._qkv(x, state, None)[0][0]
        with torch.autocast(x.device.type, enabled=False):
            y = dual.recall(self.rule, self._carry(state, q), q, self._norm(len(x), q))
        return self._out(x, y)

    def watch(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> dict[str, Float[Tensor, "B H T"]]:
        """Return surprise (norm of the gradient, before it is bounded), write (theta), momentum (eta) and forget (alpha) of each token and head.

        Raises:
            Mistake: as `forward`.
        """
        reading, tokens, _ = self._read(x, state, mask, watch=True)
        found = {"surprise": reading.surprise, "write": tokens.theta, "momentum": tokens.eta, "forget": tokens.alpha}
        return {name: part.unflatten(0, (len(x), -1)) for name, part in found.items() if part is not None}

    def _read(self, x: Tensor, state: MemoryState | None, mask: Tensor | None, watch: bool) -> tuple[dual.Reading, Tokens, Tensor]:
        self._check(x, state, mask)
        q, tokens, tail = self._tokens(x, state, mask)
        if state is None:
            carry = dual.start(self._start(len(x), q), tokens, "momentum" in self.gate_names)
        else:
            carry = self._carry(state, q)
        with torch.autocast(x.device.type, enabled=False):
            return dual.read_write(self.rule, carry, q, tokens, self._norm(len(x), q), watch), tokens, tail

    def _tokens(self, x: Tensor, state: MemoryState | None, mask: Tensor | None) -> tuple[Tensor, Tokens, Tensor]:
        """Return queries, what is written, and the convolution's tail."""
        (q, k, v), tail = self._qkv(x, state, mask)
        write = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        write = write.repeat_interleave(self.heads, 0)
        logits = self.gates(x).unflatten(-1, (-1, self.heads)) + self.gate_bias  # (B, T, gates, H)
        values = logits.to(q.dtype).sigmoid().permute(2, 0, 3, 1).flatten(1, 2)  # (gates, N, T)
        named = dict(zip(self.gate_names, values))
        tokens = Tokens(k, v, self.max_step * named["write"], named.get("momentum"), named.get("forget"), write)
        if self.head_gates == "chunk":
            opened = None if state is None else self._carry(state, q).open
            tokens = held(tokens, opened, self.rule.chunk)
        return q, tokens, tail

    def _qkv(self, x: Tensor, state: MemoryState | None, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return q, k and v, each (N, T, D), and the convolution's last inputs."""
        projected = self.qkv(x)
        tail = projected.new_zeros(len(x), self.conv.kernel_size[0] - 1, projected.shape[-1]) if state is None else state.tensors["tail"]
        mixed, tail = convolved(self.conv.weight, projected, tail.to(projected), mask)
        q, k, v = F.silu(mixed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)  # 3 x (N, T, D)
        fine = torch.promote_types(q.dtype, torch.float32)
        return [F.normalize(q.to(fine), dim=-1), F.normalize(k.to(fine), dim=-1), v.to(fine)], tail

    def _out(self, x: Tensor, y: Float[Tensor, "N T D"]) -> Float[Tensor, "B T d"]:
        y = (
            F.rms_norm(y, y.shape[-1:], self.out_norm.weight.to(y.dtype), self.out_norm.eps)
            .unflatten(0, (len(x), -1))
            .transpose(1, 2)
            .flatten(2)
        )
        return self.out((y * self.out_gate(x).sigmoid()).to(self.out.weight.dtype))

    def _check(self, x: Tensor, state: MemoryState | None, mask: Tensor | None) -> None:
        check_input(x, self.dim, mask, "NeuralMemory")
        if state is not None:
            state.check(self.kind, self.settings, len(x))

    def _carry(self, state: MemoryState, like: Tensor) -> Carry:
        return dual.unpack(
            {name: part for name, part in state.to(like.dtype).tensors.items() if name != "tail"}, state.seen, self.rule.chunk
        )

    def _start(self, batch: int, like: Tensor) -> Weights:
        return tuple(weight.to(like.dtype).repeat(batch, 1, 1) for weight in self.start)

    def _norm(self, batch: int, like: Tensor) -> Norm | None:
        if self.norm_scale is None or self.norm_shift is None:
            return None
        return self.norm_scale.to(like.dtype).repeat(batch, 1, 1), self.norm_shift.to(like.dtype).repeat(batch, 1, 1)


def convolved(
    weight: Float[Tensor, "d 1 w"], x: Float[Tensor, "B T d"], tail: Float[Tensor, "B w-1 d"], mask: Bool[Tensor, "B T"] | None
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B w-1 d"]]:
    """Mix each token with the w - 1 unmasked ones before it, `tail` being those before the first; return the mixture, 0 at
    masked tokens, and the new tail (ours)."""
    width = tail.shape[1]
    if mask is None:
        joined = torch.cat((tail, x), 1)
        return F.conv1d(joined.mT, weight, groups=len(weight)).mT, joined[:, joined.shape[1] - width :]
    order = (~mask).int().argsort(dim=1, stable=True)  # unmasked tokens first, in their order
    joined = torch.cat((tail, x.gather(1, order[..., None].expand_as(x))), 1)
    mixed = F.conv1d(joined.mT, weight, groups=len(weight)).mT
    back = order.argsort(1)[..., None].expand_as(x)
    last = mask.sum(1, keepdim=True) + torch.arange(width, device=x.device)
    return mixed.gather(1, back) * mask[..., None], joined.gather(1, last[..., None].expand_as(tail))


def held(tokens: Tokens, opened: Tokens | None, chunk: int) -> Tokens:
    """Return the tokens with the gates of the first written token of their chunk, which may be among those of the open chunk (ours)."""
    r, T = (0 if opened is None else opened.k.shape[1]), tokens.k.shape[1]

    def over(new: Tensor, old: Tensor | None) -> Tensor:
        joined = new if old is None else torch.cat((old, new), 1)
        return F.pad(joined, (0, -joined.shape[1] % chunk)).unflatten(1, (-1, chunk))  # (N, C, b)

    first = over(tokens.write, None if opened is None else opened.write).int().argmax(-1, keepdim=True)

    def hold(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        return None if new is None else over(new, old).gather(2, first).expand(-1, -1, chunk).flatten(1)[:, r : r + T]

    gates = [hold(getattr(tokens, name), None if opened is None else getattr(opened, name)) for name in ("theta", "eta", "alpha")]
    return tokens._replace(theta=gates[0], eta=gates[1], alpha=gates[2])  # type: ignore[arg-type]


def _check(settings: dict[str, Any]) -> None:
    """Refuse settings out of range."""
    for name in ("dim", "heads", "depth", "expansion", "chunk", "conv"):
        if settings[name] < 1:
            raise Mistake(f"NeuralMemory.{name}", f"must be at least 1, got {settings[name]}", "correct the value")
    if settings["dim"] % settings["heads"]:
        raise Mistake("NeuralMemory.heads", f"{settings['heads']} heads do not divide the width {settings['dim']}", "choose a divisor")
    for name, known in (("gates", ("token", "chunk")), ("read", ("after", "before"))):
        if settings[name] not in known:
            raise Mistake(f"NeuralMemory.{name}", f"unknown '{settings[name]}'", f"choose {' or '.join(known)}")
    for name in ("max_step", "max_grad_norm"):
        if settings[name] is not None and not 0 < settings[name] < float("inf"):
            raise Mistake(f"NeuralMemory.{name}", f"must be above 0, and finite, got {settings[name]}", "correct the value")
