"""The seams of the conversation memory: what turns text into vectors, shortens it, counts it, ranks it, and keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int64

from remanence.recall.items import Chunk, Fact, Gist, Hit, Message, NewChunk, NewMessage, Selection


class Embedder(Protocol):
    """Texts as unit vectors. `name` is written into the store: vectors of two embedders never mix."""

    name: str
    dim: int

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "N D"]:
        """Return one unit vector per text, finite and not zero."""
        ...


class Summarizer(Protocol):
    """Shorten `earlier` and what follows it to at most `tokens` tokens, one line. It reads up to `window` tokens; more is its own affair."""

    name: str
    window: int

    def __call__(self, earlier: str, new: str, tokens: int) -> str:
        """Return S_t = Summarizer(S_{t-1}, u_t)."""
        ...


class Tokenizer(Protocol):
    """Count tokens as the model that will read the prompt does."""

    name: str

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        ...

    def cut(self, text: str, tokens: int) -> str:
        """Return the longest prefix of the text that has at most so many tokens."""
        ...

    def pieces(self, text: str, tokens: int) -> list[tuple[int, int]]:
        """Return (start, end) of consecutive pieces of at most so many tokens that cover the text."""
        ...


class Retriever(Protocol):
    """Rank the chunks of a selection for a query. A trained retriever takes this place; those of this room are dense, lexical and both."""

    name: str

    def search(self, query: str, k: int, selection: Selection) -> list[Hit]:
        """Return at most `k` hits, best first; ties by the higher (younger) chunk id."""
        ...

    def refresh(self) -> None:
        """Let go now of whatever the store no longer has: what is kept in memory, and every file that was made of it."""
        ...


class Store(Protocol):
    """The only source of truth: text, vectors, lineage, audit log. Every writing method is one transaction, or joins the one that is open.

    Methods that take a space refuse one that does not exist (`Mistake`) unless they create it. A store opened for reading refuses to write, and a second
    writer is refused at opening. All methods may be called from several threads.
    """

    id: str  # of this store, made with it
    embedder: str
    dim: int

    def transaction(self) -> AbstractContextManager[None]:
        """Group writes of this thread: all of them or none; nested use joins the outer one."""
        ...

    def spaces(self) -> list[str]:
        """Return the names of all spaces."""
        ...

    def make_space(self, space: str, *, encrypt: bool = False) -> None:
        """Make a space if it is not there; `encrypt` seals its text and vectors with a key of its own, kept outside the store."""
        ...

    def drop_space(self, space: str) -> int:
        """Remove a space with everything in it, and destroy its key; return the number of messages."""
        ...

    def conversations(self, space: str) -> list[dict[str, Any]]:
        """Return name, number of messages, last turn, first and last time of each conversation."""
        ...

    def append(self, space: str, conversation: str, message: NewMessage, chunks: Sequence[NewChunk]) -> tuple[Message, list[int]]:
        """Store a message with its chunks (space and conversation are made if absent); return it and the chunks' ids.

        A message whose `key` is there already is not stored again: the first one is returned with no chunk ids.
        """
        ...

    def replace(self, message: int, text: str, chunks: Sequence[NewChunk], *, at: float) -> tuple[Message, list[int]]:
        """Give a message another text and other chunks; the old ones are gone."""
        ...

    def last_turn(self, space: str, conversation: str) -> int:
        """Return the number of the last turn, 0 where there is none."""
        ...

    def messages(
        self, selection: Selection, *, after: int = 0, limit: int | None = None, newest: bool = False, contains: str | None = None
    ) -> list[Message]:
        """Return messages by id, those with an id above `after` (`newest`: the last `limit`, still in order of id)."""
        ...

    def ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the selected messages, sorted."""
        ...

    def chunks(self, ids: Sequence[int]) -> list[Chunk]:
        """Return chunks in the order asked; ids that are gone are left out."""
        ...

    def chunk_ids(self, selection: Selection) -> Int64[np.ndarray, "N"]:
        """Return the ids of the chunks of the selected messages, sorted."""
        ...

    def vectors(
        self, space: str, *, above: int = 0, block: int = 8192
    ) -> Iterator[tuple[Int64[np.ndarray, "N"], Float32[np.ndarray, "N D"]]]:
        """Yield ids and vectors of a space by id, from the first id above `above`, in blocks."""
        ...

    def version(self, space: str) -> int:
        """Return a number that grows with every change of the space's chunks: the stamp of whatever is cached of it."""
        ...

    def cache(self, space: str) -> Path | None:
        """Return a folder for disposable files made of a space's vectors, or `None`: a sealed space has none, nor has a store that is not files.

        They are gone when a removal of chunks is committed, and after `scrub`.
        """
        ...

    def lexical(self, query: str, k: int, selection: Selection) -> list[tuple[int, float]]:
        """Return (chunk id, BM25 score, higher is better) of at most `k` chunks with any of the query's words."""
        ...

    def ages(self, space: str, conversation: str) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
        """Return id, turn, and last retrieved turn (-1: never) of every chunk of a conversation, by id."""
        ...

    def touch(self, ids: Sequence[int], turn: int) -> None:
        """Note that these chunks entered a prompt at a turn."""
        ...

    def prune(self, ids: Sequence[int]) -> int:
        """Remove chunks (vectors and index entries; the messages stay); return how many there were."""
        ...

    def gists(self, space: str, conversation: str) -> list[Gist]:
        """Return the gists that stand, by kind and segment."""
        ...

    def put_gists(self, space: str, conversation: str, gists: Sequence[Gist], *, clear: bool = False) -> None:
        """Set gists by (kind, segment) and note the change in their history; `clear` removes all others of the conversation first, history included."""
        ...

    def gist_history(self, space: str, conversation: str, limit: int = 100) -> list[tuple[int, Gist]]:
        """Return the last gists that were put, as (turn, gist), oldest first."""
        ...

    def facts(self, space: str, conversation: str | None = None, *, pinned: bool | None = None) -> list[Fact]:
        """Return the facts of a space, or of a conversation."""
        ...

    def add_fact(
        self, space: str, text: str, *, conversation: str | None = None, sources: Sequence[int] = (), pinned: bool = False
    ) -> Fact:
        """Store a fact with its sources (message ids of the same space)."""
        ...

    def remove_facts(self, ids: Sequence[int]) -> int:
        """Remove facts."""
        ...

    def delete(self, ids: Sequence[int]) -> Mapping[str, int]:
        """Remove messages with their chunks, vectors, index entries, keys, and the facts that drew on them; return counts by kind.

        Gists are not touched: `erasure` rebuilds them in the same transaction.
        """
        ...

    def scrub(self) -> None:
        """Leave no trace of deleted rows in any file: full-text index rebuilt, free pages overwritten, log emptied and truncated."""
        ...

    def files(self) -> list[Any]:
        """Return the paths of every file that holds or may hold content: database, log, caches, temporary files."""
        ...

    def log(self, action: str, detail: Mapping[str, Any]) -> None:
        """Append to the audit log; counts, ids and hashes, never a text."""
        ...

    def audit_log(self, after: int = 0) -> list[dict[str, Any]]:
        """Return the audit log; every entry carries the hash of the one before it."""
        ...

    def stats(self, space: str | None = None) -> dict[str, Any]:
        """Return numbers of spaces, conversations, messages, chunks, facts, and bytes on disk."""
        ...

    def close(self) -> None:
        """Close the store and let the next writer in."""
        ...
