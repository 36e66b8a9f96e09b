"""PostgreSQL behind a store: connections, transactions, sentences for its errors.

Several processes may write: each transaction takes an advisory lock of the schema first, so writes come one after the other and ids grow in the order in
which they become visible. One connection writes, behind a lock; every thread reads through its own.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, LiteralString, cast

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict

from remanence.errors import Mistake
from remanence.recall.database import Ids

LOCK = 0x52454D  # the first half of the advisory lock; the schema's hash is the second


class PostgresDatabase:
    """Connect to a schema of a database.

    Args:
        dsn: `postgresql://user@host/database` or any other connection string of libpq.
        schema: made if it is absent and `write` is set.
        write: `False` to read only.
    """

    def __init__(self, dsn: str, schema: str, *, write: bool = True):
        self._dsn, self.schema, self.write = dsn, schema, write
        try:
            parts = conninfo_to_dict(dsn)
        except psycopg.ProgrammingError as error:
            raise Mistake("dsn", "is no connection string of PostgreSQL", "give postgresql://user@host/database") from error
        self.place = f"{parts.get('dbname', 'postgres')}.{schema} on {parts.get('host', 'this machine')}"  # never the password
        self._mutex = threading.RLock()
        self._owner: int | None = None
        self._done: list[Callable[[], None]] = []
        self._undone: list[Callable[[], None]] = []
        self._local = threading.local()
        self._connections: weakref.WeakSet[psycopg.Connection[Any]] = weakref.WeakSet()
        self.closed = False
        self._writer = self._connect()

    def _connect(self) -> psycopg.Connection[Any]:
        with self._telling():
            base = psycopg.connect(self._dsn, autocommit=True)
            self._connections.add(base)
            if self.write:
                with contextlib.suppress(errors.UniqueViolation):  # another process may be first
                    base.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self.schema)))
            else:
                base.execute("SET default_transaction_read_only = on")
            base.execute(sql.SQL("SET search_path TO {}, public").format(sql.Identifier(self.schema)))
            return base

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except errors.NumericValueOutOfRange as error:
            raise Mistake(self.place, "a number is too large to be stored or sought", "give one below 2^63") from error
        except errors.DiskFull as error:
            raise Mistake(self.place, "cannot be written (the disk is full)", "free the disk; nothing of this write was stored") from error
        except (errors.UndefinedTable, errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction) as error:
            raise Mistake(self.place, f"cannot be used ({_line(error)})", "check the schema, and the rights of this user") from error
        except (errors.DataCorrupted, errors.IndexCorrupted) as error:
            raise Mistake(self.place, f"is damaged ({_line(error)})", "restore it from a backup") from error
        except psycopg.OperationalError as error:
            raise Mistake(
                self.place, f"cannot be reached ({_line(error)})", "check that the server runs, and the connection string"
            ) from error
        except psycopg.Error as error:
            raise Mistake(self.place, f"refused ({_line(error)})", "nothing of this write was stored; report this") from error

    def _base(self) -> psycopg.Connection[Any]:
        """Return this thread's connection: the writer's inside its transaction, else its own."""
        if self.closed:
            raise Mistake(self.place, "the store is closed", "open it again")
        if self._owner == threading.get_ident():
            return self._writer
        base: psycopg.Connection[Any] | None = getattr(self._local, "base", None)
        if base is None or base.closed:
            base = self._local.base = self._connect()
        return base

    def all(self, question: str, *values: Any) -> list[Any]:
        """Return the rows of a question; inside this thread's transaction it sees what that wrote."""
        base = self._base()
        with self._telling():
            try:
                return base.execute(_marked(question), values).fetchall()
            except psycopg.OperationalError:
                if base is self._writer or not base.closed:
                    raise
            return self._base().execute(_marked(question), values).fetchall()  # the server was started anew: once more

    def one(self, question: str, *values: Any) -> Any:
        """Return the first column of the first row, `None` where there is no row."""
        found = self.all(question, *values)
        return found[0][0] if found else None

    def do(self, statement: str, *values: Any) -> list[Any]:
        """Write; return the rows that `RETURNING` names."""
        with self._telling():
            cursor = self._writer.execute(_marked(statement), values)
            return cursor.fetchall() if cursor.description else []

    def count(self, statement: str, *values: Any) -> int:
        """Write; return how many rows were changed."""
        with self._telling():
            return self._writer.execute(_marked(statement), values).rowcount

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Group writes of this thread: all of them or none; a nested one that fails takes back its own writes alone."""
        if not self.write:
            raise Mistake(self.place, "is open for reading", "open it for writing")
        with self._mutex:
            if self.closed:
                raise Mistake(self.place, "the store is closed", "open it again")
            if self._owner is not None:
                with self._telling(), self._writer.transaction():  # a savepoint
                    yield
                return
            if self._writer.closed:
                self._writer = self._connect()
            self._done, self._undone = [], []
            try:
                with self._telling(), self._writer.transaction():
                    self._writer.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (LOCK, self.schema))
                    self._owner = threading.get_ident()
                    yield
            except BaseException:
                for call in self._undone:
                    call()
                raise
            finally:
                self._owner = None
            done, self._done = self._done, []
            for call in done:
                call()

    def afterwards(self, done: Callable[[], None] | None, undone: Callable[[], None] | None) -> None:
        """Call one of the two when the outermost transaction has ended."""
        self._done += [] if done is None else [done]
        self._undone += [] if undone is None else [undone]

    def among(self, column: str) -> str:
        """Return the condition that a column is one of the ids that `listed` prepared."""
        return f"{column} = ANY(?)"

    def listed(self, ids: Ids) -> list[int]:
        """Return ids as one value."""
        return [int(id) for id in ids]

    def alone(self, statement: str) -> None:
        """Run what no transaction may hold (`VACUUM`)."""
        if not self.write:
            raise Mistake(self.place, "is open for reading", "open it for writing")
        with self._mutex, self._telling():
            self._writer.execute(cast(LiteralString, statement))

    def close(self) -> None:
        """Close all connections."""
        with self._mutex:
            self.closed = True
            for base in list(self._connections):
                base.close()


def _marked(statement: str) -> LiteralString:
    return cast(LiteralString, statement.replace("?", "%s"))  # no statement of the store holds a question mark otherwise


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
