"""A store in a folder: one SQLite file is the only source of truth for text, vectors, lineage and the audit log; one transaction per write.

| in the folder | what |
|---|---|
| recall.sqlite, -wal, -shm | the database, its log, the log's index |
| vectors/ | caches; disposable |
| lock | the number of the process that writes |

Cost of a write: one sync of the log. Vectors are kept as fp16 unless told otherwise, and what is read back is what every search uses, so opening a store
again changes no result.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.recall.database import Ids
from remanence.recall.items import Message, NewChunk
from remanence.recall.lock import Lock
from remanence.recall.rows import PRECISIONS
from remanence.recall.schema import FORMAT, tables
from remanence.recall.sql_store import SqlStore
from remanence.recall.sqlite_database import Fts, SqliteDatabase

FILE = "recall.sqlite"
LOCK = "lock"
CACHES = "vectors"


class SqliteStore(SqlStore):
    """Open (or make) a store in a folder.

    Args:
        path: the folder.
        embedder: name of what makes the vectors; `None`: the one that the store was made with.
        dim: width of the vectors.
        write: `False` to read only, beside a writer.
        precision: of the vectors of a new store: float16 | float32 | int8.

    Raises:
        Mistake: another writer, another embedder, a newer format, a damaged file, a full disk.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        embedder: str | None = None,
        dim: int | None = None,
        write: bool = True,
        precision: str = "float16",
    ):
        self.path = Path(path)
        if not write or (embedder is None and not (self.path / FILE).exists()):
            _expect(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Mistake(path, f"cannot be made ({error.strerror})", "name another folder") from error
        self._lock: Lock | None = Lock(self.path / LOCK) if write else None
        base: SqliteDatabase | None = None
        try:
            base = self._sqlite = SqliteDatabase(self.path / FILE, write=write)
            _prepare(base, self.path, embedder, dim, precision)
            base.check()
            self._fts = Fts(base)
            super().__init__(base, self._fts, embedder, dim)
            if write:
                self._spaces.destroy_doomed()
                if self.scrub_due():
                    self.scrub()
        except BaseException:
            if base is not None:
                base.close()
            if self._lock is not None:
                self._lock.release()
            raise

    def cache(self, space: str) -> Path | None:
        """Return a folder for disposable files made of a space's vectors, or `None` for a sealed space."""
        return None if self._spaces.named(space).sealer is not None else self.path / CACHES

    def drop_space(self, space: str) -> int:
        """Remove a space with everything in it, and destroy its key; return the number of messages."""
        with self.transaction():
            self._drop_caches()
            return super().drop_space(space)

    def replace(self, message: int, text: str, chunks: Sequence[NewChunk], *, at: float) -> tuple[Message, list[int]]:
        """Give a message another text and other chunks; the old ones are gone."""
        with self.transaction():
            self._drop_caches()
            return super().replace(message, text, chunks, at=at)

    def prune(self, ids: Ids) -> int:
        """Remove chunks (vectors and index entries; the messages stay); return how many there were."""
        with self.transaction():
            self._drop_caches()
            return super().prune(ids)

    def delete(self, ids: Ids) -> Mapping[str, int]:
        """Remove messages with their chunks, vectors, index entries, keys, and the facts that drew on them; return counts by kind."""
        with self.transaction():
            self._drop_caches()
            return super().delete(ids)

    def _drop_caches(self) -> None:
        """Remove every cache: they hold vectors of what is going; no one writes one inside a transaction of another thread."""
        try:
            if (self.path / CACHES).is_dir():
                shutil.rmtree(self.path / CACHES)
        except OSError as error:
            raise Mistake(
                self.path / CACHES, f"cannot be removed ({error.strerror})", "remove it, it holds vectors of what is to go"
            ) from error

    def scrub_due(self) -> bool:
        """Return whether rows were deleted since the last scrub."""
        return self._spaces.due() is not None

    def scrub(self) -> None:
        """Leave no trace of deleted rows in any file: caches gone, full-text index rebuilt, free pages overwritten, log emptied and truncated."""
        with self.transaction():
            due = self._spaces.due()
            self._drop_caches()
            for (space,) in self._database.all("SELECT id FROM spaces WHERE sealed IS NULL"):
                self._fts.purge(space)
        self._sqlite.compact()
        self._spaces.unmark(due)
        self._sqlite.empty_log()

    def files(self) -> list[Path]:
        """Return the paths of every file that holds or may hold content: database, log, caches, temporary files."""
        return sorted(path for path in self.path.rglob("*") if path.is_file() and path != self.path / LOCK)

    def stats(self, space: str | None = None) -> dict[str, Any]:
        """Return numbers of spaces, conversations, messages, chunks, facts, and bytes on disk."""
        return {**self._counts(space), "bytes": sum(path.stat().st_size for path in self.files() if path.exists())}

    def close(self) -> None:
        """Close the store and let the next writer in."""
        self._sqlite.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> SqliteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _expect(path: Path) -> None:
    if not (path / FILE).is_file():
        raise Mistake(path, "there is no store here", "name the folder of a store, or an embedder for a new one")


def _prepare(base: SqliteDatabase, path: Path, embedder: str | None, dim: int | None, precision: str) -> None:
    """Make the tables of a new store; refuse what is none of ours, or newer."""
    version = base.one("PRAGMA user_version")
    if version > FORMAT:
        raise Mistake(path, f"has format {version}, this program reads {FORMAT}", "open it with the version that wrote it, or a newer one")
    if version == FORMAT:
        return
    if not base.write or base.one("SELECT COUNT(*) FROM sqlite_master"):
        raise Mistake(path / FILE, "is another program's database", "name another folder")
    if embedder is None or dim is None or dim < 1:
        raise Mistake(path, "there is no store here", "name the folder of a store, or an embedder and its width for a new one")
    if precision not in PRECISIONS:
        raise Mistake("precision", f"'{precision}' is none", nearest(precision, PRECISIONS))
    with base.transaction():
        for statement in tables(identity="INTEGER PRIMARY KEY AUTOINCREMENT", blob="BLOB"):
            base.do(statement)
        for name, value in {"id": secrets.token_hex(16), "embedder": embedder, "dim": str(dim), "precision": precision}.items():
            base.do("INSERT INTO about(name, value) VALUES(?, ?)", name, value)
        base.do(f"PRAGMA user_version={FORMAT}")
