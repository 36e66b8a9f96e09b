"""A memory small enough to be read at once: a matrix that adds up what it is shown (linear attention), for tests of what stands around a memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.memory.state import MemoryState, check_input


class ToyMemory(nn.Module):
    """S_t = S_{t-1} + w_t k_t v_t^T; y_t = q_t S_t / |q_t S_t|."""

    def __init__(self, dim: int, chunk: int = 4):
        super().__init__()
        self.dim, self.chunk = dim, chunk
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.start = nn.Parameter(torch.randn(dim, dim) * 0.1)

    def forward(self, x: Tensor, state: MemoryState | None = None, mask: Tensor | None = None) -> tuple[Tensor, MemoryState]:
        check_input(x, self.dim, mask, "toy")
        if state is not None:
            state.check("toy", {}, len(x))
        held = self.start.expand(len(x), -1, -1) if state is None else state.tensors["S"]
        seen = 0 if state is None else state.seen
        write = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        outputs = []
        for token in range(x.shape[1]):
            one = x[:, token]
            held = held + write[:, token, None, None] * self.k(one)[:, :, None] * self.v(one)[:, None]
            outputs.append(self._read(one[:, None], held)[:, 0])
        return torch.stack(outputs, 1) if outputs else x, MemoryState("toy", {"S": held}, seen + x.shape[1])

    def recall(self, x: Tensor, state: MemoryState) -> Tensor:
        return self._read(x, state.tensors["S"])

    def _read(self, x: Tensor, held: Tensor) -> Tensor:
        return F.normalize(self.q(x) @ held, dim=-1)

    def watch(self, x: Tensor, state: MemoryState | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"surprise": x.norm(dim=-1)[:, None], "write": torch.ones(len(x), 1, x.shape[1])}
