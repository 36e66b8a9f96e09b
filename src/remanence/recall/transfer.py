"""Carry a memory out and in: JSON lines, one message or fact each, and a store made anew with other vectors.

    {"message": {"space", "conversation", "turn", "role", "text", "person", "at", "meta"}}
    {"fact": {"space", "conversation", "text", "pinned"}}

Messages keep their turns, so salience and segments are those of the conversation that they came from. A file that is loaded twice is stored once: each message
gets a key made of its place and its words. Vectors, gists and what was retrieved are not carried: they are made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import Mistake
from remanence.recall.items import NewMessage, Selection
from remanence.recall.protocols import Embedder
from remanence.recall.turns import BATCH
from remanence.storage import whole_file
from remanence.training.progress import watched

if TYPE_CHECKING:
    from remanence.recall.service import Recall

PAGE = 500  # messages read at a time
FIELDS = ("space", "conversation", "turn", "role", "text", "person", "at", "meta")


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
                    yield {"fact": {"space": space, "conversation": fact.conversation, "text": fact.text, "pinned": fact.pinned}}


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
    for number, item in _read(path):
        try:
            if "fact" in item:
                facts.append({name: item["fact"][name] for name in ("conversation", "text", "pinned")})
            else:
                conversation, message = _message(item["message"])
                turns.setdefault(conversation, []).append(message)
        except (KeyError, TypeError, AttributeError) as error:
            raise Mistake(f"{path}, line {number}", f"is no message and no fact ({error!r})", "give a file that export wrote") from error
    batches = []
    for conversation, messages in turns.items():
        messages.sort(key=lambda message: message.turn or 0)
        batches += [(conversation, messages[first : first + BATCH]) for first in range(0, len(messages), BATCH)]
    for conversation, batch in watched(batches, "batches of messages", len(batches)) if progress else batches:
        recall.add_many(batch, space=space, conversation=conversation)
    known = {(fact.conversation, fact.text) for fact in recall.store.facts(space)} if facts and space in recall.store.spaces() else set()
    for fact in facts:
        if (fact["conversation"], fact["text"]) not in known:
            recall.add_fact(space, fact["text"], conversation=fact["conversation"], pinned=bool(fact["pinned"]))
    return int(recall.store.stats()["messages"] - before)


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
    for place, group in groupby(lines, key=lambda line: _place(line)):
        if place is None:
            for line in group:
                made.add_fact(
                    line["fact"]["space"], line["fact"]["text"], conversation=line["fact"]["conversation"], pinned=line["fact"]["pinned"]
                )
            continue
        messages = (_message(line["message"])[1] for line in group)
        while batch := list(islice(messages, PAGE)):
            made.add_many(batch, space=place[0], conversation=place[1])
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
