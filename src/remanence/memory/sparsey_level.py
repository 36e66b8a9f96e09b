"""One level of Sparsey: many macs side by side, each with its own fields of inputs, in a few operations for all of them.

A `Field` is the binary weights of one kind of input (U from below, H from the level's own codes one frame ago, D from above one frame ago), for all macs.
`Macs` puts fields through the code selection of `sparsey.py`: frames are learned one after another and macs in parallel; recognition is batched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.sparsey import (
    RATCHET,
    CSAConfig,
    Frame,
    back_off,
    draw,
    evidence,
    expansivity,
    familiarity,
    preferences,
    signal,
    strongest,
    weight_at_age,
)
from remanence.seeds import generator

FOREVER, NEVER = -1, 0  # births of weights that were set twice, and of those never set
ELEMENTS = 1 << 25  # of a batch's evidence at a time


class Field:
    """The weights from one kind of input to all macs of a level.

    Args:
        table: which units each mac sees; the number `units` is padding.
        units: how many there are.
        modules: Q.
        cells: K.
        own: the module of the same mac that an input comes from (-1: another mac's); a module gets nothing from itself. None: not that kind of input.
        freeze: share of set weights above which a mac's field learns no more.
        permanence: frames after which a weight that was set once is gone; None: it stays.
        decay: a of its curve.
    """

    def __init__(
        self,
        table: Int[Tensor, "M S"],
        units: int,
        modules: int,
        cells: int,
        *,
        own: Int[Tensor, "M S"] | None = None,
        freeze: float = 0.5,
        permanence: int | None = None,
        decay: float = 1.0,
    ):
        self.table, self.units, self.modules, self.cells, self.own = table, units, modules, cells, own
        self.freeze, self.permanence, self.decay = freeze, permanence, decay
        shape = (*table.shape, modules * cells)
        self.weights: UInt8[Tensor, "M S QK"] = torch.zeros(shape, dtype=torch.uint8)
        self.born: Int[Tensor, "M S QK"] | None = None if permanence is None else torch.zeros(shape, dtype=torch.int32)
        self.filled: Int[Tensor, " M"] = torch.zeros(len(table), dtype=torch.int64)
        forbidden = 0 if own is None else (own >= 0).sum(1) * cells
        self.possible: Int[Tensor, " M"] = (table < units).sum(1) * (modules * cells) - forbidden

    def fill(self, clock: int) -> Float[Tensor, " M"]:
        """Return each mac's share of weights that are set (and alive)."""
        filled = self.filled if self.born is None else (self.alive(self.born, clock) > 0).sum((1, 2))
        return filled.double() / self.possible.clamp(min=1)

    def frozen(self, clock: int) -> Bool[Tensor, " M"]:
        """Return which macs learn no more from this field."""
        return self.fill(clock) > self.freeze

    def alive(self, born: Int[Tensor, "*S"], clock: int) -> Float[Tensor, "*S"]:
        """Return the weights by the frames in which they were set."""
        assert self.permanence is not None
        aged = weight_at_age(clock - born, self.permanence, self.decay)
        return torch.where(born == FOREVER, 1.0, torch.where(born == NEVER, 0.0, aged))

    def support(self, x: Float[Tensor, "N units"], clock: int) -> tuple[Float[Tensor, "N M Q K"], Bool[Tensor, "N M"], Int[Tensor, "N M"]]:
        """Return the normalised sums (steps 2 and 3), which macs have any input, and how many active inputs each.

        One row gathers the rows of its active inputs; a batch is one product. Sums of whole numbers are the same either way.
        """
        local = x[:, self.table]  # (N, M, S)
        active = local > 0
        count = active.sum(-1)
        if len(x) == 1:
            order = self.active(active[0])
            rows = torch.arange(len(order))[:, None]
            picked = self.weights[rows, order].double() if self.born is None else self.alive(self.born[rows, order], clock)
            sums = (local[0].gather(1, order)[:, None].double() @ picked)[:, 0][None]
        else:
            whole = self.weights.float() if self.born is None else self.alive(self.born, clock)
            sums = (local.transpose(0, 1).to(whole.dtype) @ whole).transpose(0, 1).double()
        sums = sums.unflatten(-1, (self.modules, self.cells))
        norm = count[..., None].expand(*count.shape, self.modules)
        if self.own is not None:
            own = self.own.clamp(min=0).expand(local.shape)
            norm = norm - torch.zeros_like(norm).scatter_add_(-1, own, (active & (self.own >= 0)).long())
        return (sums / norm.clamp(min=1)[..., None]).clamp(max=1), count > 0, count

    @staticmethod
    def active(local: Bool[Tensor, "M S"]) -> Int[Tensor, "M A"]:
        """Return the places of the active inputs of each mac, in order, filled up with inactive ones to the largest count."""
        most = int(local.sum(1).max())
        return (~local).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]

    def learn(self, x: Float[Tensor, "1 units"], code: Int[Tensor, "M Q"], clock: int, *, force: bool = False) -> None:
        """Set the weights from active inputs to winners (step 10), but for silent macs and frozen fields."""
        local = x[0, self.table] > 0
        order = self.active(local)
        allowed = (code[:, 0] >= 0) if force else (code[:, 0] >= 0) & ~self.frozen(clock)
        write = (local.gather(1, order) & allowed[:, None])[..., None].expand(*order.shape, self.modules)
        if self.own is not None:
            write = write & (self.own.gather(1, order)[..., None] != torch.arange(self.modules))
        macs = torch.arange(len(order))[:, None, None]
        winners = (torch.arange(self.modules) * self.cells + code.clamp(min=0))[:, None]
        where = (macs, order[..., None], winners)  # (M, A, Q), every place once
        old = self.weights[where]
        new = old | write.to(torch.uint8)
        self.weights[where] = new
        self.filled += (new - old).sum((1, 2))
        if self.born is not None:
            born = self.born[where]
            again = (born != NEVER) & (born != clock) & (self.alive(born, clock) > 0)
            self.born[where] = torch.where(write & (born != clock), torch.where(again, FOREVER, clock), born).to(torch.int32)


