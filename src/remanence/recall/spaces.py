"""Spaces and conversations of a store: their rows, their keys, their names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remanence.errors import Mistake
from remanence.recall.database import Database, Ids, WordIndex
from remanence.recall.rows import Space, check_name
from remanence.recall.sealing import Sealer, destroy_key, make_key, read_key


class Spaces:
    """The spaces of a database.

    Args:
        database: that holds them.
        index: of words, for plain spaces; `None`: the database has none.
        keys: the folder of the keys of sealed spaces.
    """

    def __init__(self, database: Database, index: WordIndex | None, keys: Path):
        self._database, self._index, self._keys = database, index, keys
        self._sealers: dict[str, Sealer] = {}

    def names(self) -> list[str]:
        """Return the names of all spaces."""
        return [row[0] for row in self._database.all("SELECT name FROM spaces ORDER BY id")]

    def named(self, name: str) -> Space:
        """Return a space by name.

        Raises:
            Mistake: there is none, or its key is gone.
        """
        check_name("space", name)
        found = self._database.all("SELECT id, name, sealed FROM spaces WHERE name = ?", name)
        if not found:
            raise Mistake("space", f"there is no space '{name}'", "name one that is there; the first message makes a space")
        return self._opened(found[0])

    def by_id(self, ids: Ids) -> dict[int, Space]:
        """Return spaces by their numbers."""
        question = f"SELECT id, name, sealed FROM spaces WHERE {self._database.among('id')}"
        return {row[0]: self._opened(row) for row in self._database.all(question, self._database.listed(ids))}

    def every(self) -> list[Space]:
        """Return all spaces."""
        return [self._opened(row) for row in self._database.all("SELECT id, name, sealed FROM spaces ORDER BY id")]

    def _opened(self, row: Sequence[Any]) -> Space:
        id, name, key = row
        if key is None:
            return Space(id, name, None)
        if key not in self._sealers:
            found = read_key(self._keys, key)
            if found is None:
                raise Mistake(f"space '{name}'", f"is sealed and its key is gone from {self._keys}", "restore the key, or drop the space")
            self._sealers[key] = Sealer(found)
        return Space(id, name, self._sealers[key])

    def make(self, space: str, *, encrypt: bool = False) -> None:
        """Make a space if it is not there."""
        check_name("space", space)
        with self._database.transaction():
            found = self._database.all("SELECT sealed FROM spaces WHERE name = ?", space)
            if found:
                if encrypt and found[0][0] is None:
                    raise Mistake(
                        f"space '{space}'", "is there already, and not encrypted", "export it, drop it, load it into an encrypted one"
                    )
                return
            key = make_key(self._keys) if encrypt else None
            if key is not None:
                self._database.afterwards(None, lambda: destroy_key(self._keys, key))
            id = self._database.do("INSERT INTO spaces(name, sealed, version) VALUES(?, ?, ?) RETURNING id", space, key, _stamp(0))[0][0]
            if key is None and self._index is not None:
                self._index.make(id)

    def drop(self, space: str) -> int:
        """Remove a space with everything in it, and destroy its key once that stands; return the number of messages."""
        check_name("space", space)
        database = self._database
        with database.transaction():
            found = database.all("SELECT id, sealed FROM spaces WHERE name = ?", space)
            if not found:
                raise Mistake("space", f"there is no space '{space}'", "name one that is there")
            id, key = found[0]
            database.do("DELETE FROM sources WHERE fact IN (SELECT id FROM facts WHERE space = ?)", id)
            for table in ("gists", "history"):
                database.do(f"DELETE FROM {table} WHERE conversation IN (SELECT id FROM conversations WHERE space = ?)", id)
            for table in ("facts", "chunks", "conversations"):
                database.do(f"DELETE FROM {table} WHERE space = ?", id)
            count = database.count("DELETE FROM messages WHERE space = ?", id)
            database.do("DELETE FROM spaces WHERE id = ?", id)
            if key is not None:
                database.do("INSERT INTO doomed(key) VALUES(?)", key)
                database.afterwards(self.destroy_doomed, None)
            elif self._index is not None:
                self._index.drop(id)
            self.mark()
        return count

    def destroy_doomed(self) -> None:
        """Destroy the keys of dropped spaces; also called at opening, should a kill have come between the drop and this."""
        for (key,) in self._database.all("SELECT key FROM doomed"):
            destroy_key(self._keys, key)
            self._sealers.pop(key, None)
            with self._database.transaction():
                self._database.do("DELETE FROM doomed WHERE key = ?", key)

    def mark(self) -> None:
        """Note that deleted rows may have left traces: a scrub is due, at the next opening at the latest."""
        self._database.do(
            "INSERT INTO about(name, value) VALUES('scrub', '1') "
            "ON CONFLICT(name) DO UPDATE SET value = CAST(CAST(about.value AS BIGINT) + 1 AS TEXT)"
        )

    def due(self) -> str | None:
        """Return how many deletions wait for a scrub, `None` where none does."""
        found: str | None = self._database.one("SELECT value FROM about WHERE name = 'scrub'")
        return found

    def unmark(self, due: str | None) -> None:
        """Note that a scrub is done, unless something was deleted while it ran."""
        with self._database.transaction():
            self._database.do("DELETE FROM about WHERE name = 'scrub' AND value = ?", due)

    def version(self, space: str) -> int:
        """Return the stamp of a space's chunks."""
        return int(self._database.one("SELECT version FROM spaces WHERE id = ?", self.named(space).id))

    def bump(self, space: int) -> None:
        """Note that a space's chunks have changed."""
        last = self._database.one("SELECT version FROM spaces WHERE id = ?", space)
        self._database.do("UPDATE spaces SET version = ? WHERE id = ?", _stamp(last), space)

    # Conversations.

    def conversation(self, space: Space, name: str) -> int | None:
        """Return the number of a conversation, `None` where there is none."""
        check_name("conversation", name)
        look = space.look("conversation", name)
        found: int | None = self._database.one("SELECT id FROM conversations WHERE space = ? AND name = ?", space.id, look)
        return found

    def make_conversation(self, space: Space, name: str) -> int:
        """Return the number of a conversation that is made if absent."""
        found = self.conversation(space, name)
        if found is not None:
            return found
        row = (space.id, space.look("conversation", name), space.shut("conversation", name)[1])
        return int(self._database.do("INSERT INTO conversations(space, name, sealed) VALUES(?, ?, ?) RETURNING id", *row)[0][0])

    def conversations(self, space: str) -> list[dict[str, Any]]:
        """Return name, number of messages, last turn, first and last time of each conversation."""
        held = self.named(space)
        question = (
            "SELECT v.name, v.sealed, COUNT(m.id), COALESCE(MAX(m.turn), 0), MIN(m.at), MAX(m.at) FROM conversations v "
            "LEFT JOIN messages m ON m.conversation = v.id WHERE v.space = ? GROUP BY v.id, v.name, v.sealed ORDER BY v.id"
        )
        return [
            {"name": held.open("conversation", name, sealed), "messages": count, "last_turn": turn, "first": first, "last": last}
            for name, sealed, count, turn, first, last in self._database.all(question, held.id)
        ]

    def last_turn(self, conversation: int | None) -> int:
        """Return the number of the last turn of a conversation, 0 where there is none."""
        return int(self._database.one("SELECT COALESCE(MAX(turn), 0) FROM messages WHERE conversation = ?", conversation))

    def sweep(self) -> None:
        """Remove conversations in which nothing is left: their names may say something."""
        nothing = " AND ".join(
            f"NOT EXISTS (SELECT 1 FROM {table} t WHERE t.conversation = conversations.id)"
            for table in ("messages", "gists", "history", "facts")
        )
        self._database.do(f"DELETE FROM conversations WHERE {nothing}")


def _stamp(version: int) -> int:
    """Return a version above the last one; by the clock, so that a space that is made again never repeats one."""
    return max(version + 1, time.time_ns() // 1000)
