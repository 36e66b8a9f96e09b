"""Carry a memory out and in: JSON lines, one message or fact each, and a store made anew with other vectors.

    {"message": {"id", "space", "conversation", "turn", "role", "text", "person", "at", "meta"}}
    {"fact": {"space", "conversation", "text", "pinned", "sources": ids of messages}}

Messages keep their turns, so salience and segments are those of the conversation that they came from. A file that is loaded twice is stored once: each message
gets a key made of its place and its words. Their ids are new ones, and a fact's sources follow them, so that it still goes when one of them goes; a source that
is not in the file is left out. Files of older versions have neither ids nor sources. Vectors, gists and what was retrieved are not carried: they are made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import Mistake
from remanence.recall.items import Fact, NewMessage, Selection
from remanence.recall.protocols import Embedder
from remanence.recall.turns import BATCH
from remanence.storage import whole_file
from remanence.training.progress import watched

if TYPE_CHECKING:
    from remanence.recall.service import Recall

PAGE = 500  # messages read at a time
FIELDS = ("id", "space", "conversation", "turn", "role", "text", "person", "at", "meta")


def lines_of(recall: Recall, selection: Selection) -> Iterator[dict[str, Any]]:
    """Yield the selected messages by id, then (if nothing but a space or a conversation is selected) the facts."""
    after = 0
    while page := recall.store.messages(selection, after=after, limit=PAGE):
        for message in page:
            yield {"message": {name: getattr(message, name) for name in FIELDS} | {"meta": dict(message.meta)}}
        after = page[-1].id
    if selection == Selection(selection.space, selection.conversation):
        for space in recall.store.spaces() if selection.space is None else [selection.space]:
            for fact in recall.store.facts(space):
                if selection.conversation is None or fact.conversation in (
                    None,
                    selection.conversation,
                ):  # those without one are in every prompt
                    line = {"space": space, "conversation": fact.conversation, "text": fact.text, "pinned": fact.pinned}
                    yield {"fact": line | {"sources": list(fact.sources)}}


def export(recall: Recall, path: Path, selection: Selection) -> int:
    """Write messages and facts as JSON lines, whole or not at all; return how many messages."""
    count = 0
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines_of(recall, selection):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += "message" in line
    return count


def load(recall: Recall, path: Path, space: str, progress: bool = False) -> int:
    """Add the messages and facts of a file to a space, under a bar if asked; return how many messages are new.

    Raises:
        Mistake: the file cannot be read, or a line is not one of `export`.
    """
    before = recall.store.stats()["messages"]
    turns: dict[str, list[NewMessage]] = {}
    facts: list[dict[str, Any]] = []
    keys: dict[int, str | None] = {}  # of messages by id; where a file is two exports put together, an id means the last one above a fact
    for number, item in _read(path):
        try:
            if "fact" in item:
                fact = {name: item["fact"][name] for name in ("conversation", "text", "pinned")}
                facts.append(fact | {"sources": [keys[id] for id in item["fact"].get("sources") or () if id in keys]})
            else:
                conversation, message = _message(item["message"])
                turns.setdefault(conversation, []).append(message)
                if "id" in item["message"]:
                    keys[item["message"]["id"]] = message.key
        except (KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{path}, line {number}", f"is no message and no fact ({error!r})", "give a file that export wrote") from error
    batches: list[tuple[str, list[NewMessage]]] = []
    ids: dict[str | None, int] = {}
    for conversation, messages in turns.items():
        messages.sort(key=lambda message: message.turn or 0)
        batches += [(conversation, messages[first : first + BATCH]) for first in range(0, len(messages), BATCH)]
    for conversation, batch in watched(batches, "batches of messages", len(batches)) if progress else batches:
        stored = recall.add_many(batch, space=space, conversation=conversation)
        ids |= {new.key: message.id for new, message in zip(batch, stored, strict=True)}
    for fact in facts:
        fact["sources"] = [ids[key] for key in fact["sources"]]
    _add_facts(recall, space, facts)
    return int(recall.store.stats()["messages"] - before)


def _add_facts(recall: Recall, space: str, facts: list[dict[str, Any]]) -> None:
    """Store facts that are not there yet; one that is there without some of these sources is stored anew with them."""
    known: dict[tuple[str | None, str], list[Fact]] = {}
    for fact in recall.store.facts(space) if facts and space in recall.store.spaces() else ():
        known.setdefault((fact.conversation, fact.text), []).append(fact)
    for line in facts:
        there = known.get((line["conversation"], line["text"]), [])
        if any(set(line["sources"]) <= set(fact.sources) for fact in there):
            continue
        sources = {*line["sources"], *(source for fact in there[:1] for source in fact.sources)}
        with recall.store.transaction():
            recall.store.remove_facts([fact.id for fact in there[:1]])
            pinned = there[0].pinned if there else bool(line["pinned"])
            recall.add_fact(space, line["text"], conversation=line["conversation"], sources=sorted(sources), pinned=pinned)


def reindex(recall: Recall, path: Path, embedder: Embedder | None, progress: bool = False) -> Recall:
    """Make a new store with everything of another one, in its order, and its vectors made anew, under a bar if asked; return it, open.

    A space that is sealed is sealed in the new store too, with a key of its own (so is any whose store does not say).

    Raises:
        Mistake: there is something at `path`.
    """
    from remanence.recall.service import Recall
    from remanence.recall.sqlite_store import SqliteStore

    if path.exists() and any(path.iterdir()):
        raise Mistake(path, "is not empty", "name a new folder")
    chosen = recall.embedder if embedder is None else embedder
    made = Recall(
        SqliteStore(path, embedder=chosen.name, dim=chosen.dim), chosen, recall.summarizer, recall.tokenizer, settings=recall.settings
    )
    for space in recall.store.spaces():
        made.store.make_space(space, encrypt=recall.store.cache(space) is None)
    lines = lines_of(recall, Selection(space=None))
    if progress:
        held = recall.store.stats()
        lines = watched(lines, "messages and facts", held["messages"] + held["facts"])
    ids: dict[int, int] = {}
    for place, group in groupby(lines, key=lambda line: _place(line)):
        if place is None:
            for fact in (line["fact"] for line in group):
                sources = [ids[source] for source in fact["sources"] if source in ids]
                made.add_fact(fact["space"], fact["text"], conversation=fact["conversation"], sources=sources, pinned=fact["pinned"])
            continue
        messages = (line["message"] for line in group)
        while batch := list(islice(messages, PAGE)):
            stored = made.add_many([_message(message)[1] for message in batch], space=place[0], conversation=place[1])
            ids |= {message["id"]: new.id for message, new in zip(batch, stored, strict=True)}
    return made


def _place(line: dict[str, Any]) -> tuple[str, str] | None:
    return (line["message"]["space"], line["message"]["conversation"]) if "message" in line else None


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield numbered JSON objects.

    Raises:
        Mistake: the file cannot be read, or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    item = json.loads(line)
                    if not isinstance(item, dict):
                        raise ValueError("no object")
                    yield number, item
    except OSError as error:
        raise Mistake(path, f"cannot be read ({error.strerror or error})", "name a file that export wrote") from error
    except UnicodeDecodeError as error:
        raise Mistake(path, "is no UTF-8 text", "name a file that export wrote") from error
    except ValueError as error:
        raise Mistake(f"{path}, line {number}", "is no JSON object", "give one object a line") from error


def _message(item: dict[str, Any]) -> tuple[str, NewMessage]:
    """Return conversation and message of a line; its key is made of its place and its words."""
    words = json.dumps([item["conversation"], item["turn"], item["role"], item["text"]])
    key = "import-" + hashlib.sha256(words.encode()).hexdigest()[:32]
    return str(item["conversation"]), NewMessage(
        item["role"], item["text"], item.get("person"), item.get("at"), item.get("meta") or {}, item["turn"], key
    )