class Macs:
    """The macs of a level.

    Args:
        fields: U, and H and D if the level has them.
        modules: Q, at least 2.
        cells: K, at least 2.
        csa: code selection.
        pi: fewest and most active inputs of U with which a mac runs.
        share: cells that make one input of `pi` (Q of the level below; 1 for pixels).
        seed: of the ties.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        modules: int,
        cells: int,
        *,
        csa: CSAConfig | None = None,
        pi: tuple[float, float] = (1, float("inf")),
        share: int = 1,
        seed: int = 0,
    ):
        self.fields, self.modules, self.cells, self.csa, self.pi, self.share = dict(fields), modules, cells, csa or CSAConfig(), pi, share
        self.count = len(self.fields["U"].table)
        self.ties = torch.rand(self.count, modules, generator=generator(seed, "ties"), dtype=torch.float64)
        self.clock = 0

    def _look(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], Bool[Tensor, "N M"]]:
        """Return normalised sums and presence per field, and which macs run (steps 1 to 3)."""
        parts, present = {}, {}
        running = None
        for name, x in inputs.items():
            parts[name], present[name], count = self.fields[name].support(x, self.clock)
            if name == "U":
                running = (count >= self.pi[0] * self.share) & (count <= self.pi[1] * self.share)
        if running is None:  # recall: nothing comes from below
            running = torch.stack(list(present.values())).any(0)
        return parts, present, running

    def recognise(self, inputs: Mapping[str, Float[Tensor, "N units"]], *, first: bool) -> Frame:
        """Return the code of most evidence for each row; nothing changes.

        Args:
            inputs: activity by field, the last unit off; U is missing in recall.
            first: whether the frame begins an episode.
        """
        count = len(next(iter(inputs.values())))
        rows = max(1, ELEMENTS // (self.count * self.modules * self.cells))
        if count > rows:
            pieces = [
                self.recognise({name: x[start : start + rows] for name, x in inputs.items()}, first=first)
                for start in range(0, count, rows)
            ]
            return Frame(*(torch.cat(column) for column in zip(*pieces, strict=True)))
        parts, present, running = self._look(inputs)
        V = evidence(parts, present, self.csa, first) if first or self.csa.backoff is None else back_off(parts, present, self.csa)
        code = strongest(V, self.ties.expand(count, -1, -1))
        return _silence(code, familiarity(V), signal(V, self.csa), running)

    def choose(self, inputs: Mapping[str, Float[Tensor, "N units"]], uniforms: Float[Tensor, "N M Q"], *, first: bool) -> Frame:
        """Draw the codes that these frames would get if they were to be learned; nothing changes.

        Args:
            inputs: activity by field, the last unit off.
            uniforms: one per module, for the draw.
            first: whether the frame begins an episode.
        """
        parts, present, running = self._look(inputs)
        V = evidence(parts, present, self.csa, first)
        G = familiarity(V)
        mu = preferences(V, expansivity(G, self.cells, self.csa), self.centre().expand(G.shape), self.csa.slope)
        return _silence(draw(mu, uniforms), G, torch.ones_like(G), running)

    def learn(
        self, inputs: Mapping[str, Float[Tensor, "1 units"]], uniforms: Float[Tensor, "M Q"], *, first: bool, force: bool = False
    ) -> Frame:
        """Draw a code for one frame and store it; `force` learns in frozen fields as well."""
        self.clock += 1
        frame = self.choose(inputs, uniforms[None], first=first)
        self.store(inputs, frame.code[0], force=force)
        return frame

    def store(self, inputs: Mapping[str, Float[Tensor, "1 units"]], code: Int[Tensor, "M Q"], *, force: bool = False) -> None:
        """Set the weights from one frame's active inputs to a given code."""
        for name, x in inputs.items():
            self.fields[name].learn(x, code, self.clock, force=force)

    def centre(self) -> Float[Tensor, " M"]:
        """Return c of each mac."""
        if not self.csa.ratchet:
            return torch.full((self.count,), self.csa.centre, dtype=torch.float64)
        field = self.fields["U"]
        return self.csa.centre + (RATCHET - self.csa.centre) * (field.fill(self.clock) / field.freeze).clamp(max=1)

    def state(self) -> dict[str, Any]:
        """Return the weights as packed bits, and what goes with them."""
        return {"clock": self.clock, "fields": {name: _pack(field) for name, field in self.fields.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned.

        Raises:
            Mistake: it belongs to macs of other sizes.
        """
        if state["fields"].keys() != self.fields.keys():
            raise Mistake("state", "has other fields than these macs", "load it into macs of the same settings")
        for name, field in self.fields.items():
            _unpack(field, state["fields"][name])
        self.clock = state["clock"]


def _silence(code: Tensor, G: Tensor, sent: Tensor, running: Bool[Tensor, "N M"]) -> Frame:
    """Let macs that do not run have no code, no familiarity and no signal (step 1)."""
    return Frame(torch.where(running[..., None], code, -1), torch.where(running, G, 0.0), torch.where(running, sent, 0.0))


def _pack(field: Field) -> dict[str, Tensor]:
    """Return a field's weights, eight to the byte."""
    import numpy as np

    born = {} if field.born is None else {"born": field.born}
    return {"bits": torch.from_numpy(np.packbits(field.weights.numpy().reshape(-1)))} | born


def _unpack(field: Field, packed: Mapping[str, Tensor]) -> None:
    import numpy as np

    size = field.weights.numel()
    if len(packed["bits"]) != -(-size // 8) or ("born" in packed) != (field.born is not None):
        raise Mistake("state", f"does not hold {size} weights", "load it into macs of the same settings")
    field.weights = torch.from_numpy(np.unpackbits(packed["bits"].numpy(), count=size)).view_as(field.weights)
    field.filled = field.weights.sum((1, 2), dtype=torch.int64)
    if field.born is not None:
        field.born = packed["born"].view_as(field.born).to(torch.int32)
