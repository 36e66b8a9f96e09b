"""Forget for real: messages with their chunks, vectors, index entries, facts and gists, in one transaction; then no file keeps a trace, and a scan says so.

1. Before: gists of the conversations concerned are made anew from what remains (a summariser may take long; the store is not held meanwhile).
2. One transaction: look again, remove, put the new gists with an empty history, write the receipt into the audit log, note that a scrub is due.
3. Scrub: full-text index and database are rebuilt, the log is emptied, caches are removed. A kill before its end: the next opening does it.
4. Scan: every file, for the erased texts, names, gists, facts and vectors (`residue`).

So a kill at any instant leaves the old state, or an erasure that finishes. Out of reach, and said in the guide: exported files, backups of spaces that are not
encrypted, copies that a client keeps, blocks that a disk or a file system puts aside. Cost: steps 3 and 4 read and write the whole store.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.errors import Mistake
from remanence.recall.deletion import ERASED, FORMAT, LISTED, SCRUBBED, asked, hasher, ranges, sealed
from remanence.recall.items import Gist, Message, NewMessage, Selection
from remanence.recall.residue import PAGE, echoing, repeats, scan_store
from remanence.recall.turns import checked, chunked
from remanence.receipts import local_key

if TYPE_CHECKING:
    from remanence.recall.service import Recall

LOG = logging.getLogger("remanence.recall")
LOOKED, LETTERS = (
    4000,
    2_000_000,
)  # texts (and vectors) that a scan looks for at most, and their length together; of more a sample, evenly spread
EXAMPLES = 5
Place = tuple[str, str]  # space, conversation


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


# Looking.


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
    store, doomed = recall.store, _doomed(recall, selection)
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
        tuple(echoing(doomed.said, _staying(recall, doomed))),
        tuple(message.id for message in _staying(recall, doomed) if name and name in message.text.casefold()),
        tuple(fact.id for fact in named if fact.id not in doomed.facts),
    )


def _staying(recall: Recall, doomed: Doomed) -> Iterator[Message]:
    """Yield the messages of the same spaces that stay."""
    gone = set(doomed.ids)
    for space in doomed.spaces:
        after = 0
        while found := recall.store.messages(Selection(space=space), after=after, limit=PAGE):
            yield from (message for message in found if message.id not in gone)
            after = found[-1].id


def _doomed(recall: Recall, selection: Selection) -> Doomed:
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
        for first, last in ranges(_sample(chunks.tolist(), LOOKED)):
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


def _sample(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly spread."""
    return list(items) if len(items) <= most else [items[at] for at in np.linspace(0, len(items) - 1, most).astype(int).tolist()]


# Erasing.


def erase(recall: Recall, selection: Selection, reason: str = "", *, scan: bool = True) -> dict[str, Any]:
    """Erase messages with everything that was made of them; return the receipt.

    Args:
        recall: the memory.
        selection: of messages; one of a space and nothing else drops the space and destroys its key.
        reason: enters the receipt as it is, so it must not repeat what is erased.
        scan: read all files afterwards; without it the receipt says that nothing was scanned.

    Raises:
        Mistake: the selection names nothing, or every space; the reason repeats an erased text; the disk is full (nothing was erased, or, as the sentence then
            says, the messages are gone and the files are cleaned at the next opening).
    """
    store = recall.store
    if selection == Selection(space=None):
        raise Mistake("selection", "would erase every space", "name a space, a person, a conversation, a time or ids")
    drop = selection == Selection(space=selection.space)
    planned = {} if drop else _planned(recall, store.messages(selection))
    with store.transaction():
        doomed = _doomed(recall, selection)
        if not doomed.messages and not drop:
            raise Mistake("selection", "names no message", "look at it with a preview first")
        _check_reason(reason, doomed)
        echoes = 0 if drop else len(echoing(doomed.said, _staying(recall, doomed)))
        if drop:
            erased = {
                "messages": store.drop_space(doomed.spaces[0]),
                "chunks": doomed.chunks,
                "vectors": doomed.chunks,
                "facts": len(doomed.facts),
            }
            erased |= {"gists": 0, "spaces": 1}
        else:
            gists = _agreed(recall, doomed, planned)
            store.remove_facts(doomed.facts)
            erased = dict(store.delete(doomed.ids)) | {"facts": len(doomed.facts), "spaces": 0}
            erased["gists"] = _put(recall, gists)
        body = _body("deletion", store.id, selection, reason, erased, doomed, echoes)
        store.log(ERASED, body)
    return _cleaned(recall, body, doomed, scan)


def edit(recall: Recall, message_id: int, text: str) -> Message:
    """Give a message another text; the old one is erased everywhere: chunks, index, facts that drew on it, gists. The receipt is in the audit log.

    Raises:
        Mistake: there is no such message, the text is empty, or a disk is full.
    """
    store, selection = recall.store, Selection(space=None, ids=(message_id,))
    checked(NewMessage("user", text))
    chunks = chunked(recall.embedder, recall.tokenizer, [text], recall.settings.chunk_tokens)[0]
    old = store.messages(selection)
    if old and old[0].text == text:
        return old[0]
    planned = _planned(recall, old, text)
    with store.transaction():
        doomed = _doomed(recall, selection)
        if not doomed.messages:
            raise Mistake("message", f"there is no message {message_id}", "name one that is stored")
        gists = _agreed(recall, doomed, planned, text)
        store.remove_facts(doomed.facts)
        new, _ = store.replace(message_id, text, chunks, at=time.time())
        erased = {"messages": 1, "chunks": doomed.chunks, "vectors": doomed.chunks, "facts": len(doomed.facts), "spaces": 0}
        erased["gists"] = _put(recall, gists)
        body = _body("edit", store.id, selection, "", erased, doomed, 0)
        store.log(ERASED, body)
    _cleaned(recall, body, doomed, True)
    return new


