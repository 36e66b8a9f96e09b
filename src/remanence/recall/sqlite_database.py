"""SQLite behind a store: connections, transactions, sentences for its errors.

One connection writes, behind a lock; every thread reads through its own, so readers never wait for a writer. WAL, and synced at every commit: what was
acknowledged is there after a power cut. Freed bytes are overwritten (`secure_delete`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from remanence.errors import Mistake
from remanence.recall.database import Ids

PATIENCE = 10.0  # seconds
LARGE = 256 * 2**20  # bytes: a larger file is not copied in memory


class _Connection(sqlite3.Connection):
    """A connection that can be remembered weakly."""


class SqliteDatabase:
    """Open a database file.

    Args:
        file: made if it is absent and `write` is set.
        write: `False` to read only.
    """

    def __init__(self, file: Path, *, write: bool = True):
        self.place, self._file, self.write = str(file.parent), file, write
        self._mutex = threading.RLock()
        self._owner: int | None = None  # the thread whose transaction is open
        self._done: list[Callable[[], None]] = []
        self._undone: list[Callable[[], None]] = []
        self._local = threading.local()
        self._connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self.closed = False
        self._writer = self._connect()

    def _connect(self) -> _Connection:
        try:
            if self.write and not self._file.exists():
                os.close(os.open(self._file, os.O_CREAT | os.O_WRONLY, 0o600))  # for its owner alone; the log takes the same rights
            base = sqlite3.connect(self._file, isolation_level=None, timeout=PATIENCE, check_same_thread=False, factory=_Connection)
            self._connections.add(base)
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON") if self.write else ("query_only=ON",):
                base.execute(f"PRAGMA {pragma}")
            base.execute("PRAGMA temp_store=MEMORY")
        except (sqlite3.Error, OSError) as error:
            raise self.told(error) from error
        return base

    def told(self, error: Exception) -> Mistake:
        """Return the sentence for what SQLite reported."""
        said = str(error)
        if self.closed:
            return Mistake(self.place, "the store is closed", "open it again")
        if isinstance(error, OverflowError):
            return Mistake(self.place, "a number is too large to be stored or sought", "give one below 2^63")
        if isinstance(error, OSError) or any(words in said for words in ("disk is full", "disk I/O", "unable to open", "out of memory")):
            return Mistake(self.place, f"cannot be written or read ({said})", "free the disk or check it; nothing of this write was stored")
        if "locked" in said or "busy" in said:
            return Mistake(self.place, "is held by another program", "wait for it, or stop it")
        if "readonly" in said or "read-only" in said:
            return Mistake(self.place, f"cannot be written ({said})", "check its permissions")
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
            return Mistake(self.place, f"refused ({said})", "nothing of this write was stored; report this")
        return Mistake(self._file, f"is damaged ({said})", "restore it from a backup")

    def _base(self) -> _Connection:
        """Return this thread's connection: the writer's inside its transaction, else its own."""
        if self.closed:
            raise Mistake(self.place, "the store is closed", "open it again")
        if self._owner == threading.get_ident():
            return self._writer
        base: _Connection | None = getattr(self._local, "base", None)
        if base is None:
            base = self._local.base = self._connect()
        return base

    def all(self, question: str, *values: Any) -> list[Any]:
        """Return the rows of a question; inside this thread's transaction it sees what that wrote."""
        try:
            return self._base().execute(question, values).fetchall()
        except (sqlite3.Error, OverflowError) as error:
            raise self.told(error) from error

    def one(self, question: str, *values: Any) -> Any:
        """Return the first column of the first row, `None` where there is no row."""
        found = self.all(question, *values)
        return found[0][0] if found else None

    def numbers(self, question: str, *values: Any) -> Int64[np.ndarray, "N"]:
        """Return the numbers of a question's one column, which it names `n`, sorted; as one string: ten times as fast as row by row."""
        listed = self.one(f"SELECT group_concat(n) FROM ({question})", *values)
        return np.sort(np.fromstring(listed, dtype=np.int64, sep=",")) if listed else np.empty(0, np.int64)

    def do(self, statement: str, *values: Any) -> list[Any]:
        """Write; return the rows that `RETURNING` names."""
        try:
            return self._writer.execute(statement, values).fetchall()
        except (sqlite3.Error, OverflowError) as error:
            raise self.told(error) from error

    def count(self, statement: str, *values: Any) -> int:
        """Write; return how many rows were changed."""
        try:
            return self._writer.execute(statement, values).rowcount
        except (sqlite3.Error, OverflowError) as error:
            raise self.told(error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Group writes of this thread: all of them or none; a nested one that fails takes back its own writes alone."""
        if not self.write:
            raise Mistake(self.place, "is open for reading", "open it for writing")
        with self._mutex:
            if self.closed:
                raise Mistake(self.place, "the store is closed", "open it again")
            if self._owner is None:
                with self._outermost():
                    yield
            else:
                with self._nested():
                    yield
                return
            done, self._done = self._done, []
            for call in done:
                call()

    @contextlib.contextmanager
    def _outermost(self) -> Iterator[None]:
        self._done, self._undone = [], []
        try:
            self.do("BEGIN IMMEDIATE")
            self._owner = threading.get_ident()
            yield
            if not self._writer.in_transaction:  # SQLite has taken it back by itself: a full disk
                raise Mistake(self.place, "cannot be written", "free the disk; nothing of this write was stored")
            self.do("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            for call in self._undone:
                call()
            raise
        finally:
            self._owner = None

    @contextlib.contextmanager
    def _nested(self) -> Iterator[None]:
        try:
            self.do("SAVEPOINT nested")
            yield
            self.do("RELEASE nested")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK TO nested")
                self._writer.execute("RELEASE nested")
            raise

    def afterwards(self, done: Callable[[], None] | None, undone: Callable[[], None] | None) -> None:
        """Call one of the two when the outermost transaction has ended."""
        self._done += [] if done is None else [done]
        self._undone += [] if undone is None else [undone]

    def among(self, column: str) -> str:
        """Return the condition that a column is one of the ids that `listed` prepared."""
        return f"{column} IN (SELECT value FROM json_each(?))"

    def listed(self, ids: Ids) -> str:
        """Return ids as one value."""
        return json.dumps([int(id) for id in ids])

    def check(self) -> None:
        """Look for damage, in the indexes too: 3 seconds of a million chunks.

        Raises:
            Mistake: a page does not hold what it must.
        """
        damage = self.one(
            "PRAGMA integrity_check(1)"
        )  # quick_check leaves out what an index points to: rows would be read twice, or not at all
        if damage != "ok":
            raise self.told(sqlite3.DatabaseError(str(damage).splitlines()[-1]))

    def compact(self) -> None:
        """Write the file anew without its free bytes, and empty and truncate the log."""
        with self._mutex:
            if self._file.stat().st_size > LARGE:
                self.do("PRAGMA temp_store=FILE")  # the copy holds nothing that is not in the store as well
            self.do("VACUUM")
            self.do("PRAGMA temp_store=MEMORY")
            self.empty_log()

    def empty_log(self) -> None:
        """Move the log into the file and truncate it.

        Raises:
            Mistake: another program reads from it all the while.
        """
        with self._mutex:
            until = time.monotonic() + PATIENCE
            while self.do("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] != 0:
                if time.monotonic() > until:
                    raise Mistake(self.place, "the log cannot be emptied: another program reads the store", "stop it, and scrub again")
                time.sleep(0.05)

    def close(self) -> None:
        """Close all connections."""
        with self._mutex:
            self.closed = True
            for base in list(self._connections):
                base.close()
