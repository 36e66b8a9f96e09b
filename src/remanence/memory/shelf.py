"""The shelf of a memory cache: weights of closed segments with their pools, token counts and numbers, as named tensors; which of them a segment may see.

Weights are (B, H, S, ...), `pool` (B, H, S, D); `count` (tokens read, masked ones not), `id` (number of the segment), `used` (shares summed over tokens and heads)
and `reads` (tokens that could read it) are (B, S). A call puts all its segments on the shelf at once; each of its segments sees a part.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

Shelf = dict[str, Tensor]
ABOUT = ("pool", "count", "id", "used", "reads")


def weights_of(shelf: Shelf) -> Shelf:
    """Return the weights alone."""
    return {name: tensor for name, tensor in shelf.items() if name not in ABOUT}


def axis_of(name: str) -> int:
    """Return the axis of the caches."""
    return 1 if name in ABOUT and name != "pool" else 2


def empty(weights: Shelf, pool: Tensor) -> Shelf:
    """Return a shelf of no cache, for weights (B, H, ...) and a pool (B, H, D)."""
    blank = {name: tensor[:, :, None][:, :, :0] for name, tensor in (weights | {"pool": pool}).items()}
    number = torch.zeros(len(pool), 0, dtype=torch.long, device=pool.device)
    return blank | {"count": number, "id": number, "used": pool.new_zeros(len(pool), 0), "reads": number}


def closed(weights: Shelf, pool: Tensor, count: Int[Tensor, "B"], number: int) -> Shelf:
    """Return a shelf of one cache."""
    one = {name: tensor[:, :, None] for name, tensor in (weights | {"pool": pool}).items()}
    unread = torch.zeros_like(count[:, None])
    return one | {"count": count[:, None], "id": torch.full_like(unread, number), "used": pool.new_zeros(len(pool), 1), "reads": unread}


def joined(shelves: list[Shelf], offload: str | None) -> Shelf:
    """Return all caches in one shelf, the weights on the CPU where they are to rest there."""
    found: Shelf = {}
    for name in shelves[0]:
        parts = [shelf[name] for shelf in shelves]
        if offload is not None and name not in ABOUT:
            parts = [part.to(offload) for part in parts]
        found[name] = torch.cat(parts, axis_of(name)) if len(parts) > 1 else parts[0]
    return found


def first(shelf: Shelf, caches: int) -> Shelf:
    """Return the oldest caches, as views."""
    return {name: tensor.narrow(axis_of(name), 0, caches) for name, tensor in shelf.items()}


def take(shelf: Shelf, kept: Int[Tensor, "B K"]) -> Shelf:
    """Return some caches of each row."""
    found: Shelf = {}
    for name, tensor in shelf.items():
        index, row = kept.to(tensor.device), torch.arange(len(tensor), device=tensor.device)[:, None]
        found[name] = tensor[row, index] if axis_of(name) == 1 else tensor.transpose(1, 2)[row, index].transpose(1, 2)
    return found


def admit(shelf: Shelf, kept: Int[Tensor, "B K"], new: int, most: int, evict: str) -> Int[Tensor, "B K"]:
    """Let a new cache in; where there are too many, the oldest goes, or the one of the smallest mean share among those that were read."""
    kept = torch.cat([kept, torch.full_like(kept[:, :1], new) if kept.shape[1] else kept.new_full((len(kept), 1), new)], 1)
    if kept.shape[1] <= most:
        return kept
    if evict == "oldest":
        return kept[:, 1:]
    used, reads = shelf["used"].gather(1, kept), shelf["reads"].gather(1, kept)
    share = torch.where(reads > 0, used / reads.clamp(min=1), float("inf"))
    share[:, -1] = float("inf")  # the new one has had no reader
    rest = torch.ones_like(kept, dtype=torch.bool).scatter(1, share.argmin(1, keepdim=True), False)
    return kept[rest].view(len(kept), -1)


def without_old_gradients(shelf: Shelf, segments: int) -> Shelf:
    """Return the shelf with all but the newest caches cut from the graph."""
    found: Shelf = {}
    for name, tensor in shelf.items():
        axis = axis_of(name)
        cut = max(tensor.shape[axis] - segments, 0)
        found[name] = torch.cat([tensor.narrow(axis, 0, cut).detach(), tensor.narrow(axis, cut, tensor.shape[axis] - cut)], axis)
    return found


def without(shelf: Shelf, gone: list[int]) -> Shelf:
    """Drop segments by number; what another row still holds in that column is kept, and emptied in this one."""
    hit = torch.isin(shelf["id"], torch.tensor(gone, dtype=torch.long, device=shelf["id"].device))  # (B, S)
    rest = ~hit.all(0)
    found: Shelf = {}
    for name, tensor in shelf.items():
        axis = axis_of(name)
        blank = hit.to(tensor.device) if axis == 1 else hit.to(tensor.device)[:, None]
        blank = blank.view(*blank.shape, *[1] * (tensor.ndim - blank.ndim))
        found[name] = tensor.masked_fill(blank, -1 if name == "id" else 0).index_select(axis, rest.nonzero().flatten().to(tensor.device))
    return found
