"""What arrives: tasks to learn and requests to forget, in any order. No training code.

Rows live in Hugging Face `datasets.Dataset` objects (Arrow on disk, not RAM). The columns depend on the kind:

| kind    | columns |
|---------|---------|
| text    | `text` |
| qa      | `question`, `answer`; optionally `paraphrases` (list of questions), `paraphrased_answer`, `perturbed_answers` (list), `id`, any labels |
| chat    | `messages` (list of {role, content}) |
| classes | `features` (list of floats, or nested), `label` (int) |
| images  | `image` (PIL) , `label` (int) |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from remanence.errors import Mistake, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from remanence.training.trainer import Trainer

COLUMNS = {
    "text": ("text",),
    "qa": ("question", "answer"),
    "chat": ("messages",),
    "classes": ("features", "label"),
    "images": ("image", "label"),
}


def check_rows(place: str, rows: Dataset, kind: str) -> None:
    """Refuse an unknown kind, an empty set, or missing columns.

    Raises:
        Mistake: naming the place and the remedy.
    """
    if kind not in COLUMNS:
        raise Mistake(place, f"unknown kind '{kind}'", nearest(kind, COLUMNS))
    if len(rows) == 0:
        raise Mistake(place, "the set is empty", "check the path and the filter")
    missing = [name for name in COLUMNS[kind] if name not in rows.column_names]
    if missing:
        have = ", ".join(rows.column_names)
        raise Mistake(
            place, f"kind '{kind}' needs the column {missing[0]!r}, the set has {have}", "rename the column or choose another kind"
        )


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        name: unique within a stream.
        train: rows to train on.
        test: rows to measure on; `None` means the training rows themselves (recall of what was taught).
        kind: text | qa | chat | classes | images.
    """

    name: str
    train: Dataset
    test: Dataset | None = None
    kind: str = "text"

    def __post_init__(self) -> None:
        check_rows(f"task '{self.name}'", self.train, self.kind)
        if self.test is not None:
            check_rows(f"test set of task '{self.name}'", self.test, self.kind)

    @property
    def measured(self) -> Dataset:
        """The rows that probes look at."""
        return self.train if self.test is None else self.test


@dataclass(frozen=True)
class Request:
    """Something to forget, and what must survive.

    Args:
        name: unique within a stream.
        forget: rows whose influence must go.
        retain: rows that must stay (a sample, or all remaining training rows).
        neighbours: rows close to the forgotten ones that must stay too (measured, never trained on unless they are in `retain`).
        holdout: rows that the model never saw, distributed like `forget` (for membership inference).
        kind: as in `Task`.
    """

    name: str
    forget: Dataset
    retain: Dataset | None = None
    neighbours: Dataset | None = None
    holdout: Dataset | None = None
    kind: str = "qa"

    def __post_init__(self) -> None:
        for part in ("forget", "retain", "neighbours", "holdout"):
            rows = getattr(self, part)
            if rows is not None:
                check_rows(f"{part} set of request '{self.name}'", rows, self.kind)
        if self.retain is not None:
            refuse_overlap(f"request '{self.name}'", self.forget, self.retain, self.kind)

    @property
    def sets(self) -> dict[str, Dataset]:
        """The named sets that are present, in the order forget, retain, neighbours, holdout."""
        parts = {part: getattr(self, part) for part in ("forget", "retain", "neighbours", "holdout")}
        return {part: rows for part, rows in parts.items() if rows is not None}


def keys_of(rows: Dataset, kind: str) -> list[Any]:
    """Return one hashable key per row, from the columns that the kind trains on. O(rows)."""
    import pickle  # only to make a key of arrays and images; nothing is ever loaded with it

    plain = rows.with_format(None)
    columns = [plain[name][:] for name in COLUMNS[kind]]  # all rows at once, not one by one
    if kind in ("text", "qa"):
        return list(zip(*columns))
    return [pickle.dumps(row) for row in zip(*columns)]


def fingerprint(rows: Dataset, kind: str) -> str:
    """Return a SHA-256 that names a set of rows, whatever their order: over the sorted SHA-256 of each row's columns that the kind trains on. O(rows).

    Words are hashed as JSON in UTF-8, features as float32, pictures as their RGB pixels; a row that stands twice counts twice.
    """
    columns = [rows.with_format(None)[name][:] for name in COLUMNS[kind]]
    each = sorted(hashlib.sha256(b"\x1f".join(map(_cell_bytes, row))).digest() for row in zip(*columns))
    return hashlib.sha256(b"".join(each)).hexdigest()


