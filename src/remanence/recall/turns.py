"""Take turns into a conversation: chunk, embed, advance the gist, store, and every `period` turns maintain; a turn and what it fires are one transaction.

What a summariser or an embedder takes long for happens before the transaction, on the state that was read; inside, the state is read again, and if someone
changed it (an erasure, say) everything is planned anew. So no gist is ever written that saw a text which is gone, and a slow model never holds the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.recall.embedders import embed
from remanence.recall.gist import Compact, spoken
from remanence.recall.items import ROLES, Gist, Message, NewChunk, NewMessage, Selection
from remanence.recall.protocols import Embedder, Store, Tokenizer
from remanence.recall.salience import pruned
from remanence.recall.settings import HemaSettings

LOG = logging.getLogger("remanence.recall")
LOCKS = 256  # conversations share them by hash
BATCH = 256  # messages of a transaction


class _Changed(Exception):
    """Someone changed the conversation between reading and writing."""


class _Known(Exception):
    """A message with that key is there already; it carries its place in the batch."""


def checked(message: NewMessage) -> NewMessage:
    """Return a message that can be stored.

    Raises:
        Mistake: an unknown role, an empty text, or one that is no Unicode.
    """
    if message.role not in ROLES:
        raise Mistake("role", f"there is no '{message.role}'", nearest(str(message.role), ROLES))
    if not isinstance(message.text, str) or not message.text.strip():
        raise Mistake("text", "is empty", "give a text")
    for name, text in (("text", message.text), ("person", message.person or ""), ("key", message.key or "")):
        spelled(name, text)
    return message


def spelled(name: str, text: str) -> str:
    """Return a text that can be written.

    Raises:
        Mistake: it is no Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Mistake(name, "holds half a surrogate pair, which is no character", "decode it with errors='replace'") from None
    return text


def chunked(embedder: Embedder, tokenizer: Tokenizer, texts: Sequence[str], tokens: int) -> list[list[NewChunk]]:
    """Return the chunks of each text: pieces of at most so many tokens, no overlap, each with its vector; blanks alone are none."""
    places = [[(start, end) for start, end in tokenizer.pieces(text, tokens) if text[start:end].strip()] for text in texts]
    pieces = [text[start:end] for text, found in zip(texts, places) for start, end in found]
    vectors = iter(embed(embedder, pieces))
    return [[NewChunk(start, end, next(vectors)) for start, end in found] for found in places]


