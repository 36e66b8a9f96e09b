"""A store in a schema of a PostgreSQL server, with pgvector for dense search: for several servers over one memory.

The rows are those of `SqliteStore`; `vector` holds the same bytes and is the truth, and plain spaces have `dense` beside it, which the server searches
exactly. Words are ranked in memory (BM25, by the process that asks), as in sealed spaces.

What erasure means here: `scrub` rewrites every table (`VACUUM FULL`), so no table or index file holds a deleted row afterwards. The server's own log
(pg_wal) keeps written rows until its segments are recycled, and replicas, archives and dumps keep them for as long as they are kept; no client can change
that. Where a deletion must reach them as well, seal the space and drop it: its key never came to the server.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32

from remanence.errors import Mistake, nearest
from remanence.recall.items import Hit, Message, NewChunk, NewMessage, Selection
from remanence.recall.postgres_database import PostgresDatabase
from remanence.recall.protocols import Embedder
from remanence.recall.rows import PRECISIONS, decode_vectors, encode_vector
from remanence.recall.schema import FORMAT, tables
from remanence.recall.sql_store import SqlStore

ALL = ("about", "spaces", "conversations", "messages", "chunks", "gists", "history", "facts", "sources", "audit", "doomed")


class PostgresStore(SqlStore):
    """Open (or make) a store in a schema of a database that has the extension `vector`, or may make it.

    Args:
        dsn: `postgresql://user@host/database` or any other connection string of libpq.
        schema: that holds the tables; made if absent.
        embedder: name of what makes the vectors; `None`: the one that the store was made with.
        dim: width of the vectors.
        write: `False` to read only.
        precision: of the vectors of a new store: float16 | float32 | int8.

    Raises:
        Mistake: the server cannot be reached, another embedder, a newer format.
    """

    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "remanence",
        embedder: str | None = None,
        dim: int | None = None,
        write: bool = True,
        precision: str = "float16",
    ):
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise Mistake("schema", f"'{schema}' is no plain name", "use small letters, digits and underscores")
        base = self._postgres = PostgresDatabase(dsn, schema, write=write)
        try:
            _prepare(base, embedder, dim, precision)
            super().__init__(base, None, embedder, dim)
            if write:
                self._spaces.destroy_doomed()
                if self.scrub_due():
                    self.scrub()
        except BaseException:
            base.close()
            raise

    def append(self, space: str, conversation: str, message: NewMessage, chunks: Sequence[NewChunk]) -> tuple[Message, list[int]]:
        """Store a message with its chunks (space and conversation are made if absent); return it and the chunks' ids."""
        with self.transaction():
            stored, ids = super().append(space, conversation, message, chunks)
            self._densify(stored.space, ids, chunks)
            return stored, ids

    def replace(self, message: int, text: str, chunks: Sequence[NewChunk], *, at: float) -> tuple[Message, list[int]]:
        """Give a message another text and other chunks; the old ones are gone."""
        with self.transaction():
            stored, ids = super().replace(message, text, chunks, at=at)
            self._densify(stored.space, ids, chunks)
            return stored, ids

    def _densify(self, space: str, ids: Sequence[int], chunks: Sequence[NewChunk]) -> None:
        """Fill the column that the server searches, with what is read back: of plain spaces alone."""
        if ids and self._spaces.named(space).sealer is None:
            held = decode_vectors([encode_vector(chunk.vector, self.precision) for chunk in chunks], self.precision, self.dim)
            for id, vector in zip(ids, held):
                self._database.do("UPDATE chunks SET dense = ? WHERE id = ?", _literal(vector), id)

    def nearest(self, query: Float32[np.ndarray, "D"], k: int, selection: Selection) -> list[tuple[int, float]]:
        """Return (chunk id, cosine) of the `k` chunks of a selection that are nearest to a vector, best first, ties by the higher id; exact."""
        found: list[tuple[int, float]] = []
        for spaces, where, values in self._turns.scopes(selection):
            if spaces[0].sealer is None:
                away = "c.dense::public.vector <=> ?::public.vector"  # else the query would be rounded to the store's precision
                question = (
                    f"SELECT c.id, 1 - ({away}) FROM chunks c JOIN messages m ON m.id = c.message JOIN conversations v ON v.id = m.conversation "
                    f"WHERE {where} ORDER BY {away}, c.id DESC LIMIT ?"
                )
                found += self._database.all(question, _literal(query), *values, _literal(query), max(k, 0))
            else:
                among = self.chunk_ids(replace(selection, space=spaces[0].name))
                for ids, vectors in self.vectors(spaces[0].name):
                    cosines = vectors @ query / np.linalg.norm(vectors, axis=1)
                    found += [(int(ids[row]), float(cosines[row])) for row in np.flatnonzero(np.isin(ids, among))]
        return sorted(found, key=lambda pair: (-pair[1], -pair[0]))[: max(k, 0)]

    def scrub_due(self) -> bool:
        """Return whether rows were deleted since the last scrub."""
        return self._spaces.due() is not None

    def scrub(self) -> None:
        """Rewrite every table and index without the deleted rows; the server's own log is the server's (see the top of this file)."""
        due = self._spaces.due()
        for table in ALL:
            self._postgres.alone(f"VACUUM FULL {table}")
        self._spaces.unmark(due)

    def files(self) -> list[Any]:
        """Return no path: the files are the server's."""
        return []

    def stats(self, space: str | None = None) -> dict[str, Any]:
        """Return numbers of spaces, conversations, messages, chunks, facts, and bytes on the server's disk."""
        size = sum(int(self._database.one("SELECT pg_total_relation_size(?::regclass)", table)) for table in ALL)
        return {**self._counts(space), "bytes": size}

    def close(self) -> None:
        """Close the connections."""
        self._postgres.close()

    def __enter__(self) -> PostgresStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_made(dsn: str, schema: str) -> bool:
    """Return whether a schema holds a store.

    Raises:
        Mistake: the server cannot be reached.
    """
    base = PostgresDatabase(dsn, schema, write=False)
    try:
        return bool(base.one("SELECT 1 FROM information_schema.tables WHERE table_schema = ? AND table_name = 'about'", schema))
    finally:
        base.close()


