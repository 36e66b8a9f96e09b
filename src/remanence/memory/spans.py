"""Say which tokens end at a position: the last s of its document, padding left out, back into earlier calls of one cache.

A `Trail` is a call's tokens behind those that the cache kept of the calls before. Nothing is cut out of it until positions are chosen, so that following
the tokens costs a concatenation, and a span O(W) for W tokens of the trail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


class Spans(NamedTuple):
    """Tokens that end at positions: the first `length` ids of a row, in their order; zeros behind them are no tokens."""

    ids: Int[Tensor, "N s"]
    length: Int[Tensor, " N"]

    @staticmethod
    def joined(parts: Sequence[Spans | None]) -> Spans | None:
        """Return several ones below each other; `None` where none were kept."""
        some = [part for part in parts if part is not None]
        return Spans(torch.cat([part.ids for part in some]), torch.cat([part.length for part in some])) if some else None


class Trail(NamedTuple):
    """The tokens up to the end of a call.

    Args:
        ids: those that the cache kept, then those of the call.
        real: False at padding.
        document: number of each token's document; a kept token belongs to the document that was running.
        kept: tokens that came from the cache.
        size: s.
    """

    ids: Int[Tensor, "B W"]
    real: Bool[Tensor, "B W"]
    document: Int[Tensor, "B W"]
    kept: int
    size: int

    @staticmethod
    def follow(ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"], first: Bool[Tensor, "B T"], size: int, state: State | None) -> Trail:
        """Return the trail of a call; `first` marks the first tokens of documents, `state` is what an earlier call left."""
        document = first.long().cumsum(1)
        if state is None:
            return Trail(ids, real, document, 0, size)
        held = torch.arange(size, device=ids.device) < state["length"][:, None]
        return Trail(torch.cat([state["ids"], ids], 1), torch.cat([held, real], 1), F.pad(document, (size, 0)), size, size)

    def ending_at(self, row: Int[Tensor, " N"], column: Int[Tensor, " N"]) -> Spans:
        """Return the spans that end at positions, columns counted from the call's first token."""
        at = self.kept + column
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        own = self.real[row] & (place <= at[:, None]) & (self.document[row] == self.document[row, at][:, None])
        count = own.sum(1)
        target = own.cumsum(1) - 1 - (count - self.size).clamp(min=0)[:, None]  # where in its span a token stands, below 0 if too early
        target = torch.where(own & (target >= 0), target, self.size)  # all others go into a column that is cut off
        ids = self.ids.new_zeros(len(row), self.size + 1).scatter_(1, target, self.ids[row])
        return Spans(ids[:, : self.size], count.clamp(max=self.size))

    def state(self) -> State:
        """Return what the next call of the cache needs: the last s tokens of the running document."""
        rows = torch.arange(len(self.ids), device=self.ids.device)
        return self.ending_at(rows, torch.full_like(rows, self.ids.shape[1] - self.kept - 1))._asdict()
