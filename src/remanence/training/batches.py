"""Batches by number: `batches[i]` is the i-th micro-batch of an endless shuffled stream, a pure function of (rows, seed, i).

So a resumed run needs no iterator state, gradient accumulation and several processes take consecutive numbers, and nothing draws from the global generator.
Rows stay in Arrow: a batch is gathered from memory-mapped columns in a few vectorised copies. Token rows are padded on the right and carry no attention
mask: every language model here is causal, so padding cannot reach a supervised position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from remanence.errors import Mistake
from remanence.seeds import derive, generator

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

IGNORED = -100  # label of a position that is not supervised


class Batch(dict):
    """A dict of tensors ready for the model, or of named batches (`batch["retain"]["input_ids"]`), with the denominators of its means.

    `rows` and `tokens` are what a mean over rows or supervised tokens divides by. They are this batch's own counts, until the trainer sets them to
    the average over all micro-batches and processes of the step: then the mean of the micro-batches' losses is the mean over the whole step's rows or
    tokens, however unevenly these are spread.
    """

    _rows: float | None = None
    _tokens: float | None = None

    @property
    def rows(self) -> float:
        """The number of rows that a mean divides by."""
        return self._rows if self._rows is not None else float(self.own_rows())

    @property
    def tokens(self) -> float:
        """The number of supervised tokens that a mean divides by (at least 1)."""
        return self._tokens if self._tokens is not None else max(1.0, float(self.own_tokens()))

    def own_rows(self) -> int:
        """Count the rows of this batch."""
        return next((len(value) for value in self.values() if isinstance(value, Tensor)), 0)

    def own_tokens(self) -> int:
        """Count the supervised next-token targets of this batch: the labels from the second position on that are not ignored."""
        labels = self.get("labels")
        if labels is None or labels.dim() < 2:
            return self.own_rows()
        return int((labels[:, 1:] != IGNORED).sum())

    def parts(self) -> Iterator[Batch]:
        """Yield the flat batches inside: itself, or those it names, in order."""
        named = [value for value in self.values() if isinstance(value, Batch)]
        if not named:
            yield self
        for value in named:
            yield from value.parts()

    def masked(self) -> Batch:
        """Return the batch with an `attention_mask` wherever token rows lack one: 1 up to a row's last label, behind which nothing is learned."""
        made = Batch({key: value.masked() if isinstance(value, Batch) else value for key, value in self.items()})
        labels = self.get("labels")
        if "attention_mask" not in self and labels is not None and labels.dim() == 2:
            place = torch.arange(1, labels.shape[1] + 1, device=labels.device)
            last = torch.where(labels != IGNORED, place, 0).amax(dim=1, keepdim=True)
            made["attention_mask"] = (place <= last).long()
        made._rows, made._tokens = self._rows, self._tokens
        return made

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, denominators kept."""
        if device.type == "cpu":
            return self
        moved = Batch(
            {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device) for key, value in self.items()}
        )
        moved._rows, moved._tokens = self._rows, self._tokens
        return moved


class Numbered(Protocol):
    """Anything that gives the i-th batch."""

    def __getitem__(self, index: int) -> Batch: ...


class Counted(Numbered, Protocol):
    """Batches by number that know how many make a pass."""

    def __len__(self) -> int: ...


class Ragged:
    """Rows of integers of unequal length in one Arrow list column, read without a copy of the whole.

    Args:
        column: chunked array of lists of integers.
    """

    def __init__(self, column: pa.ChunkedArray):
        self._values: list[np.ndarray] = []
        starts, lengths, parts = [], [], []
        for part, chunk in enumerate(column.chunks):
            offsets = chunk.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            self._values.append(chunk.values.to_numpy(zero_copy_only=False))
            starts.append(offsets[:-1])
            lengths.append(np.diff(offsets))
            parts.append(np.full(len(chunk), part, np.int32))
        self._starts, self.lengths, self._parts = (
            np.concatenate(piece) if piece else np.zeros(0, np.int64) for piece in (starts, lengths, parts)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: np.ndarray, fill: int) -> Tensor:
        """Return rows as int64 (B, T), T the longest of them, padded on the right with `fill`."""
        lengths = self.lengths[rows]
        out = np.full((len(rows), int(lengths.max(initial=0))), fill, np.int64)
        inside = np.arange(out.shape[1]) < lengths[:, None]  # (B, T)
        row, column = np.nonzero(inside)
        source = self._starts[rows][row] + column
        if len(self._values) == 1:
            out[row, column] = self._values[0][source]
        else:
            part = self._parts[rows][row]
            for number in np.unique(part):
                chosen = part == number
                out[row[chosen], column[chosen]] = self._values[number][source[chosen]]
        return torch.from_numpy(out)


class Batches:
    """An endless shuffled stream of batches over rows, addressed by number; iterating gives each row once, in order.

    Args:
        rows: an encoded `datasets.Dataset` (see `remanence.data.encode`), or a dict of tensors with one row per example.
        size: rows per batch, cut to the number of rows.
        seed: of the shuffling.
        shuffle: `False` walks through the rows in their order, again and again (for one pass over a stream).
        pad: token that fills ragged columns; those whose name ends in `labels` are filled with IGNORED.

    Raises:
        Mistake: there are no rows.
    """

    def __init__(self, rows: Dataset | Mapping[str, Tensor], size: int, *, seed: int = 0, shuffle: bool = True, pad: int = 0):
        self.columns: dict[str, Column] = dict(rows) if isinstance(rows, Mapping) else _columns(rows)
        self.count = len(next(iter(self.columns.values()))) if self.columns else 0
        if self.count == 0:
            raise Mistake("data", "the set is empty", "check the path and the filter")
        self.size, self.seed, self.shuffle, self.pad = min(size, self.count), seed, shuffle, pad
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Return the number of batches that hold each row at least once."""
        return -(-self.count // self.size)

    def _epoch(self, number: int) -> np.ndarray:
        if self._order[0] != number:
            order = (
                torch.randperm(self.count, generator=generator(self.seed, "epoch", number)).numpy()
                if self.shuffle
                else np.arange(self.count)
            )
            self._order = (number, order)
        return self._order[1]

    def numbers(self, index: int) -> np.ndarray:
        """Return the row numbers of batch `index`: positions [index*size, (index+1)*size) of the epochs' orders laid end to end."""
        first, last = index * self.size, (index + 1) * self.size
        epoch, inside = divmod(first, self.count)
        if last <= (epoch + 1) * self.count:
            return self._epoch(epoch)[inside : inside + self.size]
        head = self._epoch(epoch)[inside:].copy()
        return np.concatenate([head, self._epoch(epoch + 1)[: self.size - len(head)]])  # size <= count: two epochs suffice

    def __getitem__(self, index: int) -> Batch:
        return self.take(self.numbers(index))

    def take(self, rows: np.ndarray) -> Batch:
        """Return the batch of the given row numbers."""
        batch, places = Batch(), torch.from_numpy(rows)
        for name, column in self.columns.items():
            if isinstance(column, Tensor):
                batch[name] = column.index_select(0, places)
            elif isinstance(column, Ragged):
                batch[name] = column.padded(rows, IGNORED if name.endswith("labels") else self.pad)
            else:
                batch[name] = column.take(rows)
        return batch

    def with_column(self, name: str, values: Tensor | Ragged) -> Batches:
        """Return these batches with one more column, in the order of the rows: values of shape (N, ...), or ragged tokens and labels.

        Raises:
            ValueError: there is such a column already, or the number of values is not that of the rows.
        """
        if name in self.columns or len(values) != self.count:
            raise ValueError(f"column {name!r} of {len(values)} values does not fit {self.count} rows with {', '.join(self.columns)}")
        wider = copy.copy(self)
        wider.columns = self.columns | {name: values}
        return wider

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self.count, self.size):
            yield self.take(np.arange(first, min(first + self.size, self.count)))


