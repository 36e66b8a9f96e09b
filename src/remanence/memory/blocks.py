r"""The blocks of a language model with a memory: sliding-window attention, an MLP, and the ways to put a memory beside the attention.

With x the normed input of a block, P the persistent prefix as this block sees it, SWA sliding-window attention (which always sees P) and M the memory:

| variant | what the block adds to the residual stream |
|---------|--------------------------------------------|
| swa | SWA(x) (no memory: the control) |
| lmm | M(x) |
| mal | SWA(M(x)) (in sequence) |
| mag | norm_1(SWA(x)) * sigmoid(norm_2(M(x))) |
| mac | y * sigmoid(norm(M(y))), y = Attn([P, h, segment]), h = the memory as it was before the segment, asked by the segment |
| hybrid | M(x), then SWA of the normed sum (two residual steps, as in Samba) |

Causality inside a segment of MAC, which the paper leaves open: h_i is a function of tokens up to i, so position s sees h_i only for i <= s; and the second
read is the memory's own output at y_s (its state at token s), never what stands at the segment's end.
Positions are rotary and local: within a window (or a segment) only differences count, so nothing bounds the length; the prefix has no position.

A window costs O(T W) and a segment O(T C); what a block carries from piece to piece has a constant size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from remanence.memory.architectures import build_memory
from remanence.memory.state import MemoryState
from remanence.memory.window import WindowAttention, marked, segment_attention, split

VARIANTS = ("lmm", "mac", "mag", "mal", "hybrid", "swa")


@dataclass(frozen=True)
class BlockState:
    """What one block carries from piece to piece.

    Args:
        tensors: keys and values of the prefix and of the window (or the segment's inputs), and which of its places hold real tokens; axis 0 is the batch.
        memory: the memory's own state.
        opened: for MAC, the memory as it was when the segment began.
        seen: tokens read behind the prefix.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    memory: MemoryState | None = None
    opened: MemoryState | None = None
    seen: int = 0

    def each(self, tensors: Callable[[Tensor], Tensor], memory: Callable[[MemoryState], MemoryState]) -> BlockState:
        """Return a state whose tensors and memories went through the functions."""
        return dataclasses.replace(
            self,
            tensors={name: tensors(tensor) for name, tensor in self.tensors.items()},
            memory=None if self.memory is None else memory(self.memory),
            opened=None if self.opened is None else memory(self.opened),
        )

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        return own + sum(state.bytes for state in (self.memory, self.opened) if state is not None)

    def tree(self) -> dict[str, Any]:
        """Return the state as plain nested values (see `storage.save_tree`)."""
        memories = {name: None if state is None else state.tree() for name, state in (("memory", self.memory), ("opened", self.opened))}
        return {"tensors": dict(self.tensors), "seen": self.seen, **memories}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> BlockState:
        """Return the state that `tree` described."""
        memory, opened = (None if tree[name] is None else MemoryState.from_tree(tree[name]) for name in ("memory", "opened"))
        return cls(dict(tree["tensors"]), memory, opened, tree["seen"])


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        """Return down(silu(gate(x)) * up(x))."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """One block: what its variant adds, then the MLP, each behind a norm and a residual connection."""

    def __init__(self, config: Any, variant: str):
        super().__init__()
        self.variant, self.segment = variant, config.segment

        def norm() -> nn.Module:
            return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.input_layernorm, self.post_attention_layernorm, self.mlp = norm(), norm(), GatedMLP(config)
        if variant != "lmm":
            self.self_attn = WindowAttention(config)
        if variant != "swa":
            self.memory = build_memory(config.memory_kind, config.hidden_size, **config.memory)
            for part in self.memory.modules():
                part._is_hf_initialized = True  # type: ignore[assignment]  # a memory draws its own weights: transformers must not draw them again
        if variant in ("mag", "mac"):
            self.memory_norm = norm()
        if variant == "mag":
            self.attended_norm = norm()
        if variant == "hybrid":
            self.middle_norm = norm()

    def forward(
        self, x: Float[Tensor, "B T d"], held: BlockState, mask: Bool[Tensor, "B T"] | None, prefix: bool
    ) -> tuple[Float[Tensor, "B T d"], BlockState]:
        """Read T tokens (or, at the very beginning, the prefix) and return what the block gives and holds."""
        mixed, held = getattr(self, f"_{self.variant}")(x, self.input_layernorm(x), held, mask, prefix)
        x = x + mixed
        seen = held.seen if prefix else held.seen + x.shape[1]
        return x + self.mlp(self.post_attention_layernorm(x)), dataclasses.replace(held, seen=seen)

    def _attend(self, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        out, tensors = self.self_attn.prefix(x) if prefix else self.self_attn(x, held.tensors, mask)
        return out, dataclasses.replace(held, tensors=tensors)

    def _remember(self, x: Tensor, held: BlockState, mask: Tensor | None) -> tuple[Tensor, BlockState]:
        if x.shape[1] == 0:
            return x, held
        out, memory = self.memory(x, held.memory, mask)
        return out, dataclasses.replace(held, memory=memory)

    def _swa(self, _: Tensor, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        return self._attend(x, held, mask, prefix)

    def _lmm(self, _: Tensor, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        return self._remember(x, held, mask)

    def _mal(self, _: Tensor, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        out, held = self._remember(x, held, mask)
        return self._attend(out, held, mask, prefix)

    def _mag(self, _: Tensor, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        attended, held = self._attend(x, held, mask, prefix)
        remembered, held = self._remember(x, held, mask)
        return self.attended_norm(attended) * torch.sigmoid(self.memory_norm(remembered)), held

    def _hybrid(self, stream: Tensor, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        remembered, held = self._remember(x, held, mask)
        attended, held = self._attend(self.middle_norm(stream + remembered), held, mask, prefix)
        return remembered + attended, held

    def _mac(self, _: Tensor, x: Tensor, held: BlockState, mask: Tensor | None, prefix: bool) -> tuple[Tensor, BlockState]:
        if prefix:
            y, tensors = self.self_attn.prefix(x)
            kept = {name: tensors[name] for name in ("prefix_keys", "prefix_values")}
            kept["segment"] = x.new_zeros(1, self.segment, x.shape[2])
            kept["segment_real"] = torch.zeros(1, self.segment, dtype=torch.bool, device=x.device)
            remembered, memory = self.memory(y, None, mask)
            return self._gated(y, remembered), dataclasses.replace(held, tensors=kept, memory=memory, opened=memory)
        start, outputs = held.seen % self.segment, []
        while x.shape[1]:
            taken = min(self.segment - start, x.shape[1])
            out, held = self._segment(x[:, :taken], held, None if mask is None else mask[:, :taken], start)
            outputs.append(out)
            x, mask, start = x[:, taken:], None if mask is None else mask[:, taken:], (start + taken) % self.segment
        return torch.cat(outputs, 1), held

    def _segment(self, x: Tensor, held: BlockState, mask: Tensor | None, start: int) -> tuple[Tensor, BlockState]:
        """Read tokens `start` to `start + T` of a segment, whose earlier ones are held."""
        attention, tensors = self.self_attn, dict(held.tensors)
        whole = torch.cat([tensors["segment"][:, :start], x], 1)  # (B, S, d)
        real = torch.cat([tensors["segment_real"][:, :start], marked(mask, x)], 1)  # (B, S)
        recalled = self._recall(whole, real, held.opened)
        keys, values = (torch.cat(pair, 2) for pair in zip(attention.keys_values(recalled), attention.keys_values(whole), strict=True))
        y = attention.joined(
            segment_attention(
                split(attention.q_proj(x), attention.heads),
                keys,
                values,
                real,
                tensors["prefix_keys"],
                tensors["prefix_values"],
                attention.theta,
            )
        )
        remembered, memory = self.memory(y, held.memory, mask)
        opened = held.opened
        if whole.shape[1] == self.segment:
            opened, whole, real = memory, whole[:, :0], real[:, :0]
        rest = self.segment - whole.shape[1]
        tensors |= {"segment": F.pad(whole, (0, 0, 0, rest)), "segment_real": F.pad(real, (0, rest))}
        return self._gated(y, remembered), dataclasses.replace(held, tensors=tensors, memory=memory, opened=opened)

    def _recall(self, x: Tensor, real: Tensor, state: MemoryState | None) -> Tensor:
        """Ask the memory with every token; real ones first where some are masked, for its convolution mixes neighbours."""
        recall: Any = self.memory.recall
        if bool(real.all()):
            return recall(x, state)
        order = (~real).int().argsort(dim=1, stable=True)[..., None].expand_as(x)
        return torch.empty_like(x).scatter(1, order, recall(x.gather(1, order), state))

    def _gated(self, y: Tensor, remembered: Tensor) -> Tensor:
        return y * torch.sigmoid(self.memory_norm(remembered))
