"""What a store offers, over any SQL database: the parts put together. `SqliteStore` and `PostgresStore` say what the database is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from remanence.errors import Mistake
from remanence.recall import audit
from remanence.recall.database import Database, Ids, WordIndex
from remanence.recall.derived import Derived
from remanence.recall.items import Chunk, Fact, Gist, Message, NewChunk, NewMessage, Selection
from remanence.recall.message_rows import Turns
from remanence.recall.sealing import keys_folder
from remanence.recall.spaces import Spaces


class SqlStore:
    """A store over an open database whose tables are there.

    Args:
        database: that holds the rows.
        index: of words, for plain spaces; `None`: words are ranked in memory.
        embedder, dim: what the caller has; `None`: whatever the store was made with.

    Raises:
        Mistake: the store was made with another embedder.
    """

    def __init__(self, database: Database, index: WordIndex | None, embedder: str | None, dim: int | None):
        about = dict(database.all("SELECT name, value FROM about"))
        self.id, self.embedder, self.dim, self.precision = about["id"], about["embedder"], int(about["dim"]), about["precision"]
        if embedder not in (None, self.embedder) or dim not in (None, self.dim):
            raise Mistake(
                database.place,
                f"was made with the embedder '{self.embedder}' ({self.dim} numbers), not '{embedder or self.embedder}' ({dim or self.dim})",
                "name that one, or embed the store again with `remanence recall reindex`",
            )
        self._database = database
        self._spaces = Spaces(database, index, keys_folder(self.id))
        self._derived = Derived(database, self._spaces)
        self._turns = Turns(database, index, self._spaces, self._derived, self.dim, self.precision)

    def transaction(self) -> AbstractContextManager[None]:
        """Group writes of this thread: all of them or none; nested use joins the outer one."""
        return self._database.transaction()

    # Spaces and conversations.

    def spaces(self) -> list[str]:
        """Return the names of all spaces."""
        return self._spaces.names()

    def make_space(self, space: str, *, encrypt: bool = False) -> None:
        """Make a space if it is not there; `encrypt` seals its text and vectors with a key of its own, kept outside the store."""
        self._spaces.make(space, encrypt=encrypt)

    def drop_space(self, space: str) -> int:
        """Remove a space with everything in it, and destroy its key; return the number of messages."""
        return self._spaces.drop(space)

    def conversations(self, space: str) -> list[dict[str, Any]]:
        """Return name, number of messages, last turn, first and last time of each conversation."""
        return self._spaces.conversations(space)

    def last_turn(self, space: str, conversation: str) -> int:
        """Return the number of the last turn, 0 where there is none."""
        return self._spaces.last_turn(self._spaces.conversation(self._spaces.named(space), conversation))

    def version(self, space: str) -> int:
        """Return a number that grows with every change of the space's chunks: the stamp of whatever is cached of it."""
        return self._spaces.version(space)

    # Messages and chunks.

    def append(self, space: str, conversation: str, message: NewMessage, chunks: Sequence[NewChunk]) -> tuple[Message, list[int]]:
        """Store a message with its chunks (space and conversation are made if absent); return it and the chunks' ids.

        A message whose `key` is there already is not stored again: the first one is returned with no chunk ids.
        """
        return self._turns.append(space, conversation, message, chunks)

    def replace(self, message: int, text: str, chunks: Sequence[NewChunk], *, at: float) -> tuple[Message, list[int]]:
        """Give a message another text and other chunks; the old ones are gone."""
        return self._turns.replace(message, text, chunks, at=at)

    def messages(
        self, selection: Selection, *, after: int = 0, limit: int | None = None, newest: bool = False, contains: str | None = None
    ) -> list[Message]:
        """Return messages by id, those with an id above `after` (`newest`: the last `limit`, still in order of id)."""
        return self._turns.messages(selection, after=after, limit=limit, newest=newest, contains=contains)

    def ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the selected messages, sorted."""
        return self._turns.ids(selection)

    def chunks(self, ids: Ids) -> list[Chunk]:
        """Return chunks in the order asked; ids that are gone are left out."""
        return self._turns.chunks(ids)

    def chunk_ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the chunks of the selected messages, sorted."""
        return self._turns.chunk_ids(selection)

    def vectors(
        self, space: str, *, above: int = 0, block: int = 8192
    ) -> Iterator[tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N D"]]]:
        """Yield ids and vectors of a space by id, from the first id above `above`, in blocks."""
        return self._turns.vectors(space, above=above, block=block)

    def cache(self, space: str) -> Path | None:
        """Return a folder for disposable files made of a space's vectors, or `None`: a sealed space has none, nor has a store that is not files."""
        return None

    def lexical(self, query: str, k: int, selection: Selection) -> list[tuple[int, float]]:
        """Return (chunk id, BM25 score, higher is better) of at most `k` chunks with any of the query's words."""
        return self._turns.lexical(query, k, selection)

    def ages(self, space: str, conversation: str) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """Return id, turn, and last retrieved turn (-1: never) of every chunk of a conversation, by id."""
        return self._turns.ages(space, conversation)

    def touch(self, ids: Ids, turn: int) -> None:
        """Note that these chunks entered a prompt at a turn."""
        self._turns.touch(ids, turn)

    def prune(self, ids: Ids) -> int:
        """Remove chunks (vectors and index entries; the messages stay); return how many there were."""
        return self._turns.prune(ids)

    def delete(self, ids: Ids) -> Mapping[str, int]:
        """Remove messages with their chunks, vectors, index entries, keys, and the facts that drew on them; return counts by kind.

        Gists are not touched: `erasure` rebuilds them in the same transaction.
        """
        return self._turns.delete(ids)

    # Gists and facts.

    def gists(self, space: str, conversation: str) -> list[Gist]:
        """Return the gists that stand, by kind and segment."""
        return self._derived.gists(space, conversation)

    def put_gists(self, space: str, conversation: str, gists: Sequence[Gist], *, clear: bool = False) -> None:
        """Set gists by (kind, segment) and note the change in their history; `clear` removes all others of the conversation first, history included."""
        self._derived.put_gists(space, conversation, gists, clear=clear)

    def gist_history(self, space: str, conversation: str, limit: int = 100) -> list[tuple[int, Gist]]:
        """Return the last gists that were put, as (turn, gist), oldest first."""
        return self._derived.gist_history(space, conversation, limit)

    def facts(self, space: str, conversation: str | None = None, *, pinned: bool | None = None) -> list[Fact]:
        """Return the facts of a space, or of a conversation."""
        return self._derived.facts(space, conversation, pinned=pinned)

    def add_fact(
        self, space: str, text: str, *, conversation: str | None = None, sources: Sequence[int] = (), pinned: bool = False
    ) -> Fact:
        """Store a fact with its sources (message ids of the same space)."""
        return self._derived.add_fact(space, text, conversation=conversation, sources=sources, pinned=pinned)

    def remove_facts(self, ids: Ids) -> int:
        """Remove facts."""
        return self._derived.remove_facts(ids)

    # The audit log.

    def log(self, action: str, detail: Mapping[str, Any]) -> None:
        """Append to the audit log; counts, ids and hashes, never a text."""
        audit.append_entry(self._database, action, detail)

    def audit_log(self, after: int = 0) -> list[dict[str, Any]]:
        """Return the audit log; every entry carries the hash of the one before it."""
        return audit.read_entries(self._database, after)

    def audit_broken_at(self) -> int | None:
        """Return the number of the first entry of the audit log that does not fit the chain, `None` where all do."""
        return audit.broken_at(self._database)

    def _counts(self, space: str | None) -> dict[str, int]:
        """Return numbers of rows."""
        where, values = ("", []) if space is None else (" WHERE space = ?", [self._spaces.named(space).id])
        counted = ("conversations", "messages", "chunks", "facts")
        counts = {table: int(self._database.one(f"SELECT COUNT(*) FROM {table}{where}", *values)) for table in counted}
        return {"spaces": len(self.spaces()) if space is None else 1, **counts}
