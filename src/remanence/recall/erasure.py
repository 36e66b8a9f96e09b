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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from remanence.errors import Mistake
from remanence.recall.deletion import ERASED, FORMAT, LISTED, SCRUBBED, asked, hasher, ranges, sealed
from remanence.recall.items import Gist, Message, NewMessage, Selection
from remanence.recall.needles import echoing, repeats
from remanence.recall.preview import LOOKED, NOTHING, Doomed, Place, Preview, doomed_by, find, places, preview, sample, staying
from remanence.recall.residue import scan_store
from remanence.recall.turns import checked, chunked
from remanence.receipts import local_key

if TYPE_CHECKING:
    from remanence.recall.service import Recall

__all__ = ["Preview", "edit", "erase", "find", "finish", "preview"]
LOG = logging.getLogger("remanence.recall")
LETTERS = 2_000_000  # of the texts that a scan looks for together


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
        doomed = doomed_by(recall, selection)
        if not doomed.messages and not drop:
            raise Mistake(*NOTHING)
        _check_reason(reason, doomed)
        echoes = 0 if drop else len(echoing(doomed.said, staying(recall, doomed)))
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
        doomed = doomed_by(recall, selection)
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
        store.scrub()
        recall.retriever.refresh()
        texts, vectors = _looked(doomed.texts), doomed.vectors
        seen = scan_store(store, texts, vectors) if look and store.files() else None  # the files of a server cannot be read from here
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
    each = sample([text for text in dict.fromkeys(texts) if text], LOOKED)
    letters = sum(map(len, each))
    return each if letters <= LETTERS else sample(each, max(1, len(each) * LETTERS // letters))


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
        message if text is None or message.id not in ids else replace(message, text=text)
        for message in recall.store.messages(Selection(*place))
        if text is not None or message.id not in ids
    ]
    try:
        return recall.compact.rebuild(recall.store.gists(*place), place[1], remaining, [message.turn for message in gone])
    except Exception as error:  # whatever a model raises; its words may hold texts and are not passed on
        LOG.warning("the summariser failed (%s): gists are removed, the next turn makes them anew", type(error).__name__)
        return []


def _put(recall: Recall, gists: Mapping[Place, list[Gist]]) -> int:
    for place, made in gists.items():
        recall.store.put_gists(*place, made, clear=True)
    return sum(map(len, gists.values()))
