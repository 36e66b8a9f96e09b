"""What is drawn from messages: gists with their history, and facts with their sources."""

from __future__ import annotations

import time
from collections.abc import Sequence

from remanence.errors import Mistake, nearest
from remanence.recall.database import Database, Ids
from remanence.recall.items import GISTS, Fact, Gist
from remanence.recall.rows import check_text
from remanence.recall.spaces import Spaces

GIST = "kind, segment, first, last, rewrites, text, sealed"


class Derived:
    """The gists and facts of a database."""

    def __init__(self, database: Database, spaces: Spaces):
        self._database, self._spaces = database, spaces

    def gists(self, space: str, conversation: str) -> list[Gist]:
        """Return the gists that stand, by kind and segment."""
        held = self._spaces.named(space)
        place = self._spaces.conversation(held, conversation)
        rows = self._database.all(f"SELECT {GIST} FROM gists WHERE conversation = ? ORDER BY kind, segment", place)
        return [Gist(conversation, row[0], row[1], row[2], row[3], held.open("gist", row[5], row[6]), row[4]) for row in rows]

    def put_gists(self, space: str, conversation: str, gists: Sequence[Gist], *, clear: bool = False) -> None:
        """Set gists and note them in their history; `clear` removes all others of the conversation first."""
        for gist in gists:
            if gist.kind not in GISTS:
                raise Mistake("gist", f"'{gist.kind}' is no kind of gist", nearest(gist.kind, GISTS))
            check_text("gist", gist.text)
        with self._database.transaction():
            held = self._spaces.named(space)
            place = self._spaces.make_conversation(held, conversation) if gists else self._spaces.conversation(held, conversation)
            turn = self._spaces.last_turn(place)
            if clear:
                self._database.do("DELETE FROM gists WHERE conversation = ?", place)
                self._database.do("DELETE FROM history WHERE conversation = ?", place)
                self._spaces.mark()
            for gist in gists:
                row = (place, gist.kind, gist.segment, gist.first, gist.last, gist.rewrites, *held.shut("gist", gist.text))
                self._database.do(
                    f"INSERT INTO gists(conversation, {GIST}) VALUES(?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(conversation, kind, segment) DO UPDATE SET "
                    + ", ".join(f"{name} = excluded.{name}" for name in ("first", "last", "rewrites", "text", "sealed")),
                    *row,
                )
                self._database.do(f"INSERT INTO history(conversation, {GIST}, turn) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)", *row, turn)
            if clear:
                self._spaces.sweep()

    def gist_history(self, space: str, conversation: str, limit: int = 100) -> list[tuple[int, Gist]]:
        """Return the last gists that were put, as (turn, gist), oldest first."""
        held = self._spaces.named(space)
        place = self._spaces.conversation(held, conversation)
        rows = self._database.all(f"SELECT {GIST}, turn FROM history WHERE conversation = ? ORDER BY id DESC LIMIT ?", place, limit)
        return [
            (row[7], Gist(conversation, row[0], row[1], row[2], row[3], held.open("gist", row[5], row[6]), row[4]))
            for row in reversed(rows)
        ]

    def facts(self, space: str, conversation: str | None = None, *, pinned: bool | None = None) -> list[Fact]:
        """Return the facts of a space, or of a conversation."""
        held = self._spaces.named(space)
        where = "f.space = ?"
        values: list[int | None] = [held.id]
        if conversation is not None:
            where, values = f"{where} AND f.conversation = ?", [*values, self._spaces.conversation(held, conversation)]
        if pinned is not None:
            where, values = f"{where} AND f.pinned = ?", [*values, int(pinned)]
        rows = self._database.all(
            "SELECT f.id, f.text, f.sealed, f.pinned, f.at, v.name, v.sealed FROM facts f LEFT JOIN conversations v ON v.id = f.conversation "
            f"WHERE {where} ORDER BY f.id",
            *values,
        )
        sources: dict[int, list[int]] = {}
        question = f"SELECT fact, message FROM sources WHERE {self._database.among('fact')} ORDER BY message"
        for fact, message in self._database.all(question, self._database.listed([row[0] for row in rows])):
            sources.setdefault(fact, []).append(message)
        found = []
        for id, text, sealed, pin, at, name, sealed_name in rows:
            place = None if name is None else held.open("conversation", name, sealed_name)
            found.append(Fact(id, space, place, held.open("fact", text, sealed), tuple(sources.get(id, ())), bool(pin), at))
        return found

    def add_fact(
        self, space: str, text: str, *, conversation: str | None = None, sources: Sequence[int] = (), pinned: bool = False
    ) -> Fact:
        """Store a fact with its sources."""
        check_text("fact", text)
        if not text:
            raise Mistake("fact", "is empty", "say what is so")
        with self._database.transaction():
            self._spaces.make(space)
            held = self._spaces.named(space)
            wanted = sorted({int(source) for source in sources})
            question = f"SELECT COUNT(*) FROM messages WHERE space = ? AND {self._database.among('id')}"
            if self._database.one(question, held.id, self._database.listed(wanted)) != len(wanted):
                raise Mistake("sources", f"not all of them are messages of space '{space}'", "name messages that are stored there")
            place = None if conversation is None else self._spaces.make_conversation(held, conversation)
            at = time.time()
            row = (held.id, place, *held.shut("fact", text), int(pinned), at)
            statement = "INSERT INTO facts(space, conversation, text, sealed, pinned, at) VALUES(?, ?, ?, ?, ?, ?) RETURNING id"
            id = self._database.do(statement, *row)[0][0]
            for source in wanted:
                self._database.do("INSERT INTO sources(fact, message) VALUES(?, ?)", id, source)
            return Fact(id, space, conversation, text, tuple(wanted), pinned, at)

    def remove_facts(self, ids: Ids) -> int:
        """Remove facts; return how many there were."""
        with self._database.transaction():
            listed = self._database.listed(ids)
            self._database.do(f"DELETE FROM sources WHERE {self._database.among('fact')}", listed)
            count = self._database.count(f"DELETE FROM facts WHERE {self._database.among('id')}", listed)
            if count:
                self._spaces.mark()
                self._spaces.sweep()
            return count

    def facts_of(self, messages: Ids) -> list[int]:
        """Return the numbers of the facts that drew on any of these messages."""
        question = f"SELECT DISTINCT fact FROM sources WHERE {self._database.among('message')}"
        return [row[0] for row in self._database.all(question, self._database.listed(messages))]