@dataclass
class Turns:
    """Take turns into the conversations of a store; safe to use from several threads."""

    store: Store
    embedder: Embedder
    tokenizer: Tokenizer
    compact: Compact
    settings: HemaSettings

    def __post_init__(self) -> None:
        self._locks = [threading.RLock() for _ in range(LOCKS)]

    def lock(self, space: str, conversation: str) -> threading.RLock:
        """Return the lock under which turns are added to a conversation."""
        return self._locks[hash((space, conversation)) % LOCKS]

    def take(self, space: str, conversation: str, messages: Sequence[NewMessage]) -> list[Message]:
        """Store messages of one conversation in one transaction, in order; return them as stored.

        Several threads: not from within a transaction of the store, which is taken after the conversation's lock, never before.
        """
        messages = [checked(message) for message in messages]
        chunks = chunked(self.embedder, self.tokenizer, [message.text for message in messages], self.settings.chunk_tokens)
        known: dict[int, Message] = {}
        with self.lock(space, conversation):
            while True:
                fresh = [place for place in range(len(messages)) if place not in known]
                if not fresh:
                    return [known[place] for place in range(len(messages))]
                state = self.state(space, conversation)
                early = next((place for place in fresh if _is_repeat(messages[place], state[1])), None)
                if early is not None:
                    known[early] = self.store.append(space, conversation, messages[early], chunks[early])[
                        0
                    ]  # the first one, or it is refused
                    continue
                turns = _numbered([messages[place] for place in fresh], state[1], conversation)
                plan = self._planned(space, conversation, state, turns, [messages[place] for place in fresh])
                stored: dict[int, Message] = {}
                try:
                    with self.store.transaction():
                        if self.state(space, conversation) != state:
                            raise _Changed
                        before, fits = state[1], self.compact.fits(state[0])
                        for place, turn, gists in zip(fresh, turns, plan):
                            message, ids = self.store.append(space, conversation, _at(messages[place], turn), chunks[place])
                            if not ids:
                                known[place] = message
                                raise _Known
                            stored[place] = message
                            if gists:
                                self.store.put_gists(space, conversation, gists, clear=not fits)
                                fits = True
                            if fires(before, turn, self.settings.period):
                                self.prune(space, conversation, turn)
                            before = turn
                    everything = stored | known
                    return [everything[place] for place in range(len(messages))]
                except (_Changed, _Known):
                    continue

    def state(self, space: str, conversation: str) -> tuple[list[Gist], int]:
        """Return what the next turn depends on: the gists and the number of the last turn."""
        if space not in self.store.spaces():
            return [], 0
        return self.store.gists(space, conversation), self.store.last_turn(space, conversation)

    def prune(self, space: str, conversation: str, now: int) -> int:
        """Remove the least salient chunks of a conversation; return how many."""
        if not self.settings.forgetting:
            return 0
        ids, born, retrieved = self.store.ages(space, conversation)
        gone = pruned(ids, born, retrieved, now, self.settings)
        return self.store.prune(gone.tolist()) if len(gone) else 0

    def maintain(self, space: str, conversation: str, force: bool = False) -> dict[str, Any]:
        """Run what is due besides the turns' own maintenance: gists that fell behind, and with `force` a pruning now."""
        with self.lock(space, conversation):
            while True:
                state = self.state(space, conversation)
                gists = self.caught_up(space, conversation, state) if self.settings.compact else state[0]
                with self.store.transaction():
                    if self.state(space, conversation) != state:
                        continue
                    fits = self.compact.fits(state[0])
                    new = [gist for gist in gists if gist not in state[0]] if fits else gists
                    if new:
                        self.store.put_gists(space, conversation, new, clear=not fits)
                    return {"turn": state[1], "gists": len(new), "pruned": self.prune(space, conversation, state[1]) if force else 0}

    def caught_up(self, space: str, conversation: str, state: tuple[list[Gist], int]) -> list[Gist]:
        """Return the gists with every turn in them, even if a summariser had failed or the settings were others."""
        gists, last = state
        gists = gists if self.compact.fits(gists) else []  # the period is another than it was
        covered = self.compact.covered(gists)
        if covered >= last:
            return gists
        missing = self.store.messages(Selection(space, conversation, turns=(covered + 1, last)))
        return self.compact.replay(gists, conversation, missing)

    def _planned(
        self, space: str, conversation: str, state: tuple[list[Gist], int], turns: Sequence[int], messages: Sequence[NewMessage]
    ) -> list[list[Gist]]:
        """Return for each message the gists to put with it; a summariser that fails leaves the gist behind, and the turn is stored all the same."""
        if not self.settings.compact:
            return [[] for _ in turns]
        plan: list[list[Gist]] = []
        old = state[0] if self.compact.fits(state[0]) else []
        try:
            gists = self.caught_up(space, conversation, state)
            for turn, message in zip(turns, messages):
                gists = self.compact.advance(gists, conversation, turn, spoken(message))
                plan.append([gist for gist in gists if gist not in old])
                old = gists
        except Mistake as mistake:
            LOG.warning("the gist falls behind, the next turn tries again: %s", mistake.problem)
            plan += [[] for _ in turns[len(plan) :]]
        return plan


def fires(before: int, turn: int, period: int) -> bool:
    """Return whether a turn ends a period, or begins one whose end before was left out."""
    return turn % period == 0 or (turn - 1) // period > before // period


def _is_repeat(message: NewMessage, last: int) -> bool:
    """Return whether a message with a key has a number that only a repeated one can have."""
    return message.key is not None and message.turn is not None and message.turn <= last


def _numbered(messages: Sequence[NewMessage], last: int, conversation: str) -> list[int]:
    """Return the turn numbers of messages after `last`.

    Raises:
        Mistake: a number that does not rise.
    """
    numbers = []
    for message in messages:
        turn = last + 1 if message.turn is None else message.turn
        if turn <= last:
            raise Mistake("turn", f"{turn} is not above {last}, the last one of '{conversation}'", "add turns in their order")
        numbers.append(turn)
        last = turn
    return numbers


def _at(message: NewMessage, turn: int) -> NewMessage:
    meta: Mapping[str, Any] = message.meta
    return NewMessage(message.role, message.text, message.person, message.at, meta, turn, message.key)