def _cell_bytes(value: Any) -> bytes:
    import numpy as np

    if isinstance(value, str | dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    if hasattr(value, "convert"):
        return str(value.size).encode() + value.convert("RGB").tobytes()
    if isinstance(value, list):
        array = np.asarray(value, np.float32)
        return str(array.shape).encode() + array.tobytes()
    return str(value).encode()


def refuse_overlap(place: str, forget: Dataset, retain: Dataset, kind: str) -> None:
    """Refuse a forget set that shares a row with the retain set.

    Raises:
        Mistake: with the number of shared rows and the first one's number.
    """
    kept = set(keys_of(retain, kind))
    shared = [number for number, key in enumerate(keys_of(forget, kind)) if key in kept]
    if shared:
        raise Mistake(
            place,
            f"{len(shared)} rows of the forget set stand in the retain set too (the first is row {shared[0]})",
            "remove them from the retain set",
        )


Event = Task | Request


@dataclass(frozen=True)
class Stream:
    """The events of a life, in order.

    Raises:
        Mistake: two events share a name, or there are none.
    """

    events: Sequence[Event]

    def __post_init__(self) -> None:
        if not self.events:
            raise Mistake("stream", "there are no events", "add at least one task or request")
        names = [event.name for event in self.events]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise Mistake("stream", f"two events are called '{twice}'", "give every event its own name")

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    @property
    def tasks(self) -> list[Task]:
        """The tasks, in order."""
        return [event for event in self.events if isinstance(event, Task)]

    @property
    def requests(self) -> list[Request]:
        """The requests, in order."""
        return [event for event in self.events if isinstance(event, Request)]


@dataclass(frozen=True)
class Moment:
    """When and with what a probe looks.

    Args:
        event: number of the event, 0 before the first one.
        step: optimizer step inside the event, `None` at its end.
        processor: tokenizer or image processor of the model (`None` for plain feature models).
        seed: derived seed for a probe that samples.
    """

    event: int = 0
    step: int | None = None
    processor: Any = None
    seed: int = 0


@dataclass
class Scores:
    """What a probe found: named numbers, and per-item rows where they exist (`{"item": id or row number, metric: value, ...}`)."""

    values: dict[str, float]
    items: list[dict[str, Any]] = field(default_factory=list)


@runtime_checkable
class Learner(Protocol):
    """Take in a task. State between tasks lives on the object and is saved with it."""

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Remembering(Protocol):
    """A learner that keeps rows (a replay memory), or a model that keeps entries made of rows: it must let go of them on request."""

    def erase(self, request: Request, trainer: Trainer) -> int:
        """Remove every kept row that equals a forget row, or entry that was made of one; return how many went."""
        ...


@runtime_checkable
class Checking(Protocol):
    """A method that can say beforehand whether it will fit: asked before anything is written."""

    def check(self, model: nn.Module, event: Task | Request) -> None:
        """Refuse a model or an event that the method cannot serve, with a `Mistake`."""
        ...


@runtime_checkable
class Forgetter(Protocol):
    """Serve a deletion request."""

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module: ...


@runtime_checkable
class Auditor(Protocol):
    """Attack a served request; the models stay as they are."""

    def check(self, model: nn.Module, request: Request, oracle: nn.Module | None, processor: Any) -> None:
        """Refuse, with a `Mistake`, what could not be audited; asked before anything is written."""
        ...

    def audit(self, model: nn.Module, request: Request, original: nn.Module, oracle: nn.Module | None, at: Moment) -> dict[str, Any]:
        """Return what was found, as plain JSON without clock times.

        Args:
            model: after the request.
            request: what was asked.
            original: the model before the request.
            oracle: the model of a life that never saw the forgotten rows, if there is one.
            at: the moment.
        """
        ...


@runtime_checkable
class Probe(Protocol):
    """Look at a model without changing it (weights, mode, buffers and generators stay as they were)."""

    def measure(self, model: nn.Module, at: Moment) -> Scores: ...
