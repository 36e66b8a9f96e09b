"""Replay memories: a bounded sample of everything seen, in preallocated tensors, with an exact account of its bytes.

| memory | keeps | sheet |
|---|---|---|
| ReservoirMemory | each of the n rows seen so far with probability M/n (Vitter 1985, algorithm R) | ER, DER++, A-GEM |
| RingMemory | the newest M rows | TRC2 |
| BalancedMemory | as near as possible the same number of rows of every label or group, uniformly inside each | class-balanced ER, GDumb |

What a memory holds depends on the rows and their order alone, not on how they were cut into batches. `add` costs O(B log B) for the
reservoir, and O((M + B) log (M + B)) on keys only for the balanced memory; no loop over rows.

Layout: each column is one tensor (M, ...). A batch with an `attention_mask` (B, T) is a batch of token rows: its columns of shape (B, T,
...) are as wide as the longest row so far, filled up with 0 (labels with -100), and the filling is cut off again when rows are drawn.
Logits over a vocabulary are the largest column by far: keep their top k, or only those that predict an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.seeds import generator
from remanence.training.batches import IGNORED, Batch

if TYPE_CHECKING:
    import numpy as np

    from remanence.stream import Request
    from remanence.training.trainer import Trainer

WINDOW = 8  # consecutive tokens that a kept block of text may share with a text that must go
FILL = {"labels": -100, "logits_at": -1}  # what stands after a row's end; 0 for all other columns


class _Memory:
    """Store rows in slots; the two memories below say which row goes where."""

    def __init__(
        self, capacity: int, seed: int, *, keep_logits: str | int = "full", logits_span: str = "row", device: str | torch.device = "cpu"
    ):
        if capacity < 0:
            raise Mistake("replay memory", f"the capacity is {capacity}", "give 0 (off) or more rows")
        if keep_logits != "full" and (not isinstance(keep_logits, int) or isinstance(keep_logits, bool) or keep_logits < 1):
            raise Mistake("replay memory", f"keep_logits is {keep_logits!r}", "give 'full' or the number of logits to keep")
        if logits_span not in ("row", "answer"):
            raise Mistake("replay memory", f"logits_span is {logits_span!r}", "give 'row' or 'answer'")
        self.capacity, self.keep_logits, self.logits_span, self.device = capacity, keep_logits, logits_span, torch.device(device)
        self.seen = 0
        self._count = 0
        self._columns: dict[str, Tensor] = {}
        self._ragged: dict[str, str] = {}  # column -> the column that says how long its rows are
        self._generator = generator(seed, type(self).__name__)

    def __len__(self) -> int:
        return self._count

    @property
    def bytes(self) -> int:
        """All stored tensors, as allocated: columns for all slots, and what the choice of rows needs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._columns.values(), *self._keys().values()))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the stored columns."""
        return tuple(self._columns)

    def draw(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `size` rows drawn uniformly, without replacement if there are as many (else all draws are independent).

        Args:
            size: rows to draw.
            generator: a CPU generator.

        Returns:
            The columns, token rows cut to the longest one drawn.

        Raises:
            Mistake: the memory is empty or `size` is not positive.
        """
        if self._count == 0 or size < 1:
            problem = "the memory is empty" if self._count == 0 else f"asked for {size} rows"
            raise Mistake("replay memory", problem, "add rows before drawing, and draw at least one")
        if size <= self._count:
            slots = torch.randperm(self._count, generator=generator)[:size]
        else:
            slots = torch.randint(self._count, (size,), generator=generator)
        return self.rows(slots)

    def rows(self, slots: Int[Tensor, "N"] | None = None) -> dict[str, Tensor]:
        """Return the rows in the given slots (`None`: all), token rows cut to the longest one."""
        slots = torch.arange(self._count) if slots is None else slots
        picked = {name: column[slots.to(self.device)] for name, column in self._columns.items()}
        ends = {length: _longest(length, picked[length]) for length in set(self._ragged.values())}
        return {name: value[:, : ends[self._ragged[name]]] if name in self._ragged else value for name, value in picked.items()}

    def take(self, rows: np.ndarray) -> Batch:
        """Return the batch of the given slots (for `training.batches.Draws`)."""
        return Batch(self.rows(torch.from_numpy(rows)))

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove what a request asks to forget, and return the number of rows that went.

        Rows are encoded as the trainer encodes them. Of kind text, where kept rows are blocks cut from joined texts, every block goes that shares
        `WINDOW` consecutive tokens with a forgotten text (or the whole of a shorter one).
        """
        if len(self) == 0:
            return 0
        if request.kind == "text":
            texts = trainer.processor(list(request.forget["text"]), add_special_tokens=False, verbose=False)["input_ids"]
            return self._drop(shares_window(self.rows()["input_ids"], texts, WINDOW))
        return sum(self.remove(batch) for batch in trainer.batches(request.forget, request.kind, size=256, shuffle=False))

    def remove(self, batch: Mapping[str, Tensor]) -> int:
        """Remove every kept row whose inputs and labels equal those of a row of the batch; return their number."""
        if len(self) == 0:
            return 0
        kept, gone = self.rows(), with_mask(batch)
        names = [name for name in ("input_ids", "pixel_values", "labels") if name in kept]
        if any(name not in gone for name in names):
            return 0
        return self._drop(rows_equal({name: kept[name] for name in (*names, *self._masks())}, gone))

    def _masks(self) -> tuple[str, ...]:
        return ("attention_mask",) if "attention_mask" in self._columns else ()

    def _drop(self, gone: Bool[Tensor, "M"]) -> int:
        """Empty slots, wipe what stood in them, and close the gaps."""
        stay, removed = torch.nonzero(~gone.cpu())[:, 0], int(gone.sum())
        if not removed:
            return 0
        for name, column in self._columns.items():
            column[: len(stay)] = column[: self._count][stay.to(self.device)]
            column[len(stay) :] = FILL.get(name, 0)
        for key in self._keys().values():
            key[: len(stay)] = key[: self._count][stay]
        self._count = len(stay)
        if self.seen <= self.capacity:
            self.seen -= removed
        return removed

    def state_dict(self) -> dict[str, Any]:
        """Return everything as a tree of tensors and numbers, for `storage.save_tree`."""
        return {
            "kind": type(self).__name__,
            "capacity": self.capacity,
            "seen": self.seen,
            "count": self._count,
            "columns": {name: column.clone() for name, column in self._columns.items()},
            "ragged": dict(self._ragged),
            "keys": {name: key.clone() for name, key in self._keys().items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; the memory goes on bit for bit as the saved one would have.

        Raises:
            Mistake: the state is of another kind or capacity.
        """
        for name, own in (("kind", type(self).__name__), ("capacity", self.capacity)):
            if state[name] != own:
                raise Mistake(
                    "replay memory",
                    f"the saved state has {name} {state[name]}, this memory {own}",
                    "resume with the settings it was saved with",
                )
        self.seen, self._count = state["seen"], state["count"]
        self._columns = {name: column.to(self.device, copy=True) for name, column in state["columns"].items()}
        self._ragged = dict(state["ragged"])
        self._generator.set_state(state["generator"].cpu())
        self._set_keys({name: key.clone() for name, key in state["keys"].items()})

    def _keys(self) -> dict[str, Tensor]:
        return {}

    def _set_keys(self, keys: dict[str, Tensor]) -> None:
        del keys

    def _prepare(self, batch: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return the columns to store, and the number of rows."""
        columns = {name: value.detach() for name, value in {**batch, **extra}.items() if isinstance(value, Tensor) and value.ndim}
        sizes = {name: len(value) for name, value in columns.items()}
        if len(set(sizes.values())) != 1:
            raise Mistake(
                "replay memory", f"the columns differ in length or there are none: {sizes}", "give one row per example in every column"
            )
        mask = columns.get("attention_mask", with_mask(columns).get("attention_mask"))
        if mask is not None:
            columns["attention_mask"] = mask
        ragged = (
            {}
            if mask is None
            else dict.fromkeys((name for name, value in columns.items() if value.shape[:2] == mask.shape), "attention_mask")
        )
        if "logits" in columns:
            packed = pack_logits(columns.pop("logits"), columns.get("labels"), self.keep_logits, self.logits_span)
            where = "logits_at" if "logits_at" in packed else ragged.get("logits")
            ragged = {name: length for name, length in ragged.items() if name != "logits"} | (dict.fromkeys(packed, where) if where else {})
            columns |= packed
        if not self._columns:
            self._ragged = ragged
        if self._columns and set(columns) != set(self._columns):
            raise Mistake(
                "replay memory",
                f"the batch has the columns {sorted(columns)}, the memory {sorted(self._columns)}",
                "keep to the same columns",
            )
        for name, column in self._columns.items():
            skip = 2 if name in self._ragged else 1
            if columns[name].shape[skip:] != column.shape[skip:] or ragged.get(name) != self._ragged.get(name):
                shapes = f"{tuple(columns[name].shape[1:])}, the memory's have {tuple(column.shape[1:])}"
                remedy = "give rows of one shape, or token rows with an attention_mask"
                raise Mistake("replay memory", f"rows of '{name}' have the shape {shapes}", remedy)
        return columns, next(iter(sizes.values()))

    def _write(self, columns: dict[str, Tensor], slots: Int[Tensor, "N"], rows: Int[Tensor, "N"]) -> None:
        """Put the named rows of a batch into slots (each slot once), making columns wider where rows are longer than any before."""
        for name, value in columns.items():
            fill = FILL.get(name, 0)
            if name not in self._columns:
                self._columns[name] = torch.full((self.capacity, *value.shape[1:]), fill, dtype=value.dtype, device=self.device)
            column = self._columns[name]
            if name in self._ragged and value.shape[1] > column.shape[1]:
                more = column.new_full((len(column), value.shape[1] - column.shape[1], *column.shape[2:]), fill)
                column = self._columns[name] = torch.cat([column, more], dim=1)
            picked = value[rows.to(value.device)].to(self.device)
            if name in self._ragged and value.shape[1] < column.shape[1]:
                column[slots] = fill
                column[slots, : value.shape[1]] = picked.to(column.dtype)
                continue
            column[slots] = picked.to(column.dtype)


class ReservoirMemory(_Memory):
    """Keep a uniform sample of all rows seen: row number n (from 0) takes slot n while there is room, then slot j ~ U{0..n} if j < M.

    Args:
        capacity: rows to keep (M); 0 keeps nothing.
        seed: of the choice of rows.
        keep_logits: of a column `logits`, all ("full") or the k largest.
        logits_span: keep logits for the whole "row", or (language models) only where they predict a label, "answer".
        device: where the rows lie.
    """

    def add(self, batch: Mapping[str, Tensor], **extra: Tensor) -> None:
        """Show a batch to the memory: dict of tensors (B, ...), and further columns by keyword (`logits=...`).

        Raises:
            Mistake: columns that differ in length, from those stored before, or in shape.
        """
        columns, size = self._prepare(batch, extra)
        draws = torch.rand(size, dtype=torch.float64, generator=self._generator)
        numbers = torch.arange(self.seen, self.seen + size)
        self.seen += size
        filled = self._count if self._count < min(self.capacity, int(numbers[0]) if size else 0) else None  # else rows were removed
        slots, rows = reservoir_slots(numbers, draws, self.capacity, filled)
        if len(slots):
            self._write(columns, slots.to(self.device), rows)
            self._count = max(self._count, int(slots.max()) + 1)


class RingMemory(_Memory):
    """Keep the newest M rows: row number n (from 0) takes slot n mod M. After an erasure those that stayed count as one pass, in the order of their slots.

    Args:
        capacity: rows to keep (M); 0 keeps nothing.
        seed, keep_logits, logits_span, device: as in `ReservoirMemory` (nothing is drawn).
    """

    def add(self, batch: Mapping[str, Tensor], **extra: Tensor) -> None:
        """Show a batch to the memory: dict of tensors (B, ...), and further columns by keyword.

        Raises:
            Mistake: as in `ReservoirMemory.add`.
        """
        columns, size = self._prepare(batch, extra)
        if self._count < min(self.capacity, self.seen):  # rows were removed: go on behind those that stayed
            self.seen = self._count
        rows = torch.arange(max(0, size - self.capacity), size)
        if self.capacity:
            self._write(columns, ((self.seen + rows) % self.capacity).to(self.device), rows)
        self.seen += size
        self._count = min(self.capacity, self.seen)


class BalancedMemory(_Memory):
    """Keep the same number of rows of every label or group, as near as they come, each group's drawn uniformly from its rows.

    Every row gets a random priority when it is seen. Rows are ranked by priority inside their group, and the M rows of smallest (rank,
    priority) stay: groups with fewer rows than their share keep all, and leave their room to the others; two groups that lost rows differ
    by one row at most.

    Args:
        capacity: rows to keep (M); 0 keeps nothing.
        seed: of the choice of rows.
        by: the integer column (B,) that groups the rows.
        keep_logits, logits_span, device: as in `ReservoirMemory`.
    """

    def __init__(self, capacity: int, seed: int, *, by: str = "labels", **options: Any):
        super().__init__(capacity, seed, **options)
        self.by = by
        self._group = torch.zeros(capacity, dtype=torch.int64)
        self._priority = torch.zeros(capacity, dtype=torch.float64)

    def add(self, batch: Mapping[str, Tensor], **extra: Tensor) -> None:
        """Show a batch to the memory: dict of tensors (B, ...), and further columns by keyword.

        Raises:
            Mistake: no integer column (B,) to group by; else as in `ReservoirMemory.add`.
        """
        columns, size = self._prepare(batch, extra)
        group = columns.get(self.by)
        if group is None or group.ndim != 1 or group.is_floating_point():
            raise Mistake("replay memory", f"the batch has no integer column '{self.by}' of shape (B,)", "pass one and name it with by=")
        count = self._count
        self.seen += size
        group = torch.cat([self._group[:count], group.cpu().long()])
        priority = torch.cat([self._priority[:count], torch.rand(size, dtype=torch.float64, generator=self._generator)])
        kept = balanced_choice(group, priority, self.capacity)
        rows = torch.nonzero(kept[count:])[:, 0]
        slots = torch.cat([torch.nonzero(~kept[:count])[:, 0], torch.arange(count, self.capacity)])[: len(rows)]
        if len(rows):
            self._write(columns, slots.to(self.device), rows)
            self._group[slots], self._priority[slots] = group[count + rows], priority[count + rows]
            self._count = int(kept.sum())

    def _keys(self) -> dict[str, Tensor]:
        return {"group": self._group, "priority": self._priority}

    def _set_keys(self, keys: dict[str, Tensor]) -> None:
        self._group, self._priority = keys["group"], keys["priority"]


def reservoir_slots(
    numbers: Int[Tensor, "B"], draws: Float[Tensor, "B"], capacity: int, filled: int | None = None
) -> tuple[Int[Tensor, "N"], Int[Tensor, "N"]]:
    """Return which slots are written, each once, and by which row of the batch: the last one that chose it (Vitter 1985, algorithm R).

    Args:
        numbers: how many rows were seen before each row.
        draws: uniform in [0, 1).
        capacity: number of slots.
        filled: slots in use, where rows were removed from a full reservoir: rows enter at the same odds as ever, and the first that do
            take the free slots instead of others' (random pairing, Gemulla et al. 2006).
    """
    slots = torch.where(numbers < capacity, numbers, (draws * (numbers + 1)).long())
    rows = torch.nonzero(slots < capacity)[:, 0]
    slots = slots[rows]
    if filled is not None:
        free = torch.arange(filled, capacity)[: len(slots)]
        slots[: len(free)] = free
    slots, order = slots.sort(stable=True)
    last = torch.ones_like(slots, dtype=torch.bool)
    last[:-1] = slots[1:] != slots[:-1]
    return slots[last], rows[order[last]]


def balanced_choice(group: Int[Tensor, "N"], priority: Float[Tensor, "N"], capacity: int) -> Bool[Tensor, "N"]:
    """Mark the `capacity` rows of smallest (rank of priority inside the group, priority). Ours; it fills groups as water fills vessels."""
    order = priority.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    place = torch.arange(len(group))
    ordered = group[order]
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    rank = torch.empty_like(place)
    rank[order] = place - torch.where(starts, place, 0).cummax(0).values
    best = priority.argsort(stable=True)
    best = best[rank[best].argsort(stable=True)][:capacity]
    kept = torch.zeros_like(group, dtype=torch.bool)
    kept[best] = True
    return kept


def pack_logits(logits: Tensor, labels: Tensor | None, keep: str | int = "full", span: str = "row") -> dict[str, Tensor]:
    """Return the columns that stand for logits (B, K) or (B, T, V) in a memory.

    Args:
        logits: of a batch.
        labels: (B, T) for `span="answer"`; the logits at t are kept where labels[t + 1] is not -100.
        keep: "full", or the number of largest logits at each position (their values and their int32 indices).
        span: "row" or "answer".

    Returns:
        `logits`, or `logits_values` and `logits_indices`; with `span="answer"` over A positions, and their places `logits_at` (B, A), -1
        after the last.

    Raises:
        Mistake: `span="answer"` without token labels, or `keep` above the number of classes.
    """
    packed = {}
    if span == "answer":
        if logits.ndim != 3 or labels is None or labels.ndim != 2:
            raise Mistake("replay memory", "logits_span='answer' needs logits (B, T, V) and labels (B, T)", "use logits_span='row'")
        marked = labels[:, 1:] != -100
        width = int(marked.sum(dim=1).max())
        at = marked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = marked.gather(1, at)
        logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1])) * real[..., None]
        packed["logits_at"] = torch.where(real, at, -1)
    if keep == "full":
        return {"logits": logits, **packed}
    if int(keep) > logits.shape[-1]:
        raise Mistake("replay memory", f"keep_logits is {keep}, the model has {logits.shape[-1]} classes", "keep fewer, or 'full'")
    values, indices = logits.topk(int(keep), dim=-1)
    return {"logits_values": values, "logits_indices": indices.to(torch.int32), **packed}


def stored_logits(logits: Tensor, drawn: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Bool[Tensor, "..."]]:
    """Return, for the rows that were drawn, the model's present logits and the stored ones at the same places, and which positions count.

    Args:
        logits: what the model says now, (B, K) or (B, T, V).
        drawn: what `draw` returned.

    Returns:
        present (B, ..., k), stored (B, ..., k), and a mask (B, ...): all for classes, attended positions for token rows, answers for
        `logits_at`.

    Raises:
        Mistake: the memory holds no logits.
    """
    if "logits" not in drawn and "logits_values" not in drawn:
        raise Mistake("replay memory", "holds no logits", "pass logits=... to add")
    mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if "logits_at" in drawn:
        at = drawn["logits_at"].to(logits.device)
        mask = at >= 0
        logits = logits.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1]))
    elif logits.ndim == 3 and "attention_mask" in drawn:
        mask = drawn["attention_mask"].to(logits.device) != 0
    if "logits" in drawn:
        return logits, drawn["logits"].to(logits.device), mask
    return logits.gather(-1, drawn["logits_indices"].to(logits.device).long()), drawn["logits_values"].to(logits.device), mask


def _longest(name: str, column: Tensor) -> int:
    """Return the length of the longest row by the column that marks what is real in each row."""
    used = (column >= 0 if name == "logits_at" else column != 0).any(dim=0)
    return int(torch.nonzero(used)[-1, 0]) + 1 if used.any() else 1


def make_memory(kind: str, capacity: int, seed: int) -> ReservoirMemory | BalancedMemory:
    """Return an empty memory of a kind of `MEMORIES`; a balanced one shares its room among the values of a column `group`."""
    return BalancedMemory(capacity, seed, by="group") if kind == "balanced" else ReservoirMemory(capacity, seed)


MEMORIES = ("reservoir", "balanced")


def groups(batch: Mapping[str, Tensor], task: int) -> Int[Tensor, "B"]:
    """Return what a balanced memory groups rows by: their class, or for token rows the number of their task."""
    labels = batch["labels"]
    return labels if labels.ndim == 1 else torch.full((len(labels),), task, dtype=torch.int64)


def with_mask(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with an `attention_mask` if it holds token rows without one: 1 up to a row's last label, behind which nothing is learned."""
    return dict(Batch(batch).masked())


def rows_equal(kept: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Bool[Tensor, "M"]:
    """Mark the rows of `kept` that stand in `other` with equal inputs and labels; what is masked does not count. O((M + B) log (M + B)) rows."""
    both = []
    for name in (name for name in kept if name != "attention_mask"):
        mine, theirs = (rows[name].cpu() for rows in (kept, other))
        if mine.is_floating_point():
            mine, theirs = (value.to(mine.dtype).contiguous().view(torch.uint8).long() for value in (mine, theirs))
        elif mine.ndim == 2 and "attention_mask" in kept:
            mine, theirs = (
                torch.where(rows["attention_mask"].cpu() != 0, value, IGNORED) for rows, value in ((kept, mine), (other, theirs))
            )
            width = max(mine.shape[1], theirs.shape[1])
            mine, theirs = (torch.nn.functional.pad(value, (0, width - value.shape[1]), value=IGNORED) for value in (mine, theirs))
        mine, theirs = mine.reshape(len(mine), -1), theirs.reshape(len(theirs), -1)
        if mine.shape[1] != theirs.shape[1]:
            return torch.zeros(len(mine), dtype=torch.bool)
        both.append(torch.cat([mine, theirs]))
    _, number = torch.unique(torch.cat(both, dim=1), dim=0, return_inverse=True)
    count = len(next(iter(kept.values())))
    return torch.isin(number[:count], number[count:])


def shares_window(rows: Int[Tensor, "M T"], texts: list[list[int]], size: int) -> Bool[Tensor, "M"]:
    """Mark the rows that hold `size` consecutive tokens of a text, or the whole of a text that is shorter."""
    found = torch.zeros(len(rows), dtype=torch.bool)
    for width in sorted({min(size, len(text)) for text in texts if text}):
        several = [torch.tensor(text) for text in texts if min(size, len(text)) == width]
        wanted = torch.cat([window_hashes(text[None], width)[0] for text in several])
        if rows.shape[1] >= width:
            found |= torch.isin(window_hashes(rows.cpu(), width), wanted).any(dim=1)
    return found


def window_hashes(rows: Int[Tensor, "M T"], width: int) -> Int[Tensor, "M W"]:
    """Return a 64-bit hash of every window of `width` tokens (a wrapping dot product with odd random numbers)."""
    keys = torch.randint(-(2**62), 2**62, (width,), generator=generator("window")) * 2 + 1
    total = torch.zeros(len(rows), rows.shape[1] - width + 1, dtype=torch.int64)
    for start, key in enumerate(keys):
        total += rows[:, start : rows.shape[1] - width + start + 1] * key
    return total