class Zip:
    """Several streams side by side: batch i holds batch i of each, under its name.

    A stream whose batch is empty (a replay memory before its first row) is left out of that batch.
    """

    def __init__(self, **streams: Numbered):
        self.streams = streams

    def __getitem__(self, index: int) -> Batch:
        found = {name: stream[index] for name, stream in self.streams.items()}
        return Batch({name: batch for name, batch in found.items() if len(batch)})


class Pairs(Zip):
    """A forget and a retain stream side by side, each in its own shuffled order; a pass is a pass over the forget rows.

    Args:
        forget: rows that must go.
        retain: rows that must stay; without them the batches hold `forget` alone.
    """

    def __init__(self, forget: Batches, retain: Batches | None = None):
        super().__init__(**({"forget": forget} | ({"retain": retain} if retain is not None else {})))
        self._length = len(forget)

    def __len__(self) -> int:
        """Return the number of batches that hold each forget row at least once."""
        return self._length


class Changed:
    """Batches by number, each changed by a function of (number, batch) before anyone counts its rows and tokens (labels drawn anew, tokens left out).

    Args:
        batches: to be changed.
        change: returns the batch that takes the place of batch `number`.
    """

    def __init__(self, batches: Counted, change: Callable[[int, Batch], Batch]):
        self.batches, self.change = batches, change

    def __getitem__(self, index: int) -> Batch:
        return self.change(index, self.batches[index])

    def __len__(self) -> int:
        """Return the number of batches that make a pass."""
        return len(self.batches)


