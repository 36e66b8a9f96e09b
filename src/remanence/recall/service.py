"""One object for the whole conversation memory: add, search, compose, edit, forget, over many spaces and conversations of one store; safe for threads.

    with Recall.open("memory") as recall:
        recall.add("My sister Ana moved to Lisbon.", person="eva")
        prompt = recall.compose("Where does my sister live?")
        receipt = recall.forget(Selection(person="eva", space=None))

No language model works on the read path. Cost: a turn is one embedding, one summariser call and one transaction; a search one embedding and one product with
the space's vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.recall import erasure, transfer
from remanence.recall.compose import compose
from remanence.recall.gist import Compact
from remanence.recall.items import DEFAULT, Chunk, Fact, Gist, Hit, Message, NewMessage, Prompt, Selection
from remanence.recall.opening import open_store, own_retriever
from remanence.recall.preview import Preview
from remanence.recall.protocols import Embedder, Retriever, Store, Summarizer, Tokenizer
from remanence.recall.retrieval import load_retriever
from remanence.recall.settings import HemaSettings
from remanence.recall.summarizers import Extractive, load_summarizer
from remanence.recall.tokenizers import load_tokenizer
from remanence.recall.turns import BATCH, Turns, spelled
from remanence.training.progress import watched

DEFAULTS = HemaSettings()
HERE = Selection()  # everything in the space that is taken where none is named


class Recall:
    """Hold a store, what reads it, and what shortens and counts.

    Args:
        store: of the messages.
        embedder: of the store's vectors.
        summarizer: of the compact memory; by default the extractive one.
        tokenizer: that budgets count by; by default the offline encoder's.
        settings: of HEMA.
        retriever: what ranks chunks; by default as `settings.retrieval` says.
    """

    def __init__(
        self,
        store: Store,
        embedder: Embedder,
        summarizer: Summarizer | None = None,
        tokenizer: Tokenizer | None = None,
        settings: HemaSettings = DEFAULTS,
        retriever: Retriever | None = None,
    ):
        if (store.embedder, store.dim) != (embedder.name, embedder.dim):
            problem = f"it was made with '{store.embedder}' ({store.dim} numbers), not '{embedder.name}' ({embedder.dim})"
            raise Mistake("embedder", problem, "name the store's embedder, or embed it anew with reindex")
        self.store, self.embedder, self.settings, self.writes = store, embedder, settings, True
        self.tokenizer = load_tokenizer("sentence") if tokenizer is None else tokenizer
        self.summarizer = Extractive(self.tokenizer) if summarizer is None else summarizer
        self.retriever = load_retriever(settings.retrieval, store, embedder) if retriever is None else retriever
        self.compact = Compact(self.summarizer, self.tokenizer, settings.summary_tokens, settings.period, settings.sos)
        self.turns = Turns(store, embedder, self.tokenizer, self.compact, settings)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        embedder: str | Embedder | None = None,
        summarizer: str | Summarizer = "extractive",
        tokenizer: str | Tokenizer = "sentence",
        write: bool = True,
        **settings: Any,
    ) -> Recall:
        """Open a store, or make one.

        Args:
            path: its folder, or `postgresql://...` for a server (`recall/opening.py`).
            embedder: by name (`recall/embedders.py`) or itself; by default the store's own, `sentence` for a new one.
            summarizer: by name (`recall/summarizers.py`) or itself.
            tokenizer: by name (`recall/tokenizers.py`) or itself.
            write: or only read.
            **settings: of `HemaSettings`.

        Raises:
            Mistake: another embedder than the store's, a second writer, a damaged or newer store, an unknown name or setting.
        """
        chosen = HemaSettings.of(settings)
        counted = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        shortened = load_summarizer(summarizer, counted) if isinstance(summarizer, str) else summarizer
        store, made_by = open_store(path, embedder, write)
        try:
            made = cls(store, made_by, shortened, counted, chosen, own_retriever(store, made_by, chosen.retrieval))
            made.writes = write
            return made
        except BaseException:
            store.close()
            raise

    def add(
        self,
        text: str,
        *,
        role: str = "user",
        space: str = DEFAULT,
        conversation: str = DEFAULT,
        person: str | None = None,
        at: float | None = None,
        turn: int | None = None,
        meta: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Message:
        """Store a message; the gist's advance, and maintenance if it is due, are in the same transaction."""
        message = NewMessage(role, text, person, at, {} if meta is None else meta, turn, key)
        return self.turns.take(space, conversation, [message])[0]

    def add_many(
        self, messages: Sequence[NewMessage], *, space: str = DEFAULT, conversation: str = DEFAULT, progress: bool = False
    ) -> list[Message]:
        """Store messages of one conversation in batches: embedded together, one transaction each."""
        stored: list[Message] = []
        firsts = range(0, len(messages), BATCH)
        for first in watched(firsts, "batches of messages", len(firsts)) if progress else firsts:
            stored += self.turns.take(space, conversation, messages[first : first + BATCH])
        return stored

    def search(self, query: str, k: int = 10, selection: Selection = HERE) -> list[Hit]:
        """Return the best chunks for a query, best first."""
        return self.retriever.search(spelled("query", query), k, selection) if query.strip() and k > 0 else []

    def compose(
        self,
        user_text: str,
        *,
        system: str = "",
        space: str = DEFAULT,
        conversation: str = DEFAULT,
        budget: int | None = None,
        scope: str = "space",
        used: bool = True,
        seen: Collection[str] = (),
    ) -> Prompt:
        """Compose the prompt for a user's turn, which may have been added already or not.

        Args:
            user_text: the current turn.
            system: rules.
            space, conversation: where it is.
            budget: tokens at most; by default the settings'.
            scope: retrieve from the whole space, or from the conversation alone.
            used: note the retrieved chunks as used at this turn (if the store is open for writing); `False` for a preview.
            seen: texts that the model is shown anyway (a client's own history): chunks of them are not retrieved again.

        Raises:
            Mistake: system, compact memory and the turn alone are over the budget.
        """
        if scope not in ("space", "conversation"):
            raise Mistake("scope", f"there is no '{scope}'", nearest(scope, ("space", "conversation")))
        known = space in self.store.spaces()
        here = Selection(space, conversation)
        most = self.settings.tail if self.settings.compact or self.settings.vectors else None
        last = self.store.messages(here, limit=None if most is None else most + 1, newest=True) if known else []
        current = last[-1] if last and last[-1].role == "user" and last[-1].text == user_text else None
        tail = last[:-1] if current is not None else last
        tail = tail if most is None else tail[len(tail) - min(most, len(tail)) :]
        hits = self._retrieved(user_text, here if scope == "conversation" else Selection(space), tail, current, seen) if known else []
        prompt = compose(
            self.tokenizer,
            self.settings.budget if budget is None else budget,
            user=spelled("user turn", user_text),
            system=spelled("system", system),
            gist=self.compact.visible(self.store.gists(space, conversation)) if known and self.settings.compact else "",
            facts=[fact.text for fact in self.store.facts(space, pinned=True) if fact.conversation in (None, conversation)]
            if known
            else [],
            hits=hits,
            tail=tail,
        )
        if used and self.writes and prompt.chunk_ids:
            now = current.turn if current is not None else self.store.last_turn(space, conversation) + 1
            self._touch([hit.chunk for hit in hits if hit.chunk.id in prompt.chunk_ids], conversation, now)
        return prompt

    def _retrieved(
        self, query: str, selection: Selection, tail: Sequence[Message], current: Message | None, seen: Collection[str]
    ) -> list[Hit]:
        """Return the best chunks that are neither in the tail nor the current turn itself, and in no text that is seen anyway."""
        if not self.settings.vectors or not self.settings.top_k:
            return []
        there = {message.id for message in tail} | ({current.id} if current is not None else set())
        pool = self.search(query, self.settings.pool + len(there) + len(seen), selection)
        fresh = (hit for hit in pool if hit.chunk.message not in there and not _is_in(hit.chunk.text, seen))
        return list(islice(fresh, min(self.settings.pool, self.settings.top_k)))

    def _touch(self, chunks: Sequence[Chunk], conversation: str, now: int) -> None:
        """Note that chunks of a space entered a prompt, each at the turn at which its own conversation is."""
        places: dict[str, list[int]] = {}
        for chunk in chunks:
            places.setdefault(chunk.conversation, []).append(chunk.id)
        with self.store.transaction():
            for name, ids in places.items():
                self.store.touch(ids, now if name == conversation else self.store.last_turn(chunks[0].space, name))

    def edit(self, message_id: int, text: str) -> Message:
        """Give a message another text; the old one is erased everywhere, gists included."""
        return erasure.edit(self, message_id, text)

    def preview(self, selection: Selection) -> Preview:
        """Return what `forget` would remove, without removing it."""
        return erasure.preview(self, selection)

    def forget(self, selection: Selection, *, reason: str = "") -> dict[str, Any]:
        """Erase messages with everything that was made of them; return the receipt."""
        return erasure.erase(self, selection, reason)

    def gist(self, space: str = DEFAULT, conversation: str = DEFAULT) -> str:
        """Return the compact memory of a conversation as it enters prompts."""
        return self.compact.visible(self.store.gists(space, conversation))

    def rebuilt_gists(self, space: str, conversation: str, touched: Sequence[int]) -> list[Gist]:
        """Return the gists of what remains of a conversation after messages of the touched turns were removed or edited; put them with `clear=True`."""
        if not self.settings.compact:
            return []
        remaining = self.store.messages(Selection(space, conversation))
        return self.compact.rebuild(self.store.gists(space, conversation), conversation, remaining, touched)

    def maintain(self, space: str = DEFAULT, conversation: str = DEFAULT, force: bool = False) -> dict[str, Any]:
        """Bring a gist up to date that fell behind, and with `force` prune now; return counts. Turns do their own maintenance."""
        return self.turns.maintain(space, conversation, force)

    def messages(self, selection: Selection = HERE, **options: Any) -> list[Message]:
        """Return messages by id; options are those of `Store.messages`."""
        return self.store.messages(selection, **options)

    def conversations(self, space: str = DEFAULT) -> list[dict[str, Any]]:
        """Return the conversations of a space with their sizes."""
        return self.store.conversations(space)

    def spaces(self) -> list[str]:
        """Return the names of all spaces."""
        return self.store.spaces()

    def facts(self, space: str = DEFAULT, conversation: str | None = None, *, pinned: bool | None = None) -> list[Fact]:
        """Return facts."""
        return self.store.facts(space, conversation, pinned=pinned)

    def add_fact(
        self, space: str, text: str, *, conversation: str | None = None, sources: Sequence[int] = (), pinned: bool = False
    ) -> Fact:
        """Store a fact; a pinned one enters every prompt of its conversation, or of its space if it names none."""
        self.store.make_space(space)
        return self.store.add_fact(space, text, conversation=conversation, sources=sources, pinned=pinned)

    def remove_fact(self, fact_id: int) -> int:
        """Remove a fact; return how many there were."""
        return self.store.remove_facts([fact_id])

    def stats(self, space: str | None = None) -> dict[str, Any]:
        """Return numbers of everything, and what is in use."""
        names = {"embedder": self.embedder.name, "summarizer": self.summarizer.name, "tokenizer": self.tokenizer.name}
        return {**self.store.stats(space), **names, "retriever": self.retriever.name}

    def export(self, path: str | Path, selection: Selection = HERE) -> int:
        """Write messages and facts as JSON lines, whole or not at all; return how many messages."""
        return transfer.export(self, Path(path), selection)

    def load(self, path: str | Path, space: str = DEFAULT, *, progress: bool = False) -> int:
        """Add what `export` wrote to a space; return how many messages are new."""
        return transfer.load(self, Path(path), space, progress)

    def reindex(self, path: str | Path, embedder: Embedder | None = None, *, progress: bool = False) -> Recall:
        """Make a new store at `path` with everything of this one, its vectors made anew (by another embedder, if one is given); return it, open."""
        return transfer.reindex(self, Path(path), embedder, progress)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Recall:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_in(text: str, seen: Collection[str]) -> bool:
    """Return whether a text is one of those that are seen, or a piece of one."""
    return text in seen or any(text in whole for whole in seen)
