"""Messages and chunks of a store: written, read, chosen, ranked by their words, removed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from remanence.errors import Mistake, nearest
from remanence.recall.database import Database, Ids, WordIndex
from remanence.recall.derived import Derived
from remanence.recall.items import ROLES, Chunk, Message, NewChunk, NewMessage, Selection
from remanence.recall.rows import (
    MESSAGE,
    Space,
    check_chunks,
    check_message,
    check_name,
    check_time,
    decode_vectors,
    encode_vector,
    open_chunk,
    open_message,
    shut_message,
)
from remanence.recall.spaces import Spaces
from remanence.recall.words import Bm25, asked, words

FROM = "FROM messages m JOIN conversations v ON v.id = m.conversation"
BATCH = 1000
HIGHEST = 2**63 - 1


class Turns:
    """The messages and chunks of a database.

    Args:
        dim, precision: of the vectors.
    """

    def __init__(self, database: Database, index: WordIndex | None, spaces: Spaces, derived: Derived, dim: int, precision: str):
        self._database, self._index, self._spaces, self._derived = database, index, spaces, derived
        self._dim, self._precision = dim, precision
        self._ranked: dict[int, tuple[int, Bm25]] = {}
        self._mutex = threading.Lock()

    # Writing.

    def append(self, space: str, conversation: str, message: NewMessage, chunks: Sequence[NewChunk]) -> tuple[Message, list[int]]:
        """Store a message with its chunks, once per key."""
        check_message(message)
        check_chunks(message.text, chunks, self._dim)
        check_name("conversation", conversation)
        with self._database.transaction():
            self._spaces.make(space)
            held = self._spaces.named(space)
            key = None if message.key is None else held.look("key", message.key)
            if key is not None:
                first = self._database.all(f"SELECT {MESSAGE} {FROM} WHERE m.space = ? AND m.key = ?", held.id, key)
                if first:
                    return open_message(held, first[0]), []
            place = self._spaces.make_conversation(held, conversation)
            last = self._spaces.last_turn(place)
            turn = last + 1 if message.turn is None else message.turn
            if turn <= last:
                raise Mistake("turn", f"{turn} is not above the last one ({last}) of its conversation", "add turns in order")
            at = float(time.time() if message.at is None else message.at)
            columns = shut_message(held, message.text, message.person, message.meta)
            id = self._database.do(
                "INSERT INTO messages(space, conversation, turn, role, text, person, meta, sealed, crc, at, key) "
                "VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
                *(held.id, place, turn, message.role, *columns, at, key),
            )[0][0]
            ids = self._add_chunks(held, place, id, message.text, chunks)
            meta = json.loads(json.dumps(dict(message.meta)))  # as it will be read back
            return Message(id, space, conversation, turn, message.role, message.text, message.person, at, meta), ids

    def _add_chunks(self, space: Space, conversation: int, message: int, text: str, chunks: Sequence[NewChunk]) -> list[int]:
        ids = []
        for chunk in chunks:
            vector = encode_vector(chunk.vector, self._precision)
            if space.sealer is not None:
                vector = space.sealer.seal("vector", vector)
            said = words(text[chunk.start : chunk.end]) if space.sealer is None and self._index is not None else []
            statement = (
                "INSERT INTO chunks(message, space, conversation, begins, ends, words, vector) VALUES(?, ?, ?, ?, ?, ?, ?) RETURNING id"
            )
            row = (message, space.id, conversation, chunk.start, chunk.end, len(said), vector)
            ids.append(self._database.do(statement, *row)[0][0])
            if space.sealer is None and self._index is not None:
                self._index.add(space.id, ids[-1], said)
        self._spaces.bump(space.id)
        self._database.afterwards(None, self._ranked.clear)  # numbers that are taken back are given again
        return ids

    def _drop_chunks(self, where: str, value: Any) -> int:
        """Remove the chunks `c` of a condition with their index entries; return how many there were."""
        question = f"SELECT c.id, c.space, c.begins, c.ends, m.text FROM chunks c JOIN messages m ON m.id = c.message WHERE {where}"
        found = self._database.all(question, value)
        for id, space, begins, ends, text in found:
            if text is not None and self._index is not None:
                self._index.remove(space, id, words(text[begins:ends]))
        self._database.do(f"DELETE FROM chunks WHERE {self._database.among('id')}", self._database.listed([row[0] for row in found]))
        for space in {row[1] for row in found}:
            self._spaces.bump(space)
        return len(found)

    def replace(self, message: int, text: str, chunks: Sequence[NewChunk], *, at: float) -> tuple[Message, list[int]]:
        """Give a message another text and other chunks; the old ones are gone."""
        check_message(NewMessage("user", text))
        check_time("at", at)
        check_chunks(text, chunks, self._dim)
        with self._database.transaction():
            rows = self._database.all(f"SELECT {MESSAGE}, m.conversation {FROM} WHERE m.id = ?", message)
            if not rows:
                raise Mistake("message", f"there is no message {message}", "name one that is stored")
            (*row, place) = rows[0]
            held = self._spaces.by_id([row[1]])[row[1]]
            old = open_message(held, row)
            self._drop_chunks("c.message = ?", message)
            columns = shut_message(held, text, old.person, old.meta)
            self._database.do(
                "UPDATE messages SET text = ?, person = ?, meta = ?, sealed = ?, crc = ?, edited = ? WHERE id = ?", *columns, at, message
            )
            ids = self._add_chunks(held, place, message, text, chunks)
            self._spaces.mark()
            return replace(old, text=text, edited=at), ids

    def touch(self, ids: Ids, turn: int) -> None:
        """Note that these chunks entered a prompt at a turn."""
        with self._database.transaction():
            statement = f"UPDATE chunks SET last_retrieved = ? WHERE {self._database.among('id')}"
            self._database.do(statement, turn, self._database.listed(ids))

    def prune(self, ids: Ids) -> int:
        """Remove chunks; their messages stay."""
        with self._database.transaction():
            return self._drop_chunks(self._database.among("c.id"), self._database.listed(ids))

    def delete(self, ids: Ids) -> Mapping[str, int]:
        """Remove messages with all that is theirs, and the facts that drew on them; return counts by kind."""
        listed = self._database.listed(ids)
        with self._database.transaction():
            chunks = self._drop_chunks(self._database.among("c.message"), listed)
            facts = self._derived.remove_facts(self._derived.facts_of(ids))
            messages = self._database.count(f"DELETE FROM messages WHERE {self._database.among('id')}", listed)
            if messages:
                self._spaces.mark()
                self._spaces.sweep()
            return {"messages": messages, "chunks": chunks, "vectors": chunks, "facts": facts}

    # Reading.

    def scopes(self, selection: Selection) -> list[tuple[list[Space], str, list[Any]]]:
        """Return (spaces, condition on `m` and `v`, values): all plain spaces at once, each sealed one by itself."""
        if selection.turns is not None and selection.conversation is None:
            raise Mistake("turns", "need a conversation", "name it")
        if selection.role is not None and selection.role not in ROLES:
            raise Mistake("role", f"'{selection.role}' is none", nearest(str(selection.role), ROLES))
        for name, value in (("conversation", selection.conversation), ("person", selection.person)):
            if value is not None:
                check_name(name, value)
        if selection.space is not None:
            groups = [[self._spaces.named(selection.space)]]
        else:
            every = self._spaces.every()
            plain = [space for space in every if space.sealer is None]
            groups = [plain] * bool(plain) + [[space] for space in every if space.sealer is not None]
        return [(spaces, *self._condition(spaces, selection)) for spaces in groups]

    def _condition(self, spaces: list[Space], selection: Selection) -> tuple[str, list[Any]]:
        among, first, numbers = self._database.among, spaces[0], self._database.listed([space.id for space in spaces])
        turns = selection.turns or (None, None)
        if selection.conversation is not None:
            look = first.look("conversation", selection.conversation)
            rows = self._database.all(f"SELECT id FROM conversations WHERE name = ? AND {among('space')}", look, numbers)
            numbers, home = self._database.listed([row[0] for row in rows]), among("m.conversation")
        else:
            home = among("m.space")
        found = [
            (home, numbers),
            ("m.person = ?", None if selection.person is None else first.look("person", selection.person)),
            ("m.role = ?", selection.role),
            ("m.at >= ?", selection.since),
            ("m.at <= ?", selection.until),
            ("m.turn >= ?", turns[0]),
            ("m.turn <= ?", turns[1]),
            (among("m.id"), None if selection.ids is None else self._database.listed(selection.ids)),
        ]
        found = [(condition, value) for condition, value in found if value is not None]
        return " AND ".join(condition for condition, _ in found), [value for _, value in found]

    def messages(
        self, selection: Selection, *, after: int = 0, limit: int | None = None, newest: bool = False, contains: str | None = None
    ) -> list[Message]:
        """Return messages by id, those with an id above `after` (`newest`: the last `limit`, still in order of id); `contains`: whatever the case."""
        found: list[Message] = []
        for spaces, where, values in self.scopes(selection):
            by_id = {space.id: space for space in spaces}
            low, high, kept = after, HIGHEST, 0
            while limit is None or kept < limit:
                order = "DESC" if newest else "ASC"
                question = f"SELECT {MESSAGE} {FROM} WHERE {where} AND m.id > ? AND m.id < ? ORDER BY m.id {order} LIMIT ?"
                size = BATCH if limit is None or contains is not None else min(BATCH, limit - kept)
                rows = self._database.all(question, *values, low, high, size)
                some = [open_message(by_id[row[1]], row) for row in rows]
                if contains is not None:
                    some = [message for message in some if contains.casefold() in message.text.casefold()]
                found += some
                kept += len(some)
                if len(rows) < size:
                    break
                low, high = (low, rows[-1][0]) if newest else (rows[-1][0], high)
        found.sort(key=lambda message: message.id)
        return found if limit is None else found[max(len(found) - limit, 0) :] if newest else found[:limit]

    def _numbers(self, question: str, selection: Selection) -> Int64[np.ndarray, "N"]:
        found = [self._database.numbers(f"{question} WHERE {where}", *values) for _, where, values in self.scopes(selection)]
        return np.sort(np.concatenate([np.empty(0, np.int64), *found]))

    def ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the selected messages, sorted."""
        return self._numbers(f"SELECT m.id AS n {FROM}", selection)

    def chunk_ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the chunks of the selected messages, sorted."""
        if selection.space is not None and selection == Selection(space=selection.space):
            return self._database.numbers("SELECT id AS n FROM chunks WHERE space = ?", self._spaces.named(selection.space).id)
        return self._numbers(f"SELECT c.id AS n {FROM} JOIN chunks c ON c.message = m.id", selection)

    def chunks(self, ids: Ids) -> list[Chunk]:
        """Return chunks in the order asked; ids that are gone are left out."""
        question = f"SELECT c.id, c.begins, c.ends, c.last_retrieved, {MESSAGE} {FROM} JOIN chunks c ON c.message = m.id WHERE "
        rows = self._database.all(question + self._database.among("c.id"), self._database.listed(ids))
        spaces = self._spaces.by_id(list({row[5] for row in rows}))
        found = {row[0]: open_chunk(open_message(spaces[row[5]], row[4:]), *row[:4]) for row in rows}
        return [found[int(id)] for id in ids if int(id) in found]

    def vectors(
        self, space: str, *, above: int = 0, block: int = 8192
    ) -> Iterator[tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N D"]]]:
        """Yield ids and vectors of a space by id, in blocks."""
        held = self._spaces.named(space)
        while rows := self._database.all(
            "SELECT id, vector FROM chunks WHERE space = ? AND id > ? ORDER BY id LIMIT ?", held.id, above, block
        ):
            found = [row[1] if held.sealer is None else held.sealer.open("vector", bytes(row[1])) for row in rows]
            yield np.array([row[0] for row in rows], dtype=np.int64), decode_vectors(found, self._precision, self._dim)
            above = rows[-1][0]

    def ages(self, space: str, conversation: str) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """Return id, turn, and last retrieved turn (-1: never) of every chunk of a conversation, by id."""
        place = self._spaces.conversation(self._spaces.named(space), conversation)
        rows = self._database.all(
            "SELECT c.id, m.turn, COALESCE(c.last_retrieved, -1) FROM chunks c JOIN messages m ON m.id = c.message "
            "WHERE c.conversation = ? ORDER BY c.id",
            place,
        )
        found = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return found[:, 0], found[:, 1], found[:, 2]

    # Words.

    def lexical(self, query: str, k: int, selection: Selection) -> list[tuple[int, float]]:
        """Return (chunk id, BM25 score) of at most `k` chunks with any of the query's words."""
        sought = asked(query)
        found: list[tuple[int, float]] = []
        for spaces, _, _ in self.scopes(selection) if sought and k > 0 else ():
            for space in spaces:
                here = replace(selection, space=space.name)
                among = None if here == Selection(space=space.name) else self.chunk_ids(here)
                if space.sealer is None and self._index is not None:
                    found += self._index.search(space.id, sought, k, among)
                else:
                    found += self._ranking(space).search(sought, k, among)
        return sorted(found, key=lambda pair: (-pair[1], -pair[0]))[:k]

    def _ranking(self, space: Space) -> Bm25:
        """Return BM25 over a space that has no index on disk, brought up to date."""
        with self._mutex:
            version = self._spaces.version(space.name)
            kept, ranking = self._ranked.get(space.id, (0, Bm25()))
            if kept != version:
                there, known = self.chunk_ids(Selection(space=space.name)), ranking.ids()
                ranking.remove(np.setdiff1d(known, there))
                fresh = there[there > (known[-1] if len(known) else 0)]
                for start in range(0, len(fresh), BATCH):
                    for chunk in self.chunks(fresh[start : start + BATCH]):
                        ranking.add(chunk.id, chunk.text)
                self._ranked[space.id] = (version, ranking)
            return ranking