class Draws:
    """Random rows, with replacement, of a collection that may grow: position p of the stream takes row floor(u_p * len), u_p a hash of (seed, p).

    Args:
        rows: anything with `len` and `take(row numbers) -> Batch` (a replay memory).
        size: rows per batch.
        seed: of the draws.
    """

    def __init__(self, rows: Any, size: int, *, seed: int):
        self.rows, self.size, self.key = rows, size, np.uint64(derive(seed, "draw"))

    def __getitem__(self, index: int) -> Batch:
        if len(self.rows) == 0:
            return Batch()
        position = np.arange(index * self.size, (index + 1) * self.size, dtype=np.uint64)
        return self.rows.take((uniform(self.key, position) * len(self.rows)).astype(np.int64))


def uniform(key: np.uint64, position: np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1) for each position (uint64), a splitmix64 hash of (key, position): random access, no state."""
    with np.errstate(over="ignore"):
        z = key + (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Stored:
    """A column of equal-shaped arrays that is read from Arrow batch by batch (images of large sets)."""

    def __init__(self, rows: Dataset, name: str):
        self._rows, self._name = rows.with_format("numpy", columns=[name]), name

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._rows[rows][self._name]))


class _Viewed:
    """Images that are decoded and processed when their rows are taken (a set with a transform)."""

    def __init__(self, rows: Dataset):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self._rows[rows.tolist()]["pixel_values"])


Column = Tensor | Ragged | _Stored | _Viewed

_IN_MEMORY = 256 << 20  # bytes of a dense column that is kept as one tensor


def _columns(rows: Dataset) -> dict[str, Column]:
    import pyarrow as pa

    if rows.format["type"] == "custom":
        return {"pixel_values": _Viewed(rows), "labels": torch.tensor(rows.with_format(None)["label"][:], dtype=torch.int64)}
    if rows._indices is not None:
        rows = rows.flatten_indices()
    found: dict[str, Column] = {}
    for name in rows.column_names:
        column = rows.data.column(name)
        kind = column.type
        if name in ("input_ids", "labels") and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            found[name] = Ragged(column)
        elif column.nbytes > _IN_MEMORY and not pa.types.is_integer(kind):
            found[name] = _Stored(rows, name)
        else:
            found[name] = torch.from_numpy(np.ascontiguousarray(rows.with_format("numpy", columns=[name])[:][name]))
    return found
