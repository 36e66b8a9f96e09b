"""The append-only record of what a model remembered, when: one SQLite file, one transaction per event, step block or probe.

A row that is written again (after a kill, when steps are redone from the last checkpoint) is the same row: the key decides, the first one stays.

| table    | one row per | key |
|----------|-------------|-----|
| runs     | life of a model | run |
| events   | task or request that was served | run, event |
| steps    | optimizer step and metric (`loss`, `rate`, `norm`) | run, event, stage, step, metric |
| scores   | number that a probe found | run, event, step, probe, subject, metric |
| items    | row of data that a probe looked at | run, event, step, probe, subject, item |
| moved    | weight tensor that an event changed | run, event, weight |
| notes    | anything else worth keeping (masks, receipts), as JSON | run, event, name |

`event` counts from 1; event 0 is the start model. `step` is -1 at the end of an event (and for event 0), else the optimizer step inside it, counted over the
event's stages. `seconds`/`at` columns are wall-clock and the only columns that two identical runs may differ in.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from remanence.errors import Mistake

SCHEMA_VERSION = 1
END = -1  # the step of a measurement made after the event

SCHEMA = """
CREATE TABLE runs(
  run TEXT PRIMARY KEY, recipe TEXT NOT NULL, life TEXT NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL, versions TEXT NOT NULL,
  parameters INTEGER NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE events(
  run TEXT NOT NULL, event INTEGER NOT NULL, name TEXT NOT NULL, verb TEXT NOT NULL, kind TEXT NOT NULL, method TEXT NOT NULL, settings TEXT NOT NULL,
  rows INTEGER NOT NULL, steps INTEGER NOT NULL, weights_before TEXT NOT NULL, weights_after TEXT NOT NULL, seconds REAL NOT NULL, at REAL NOT NULL,
  PRIMARY KEY(run, event)) WITHOUT ROWID;
CREATE TABLE steps(
  run TEXT NOT NULL, event INTEGER NOT NULL, stage INTEGER NOT NULL, step INTEGER NOT NULL, metric TEXT NOT NULL, value REAL,
  PRIMARY KEY(run, event, stage, step, metric)) WITHOUT ROWID;
CREATE TABLE scores(
  run TEXT NOT NULL, event INTEGER NOT NULL, step INTEGER NOT NULL, probe TEXT NOT NULL, subject TEXT NOT NULL, metric TEXT NOT NULL, value REAL,
  PRIMARY KEY(run, event, step, probe, subject, metric)) WITHOUT ROWID;
CREATE TABLE items(
  run TEXT NOT NULL, event INTEGER NOT NULL, step INTEGER NOT NULL, probe TEXT NOT NULL, subject TEXT NOT NULL, item TEXT NOT NULL, scores TEXT NOT NULL,
  PRIMARY KEY(run, event, step, probe, subject, item)) WITHOUT ROWID;
CREATE TABLE moved(
  run TEXT NOT NULL, event INTEGER NOT NULL, weight TEXT NOT NULL, role TEXT NOT NULL, layer INTEGER, size INTEGER NOT NULL, changed INTEGER NOT NULL,
  relative REAL, PRIMARY KEY(run, event, weight)) WITHOUT ROWID;
CREATE TABLE notes(
  run TEXT NOT NULL, event INTEGER NOT NULL, name TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY(run, event, name)) WITHOUT ROWID;
"""
TABLES = ("runs", "events", "steps", "scores", "items", "moved", "notes")
CLOCKS = {"runs": ("at",), "events": ("seconds", "at")}


class Ledger:
    """Open (or create) a ledger file.

    Args:
        path: the SQLite file; `:memory:` for one that is not kept.
        create: make the file if it is absent; `False` to read an existing one.

    Raises:
        Mistake: the file is absent (with `create=False`), is not a ledger, has another schema version, or cannot be written.
    """

    def __init__(self, path: str | Path, *, create: bool = True):
        self.path = Path(path)
        memory = str(path) == ":memory:"
        if not memory and not create and not self.path.is_file():
            raise Mistake(path, "there is no ledger here", "name the ledger.sqlite that `remanence run` wrote")
        try:
            if not memory:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(str(path), isolation_level=None, timeout=10)
            self._base.row_factory = sqlite3.Row
            self._base.execute("PRAGMA journal_mode=WAL" if create else "PRAGMA query_only=ON")
            self._base.execute("PRAGMA synchronous=FULL")  # states are synced too, and removed on the word of the ledger
            self._prepare(create)
        except (sqlite3.Error, OSError) as error:
            remedy = "free the disk, or name another output" if create else "name a ledger.sqlite that a run wrote"
            raise Mistake(path, f"is not a usable ledger ({error})", remedy) from error

    def _prepare(self, create: bool) -> None:
        version = self._version()
        if version == 0 and create:
            with self.transaction():
                if self._base.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] and not self._version():
                    raise Mistake(self.path, "is another program's database", "name another output")
                if self._version() == 0:  # another process may have been first
                    for statement in SCHEMA.split(";"):
                        self._base.execute(statement)
                    self._base.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise Mistake(
                self.path, f"has schema version {version}, this program reads {SCHEMA_VERSION}", "open it with the version that wrote it"
            )

    def _version(self) -> int:
        return self._base.execute("PRAGMA user_version").fetchone()[0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Group writes: all of them or none. Nested use joins the outer transaction."""
        if self._base.in_transaction:
            yield
            return
        try:
            self._base.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise self._unwritten(error) from error
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._base.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):  # at the end of a transaction at the latest: the disk is full
                raise self._unwritten(error) from error
            raise

    def _unwritten(self, error: sqlite3.Error) -> Mistake:
        return Mistake(self.path, f"cannot be written ({error})", "free the disk or name another output, then go on with --resume")

    def write(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to a table in one transaction; rows whose key is there already are left as they are.

        Dicts and lists are stored as JSON.

        Raises:
            Mistake: the disk is full or the file cannot be written.
        """
        rows = list(rows)
        if not rows:
            return
        names = list(rows[0])
        marks = ", ".join("?" for _ in names)
        statement = f"INSERT INTO {table}({', '.join(names)}) VALUES({marks}) ON CONFLICT DO NOTHING"
        with self.transaction():
            self._base.executemany(statement, ([_plain(row[name]) for name in names] for row in rows))

    def read(self, question: str, *values: Any) -> list[dict[str, Any]]:
        """Return the rows of an SQL question as dicts.

        Raises:
            Mistake: the file is damaged, or held by another program.
        """
        try:
            return [dict(row) for row in self._base.execute(question, values)]
        except (sqlite3.OperationalError, sqlite3.DatabaseError) as error:
            raise Mistake(self.path, f"cannot be read ({error})", "restore it, or name another ledger") from error

    def rows(self, table: str, run: str | None = None, *, clocks: bool = True) -> list[dict[str, Any]]:
        """Return a table's rows in key order, of one run or of all; `clocks=False` leaves out the wall-clock columns."""
        where, values = ("", ()) if run is None else (" WHERE run = ?", (run,))
        drop = () if clocks else CLOCKS.get(table, ())
        found = self.read(f"SELECT * FROM {table}{where}", *values)
        return [{key: value for key, value in row.items() if key not in drop} for row in found]

    def done(self, run: str) -> int:
        """Return the number of the last event that is complete (0: none)."""
        return self._base.execute("SELECT COALESCE(MAX(event), 0) FROM events WHERE run = ?", (run,)).fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._base.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, sort_keys=True)
    if isinstance(value, float) and value != value:  # SQLite turns NaN into NULL anyway: say so here
        return None
    return value


def now() -> float:
    """Return the wall-clock time in seconds; the only clock that enters a ledger."""
    return time.time()
