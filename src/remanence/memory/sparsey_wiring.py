"""The geometry of Sparsey: which units each mac sees, which macs hear each other, and the way back from codes to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.sparsey import CSAConfig, activity
from remanence.memory.sparsey_level import Field, Macs
from remanence.seeds import derive


@dataclass(frozen=True)
class Level:
    """One level of macs.

    Args:
        macs: rows and columns of the grid.
        window: rows and columns of units below that each mac sees; None: all.
        modules: Q.
        cells: K.
        csa: code selection.
        pi: fewest and most active inputs (pixels; macs of the level below) with which a mac runs.
        freeze: share of set weights of a field above which it learns no more.
        permanence: frames after which a weight set once is gone; None: it stays.
        decay: a of its curve.
        persistence: frames that a code lasts; None: 1, 2, 4, ... by level.
        radius: of the grid within which macs hear each other's last codes (0: only themselves); None: no H.
        top_down: whether macs hear those above.
    """

    macs: tuple[int, int] = (1, 1)
    window: tuple[int, int] | None = None
    modules: int = 24
    cells: int = 16
    csa: CSAConfig = field(default_factory=CSAConfig)
    pi: tuple[float, float] = (1, float("inf"))
    freeze: float = 0.5
    permanence: int | None = None
    decay: float = 1.0
    persistence: int | None = None
    radius: int | None = 1
    top_down: bool = True

    def __post_init__(self) -> None:
        if self.modules < 2 or self.cells < 2:
            raise Mistake("level", f"Q={self.modules}, K={self.cells}", "a code needs at least 2 modules of at least 2 cells")
        if not 1 <= self.pi[0] <= self.pi[1]:
            raise Mistake("pi", f"is {self.pi}", "give the fewest (at least 1) and the most active inputs")


def build(specs: Sequence[Level], number: int, shape: tuple[int, int], seed: int) -> Macs:
    """Wire one level: U to the units below, H to its neighbours, D to the macs above that see it."""
    spec = specs[number]
    lowest = number == 0
    grid, each = (shape, 1) if lowest else (specs[number - 1].macs, specs[number - 1].modules * specs[number - 1].cells)
    settings: dict[str, Any] = {"freeze": spec.freeze, "permanence": spec.permanence, "decay": spec.decay}
    Q, K = spec.modules, spec.cells
    fields = {"U": Field(spread(windows(grid, spec.macs, spec.window), each), grid[0] * grid[1] * each, Q, K, **settings)}
    macs = spec.macs[0] * spec.macs[1]
    if spec.radius is not None:
        near = neighbours(spec.macs, spec.radius)
        cell = torch.arange(Q * K) // K  # the module of each cell
        own = torch.where((near == torch.arange(macs)[:, None])[..., None], cell, -1).flatten(1)
        fields["H"] = Field(spread(near, Q * K, macs), macs * Q * K, Q, K, own=own, **settings)
    if spec.top_down and number + 1 < len(specs):
        above = specs[number + 1]
        seen = (windows(spec.macs, above.macs, above.window)[..., None] == torch.arange(macs)).any(1).T  # (macs, macs above)
        size, count = above.modules * above.cells, above.macs[0] * above.macs[1]
        fields["D"] = Field(spread(_places(seen), size, count), count * size, Q, K, **settings)
    share = 1 if lowest else specs[number - 1].modules
    return Macs(fields, Q, K, csa=spec.csa, pi=spec.pi, share=share, seed=derive(seed, number))


def windows(grid: tuple[int, int], macs: tuple[int, int], size: tuple[int, int] | None) -> Int[Tensor, "M S"]:
    """Return the units that each mac sees: windows spread evenly over the grid, overlapping if they are larger than the steps.

    Raises:
        Mistake: the window is larger than the grid.
    """
    size = size or grid
    if not all(1 <= small <= large for small, large in zip(size, grid, strict=True)):
        raise Mistake("window", f"is {size}, the grid below {grid}", "it must fit into the grid")
    begin = [torch.linspace(0, grid[axis] - size[axis], macs[axis]).round().long() for axis in (0, 1)]
    lines, columns = (start[:, None] + torch.arange(length) for start, length in zip(begin, size, strict=True))
    return (lines[:, None, :, None] * grid[1] + columns[None, :, None, :]).reshape(macs[0] * macs[1], -1)


def neighbours(macs: tuple[int, int], radius: int) -> Int[Tensor, "M S"]:
    """Return the macs within `radius` rows and columns of each, itself included, padded by their number."""
    place = torch.cartesian_prod(torch.arange(macs[0]), torch.arange(macs[1]))
    return _places((place[:, None] - place[None]).abs().amax(-1) <= radius)


def _places(chosen: Bool[Tensor, "M N"]) -> Int[Tensor, "M S"]:
    """Return the places that are chosen in each row, padded by N."""
    count = chosen.sum(1)
    order = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(count.max()))]
    return torch.where(chosen.gather(1, order), order, chosen.shape[1])


def spread(table: Int[Tensor, "M S"], each: int, units: int | None = None) -> Int[Tensor, "M S_each"]:
    """Replace macs by their cells; a padding mac by the padding cell."""
    inside = (table[..., None] * each + torch.arange(each)).flatten(1)
    return inside if units is None else inside.clamp(max=units * each)


def pixels(macs: Macs, code: Int[Tensor, "N M Q"]) -> Float[Tensor, "N F"]:
    """Return for each pixel the share of winners that are connected with it, averaged over the running macs that see it."""
    field = macs.fields["U"]
    winners = activity(code, torch.ones(code.shape[:2]), macs.cells)[:, :-1].view(len(code), macs.count, -1)
    weights = (field.weights if field.born is None else field.alive(field.born, macs.clock)).double()
    share = torch.einsum("nmk,msk->nms", winners, weights) / macs.modules
    running = (code[..., :1] >= 0).double().expand(share.shape)
    place = field.table.flatten().expand(len(code), -1)
    empty = torch.zeros(len(code), field.units, dtype=torch.float64)
    return empty.scatter_add(1, place, (share * running).flatten(1)) / empty.scatter_add(1, place, running.flatten(1)).clamp(min=1)
