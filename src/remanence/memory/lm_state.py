"""What a language model with a memory holds of what it read: a value of constant size, and the cache in which `generate` carries it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from remanence.errors import Mistake
from remanence.memory.blocks import BlockState
from remanence.memory.state import MemoryState, state_tree
from remanence.storage import save_tree

BESIDE = ("vocab_size", "hidden_size", "num_hidden_layers", "variant", "window", "segment", "n_persistent", "layers_with_memory", "memory")


@dataclass(frozen=True)
class LMState:
    """All that a model holds of what it read, for a batch of texts; a value that nothing changes in place.

    Args:
        kind: the model's type.
        config: the model's settings that shape it.
        blocks: what each block carries.
        seen: tokens read so far, behind the prefix.
    """

    kind: str
    config: dict[str, Any]
    blocks: tuple[BlockState, ...]
    seen: int = 0

    @property
    def batch(self) -> int:
        """B, the number of texts."""
        first = self.blocks[0]
        return first.memory.batch if first.memory is not None else len(next(iter(first.tensors.values()), [0]))

    @property
    def bytes(self) -> int:
        """The size of all tensors."""
        return sum(block.bytes for block in self.blocks)

    def each(self, tensors: Callable[[Tensor], Tensor], memory: Callable[[MemoryState], MemoryState]) -> LMState:
        """Return a state whose tensors and memories went through the functions."""
        return dataclasses.replace(self, blocks=tuple(block.each(tensors, memory) for block in self.blocks))

    def rows(self, index: Int[Tensor, " N"]) -> LMState:
        """Return the states of some texts, in that order."""
        return self.each(lambda tensor: tensor.index_select(0, index.to(tensor.device)), lambda memory: memory.rows(index))

    def detach(self) -> LMState:
        """Return the state cut from the graph."""
        return self.each(Tensor.detach, MemoryState.detach)

    def to(self, device: torch.device | str) -> LMState:
        """Return the state on another device."""
        return self.each(lambda tensor: tensor.to(device), lambda memory: memory.to(device))

    def check(self, config: Any, batch: int) -> None:
        """Refuse the state of another model, or of another batch.

        Raises:
            Mistake: naming what differs.
        """
        own, made = beside(config), self.config | {"memory": without_places(self.config.get("memory"))}
        if self.kind != config.model_type:
            raise Mistake("state", f"was made by a model of type '{self.kind}', not '{config.model_type}'", "give this model's state")
        differing = next((key for key in own if made.get(key) != own[key]), None)
        if differing is not None:
            problem = f"was made with {differing}={made.get(differing)}, this model has {differing}={own[differing]}"
            raise Mistake("state", problem, "give this model's state")
        if self.batch != batch:
            raise Mistake("state", f"holds {self.batch} texts, the input {batch}", "carry one state per row, see LMState.rows")

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, whole or not at all; it loads again bit for bit.

        Raises:
            Mistake: the file cannot be written.
        """
        save_tree(path, {"kind": self.kind, "config": self.config, "seen": self.seen, "blocks": [block.tree() for block in self.blocks]})

    @classmethod
    def load(cls, path: str | Path) -> LMState:
        """Read what `save` wrote, on the CPU.

        Raises:
            Mistake: the file is missing, damaged, or no state of a model.
        """
        tree = state_tree(path, {"kind", "config", "seen", "blocks"}, "name a file that `remanence remember` or LMState.save wrote")
        return cls(tree["kind"], tree["config"], tuple(BlockState.from_tree(block) for block in tree["blocks"]), tree["seen"])


class LMCache(Cache):
    """The state, where `generate` looks for its cache; it does not grow.

    Args:
        state: to start from; what it holds counts as length 0, so that a prompt is given without what was remembered.
    """

    is_linear = [False]  # noqa: RUF012 (as transformers reads it: not to be taken for a cache without a length)
    is_compileable = False
    is_croppable = False

    def __init__(self, state: LMState | None = None):
        super().__init__(layers=[])
        self.state, self.begun = state, state.seen if state is not None else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were read since the cache was made."""
        return self.state.seen - self.begun if self.state is not None else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no bound."""
        return -1

    def reorder_cache(self, beam_idx: Int[Tensor, " B"]) -> None:
        """Let row i go on from row `beam_idx[i]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " B"]) -> None:
        """Keep some rows, in that order."""
        if self.state is not None:
            self.state = self.state.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Give every row to `repeats` continuations."""
        if self.state is not None:
            self.state = self.state.rows(torch.arange(self.state.batch).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """Refuse: what was read cannot be taken back."""
        raise Mistake("cache", "a memory cannot take back what it read", "start again from an earlier state")


def beside(config: Any) -> dict[str, Any]:
    """Return the settings that a state of the model depends on."""
    return {name: getattr(config, name) for name in BESIDE} | {"memory": without_places(config.memory)}


def without_places(memory: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a memory's settings without those that say where it rests: a state goes on anywhere."""
    return {name: value for name, value in (memory or {}).items() if name != "offload"}
