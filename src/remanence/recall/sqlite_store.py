"""A store in one SQLite file: text, vectors, lineage and audit log, one transaction per write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from remanence.errors import Mistake, nearest
from remanence.recall.items import GISTS, ROLES, Chunk, Fact, Gist, Message, NewChunk, NewMessage, Selection
from remanence.recall.lock import Lock
from remanence.recall.rows import (
    MESSAGE,
    PRECISIONS,
    Space,
    check_chunks,
    check_message,
    check_name,
    check_text,
    decode_vectors,
    encode_vector,
    open_chunk,
    open_message,
    shut_message,
)
from remanence.recall.schema import FORMAT, tables
from remanence.recall.sealing import Sealer, destroy_key, keys_folder, make_key, read_key
from remanence.recall.words import Bm25, words

FILE = "recall.sqlite"
FROM = "FROM messages m JOIN conversations v ON v.id = m.conversation"
BATCH = 1000


class _Connection(sqlite3.Connection):
    """A connection that can be remembered weakly."""


class SqliteStore:
    """Open (or make) a store in a folder.

    Args:
        path: the folder.
        embedder: name of what makes the vectors; `None`: the one that the store was made with.
        dim: width of the vectors.
        write: `False` to read only, beside a writer.
        precision: of the vectors, for a new store: float16 | float32 | int8.

    Raises:
        Mistake: another writer, another embedder, a newer format, a damaged file, a full disk.
    """

    def __init__(
        self, path: str | Path, *, embedder: str | None = None, dim: int | None = None, write: bool = True, precision: str = "float16"
    ):
        self.path = Path(path)
        self._file = self.path / FILE
        self._write = write
        self._mutex = threading.RLock()
        self._owner: int | None = None
        self._local = threading.local()
        self._readers: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._closed = False
        self._sealers: dict[str, Sealer] = {}
        self._ranked: dict[int, tuple[int, Bm25]] = {}
        self._lock: Lock | None = None
        if not write and not self._file.is_file():
            raise Mistake(path, "there is no store here", "name the folder of a store")
        try:
            if write:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = Lock(self.path / "lock")
            self._writer = self._connect()
            self._prepare(embedder, dim, precision)
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.Error | OSError):
                raise self._told(error) from error
            raise

    # Connections and transactions.

    def _connect(self) -> _Connection:
        base = sqlite3.connect(self._file, isolation_level=None, timeout=10, check_same_thread=False, factory=_Connection)
        self._readers.add(base)
        if self._write:
            base.execute("PRAGMA journal_mode=WAL")
            base.execute("PRAGMA synchronous=FULL")
            base.execute("PRAGMA secure_delete=ON")
            base.execute("PRAGMA temp_store=MEMORY")
        else:
            base.execute("PRAGMA query_only=ON")
        return base

    def _prepare(self, embedder: str | None, dim: int | None, precision: str) -> None:
        version = self._writer.execute("PRAGMA user_version").fetchone()[0]
        if version > FORMAT:
            raise Mistake(
                self.path, f"has format {version}, this program reads {FORMAT}", "open it with the version that wrote it, or a newer one"
            )
        if version == 0:
            if not self._write or self._writer.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                raise Mistake(self.path, f"{FILE} is another program's database", "name another folder")
            if embedder is None or dim is None:
                raise Mistake(self.path, "there is no store here", "name the folder of a store, or the embedder of a new one")
            if precision not in PRECISIONS:
                raise Mistake("precision", f"'{precision}' is none", nearest(precision, PRECISIONS))
            with self.transaction():
                for statement in tables(identity="INTEGER PRIMARY KEY AUTOINCREMENT", blob="BLOB"):
                    self._do(statement)
                about = {"id": secrets.token_hex(16), "embedder": embedder, "dim": str(dim), "precision": precision}
                for name, value in about.items():
                    self._do("INSERT INTO about(name, value) VALUES(?, ?)", name, value)
                self._do(f"PRAGMA user_version={FORMAT}")
        damage = self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise sqlite3.DatabaseError(damage.splitlines()[0])
        about = dict(self._all("SELECT name, value FROM about"))
        self.id, self.embedder, self.dim, self.precision = about["id"], about["embedder"], int(about["dim"]), about["precision"]
        self._keys = keys_folder(self.id)
        if embedder is not None and (embedder != self.embedder or (dim is not None and dim != self.dim)):
            raise Mistake(
                self.path,
                f"was made with the embedder '{self.embedder}' ({self.dim} numbers), not '{embedder}' ({dim})",
                "name that one, or embed the store again with `remanence recall reindex`",
            )
        if self._write:
            self._destroy_doomed()
            if "scrub" in about:  # a kill came between a deletion and its scrub
                self.scrub()

    def _told(self, error: Exception) -> Mistake:
        """Return the sentence for what SQLite or the disk reported."""
        said = str(error)
        if isinstance(error, OSError) or "full" in said or "I/O" in said or "disk" in said:
            return Mistake(self.path, f"cannot be written or read ({said})", "free the disk or check it; nothing of this write was stored")
        if "locked" in said or "busy" in said:
            return Mistake(self.path, "is held by another program", "wait for it, or stop it")
        if isinstance(error, sqlite3.OperationalError) and "readonly" in said:
            return Mistake(self.path, "cannot be written (it is read-only)", "check its permissions")
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.IntegrityError):
            return Mistake(self._file, f"is damaged ({said})", "restore it from a backup")
        return Mistake(self.path, f"refused the write ({said})", "report this")

    def _base(self) -> _Connection:
        """Return this thread's connection: the writer's inside its transaction, else its own."""
        if self._owner == threading.get_ident():
            return self._writer
        if self._closed:
            raise Mistake(self.path, "the store is closed", "open it again")
        base: _Connection | None = getattr(self._local, "base", None)
        if base is None:
            base = self._local.base = self._connect()
        return base

    def _all(self, question: str, *values: Any) -> list[Any]:
        try:
            return self._base().execute(question, values).fetchall()
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _one(self, question: str, *values: Any) -> Any:
        found = self._all(question, *values)
        return found[0][0] if found else None

    def _do(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._writer.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._told(error) from error

    def _count(self, statement: str, *values: Any) -> int:
        """Return how many rows a statement changed."""
        try:
            return self._writer.execute(statement, values).rowcount
        except sqlite3.Error as error:
            raise self._told(error) from error

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Group writes of this thread: all of them or none; nested use joins the outer one."""
        if not self._write:
            raise Mistake(self.path, "is open for reading", "open it for writing")
        with self._mutex:
            if self._closed:
                raise Mistake(self.path, "the store is closed", "open it again")
            nested = self._owner is not None
            before = self._owner
            try:
                self._do("SAVEPOINT nested" if nested else "BEGIN IMMEDIATE")
                self._owner = threading.get_ident()
                yield
                self._do("RELEASE nested" if nested else "COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK TO nested" if nested else "ROLLBACK")
                    if nested:
                        self._writer.execute("RELEASE nested")
                raise
            finally:
                self._owner = before

    @staticmethod
    def _list(ids: Sequence[int] | np.ndarray) -> str:
        return json.dumps([int(id) for id in ids])

    @staticmethod
    def _among(column: str) -> str:
        return f"{column} IN (SELECT value FROM json_each(?))"

    # Spaces.

    def _space_of(self, row: Sequence[Any]) -> Space:
        id, name, key = row
        if key is None:
            return Space(id, name, None, None)
        if key not in self._sealers:
            found = read_key(self._keys, key)
            if found is None:
                raise Mistake(f"space '{name}'", f"is sealed and its key is gone from {self._keys}", "restore the key, or drop the space")
            self._sealers[key] = Sealer(found)
        return Space(id, name, key, self._sealers[key])

    def _space(self, name: str) -> Space:
        check_name("space", name)
        found = self._all("SELECT id, name, sealed FROM spaces WHERE name = ?", name)
        if not found:
            raise Mistake("space", f"there is no space '{name}'", nearest(name, self.spaces()) if self.spaces() else "add a message first")
        return self._space_of(found[0])

    def spaces(self) -> list[str]:
        """Return the names of all spaces."""
        return [row[0] for row in self._all("SELECT name FROM spaces ORDER BY id")]

    def make_space(self, space: str, *, encrypt: bool = False) -> None:
        """Make a space if it is not there; `encrypt` seals its text and vectors with a key of its own, kept outside the store."""
        check_name("space", space)
        with self.transaction():
            found = self._all("SELECT sealed FROM spaces WHERE name = ?", space)
            if found:
                if encrypt and found[0][0] is None:
                    raise Mistake(
                        f"space '{space}'", "is there already, and not encrypted", "export it, drop it, and load it into an encrypted one"
                    )
                return
            key = make_key(self._keys) if encrypt else None
            id = self._do("INSERT INTO spaces(name, sealed, version) VALUES(?, ?, ?) RETURNING id", space, key, _stamp(0))[0][0]
            if not encrypt:
                self._do(f"CREATE VIRTUAL TABLE words_{id} USING fts5(text, content='', tokenize=\"unicode61 remove_diacritics 2\")")

    def drop_space(self, space: str) -> int:
        """Remove a space with everything in it, and destroy its key; return the number of messages."""
        check_name("space", space)
        with self.transaction():
            found = self._all("SELECT id, sealed FROM spaces WHERE name = ?", space)
            if not found:
                raise Mistake(
                    "space", f"there is no space '{space}'", nearest(space, self.spaces()) if self.spaces() else "nothing is to be dropped"
                )
            id, key = found[0]
            inside = "conversation IN (SELECT id FROM conversations WHERE space = ?)"
            self._do("DELETE FROM sources WHERE fact IN (SELECT id FROM facts WHERE space = ?)", id)
            self._do(f"DELETE FROM gists WHERE {inside}", id)
            self._do(f"DELETE FROM history WHERE {inside}", id)
            for table in ("facts", "chunks", "conversations"):
                self._do(f"DELETE FROM {table} WHERE space = ?", id)
            count = self._count("DELETE FROM messages WHERE space = ?", id)
            self._do("DELETE FROM spaces WHERE id = ?", id)
            if key is None:
                self._do(f"DROP TABLE words_{id}")
            else:
                self._do("INSERT INTO doomed(key) VALUES(?)", key)
            self._mark()
        if self._owner is None:
            self._destroy_doomed()
        return count

    def _destroy_doomed(self) -> None:
        """Destroy the keys of dropped spaces: only after the transaction that dropped them stands."""
        for (key,) in self._all("SELECT key FROM doomed"):
            destroy_key(self._keys, key)
            self._sealers.pop(key, None)
            with self.transaction():
                self._do("DELETE FROM doomed WHERE key = ?", key)

    def _mark(self) -> None:
        """Note that deleted rows may have left traces: `scrub` is due, at the next opening at the latest."""
        self._do("INSERT INTO about(name, value) VALUES('scrub', '1') ON CONFLICT(name) DO NOTHING")

    def version(self, space: str) -> int:
        """Return a number that grows with every change of the space's chunks: the stamp of whatever is cached of it."""
        found = self._one("SELECT version FROM spaces WHERE name = ?", space)
        return found if found is not None else self._space(space).id

    def _bump(self, space: int) -> None:
        self._do("UPDATE spaces SET version = ? WHERE id = ?", _stamp(self._one("SELECT version FROM spaces WHERE id = ?", space)), space)

    # Conversations.

    def _conversation(self, space: Space, name: str, *, make: bool = False) -> int | None:
        check_name("conversation", name)
        look = space.look("conversation", name)
        found: int | None = self._one("SELECT id FROM conversations WHERE space = ? AND name = ?", space.id, look)
        if found is None and make:
            sealed = space.shut("conversation", name)[1]
            found = self._do("INSERT INTO conversations(space, name, sealed) VALUES(?, ?, ?) RETURNING id", space.id, look, sealed)[0][0]
        return found

    def conversations(self, space: str) -> list[dict[str, Any]]:
        """Return name, number of messages, last turn, first and last time of each conversation."""
        held = self._space(space)
        question = (
            "SELECT v.name, v.sealed, COUNT(m.id), COALESCE(MAX(m.turn), 0), MIN(m.at), MAX(m.at) FROM conversations v "
            "LEFT JOIN messages m ON m.conversation = v.id WHERE v.space = ? GROUP BY v.id, v.name, v.sealed ORDER BY v.id"
        )
        return [
            {"name": held.open("conversation", name, sealed), "messages": count, "last_turn": turn, "first": first, "last": last}
            for name, sealed, count, turn, first, last in self._all(question, held.id)
        ]

    def last_turn(self, space: str, conversation: str) -> int:
        """Return the number of the last turn, 0 where there is none."""
        found = self._conversation(self._space(space), conversation)
        return self._one("SELECT COALESCE(MAX(turn), 0) FROM messages WHERE conversation = ?", found)

    def _sweep_conversations(self) -> None:
        """Remove conversations in which nothing is left: their names may say something."""
        nothing = " AND ".join(
            f"NOT EXISTS (SELECT 1 FROM {table} t WHERE t.conversation = conversations.id)"
            for table in ("messages", "gists", "history", "facts")
        )
        self._do(f"DELETE FROM conversations WHERE {nothing}")

    # Messages and chunks.

    def append(self, space: str, conversation: str, message: NewMessage, chunks: Sequence[NewChunk]) -> tuple[Message, list[int]]:
        """Store a message with its chunks (space and conversation are made if absent); return it and the chunks' ids.

        A message whose `key` is there already is not stored again: the first one is returned with no chunk ids.
        """
        check_message(message)
        check_chunks(message.text, chunks, self.dim)
        check_name("conversation", conversation)
        with self.transaction():
            self.make_space(space)
            held = self._space(space)
            key = None if message.key is None else held.look("key", message.key)
            if key is not None:
                first = self._all(f"SELECT {MESSAGE} {FROM} WHERE m.space = ? AND m.key = ?", held.id, key)
                if first:
                    return open_message(held, first[0]), []
            place = self._conversation(held, conversation, make=True)
            last = self._one("SELECT COALESCE(MAX(turn), 0) FROM messages WHERE conversation = ?", place)
            turn = last + 1 if message.turn is None else message.turn
            if turn <= last:
                raise Mistake("turn", f"{turn} is not above the last one ({last}) of conversation '{conversation}'", "add turns in order")
            at = float(time.time() if message.at is None else message.at)
            columns = shut_message(held, message.text, message.person, message.meta)
            id = self._do(
                "INSERT INTO messages(space, conversation, turn, role, text, person, meta, sealed, at, key) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                *(held.id, place, turn, message.role, *columns, at, key),
            )[0][0]
            ids = self._add_chunks(held, place, id, message.text, chunks)
            meta = json.loads(json.dumps(dict(message.meta)))
            return Message(id, space, conversation, turn, message.role, message.text, message.person, at, meta), ids

    def _add_chunks(self, space: Space, conversation: Any, message: int, text: str, chunks: Sequence[NewChunk]) -> list[int]:
        ids = []
        for chunk in chunks:
            vector = encode_vector(chunk.vector, self.precision)
            if space.sealer is not None:
                vector = space.sealer.seal("vector", vector)
            row = (message, space.id, conversation, chunk.start, chunk.end, vector)
            question = "INSERT INTO chunks(message, space, conversation, begins, ends, vector) VALUES(?, ?, ?, ?, ?, ?) RETURNING id"
            ids.append(self._do(question, *row)[0][0])
            if space.sealer is None:
                self._do(f"INSERT INTO words_{space.id}(rowid, text) VALUES(?, ?)", ids[-1], text[chunk.start : chunk.end])
        self._bump(space.id)
        return ids

    def _drop_chunks(self, where: str, *values: Any) -> int:
        """Remove the chunks `c` of a condition with their index entries; return how many there were."""
        found = self._all(
            f"SELECT c.id, c.space, c.begins, c.ends, m.text FROM chunks c JOIN messages m ON m.id = c.message WHERE {where}", *values
        )
        for id, space, begins, ends, text in found:
            if text is not None:  # the index keeps no text: it must be told what it had been given
                self._do(f"INSERT INTO words_{space}(words_{space}, rowid, text) VALUES('delete', ?, ?)", id, text[begins:ends])
        self._do(f"DELETE FROM chunks WHERE {self._among('id')}", self._list([row[0] for row in found]))
        for space in {row[1] for row in found}:
            self._bump(space)
        return len(found)

    def replace(self, message: int, text: str, chunks: Sequence[NewChunk], *, at: float) -> tuple[Message, list[int]]:
        """Give a message another text and other chunks; the old ones are gone."""
        check_message(NewMessage("user", text, at=at))
        check_chunks(text, chunks, self.dim)
        with self.transaction():
            row = self._all(f"SELECT {MESSAGE}, m.conversation {FROM} WHERE m.id = ?", message)
            if not row:
                raise Mistake("message", f"there is no message {message}", "name one that is stored")
            held = self._spaces([row[0][1]])[row[0][1]]
            old = open_message(held, row[0][:-1])
            self._drop_chunks("c.message = ?", message)
            columns = shut_message(held, text, old.person, old.meta)
            self._do("UPDATE messages SET text = ?, person = ?, meta = ?, sealed = ?, edited = ? WHERE id = ?", *columns, at, message)
            ids = self._add_chunks(held, row[0][-1], message, text, chunks)
            self._mark()
            return self.messages(Selection(space=held.name, ids=(message,)))[0], ids

    def _spaces(self, ids: Sequence[int]) -> dict[int, Space]:
        rows = self._all(f"SELECT id, name, sealed FROM spaces WHERE {self._among('id')}", self._list(ids))
        return {row[0]: self._space_of(row) for row in rows}

    def _scopes(self, selection: Selection) -> list[tuple[list[Space], str, list[Any]]]:
        """Return (spaces, condition on `m` and `v`, values): all plain spaces at once, each sealed one by itself."""
        if selection.turns is not None and selection.conversation is None:
            raise Mistake("turns", "need a conversation", "name it")
        if selection.role is not None and selection.role not in ROLES:
            raise Mistake("role", f"'{selection.role}' is none", nearest(str(selection.role), ROLES))
        if selection.space is not None:
            groups = [[self._space(selection.space)]]
        else:
            every = [self._space_of(row) for row in self._all("SELECT id, name, sealed FROM spaces ORDER BY id")]
            plain = [space for space in every if space.sealer is None]
            groups = [plain] * bool(plain) + [[space] for space in every if space.sealer is not None]
        found = []
        for spaces in groups:
            conditions = ["m.space = ?" if len(spaces) == 1 else self._among("m.space")]
            values: list[Any] = [spaces[0].id if len(spaces) == 1 else self._list([space.id for space in spaces])]
            for condition, value in (
                ("v.name = ?", None if selection.conversation is None else spaces[0].look("conversation", selection.conversation)),
                ("m.person = ?", None if selection.person is None else spaces[0].look("person", selection.person)),
                ("m.role = ?", selection.role),
                ("m.at >= ?", selection.since),
                ("m.at <= ?", selection.until),
                ("m.turn >= ?", selection.turns and selection.turns[0]),
                ("m.turn <= ?", selection.turns and selection.turns[1]),
                (self._among("m.id"), None if selection.ids is None else self._list(selection.ids)),
            ):
                if value is not None:
                    conditions.append(condition)
                    values.append(value)
            found.append((spaces, " AND ".join(conditions), values))
        return found

    def messages(
        self, selection: Selection, *, after: int = 0, limit: int | None = None, newest: bool = False, contains: str | None = None
    ) -> list[Message]:
        """Return messages by id, those with an id above `after` (`newest`: the last `limit`, still in order of id)."""
        found: list[Message] = []
        for spaces, where, values in self._scopes(selection):
            by_id = {space.id: space for space in spaces}
            low, high, kept = after, 2**63 - 1, 0
            while limit is None or kept < limit:
                order = "DESC" if newest else "ASC"
                question = f"SELECT {MESSAGE} {FROM} WHERE {where} AND m.id > ? AND m.id < ? ORDER BY m.id {order} LIMIT ?"
                size = BATCH if contains is not None else min(BATCH, limit - kept) if limit is not None else BATCH
                rows = self._all(question, *values, low, high, size)
                some = [open_message(by_id[row[1]], row) for row in rows]
                some = [message for message in some if contains is None or contains.casefold() in message.text.casefold()]
                found += some
                kept += len(some)
                if len(rows) < size:
                    break
                low, high = (low, rows[-1][0]) if newest else (rows[-1][0], high)
        found.sort(key=lambda message: message.id)
        return found if limit is None else found[max(len(found) - limit, 0) :] if newest else found[:limit]

    def ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the selected messages, sorted."""
        found = [row[0] for _, where, values in self._scopes(selection) for row in self._all(f"SELECT m.id {FROM} WHERE {where}", *values)]
        return np.sort(np.array(found, dtype=np.int64))

    def chunk_ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the chunks of the selected messages, sorted."""
        question = f"SELECT c.id {FROM} JOIN chunks c ON c.message = m.id WHERE "
        found = [row[0] for _, where, values in self._scopes(selection) for row in self._all(question + where, *values)]
        return np.sort(np.array(found, dtype=np.int64))

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """Return chunks in the order asked; ids that are gone are left out."""
        question = f"SELECT c.id, c.begins, c.ends, c.last_retrieved, {MESSAGE} {FROM} JOIN chunks c ON c.message = m.id WHERE {self._among('c.id')}"
        rows = self._all(question, self._list(ids))
        spaces = self._spaces(list({row[5] for row in rows}))
        found = {row[0]: open_chunk(open_message(spaces[row[5]], row[4:]), *row[:4]) for row in rows}
        return [found[int(id)] for id in ids if int(id) in found]

    def vectors(
        self, space: str, *, above: int = 0, block: int = 8192
    ) -> Iterator[tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N D"]]]:
        """Yield ids and vectors of a space by id, from the first id above `above`, in blocks."""
        held = self._space(space)
        while True:
            rows = self._all("SELECT id, vector FROM chunks WHERE space = ? AND id > ? ORDER BY id LIMIT ?", held.id, above, block)
            if not rows:
                return
            found = [bytes(row[1]) if held.sealer is None else held.sealer.open("vector", bytes(row[1])) for row in rows]
            yield np.array([row[0] for row in rows], dtype=np.int64), decode_vectors(found, self.precision, self.dim)
            above = rows[-1][0]

    def lexical(self, query: str, k: int, selection: Selection) -> list[tuple[int, float]]:
        """Return (chunk id, BM25 score, higher is better) of at most `k` chunks with any of the query's words."""
        asked = list(dict.fromkeys(words(query)))
        found: list[tuple[int, float]] = []
        alone = selection == Selection(space=selection.space)
        for spaces, where, values in self._scopes(selection) if asked else ():
            for space in spaces:
                if space.sealer is None:
                    match = " OR ".join(f'"{word}"' for word in asked)
                    table = f"words_{space.id}"
                    question = f"SELECT w.rowid, -bm25({table}) FROM {table} w "
                    if not alone:
                        question += f"JOIN chunks c ON c.id = w.rowid JOIN messages m ON m.id = c.message JOIN conversations v ON v.id = m.conversation AND {where} "
                    question += f"WHERE {table} MATCH ? ORDER BY bm25({table}), w.rowid DESC LIMIT ?"
                    found += self._all(question, *([] if alone else values), match, k)
                else:
                    among = None if alone else self.chunk_ids(Selection(**{**vars(selection), "space": space.name}))
                    found += self._ranking(space).search(query, k, among)
        return sorted(found, key=lambda pair: (-pair[1], -pair[0]))[:k]

    def _ranking(self, space: Space) -> Bm25:
        """Return BM25 over a sealed space, from memory while nothing has changed."""
        version = self.version(space.name)
        kept = self._ranked.get(space.id)
        if kept is None or kept[0] != version:
            ids = self.chunk_ids(Selection(space=space.name))
            kept = self._ranked[space.id] = (version, Bm25((chunk.id, chunk.text) for chunk in self.chunks(ids.tolist())))
        return kept[1]

    def ages(self, space: str, conversation: str) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """Return id, turn, and last retrieved turn (-1: never) of every chunk of a conversation, by id."""
        place = self._conversation(self._space(space), conversation)
        question = "SELECT c.id, m.turn, COALESCE(c.last_retrieved, -1) FROM chunks c JOIN messages m ON m.id = c.message WHERE c.conversation = ? ORDER BY c.id"
        found = np.array(self._all(question, place), dtype=np.int64).reshape(-1, 3)
        return found[:, 0], found[:, 1], found[:, 2]

    def touch(self, ids: Sequence[int], turn: int) -> None:
        """Note that these chunks entered a prompt at a turn."""
        with self.transaction():
            self._do(f"UPDATE chunks SET last_retrieved = ? WHERE {self._among('id')}", turn, self._list(ids))

    def prune(self, ids: Sequence[int]) -> int:
        """Remove chunks (vectors and index entries; the messages stay); return how many there were."""
        with self.transaction():
            return self._drop_chunks(self._among("c.id"), self._list(ids))

    # Gists and facts.

    def gists(self, space: str, conversation: str) -> list[Gist]:
        """Return the gists that stand, by kind and segment."""
        held = self._space(space)
        place = self._conversation(held, conversation)
        rows = self._all(
            "SELECT kind, segment, first, last, rewrites, text, sealed FROM gists WHERE conversation = ? ORDER BY kind, segment", place
        )
        return [Gist(conversation, *row[:4], held.open("gist", *row[5:]), row[4]) for row in rows]

    def put_gists(self, space: str, conversation: str, gists: Sequence[Gist], *, clear: bool = False) -> None:
        """Set gists by (kind, segment) and note the change in their history; `clear` removes all others of the conversation first, history included."""
        for gist in gists:
            if gist.kind not in GISTS:
                raise Mistake("gist", f"'{gist.kind}' is no kind of gist", nearest(gist.kind, GISTS))
            check_text("gist", gist.text)
        with self.transaction():
            held = self._space(space)
            place = self._conversation(held, conversation, make=bool(gists))
            turn = self._one("SELECT COALESCE(MAX(turn), 0) FROM messages WHERE conversation = ?", place)
            if clear:
                self._do("DELETE FROM gists WHERE conversation = ?", place)
                self._do("DELETE FROM history WHERE conversation = ?", place)
                self._mark()
            for gist in gists:
                row = (place, gist.kind, gist.segment, gist.first, gist.last, *held.shut("gist", gist.text), gist.rewrites)
                columns = "conversation, kind, segment, first, last, text, sealed, rewrites"
                self._do(
                    f"INSERT INTO gists({columns}) VALUES(?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(conversation, kind, segment) DO UPDATE SET first = excluded.first, "
                    "last = excluded.last, text = excluded.text, sealed = excluded.sealed, rewrites = excluded.rewrites",
                    *row,
                )
                self._do(f"INSERT INTO history({columns}, turn) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)", *row, turn)
            if clear:
                self._sweep_conversations()

    def gist_history(self, space: str, conversation: str, limit: int = 100) -> list[tuple[int, Gist]]:
        """Return the last gists that were put, as (turn, gist), oldest first."""
        held = self._space(space)
        place = self._conversation(held, conversation)
        question = (
            "SELECT turn, kind, segment, first, last, rewrites, text, sealed FROM history WHERE conversation = ? ORDER BY id DESC LIMIT ?"
        )
        rows = self._all(question, place, limit)
        return [(row[0], Gist(conversation, *row[1:5], held.open("gist", *row[6:]), row[5])) for row in reversed(rows)]

    def facts(self, space: str, conversation: str | None = None, *, pinned: bool | None = None) -> list[Fact]:
        """Return the facts of a space, or of a conversation."""
        held = self._space(space)
        question, values = (
            "SELECT f.id, f.text, f.sealed, f.pinned, f.at, v.name, v.sealed FROM facts f LEFT JOIN conversations v ON v.id = f.conversation",
            [],
        )
        question += " WHERE f.space = ?"
        values.append(held.id)
        if conversation is not None:
            question += " AND f.conversation = ?"
            values.append(self._conversation(held, conversation))
        if pinned is not None:
            question += " AND f.pinned = ?"
            values.append(int(pinned))
        rows = self._all(question + " ORDER BY f.id", *values)
        sources: dict[int, list[int]] = {}
        listed = self._list([row[0] for row in rows])
        for fact, message in self._all(f"SELECT fact, message FROM sources WHERE {self._among('fact')} ORDER BY message", listed):
            sources.setdefault(fact, []).append(message)
        return [
            Fact(
                row[0],
                space,
                None if row[5] is None else held.open("conversation", row[5], row[6]),
                held.open("fact", row[1], row[2]),
                tuple(sources.get(row[0], ())),
                bool(row[3]),
                row[4],
            )
            for row in rows
        ]

    def add_fact(
        self, space: str, text: str, *, conversation: str | None = None, sources: Sequence[int] = (), pinned: bool = False
    ) -> Fact:
        """Store a fact with its sources (message ids of the same space)."""
        check_text("fact", text)
        if not text:
            raise Mistake("fact", "is empty", "say what is so")
        with self.transaction():
            self.make_space(space)
            held = self._space(space)
            wanted = sorted({int(source) for source in sources})
            there = self.ids(Selection(space=space, ids=tuple(wanted)))
            if len(there) != len(wanted):
                raise Mistake("sources", f"not all of them are messages of space '{space}'", "name messages that are stored there")
            place = None if conversation is None else self._conversation(held, conversation, make=True)
            at = time.time()
            row = (held.id, place, *held.shut("fact", text), int(pinned), at)
            id = self._do("INSERT INTO facts(space, conversation, text, sealed, pinned, at) VALUES(?, ?, ?, ?, ?, ?) RETURNING id", *row)[
                0
            ][0]
            for source in wanted:
                self._do("INSERT INTO sources(fact, message) VALUES(?, ?)", id, source)
            return Fact(id, space, conversation, text, tuple(wanted), pinned, at)

    def remove_facts(self, ids: Sequence[int]) -> int:
        """Remove facts."""
        with self.transaction():
            listed = self._list(ids)
            self._do(f"DELETE FROM sources WHERE {self._among('fact')}", listed)
            count = self._count(f"DELETE FROM facts WHERE {self._among('id')}", listed)
            if count:
                self._mark()
                self._sweep_conversations()
            return count

    # Erasing.

    def delete(self, ids: Sequence[int]) -> Mapping[str, int]:
        """Remove messages with their chunks, vectors, index entries, keys, and the facts that drew on them; return counts by kind.

        Gists are not touched: `erasure` rebuilds them in the same transaction.
        """
        listed = self._list(ids)
        with self.transaction():
            chunks = self._drop_chunks(self._among("c.message"), listed)
            drawn = [row[0] for row in self._all(f"SELECT DISTINCT fact FROM sources WHERE {self._among('message')}", listed)]
            facts = self.remove_facts(drawn)
            messages = self._count(f"DELETE FROM messages WHERE {self._among('id')}", listed)
            if messages:
                self._mark()
                self._sweep_conversations()
            return {"messages": messages, "chunks": chunks, "vectors": chunks, "facts": facts}

    def scrub(self) -> None:
        """Leave no trace of deleted rows in any file: full-text index rebuilt, free pages overwritten, log emptied and truncated."""
        with self._mutex:
            with self.transaction():
                for (id,) in self._all("SELECT id FROM spaces WHERE sealed IS NULL"):
                    self._do(f"INSERT INTO words_{id}(words_{id}) VALUES('delete-all')")
                    question = "SELECT c.id, substr(m.text, c.begins + 1, c.ends - c.begins) FROM chunks c JOIN messages m ON m.id = c.message WHERE c.space = ?"
                    self._do(f"INSERT INTO words_{id}(rowid, text) {question} ORDER BY c.id", id)
            self._do("VACUUM")
            self._empty_log()
            with self.transaction():
                self._do("DELETE FROM about WHERE name = 'scrub'")
            self._empty_log()

    def _empty_log(self) -> None:
        for _ in range(100):
            if self._do("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0:
                return
            time.sleep(0.1)  # another process reads from the log
        raise Mistake(self.path, "the log cannot be emptied: another program reads the store", "stop it, and scrub again")

    def files(self) -> list[Path]:
        """Return the paths of every file that holds or may hold content: database, log, caches, temporary files."""
        return sorted(path for path in self.path.rglob("*") if path.is_file() and path != self.path / "lock")

    # The audit log.

    def log(self, action: str, detail: Mapping[str, Any]) -> None:
        """Append to the audit log; counts, ids and hashes, never a text."""
        with self.transaction():
            last = self._all("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1")
            id, previous = (last[0][0] + 1, last[0][1]) if last else (1, "")
            told = json.dumps(dict(detail), sort_keys=True, ensure_ascii=False)
            at = time.time()
            row = (id, at, action, told, previous)
            self._do("INSERT INTO audit(id, at, action, detail, previous, hash) VALUES(?, ?, ?, ?, ?, ?)", *row, _chained(*row))

    def audit_log(self, after: int = 0) -> list[dict[str, Any]]:
        """Return the audit log; every entry carries the hash of the one before it."""
        rows = self._all("SELECT id, at, action, detail, previous, hash FROM audit WHERE id > ? ORDER BY id", after)
        names = ("id", "at", "action", "detail", "previous", "hash")
        return [dict(zip(names, row)) | {"detail": json.loads(row[3])} for row in rows]

    def stats(self, space: str | None = None) -> dict[str, Any]:
        """Return numbers of spaces, conversations, messages, chunks, facts, and bytes on disk."""
        where, values = ("", []) if space is None else (" WHERE space = ?", [self._space(space).id])
        counts = {
            table: self._one(f"SELECT COUNT(*) FROM {table}{where}", *values) for table in ("conversations", "messages", "chunks", "facts")
        }
        size = sum(path.stat().st_size for path in self.files() if path.exists())
        return {"spaces": len(self.spaces()) if space is None else 1, **counts, "bytes": size}

    def close(self) -> None:
        """Close the store and let the next writer in."""
        with self._mutex:
            self._closed = True
            for base in list(self._readers):
                base.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> SqliteStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stamp(version: int) -> int:
    """Return a version above the last one; by the clock, so that a space that is made again never repeats one."""
    return max(version + 1, time.time_ns() // 1000)


def _chained(id: int, at: float, action: str, detail: str, previous: str) -> str:
    return hashlib.sha256(json.dumps([id, at, action, detail, previous], ensure_ascii=False).encode()).hexdigest()