class PostgresDense:
    """Rank the chunks of a selection by cosine, on the server; obeys `Retriever`."""

    name = "postgres-dense"

    def __init__(self, store: PostgresStore, embedder: Embedder):
        self._store, self._embedder = store, embedder

    def search(self, query: str, k: int, selection: Selection) -> list[Hit]:
        """Return at most `k` hits, best first."""
        scores = dict(self._store.nearest(self._embedder([query])[0], k, selection))
        return [Hit(chunk, scores[chunk.id], {"cosine": scores[chunk.id]}) for chunk in self._store.chunks(list(scores))]

    def refresh(self) -> None:
        """Do nothing: nothing is held here."""


def _literal(vector: Float32[np.ndarray, "D"]) -> str:
    return "[" + ",".join(repr(float(value)) for value in vector) + "]"


def _prepare(base: PostgresDatabase, embedder: str | None, dim: int | None, precision: str) -> None:
    """Make the tables of a new store; refuse a newer one."""
    if base.one("SELECT 1 FROM information_schema.tables WHERE table_schema = ? AND table_name = 'about'", base.schema):
        version = int(base.one("SELECT value FROM about WHERE name = 'format'"))
        if version > FORMAT:
            raise Mistake(
                base.place, f"has format {version}, this program reads {FORMAT}", "open it with the version that wrote it, or a newer one"
            )
        return
    if not base.write or embedder is None or dim is None or dim < 1:
        raise Mistake(base.place, "there is no store here", "name the schema of a store, or an embedder and its width for a new one")
    if precision not in PRECISIONS:
        raise Mistake("precision", f"'{precision}' is none", nearest(precision, PRECISIONS))
    with base.transaction():
        base.do("CREATE EXTENSION IF NOT EXISTS vector WITH SCHEMA public")
        for statement in tables(identity="BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY", blob="BYTEA"):
            base.do(statement)
        base.do(f"ALTER TABLE chunks ADD COLUMN dense public.{'halfvec' if precision == 'float16' else 'vector'}({dim})")
        about = {"id": secrets.token_hex(16), "format": str(FORMAT), "embedder": embedder, "dim": str(dim), "precision": precision}
        for name, value in about.items():
            base.do("INSERT INTO about(name, value) VALUES(?, ?)", name, value)
