"""A chat completion as a client asks for it: what the proxy needs of it is read, everything else is left alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.recall.items import DEFAULT

MODES = {"on": (True, True), "off": (False, False), "read": (True, False), "write": (False, True)}  # reads, stores
FIELDS = ("memory", "space", "conversation", "person", "key")
HEADERS = {field: f"x-remanence-{field}" for field in FIELDS[:4]} | {"key": "idempotency-key"}
LONGEST = 200  # characters of a name


@dataclass(frozen=True)
class Call:
    """A request for a chat completion.

    Args:
        body: bytes for the upstream: as they came, or without our own field.
        content: the same, read.
        reads, stores: what the memory may do.
        space, conversation, person, key: see `proxy`.
        query: what the memory is asked for: the last user turn.
        said: the user's turn if it is new, else empty (in the rounds after a tool call it is stored already).
    """

    body: bytes
    content: Mapping[str, Any]
    reads: bool
    stores: bool
    space: str
    conversation: str
    person: str | None
    key: str | None
    query: str
    said: str

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """Return the messages."""
        return _messages(self.content)


def read_call(raw: bytes, headers: Mapping[str, str]) -> Call:
    """Read a request.

    Raises:
        Mistake: it is no JSON object, or what it says about the memory cannot be understood (a switch that is misspelt must not store).
    """
    try:
        content = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Mistake("request", "the body is no JSON", "send a chat completion") from None
    if not isinstance(content, dict):
        raise Mistake("request", "the body is no JSON object", "send a chat completion")
    mode, names = _asked(content, headers)
    body = raw
    if "remanence" in content:
        content = {name: value for name, value in content.items() if name != "remanence"}
        body = json.dumps(content).encode()
    reads, stores = MODES[mode]
    user = _name("user", content.get("user") or None) if reads or stores else None
    query, said = _turn(_messages(content))
    conversation, person = names.get("conversation") or user or DEFAULT, names.get("person") or user
    return Call(body, content, reads, stores, names.get("space") or DEFAULT, conversation, person, names.get("key"), query, said)


def _messages(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the messages, none where the field is not what it should be (the upstream says so)."""
    found = content.get("messages")
    return found if isinstance(found, list) and all(isinstance(message, dict) for message in found) else ()


def _asked(content: Mapping[str, Any], headers: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the mode and the names that the body's own field and the headers ask for; the body counts before a header, `off` before anything."""
    own = content.get("remanence", {})
    if not isinstance(own, dict):
        raise Mistake("remanence", "is no object", f"give any of {', '.join(FIELDS)}")
    for field in own:
        if field not in FIELDS:
            raise Mistake("remanence", "holds a field that is not known", nearest(str(field)[:40], FIELDS))
    heard = {field: _decoded(headers[name]) for field, name in HEADERS.items() if name in headers}
    modes = [_mode(said["memory"]) for said in (own, heard) if said.get("memory") is not None]
    names = {field: _name(field, value) for field, value in {**heard, **own}.items() if field != "memory" and value is not None}
    return "off" if "off" in modes else (modes or ["on"])[0], names


def _mode(value: Any) -> str:
    """Return the mode that is asked for; true and false are on and off.

    Raises:
        Mistake: it is none.
    """
    word = ("on" if value else "off") if isinstance(value, bool) else str(value).strip().lower()
    if word not in MODES:
        raise Mistake(HEADERS["memory"], "is not understood", f"write {', '.join(MODES)}")
    return word


def _name(field: str, value: Any) -> Any:
    """Return the name of a space, conversation, person or key; `None` stays.

    Raises:
        Mistake: it is none.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value.strip()) <= LONGEST or not value.strip().isprintable():
        raise Mistake(field, f"is no printable text of 1 to {LONGEST} characters", "give another name")
    return value.strip()


def _decoded(header: str) -> str:
    """Return a header's text: what clients send as UTF-8 arrives as Latin-1."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def _no_number(constant: str) -> Any:
    raise ValueError(constant)


def raw_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, or of a piece of one; where it has parts (images, sound), of its text parts."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "\n".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message as it can be stored."""
    return storable(raw_text(message))


def storable(text: str) -> str:
    """Return a text in which halves of surrogate pairs are joined, and lonely ones (which no file can hold) are replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _turn(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the last user turn, and the same again if it is new: no tool has been called since."""
    for number in range(len(messages) - 1, -1, -1):
        if messages[number].get("role") == "user":
            after = messages[number + 1 :]
            text = text_of(messages[number])
            called = any(message.get("role") in ("tool", "function") or message.get("tool_calls") for message in after)
            return (text, "" if called else text) if text.strip() else ("", "")
    return "", ""


def added(call: Call, text: str) -> bytes:
    """Return the body with a text in its leading system (or developer) message, which is made if there is none; nothing else changes.

    It goes into the message that is there because many chat templates take one system message, at the start, and no other.
    """
    messages = list(call.messages)
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str | list):
        old = first["content"]
        messages[0] = {**first, "content": [*old, {"type": "text", "text": text}] if isinstance(old, list) else f"{old}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})
    return json.dumps({**call.content, "messages": messages}).encode()
