"""What a neural memory holds after reading: named tensors, one row per sequence, that travel as one safetensors file.

A memory is a layer whose state changes while it reads. Every layer of this room answers to `Memory`: the state goes in, the state comes out, and nothing of
it is kept on the layer, so that rows of a batch, or two conversations, never share one. Reading in pieces with the state carried over is reading at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.archive import Hold
from remanence.memory.shelved import Shelved, whole
from remanence.storage import load_tree, save_tree


@dataclass(frozen=True)
class MemoryState:
    """The state of one memory layer for a batch of sequences.

    Args:
        kind: of the memory that made it, as in the catalogue.
        tensors: what it holds; axis 0 of each is the batch B.
        seen: tokens read so far, masked ones included: it places the next token inside its chunk.
        config: the settings of that memory; a state of other settings is refused.
        hold: keeps the caches that rest on disk for as long as the state lives; their places are its tensor `cache.place`.
    """

    kind: str
    tensors: dict[str, Tensor]
    seen: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    hold: Hold | None = None

    @property
    def batch(self) -> int:
        """B, the number of sequences."""
        return len(next(iter(self.tensors.values())))

    @property
    def bytes(self) -> int:
        """The size of all tensors, and of the caches on disk."""
        on_disk = self.tensors["cache.place"].numel() * self.hold.archive.bytes if self.hold is not None else 0
        return on_disk + sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """Return a state whose tensors went through `change`."""
        return dataclasses.replace(self, tensors={name: change(tensor) for name, tensor in self.tensors.items()})

    def detach(self) -> MemoryState:
        """Return the state cut from the graph, for truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> MemoryState:
        """Return a copy that shares no storage, but for caches on disk, which nothing writes over."""
        return self.map(Tensor.clone)

    def to(self, *args: Any, **kwargs: Any) -> MemoryState:
        """Return the state on another device, or its floating tensors in another precision (as `Tensor.to`); caches on disk stay there, but come into memory
        where the precision changes."""
        state = self.gathered() if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())) else self
        return state.map(
            lambda tensor: tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor.to(*_devices(args), **_device(kwargs))
        )

    def gathered(self) -> MemoryState:
        """Return the state with everything in memory, and nothing on disk."""
        if self.hold is None:
            return self
        place = self.tensors["cache.place"]
        weights = {f"cache.{name}": weight for name, weight in whole(Shelved(self.hold.archive, place), place.device).items()}
        rest = {name: tensor for name, tensor in self.tensors.items() if name != "cache.place"}
        return dataclasses.replace(self, tensors=rest | weights, hold=None)

    def rows(self, index: Int[Tensor, "N"]) -> MemoryState:
        """Return the states of some sequences, in that order (beam search repeats and drops rows)."""
        return self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def check(self, kind: str, config: Mapping[str, Any], batch: int) -> None:
        """Refuse a state that another memory made, or one of another batch.

        Raises:
            Mistake: naming what differs.
        """
        if self.kind != kind:
            raise Mistake("state", f"was made by '{self.kind}', not by '{kind}'", "give the state that this memory returned")
        differing = sorted(key for key in {*self.config, *config} if self.config.get(key) != config.get(key))
        if differing:
            key = differing[0]
            raise Mistake(
                "state",
                f"was made with {key}={self.config.get(key)}, this memory has {key}={config.get(key)}",
                "give a state of this memory",
            )
        if self.batch != batch:
            raise Mistake("state", f"holds {self.batch} sequences, the input {batch}", "carry one state per row of the batch")

    def tree(self) -> dict[str, Any]:
        """Return the state as nested values to be saved (see `storage.save_tree`): what is on disk as something to be read piece by piece."""
        tensors: dict[str, Any] = dict(self.tensors)
        if self.hold is not None:
            weights = Shelved(self.hold.archive, tensors.pop("cache.place"))
            tensors |= {f"cache.{name}": weights.streamed(name) for name in self.hold.archive.forms}
        return {"kind": self.kind, "seen": self.seen, "config": dict(self.config), "tensors": tensors}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> MemoryState:
        """Return the state that `tree` described."""
        return cls(tree["kind"], dict(tree["tensors"]), tree["seen"], dict(tree["config"]))

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, whole or not at all; it loads again bit for bit.

        Raises:
            Mistake: the file cannot be written.
        """
        save_tree(path, self.tree())

    @classmethod
    def load(cls, path: str | Path) -> MemoryState:
        """Read what `save` wrote, on the CPU.

        Raises:
            Mistake: the file is missing, damaged, or no state of a memory.
        """
        return cls.from_tree(state_tree(path, {"kind", "seen", "config", "tensors"}, "name a file that MemoryState.save wrote"))


def state_tree(path: str | Path, keys: set[str], remedy: str) -> dict[str, Any]:
    """Read a saved state.

    Raises:
        Mistake: the file is missing, damaged, or not such a state.
    """
    try:
        tree = load_tree(path)
    except Mistake as mistake:
        raise Mistake(path, mistake.problem, remedy) from mistake
    if not isinstance(tree, dict) or tree.keys() != keys:
        raise Mistake(path, "is not the state of a memory", remedy)
    return tree


class Memory(Protocol):
    """A layer that learns while it reads."""

    def forward(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T d"], MemoryState]:
        """Read T tokens: the outputs, and the state behind them. Without a state the memory starts from its learned beginning; a token whose mask is
        False changes nothing but `seen`."""
        ...

    def recall(self, x: Float[Tensor, "B T d"], state: MemoryState) -> Float[Tensor, "B T d"]:
        """Ask the memory as it stands, and write nothing."""
        ...

    def watch(
        self, x: Float[Tensor, "B T d"], state: MemoryState | None = None, mask: Bool[Tensor, "B T"] | None = None
    ) -> dict[str, Float[Tensor, "B H T"]]:
        """Return what happened at each token, per head: `surprise` (norm of the gradient), `write` (step size), `forget` (share that decays), and what
        else the memory has (`momentum`)."""
        ...


def check_input(x: Tensor, dim: int, mask: Tensor | None, place: str) -> None:
    """Refuse input that a memory would carry on for ever.

    Raises:
        Mistake: the shape is not (B, T, dim), the mask is not (B, T) of booleans, or a value is not finite.
    """
    if x.ndim != 3 or x.shape[-1] != dim:
        raise Mistake(place, f"expected input (B, T, {dim}), got {tuple(x.shape)}", "give hidden states of this width")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise Mistake(
            place, f"expected a boolean mask {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}", "True marks real tokens"
        )
    if not bool(x.isfinite().all()):
        raise Mistake(place, "the input holds values that are not finite", "a memory would keep them; look at what comes before it")


def _devices(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value for value in args if not isinstance(value, torch.dtype))


def _device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "dtype"}
