"""What a conversation memory holds and hands out: messages, chunks, gists, facts, and the selection that names some of them.

A turn is one message. Chunks are pieces of a message's text, each with its unit vector; gists and facts are derived from messages and remember from which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ROLES = ("system", "user", "assistant", "tool")
DEFAULT = "default"  # the name of the space and of the conversation where none is named
GISTS = ("running", "segment", "whole", "flat")


@dataclass(frozen=True)
class NewMessage:
    """A message to be stored.

    Args:
        role: one of `ROLES`.
        text: verbatim; never empty.
        person: whose message it is (a user id or a name); what `forget person` goes by.
        at: seconds since the epoch.
        meta: anything JSON.
        turn: its number in the conversation, from 1; `None`: the next one. A number that is not above the last one is refused.
        key: of the client; a second message with the same key in the same space is not stored again, the first one is returned.
    """

    role: str
    text: str
    person: str | None = None
    at: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    turn: int | None = None
    key: str | None = None


@dataclass(frozen=True)
class NewChunk:
    """A piece `text[start:end]` of a message with its unit vector (D,), fp32."""

    start: int
    end: int
    vector: np.ndarray


@dataclass(frozen=True)
class Message:
    """A stored message; `id` is unique in the store and is never given again."""

    id: int
    space: str
    conversation: str
    turn: int
    role: str
    text: str
    person: str | None
    at: float
    meta: Mapping[str, Any]
    edited: float | None = None


@dataclass(frozen=True)
class Chunk:
    """A stored piece of a message; `last_retrieved` is the turn of its conversation at which it last entered a prompt."""

    id: int
    message: int
    space: str
    conversation: str
    turn: int
    role: str
    text: str
    person: str | None
    at: float
    last_retrieved: int | None = None


@dataclass(frozen=True)
class Gist:
    """A summary of turns `first..last` of a conversation.

    Args:
        kind: running (of the open segment) | segment (frozen Z_j) | whole (G, made of all frozen ones) | flat (the recursion without levels).
        segment: j of a frozen one, from 1; 0 for the others, of which there is one each.
        rewrites: how many summariser calls the content of its first turn went through.
    """

    conversation: str
    kind: str
    segment: int
    first: int
    last: int
    text: str
    rewrites: int = 0


@dataclass(frozen=True)
class Fact:
    """A statement drawn from messages (or written by hand: no sources); it goes when any of its sources goes. Pinned ones enter every prompt."""

    id: int
    space: str
    conversation: str | None
    text: str
    sources: tuple[int, ...]
    pinned: bool
    at: float


@dataclass(frozen=True)
class Selection:
    """Some messages: all conditions must hold; an empty one selects everything in its space.

    Args:
        space: `None`: every space (what `forget person` needs).
        conversation: by name.
        ids: of messages.
        turns: (first, last), both included; needs a conversation.
        person: whose messages.
        role: one of `ROLES`.
        since, until: seconds since the epoch, both included.
    """

    space: str | None = DEFAULT
    conversation: str | None = None
    ids: tuple[int, ...] | None = None
    turns: tuple[int, int] | None = None
    person: str | None = None
    role: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True)
class Hit:
    """A chunk that a search found; `score` is what it was ranked by, `parts` what that was made of (cosine, bm25, ...)."""

    chunk: Chunk
    score: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A composed prompt within its budget.

    Args:
        text: what the model reads.
        parts: tag -> content, in order (system, compact, retrieved, dialogue_tail, user); parts that are empty are absent.
        tokens: of `text`, by the tokenizer in use.
        chunk_ids: of the retrieved chunks, in the order of the prompt.
        scores: their cosines, in the same order.
        dropped: ids of chunks that were found but did not fit.
        tail: ids of the messages in the dialogue's tail.
    """

    text: str
    parts: Mapping[str, str]
    tokens: int
    chunk_ids: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    dropped: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
