"""What the parts of a store need of a database: questions, writes, transactions, and an index of words if it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

Ids = Sequence[int] | np.ndarray


class Database(Protocol):
    """SQL with `?` for every value. Errors come out as `Mistake`."""

    place: str

    def all(self, question: str, *values: Any) -> list[Any]:
        """Return the rows of a question; inside this thread's transaction it sees what that wrote."""
        ...

    def one(self, question: str, *values: Any) -> Any:
        """Return the first column of the first row, `None` where there is no row."""
        ...

    def do(self, statement: str, *values: Any) -> list[Any]:
        """Write, inside a transaction; return the rows that `RETURNING` names."""
        ...

    def count(self, statement: str, *values: Any) -> int:
        """Write, inside a transaction; return how many rows were changed."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Group writes of this thread: all of them or none; a nested one that fails takes back its own writes alone."""
        ...

    def afterwards(self, done: Callable[[], None] | None, undone: Callable[[], None] | None) -> None:
        """Call one of the two when the outermost transaction has ended."""
        ...

    def among(self, column: str) -> str:
        """Return the condition that a column is one of the ids that `listed` prepared."""
        ...

    def listed(self, ids: Ids) -> Any:
        """Return ids as one value."""
        ...


class WordIndex(Protocol):
    """A full-text index on disk, one per plain space."""

    def make(self, space: int) -> None:
        """Make the index of a space."""
        ...

    def drop(self, space: int) -> None:
        """Remove the index of a space."""
        ...

    def add(self, space: int, chunk: int, text: str) -> None:
        """Index a chunk."""
        ...

    def remove(self, space: int, chunk: int, text: str) -> None:
        """Forget a chunk; `text` is what was given to `add`."""
        ...

    def search(self, space: int, asked: Sequence[str], k: int, where: str | None, values: Sequence[Any]) -> list[tuple[int, float]]:
        """Return (chunk, BM25 score) of chunks with any of the words, best first; `where`: of the messages `m` in conversations `v` alone."""
        ...
