"""The shelf of a memory cache: weights of closed segments with their pools, token counts and numbers, as named tensors; which of them a segment may see.

Weights are (B, H, S, ...), `pool` (B, H, S, D); `count` (tokens read, masked ones not), `id` (number of the segment), `used` (shares summed over tokens and heads)
and `reads` (tokens that could read it) are (B, S). A call puts all its segments on the shelf at once; each of its segments sees a part.
Where the weights rest on disk, `place` (B, S) stands for them: their places in an archive, -1 for none.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from remanence.memory.archive import Archive, Hold
from remanence.memory.recurrence import State
from remanence.memory.shelved import Shelved, whole

Shelf = dict[str, Tensor]
ABOUT = ("pool", "count", "id", "used", "reads")
PLACE = "place"


def weights_of(shelf: Shelf) -> Shelf:
    """Return the weights alone."""
    return {name: tensor for name, tensor in shelf.items() if name not in (*ABOUT, PLACE)}


def axis_of(name: str) -> int:
    """Return the axis of the caches."""
    return 1 if name in (*ABOUT, PLACE) and name != "pool" else 2


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


def joined(shelves: list[Shelf], offload: str | None, hold: Hold | None) -> tuple[Shelf, Hold | None]:
    """Return all caches in one shelf, the weights where they are to rest, with the hold on those on disk. `hold` is that of the first shelf.

    A call through whose new caches gradients flow keeps all of them in memory: the graph holds them there anyway, and a file passes none on.

    Raises:
        Mistake: the disk is full, or the folder cannot be written.
    """
    about = {name: _joined([shelf[name] for shelf in shelves], axis_of(name)) for name in ABOUT}
    parts = [weights_of(shelf) for shelf in shelves]
    flows = torch.is_grad_enabled() and any(tensor.requires_grad for part in parts for tensor in part.values())
    if offload in (None, "cpu") or flows:
        if hold is not None:
            parts[0] = whole(Shelved(hold.archive, shelves[0][PLACE]), about["id"].device)
        if offload == "cpu":
            parts = [{name: tensor.cpu() for name, tensor in part.items()} for part in parts]
        return about | {name: _joined([part[name] for part in parts], axis_of(name)) for name in parts[0]}, None
    fresh = [part for part in parts if any(tensor.shape[2] for tensor in part.values())]
    if not fresh:  # nothing was closed
        return about | (parts[0] if hold is None else {PLACE: shelves[0][PLACE]}), hold
    place, hold = put_away(fresh, None if offload == "disk" else offload, shelves[0].get(PLACE), hold)
    return about | {PLACE: place}, hold


def put_away(
    fresh: list[State], parent: str | None, place: Int[Tensor, "B S"] | None, hold: Hold | None
) -> tuple[Int[Tensor, "B S1"], Hold]:
    """Write caches to disk behind those at `place`; a text that has none there yet gets an archive of its own."""
    if hold is not None and place is not None:
        if all(hold.archive.fits(part) for part in fresh):
            return hold.archive.append(place, fresh)
        fresh = [whole(Shelved(hold.archive, place), torch.device("cpu")), *fresh]  # the layer's precision has grown: written anew, once
    rows = len(next(iter(fresh[0].values())))
    return Archive(parent, fresh).append(torch.zeros(rows, 0, dtype=torch.long), fresh)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


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
        found[name] = tensor.masked_fill(blank, -1 if name in ("id", PLACE) else 0).index_select(
            axis, rest.nonzero().flatten().to(tensor.device)
        )
    return found
