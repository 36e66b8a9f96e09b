"""What an erasure would take with it: by id, by conversation, person, time or query, before anything is removed.

Cost: one pass over the texts of the spaces concerned, since what stays is looked through for quotations of what goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.errors import Mistake
from remanence.recall.deletion import ranges
from remanence.recall.items import Message, Selection
from remanence.recall.needles import echoing
from remanence.recall.residue import PAGE

if TYPE_CHECKING:
    from remanence.recall.service import Recall

LOOKED = 4000  # vectors (and texts) that a scan looks for at most; of more a sample, evenly spread
EXAMPLES = 5
Place = tuple[str, str]  # space, conversation
NOTHING = ("selection", "names no message", "look up what there is with `remanence recall show`")  # place, problem and remedy of a Mistake


@dataclass(frozen=True)
class Preview:
    """What an erasure would do.

    Args:
        selection: exactly these messages, by id.
        messages, chunks, facts: how many go.
        gists: how many are made anew.
        conversations: (space, conversation, messages that go).
        people: whose messages they are.
        first, last: their times.
        examples: some of them, spread over all.
        echoes: ids of messages of the same spaces that stay and repeat a piece of them: look at these too.
        mentions: ids of messages that stay and have the person's name in them.
        fact_mentions: ids of facts that stay and have the person's name in them.
    """

    selection: Selection
    messages: int
    chunks: int
    facts: int
    gists: int
    conversations: tuple[tuple[str, str, int], ...] = ()
    people: tuple[str, ...] = ()
    first: float | None = None
    last: float | None = None
    examples: tuple[Message, ...] = ()
    echoes: tuple[int, ...] = ()
    mentions: tuple[int, ...] = ()
    fact_mentions: tuple[int, ...] = ()


@dataclass
class Doomed:
    """What is about to go, and everything that a scan looks for afterwards."""

    messages: list[Message]
    spaces: list[str]
    chunks: int = 0
    facts: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Return the messages' ids."""
        return [message.id for message in self.messages]

    @property
    def said(self) -> list[str]:
        """Return the messages' texts."""
        return [message.text for message in self.messages]


def places(messages: Iterable[Message]) -> dict[Place, list[Message]]:
    """Return messages by space and conversation."""
    held: dict[Place, list[Message]] = {}
    for message in messages:
        held.setdefault((message.space, message.conversation), []).append(message)
    return held


def find(recall: Recall, selection: Selection, *, query: str | None = None, contains: str | None = None, k: int = 20) -> Selection:
    """Return by id the messages of a selection that a query finds, or that contain a text: to be previewed, and then forgotten exactly so.

    Raises:
        Mistake: there are none.
    """
    if query is not None:
        ids: Iterable[int] = (hit.chunk.message for hit in recall.search(query, k, selection))
    else:
        ids = (message.id for message in recall.store.messages(selection, contains=contains))
    found = tuple(dict.fromkeys(ids))
    if not found:
        raise Mistake("selection", "names no message", "ask with other words, or name messages by id")
    return Selection(space=selection.space, ids=found)


def preview(recall: Recall, selection: Selection) -> Preview:
    """Return what `erase` would remove, without removing it."""
    store, doomed = recall.store, doomed_by(recall, selection)
    name = selection.person.casefold() if selection.person else None
    times, count, there = [message.at for message in doomed.messages], len(doomed.messages), places(doomed.messages)
    spread = np.linspace(0, count - 1, min(EXAMPLES, count)).astype(int).tolist()
    named = (fact for space in doomed.spaces for fact in store.facts(space) if name and name in fact.text.casefold())
    return Preview(
        Selection(space=selection.space, ids=tuple(doomed.ids)),
        count,
        doomed.chunks,
        len(doomed.facts),
        sum(len(store.gists(*place)) for place in there),
        tuple((*place, len(messages)) for place, messages in there.items()),
        tuple(sorted({message.person for message in doomed.messages if message.person})),
        min(times, default=None),
        max(times, default=None),
        tuple(doomed.messages[at] for at in spread),
        tuple(echoing(doomed.said, staying(recall, doomed))),
        tuple(message.id for message in staying(recall, doomed) if name and name in message.text.casefold()),
        tuple(fact.id for fact in named if fact.id not in doomed.facts),
    )


def staying(recall: Recall, doomed: Doomed) -> Iterator[Message]:
    """Yield the messages of the same spaces that stay."""
    gone = set(doomed.ids)
    for space in doomed.spaces:
        after = 0
        while found := recall.store.messages(Selection(space=space), after=after, limit=PAGE):
            yield from (message for message in found if message.id not in gone)
            after = found[-1].id


def doomed_by(recall: Recall, selection: Selection) -> Doomed:
    """Gather everything that a selection takes with it: of a whole conversation or space also facts that name no source."""
    store, messages = recall.store, recall.store.messages(selection)
    whole = selection == Selection(space=selection.space, conversation=selection.conversation) and selection.space is not None
    doomed = Doomed(
        messages, [selection.space] if whole and selection.space else list(dict.fromkeys(message.space for message in messages))
    )
    gone = set(doomed.ids)
    doomed.texts = [text for m in messages for text in (m.text, m.person or "", *_strings(m.meta))]
    for space in doomed.spaces:
        chunks = store.chunk_ids(Selection(space=space, ids=tuple(m.id for m in messages if m.space == space)))
        doomed.chunks += len(chunks)
        for first, last in ranges(sample(chunks.tolist(), LOOKED)):
            _, vectors = next(iter(store.vectors(space, above=first - 1, block=last - first + 1)))
            doomed.vectors += list(vectors)
        for fact in store.facts(space):
            if gone & set(fact.sources) or (whole and selection.conversation in (None, fact.conversation)):
                doomed.facts.append(fact.id)
                doomed.texts.append(fact.text)
    for place in places(messages):
        doomed.texts += [*place, *(gist.text for gist in (*store.gists(*place), *(old for _, old in store.gist_history(*place, 1 << 40))))]
    return doomed


def _strings(value: object) -> list[str]:
    """Return every string in a JSON value, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [found for key, one in value.items() for found in [str(key), *_strings(one)]]
    return [found for one in value for found in _strings(one)] if isinstance(value, list | tuple) else []


def sample(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly spread."""
    return list(items) if len(items) <= most else [items[at] for at in np.linspace(0, len(items) - 1, most).astype(int).tolist()]