def finish(recall: Recall) -> None:
    """Scrub again, where a disk was full or a reader held the log when something was erased."""
    recall.store.scrub()


def _check_reason(reason: str, doomed: Doomed) -> None:
    """Refuse a reason that would keep in the receipt what is erased."""
    names = [message.person for message in doomed.messages if message.person]
    if repeats(doomed.texts, reason) or any(name.casefold() in reason.casefold() for name in names):
        raise Mistake("reason", "repeats a name or a text that is to be erased", "give the number of a request instead")


def _body(
    kind: str, store: str, selection: Selection, reason: str, erased: Mapping[str, int], doomed: Doomed, echoes: int
) -> dict[str, Any]:
    """Return the receipt as far as it is known inside the transaction."""
    number = secrets.token_hex(16)
    hashed = hasher(number, local_key())
    texts = sorted({hashed(text) for text in doomed.said}) if hashed and len(doomed.said) <= LISTED else None
    told = {"asked": asked(selection, reason, hashed), "erased": dict(erased), "ids": ranges(doomed.ids), "texts": texts, "echoes": echoes}
    return {"format": FORMAT, "kind": kind, "id": number, "store": store, "at": time.time()} | told


def _cleaned(recall: Recall, body: dict[str, Any], doomed: Doomed, look: bool) -> dict[str, Any]:
    """Scrub and scan after the transaction; return the receipt."""
    store = recall.store
    try:
        recall.retriever.refresh()
        store.scrub()
        texts, vectors = _looked(doomed.texts), doomed.vectors
        seen = scan_store(store, texts, vectors) if look else None
        told = None
        if seen is not None:
            told = {"files": seen.files, "bytes": seen.bytes, "needles": seen.needles, "texts": len(texts), "vectors": len(vectors)}
            told |= {"short": seen.short, "found": len(seen.found)}
            if not seen.clean:
                LOG.warning("%d traces were found after erasure %s", len(seen.found), body["id"])
        store.log(SCRUBBED, {"id": body["id"], "scan": told})
    except Mistake as mistake:
        problem = f"the messages are gone, but traces of them may be left in the files ({mistake.problem})"
        raise Mistake(mistake.place, problem, f"{mistake.remedy}; the next opening or erasure cleans them") from mistake
    return sealed({**body, "scan": told})


def _looked(texts: Sequence[str]) -> list[str]:
    """Return the texts to look for: each once, not more than a scan can bear."""
    each = _sample([text for text in dict.fromkeys(texts) if text], LOOKED)
    letters = sum(map(len, each))
    return each if letters <= LETTERS else _sample(each, max(1, len(each) * LETTERS // letters))


# Gists.


def _planned(recall: Recall, messages: Sequence[Message], text: str | None = None) -> dict[Place, tuple[Any, list[Gist]]]:
    """Return for each conversation its state now and the gists of what will remain; `text`: the one message is edited, not removed."""
    return {place: (_state(recall, place), _remade(recall, place, gone, text)) for place, gone in places(messages).items()}


def _agreed(
    recall: Recall, doomed: Doomed, planned: Mapping[Place, tuple[Any, list[Gist]]], text: str | None = None
) -> dict[Place, list[Gist]]:
    """Return the planned gists where nothing has changed since, and others anew; inside the transaction, before anything is removed."""
    made = {}
    for place, gone in places(doomed.messages).items():
        state, gists = planned.get(place, (None, []))
        made[place] = gists if state == _state(recall, place) else _remade(recall, place, gone, text)
    return made


def _state(recall: Recall, place: Place) -> tuple[Any, bytes]:
    return recall.turns.state(*place), recall.store.ids(Selection(*place)).tobytes()


def _remade(recall: Recall, place: Place, gone: Sequence[Message], text: str | None) -> list[Gist]:
    """Return the gists of what remains; none if the summariser fails, since an erasure does not wait for a model: the next turn makes them."""
    if not recall.settings.compact:
        return []
    ids = {message.id for message in gone}
    remaining = [
        message if message.id not in ids else replace(message, text=text)
        for message in recall.store.messages(Selection(*place))
        if message.id not in ids or text is not None
    ]
    try:
        return recall.compact.rebuild(recall.store.gists(*place), place[1], remaining, [message.turn for message in gone])
    except Exception as error:
        LOG.warning("the summariser failed (%s): gists are removed, the next turn makes them anew", type(error).__name__)
        return []


def _put(recall: Recall, gists: Mapping[Place, list[Gist]]) -> int:
    for place, made in gists.items():
        recall.store.put_gists(*place, made, clear=True)
    return sum(map(len, gists.values()))
