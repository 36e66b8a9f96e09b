"""Weights of closed segments as the reads of a memory cache want them, single ones or all piece by piece, whether they rest in memory or in an archive on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from remanence.memory.archive import PIECE, Archive
from remanence.memory.recurrence import State
from remanence.storage import Streamed


@dataclass(frozen=True)
class Kept:
    """Weights in memory, (B, H, S, ...) each."""

    weights: State

    @property
    def caches(self) -> int:
        """S."""
        return next(iter(self.weights.values())).shape[2]

    @property
    def bytes(self) -> int:
        """The size of one head's cache."""
        return sum(tensor.shape[3:].numel() * tensor.element_size() for tensor in self.weights.values())

    def fetch(self, pairs: Int[Tensor, "N"], device: torch.device) -> State:
        """Return single caches, (N, ...), by their numbers in (B, H, S)."""
        found: State = {}
        for name, tensor in self.weights.items():  # by three indices: to flatten a part of a shelf would copy it whole
            found[name] = tensor[torch.unravel_index(pairs.to(tensor.device), tensor.shape[:3])].to(device)
        return found

    def part(self, caches: slice, device: torch.device) -> State:
        """Return some caches of all rows and heads, (B, H, s, ...)."""
        return {name: tensor[:, :, caches].to(device) for name, tensor in self.weights.items()}


@dataclass(frozen=True)
class Shelved:
    """Weights on disk, at the places of a state: the same, copied out of the mapped files."""

    archive: Archive
    place: Int[Tensor, "B S"]

    @property
    def caches(self) -> int:
        """S."""
        return self.place.shape[1]

    @property
    def bytes(self) -> int:
        """The size of one head's cache."""
        return self.archive.bytes // self.archive.heads

    def fetch(self, pairs: Int[Tensor, "N"], device: torch.device) -> State:
        """Return single caches, (N, ...), by their numbers in (B, H, S)."""
        row, head, cache = torch.unravel_index(pairs.cpu(), (len(self.place), self.archive.heads, self.caches))
        return self.archive.read(self.place.cpu()[row, cache], head, device)

    def part(self, caches: slice, device: torch.device) -> State:
        """Return some caches of all rows and heads, (B, H, s, ...)."""
        place = self.place.cpu()[:, None, caches].expand(-1, self.archive.heads, -1)  # (B, H, s)
        head = torch.arange(self.archive.heads)[:, None].expand_as(place)
        found = self.archive.read(place.reshape(-1), head.reshape(-1), device)
        return {name: weight.view(*place.shape, *weight.shape[1:]) for name, weight in found.items()}

    def streamed(self, name: str) -> Streamed:
        """Return one weight of all caches, (B, H, S, ...), as something to be saved piece by piece."""
        form = self.archive.forms[name]
        shape = (len(self.place), form.heads, self.caches)
        step = max(PIECE // form.bytes, 1)

        def read() -> Iterator[Tensor]:
            for pairs in torch.arange(math.prod(shape)).split(step):
                row, head, cache = torch.unravel_index(pairs, shape)
                yield self.archive.read(self.place.cpu()[row, cache], head, torch.device("cpu"), name)[name]

        return Streamed(form.dtype, (*shape, *form.shape), read)


def whole(weights: Kept | Shelved, device: torch.device) -> State:
    """Return all caches."""
    return weights.part(slice(None), device)


def pieces(number: int, size: int) -> list[slice]:
    """Return spans of `number` things of `size` bytes that are read one after the other, wherever they rest: a product's last bits depend on how much is in it.

    Where gradients are recorded everything is kept for them, so it is one piece.
    """
    most = max(PIECE // max(size, 1), 1)
    if number <= most or torch.is_grad_enabled():
        return [slice(None)]
    return [slice(begin, begin + most) for begin in range(0, number, most)]
