"""What a reweaving memory holds: a window of the newest tokens and, of those that left it, the few worth keeping. Named tensors, one row per sequence.

A token's salience is fixed once, when it leaves the window; the best `budget` are held, the newest first among equals, the same ones in all layers. That
happens at multiples of `chunk` tokens of each row, wherever calls begin and end, so reading in pieces is reading at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.salience import GOLDEN, SCORES, add_moments, best, hashed, merge_groups, standard
from remanence.memory.state import MemoryState

KIND = "reweaving"  # of its states


@dataclass(frozen=True)
class BufferSettings:
    """How a buffer keeps.

    Args:
        window: w, tokens that stay visible, those of the running chunk beside them.
        chunk: c, tokens between two updates.
        budget: m, entries held of what left the window.
        sinks: first tokens that are always held.
        rule: name in `salience.RULES`, or "weights" for a mix of z-scores by `weights`.
        weights: of surprisal, received attention, recency.
        group: neighbours that are merged into one entry; 1: none.
        seed: of the rule "random".
    """

    window: int
    chunk: int
    budget: int
    sinks: int
    rule: str
    weights: tuple[float, float, float]
    group: int
    seed: int


class LatentBuffer:
    """The memory of one batch of sequences; also the cache that `generate` carries.

    Args:
        settings: how it keeps.
        config: of the model that reads, to refuse another one's file.
    """

    is_compileable = False  # what `generate` asks of a cache: its prompt holds new tokens only, and nothing can be taken back
    is_croppable = False
    is_linear = (True,)

    def __init__(self, settings: BufferSettings, config: Mapping[str, Any]):
        self.settings, self.config = settings, dict(config)
        self.tensors: dict[str, Tensor] = {}
        self.woven: Any = None  # keys and values made of what is held, until that changes
        self.error: dict[int, float] = {}  # relative squared error of the codes of each layer, mean over the last call

    @property
    def seen(self) -> Int[Tensor, " B"]:
        """Tokens read of each row."""
        return self.tensors["seen"]

    @property
    def empty(self) -> bool:
        """Whether nothing was read."""
        return not self.tensors

    def get_seq_length(self) -> int:
        """Return the tokens read of the longest row."""
        return 0 if self.empty else int(self.seen.max())

    def begin(self, batch: int, device: torch.device) -> None:
        """Make room for sequences, or refuse others than those read so far."""
        if self.empty:
            self.tensors = {"seen": torch.zeros(batch, dtype=torch.int64, device=device)}
            self.tensors["moments"] = torch.zeros(
                batch, 4, 3, dtype=torch.float64, device=device
            )  # of 3 features and the score: n, mean, M2
        elif len(self.seen) != batch:
            raise Mistake("memory", f"holds {len(self.seen)} sequences, the input {batch}", "clear() it, or give one input per sequence")

    def boundaries(self, real: Bool[Tensor, "B T"]) -> Iterator[tuple[int, int]]:
        """Cut the columns of a call where any row completes a chunk; masked tokens do not count."""
        number = (self.seen[:, None] + real.cumsum(1)) // self.settings.chunk
        before = torch.cat([(self.seen // self.settings.chunk)[:, None], number[:, :-1]], 1)
        cuts = (number != before).any(0).nonzero().squeeze(1) + 1
        edges = sorted({0, *cuts.tolist(), real.shape[1]})
        return itertools.pairwise(edges)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of the window, or of what is held, by their short names."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def append(self, columns: dict[str, Tensor], real: Bool[Tensor, "B T"]) -> None:
        """Put the tokens of a call into the window and let go of what a completed chunk pushed out of it."""
        old = self.part("window.")
        for name, new in columns.items():
            self.tensors[f"window.{name}"] = torch.cat([old[name], new], _axis(new)) if name in old else new
        self.tensors["seen"] = self.seen + real.sum(1)
        self._offer()

    def _offer(self) -> None:
        settings, position = self.settings, self.tensors["window.position"]
        start = self.seen // settings.chunk * settings.chunk - settings.window
        leaving = (position >= 0) & (position < start[:, None])
        if not bool(leaving.any()):
            return
        out = leaving.any(0).nonzero().squeeze(1)
        gone = {name: tensor.index_select(_axis(tensor), out) for name, tensor in self.part("window.").items()}
        self.tensors["window.position"] = position.masked_fill(leaving, -1)
        self._keep("window.", (self.tensors["window.position"] >= 0).any(0))
        self.woven = None
        if settings.budget == 0:
            return
        gone["position"] = gone["position"].masked_fill(~leaving[:, out], -1).double()
        gone["score"] = self._score(gone)
        stale = ("surprisal", "mass", *(("k.", "v.") if any(name.startswith("h.") for name in gone) else ()))
        gone = {name: tensor for name, tensor in gone.items() if not name.startswith(stale)}
        if settings.group > 1:
            gone = merge_groups(gone, settings.group, -(-settings.sinks // settings.group) * settings.group)
        held = self.part("held.")
        both = {name: torch.cat([held[name], tensor], _axis(tensor)) if held else tensor for name, tensor in gone.items()}
        chosen = best(both["score"], both["position"], settings.budget, settings.sinks)
        for name, tensor in both.items():
            self.tensors[f"held.{name}"] = gather_tokens(tensor, chosen)
        self.tensors["held.position"] = self.tensors["held.position"].where(both["position"].gather(1, chosen) >= 0, -1.0)
        self._keep("held.", (self.tensors["held.position"] >= 0).any(0))

    def _keep(self, prefix: str, columns: Bool[Tensor, " N"]) -> None:
        if not bool(columns.all()):
            where = columns.nonzero().squeeze(1)
            for name, tensor in self.part(prefix).items():
                self.tensors[prefix + name] = tensor.index_select(_axis(tensor), where)

    def _score(self, gone: Mapping[str, Tensor]) -> Float[Tensor, "B N"]:
        """Return the salience of tokens that leave, by what was known until now, and count them in."""
        position, valid = gone["position"], gone["position"] >= 0
        features = torch.stack([gone["surprisal"].double(), gone["mass"].double(), position], 1)  # (B, 3, N)
        moments = torch.cat([add_moments(self.tensors["moments"][:, :3], features, valid), self.tensors["moments"][:, 3:]], 1)
        settings = self.settings
        if settings.rule == "random":
            score = hashed(position.long(), settings.seed)
        elif settings.rule == "uniform":
            score = (position * GOLDEN) % 1.0  # the best of any number lie evenly over the text (three gaps)
        elif settings.rule in SCORES:
            score = features[:, SCORES.index(settings.rule)]
        else:
            score = (standard(features, moments[:, :3]) * torch.tensor(settings.weights, device=position.device)[:, None]).sum(1)
        moments[:, 3:] = add_moments(moments[:, 3:], score[:, None], valid)
        self.tensors["moments"] = moments
        return score

    def salience(self) -> Float[Tensor, "B M"]:
        """Return the scores of what is held as z-scores among all that ever left the window (s_i)."""
        return standard(self.tensors["held.score"][:, None], self.tensors["moments"][:, 3:])[:, 0]

    def detach(self) -> None:
        """Cut everything from the graph (truncated back-propagation through time)."""
        self.tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}
        self.woven = None

    def reorder_cache(self, beam: Int[Tensor, " B"]) -> None:
        """Repeat and drop rows as beam search says."""
        self.tensors = {name: tensor.index_select(0, beam.to(tensor.device)) for name, tensor in self.tensors.items()}
        self.woven = None

    def clear(self) -> None:
        """Forget everything: the next token is the first."""
        self.tensors, self.woven, self.error = {}, None, {}

    def drop(self, positions: Sequence[float], row: int | None = None) -> None:
        """Remove entries by position, of one row or of all; nothing else changes.

        Raises:
            Mistake: a position that is not held.
        """
        held = self.tensors.get("held.position", torch.full((1, 0), -1.0, dtype=torch.float64))
        wanted = torch.tensor(list(positions), dtype=torch.float64, device=held.device)
        rows = slice(None) if row is None else slice(row, row + 1)
        lacking = wanted[~torch.isin(wanted, held[rows])].tolist()
        if lacking:
            raise Mistake("drop", f"position {lacking[0]:g} is not held", "inspect() says which are")
        hit = torch.isin(held, wanted)
        if row is not None:
            hit &= (torch.arange(len(held), device=held.device) == row)[:, None]
        if bool(hit.any()):
            self.tensors["held.position"] = held.masked_fill(hit, -1.0)
            self._keep("held.", (self.tensors["held.position"] >= 0).any(0))
            self.woven = None

    def inspect(self, row: int = 0, tokenizer: Any = None) -> list[dict[str, Any]]:
        """Return what is held of a row, oldest first: position, token id (text with a tokenizer) and score."""
        if "held.position" not in self.tensors:
            return []
        position, ids, score = (self.tensors[f"held.{name}"][row].tolist() for name in ("position", "id", "score"))
        found = [{"position": where, "id": token, "score": value} for where, token, value in zip(position, ids, score) if where >= 0]
        return found if tokenizer is None else [{**entry, "token": tokenizer.decode([entry["id"]])} for entry in found]

    def stats(self) -> dict[str, Any]:
        """Return counts and sizes: tokens read, entries held and in the window (largest row), bytes of both, error of the codes by layer."""
        held, window = self.part("held."), self.part("window.")
        count = {name: int((part["position"] >= 0).sum(1).max()) if part else 0 for name, part in (("held", held), ("window", window))}
        size = {
            f"{name} bytes": sum(t.numel() * t.element_size() for t in part.values()) for name, part in (("held", held), ("window", window))
        }
        return {"read": self.get_seq_length(), "budget": self.settings.budget, **count, **size, "error": dict(self.error)}

    def state(self) -> MemoryState:
        """Return all that is held as a value, which later reading leaves as it is.

        Raises:
            Mistake: nothing was read yet.
        """
        if self.empty:
            raise Mistake("memory", "is empty", "read something first")
        return MemoryState(KIND, dict(self.tensors), self.get_seq_length(), self.config).detach()

    def take(self, state: MemoryState, device: torch.device | str = "cpu") -> None:
        """Go on from a value of `state`, in place of what is held.

        Raises:
            Mistake: it is of another model or other settings.
        """
        state.check(KIND, self.config, state.batch)
        self.tensors, self.woven, self.error = {name: tensor.to(device) for name, tensor in state.tensors.items()}, None, {}

    def save(self, path: str | Path) -> None:
        """Write everything as one safetensors file, whole or not at all.

        Raises:
            Mistake: nothing was read yet, or the file cannot be written.
        """
        self.state().save(path)

    def load(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        """Go on where a file was saved, bit for bit.

        Raises:
            Mistake: the file is no such memory, or one of another model or other settings.
        """
        self.take(MemoryState.load(path), device)


def _axis(tensor: Tensor) -> int:
    """The axis of tokens: of keys and values (B, G, N, dh) the third, of anything else the second."""
    return 2 if tensor.ndim == 4 else 1


def gather_tokens(tensor: Tensor, index: Int[Tensor, "B M"]) -> Tensor:
    """Return, for each row, the tokens at `index`."""
    shape = [len(index)] + [1] * (tensor.ndim - 1)
    shape[_axis(tensor)] = index.shape[1]
    wide = list(tensor.shape)
    wide[_axis(tensor)] = index.shape[1]
    return tensor.gather(_axis(tensor), index.view(shape).expand(wide))
