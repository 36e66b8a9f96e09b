"""What may be asked of the server over HTTP: the bodies of requests, each with its limits, so that nothing odd gets past the door.

Text is kept as it comes; refused are only what no store can hold (lone surrogates) and what no reader can (numbers that are none, endless nesting).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from remanence.recall.items import DEFAULT, NewMessage, Selection

TEXT = 100_000  # characters of a message
META = 16_384  # bytes of a message's meta as JSON
LAST = 2**63 - 1


def writable(text: str) -> str:
    """Refuse what is no Unicode text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


def named(text: str) -> str:
    """Refuse names that cannot be shown."""
    if not writable(text).isprintable() or text != text.strip():
        raise ValueError("must be printable, without spaces around it")
    return text


def spoken(text: str) -> str:
    """Refuse a text of nothing but spaces."""
    if not writable(text).strip():
        raise ValueError("holds no words")
    return text


def plain(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse a meta that is no plain, small JSON."""
    try:
        size = len(json.dumps(meta, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, RecursionError):
        raise ValueError("must be plain JSON (finite numbers, whole characters)") from None
    if size > META:
        raise ValueError(f"must be at most {META} bytes of JSON")
    deep = 0
    for letter in json.dumps(meta):  # brackets inside strings count too: a bound, not a parser
        deep += (letter in "[{") - (letter in "]}")
        if deep > 64:
            raise ValueError("is nested too deep")
    return meta


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(named)]
Words = Annotated[str, Field(min_length=1, max_length=TEXT), AfterValidator(spoken)]
Query = Annotated[str, Field(min_length=1, max_length=8000), AfterValidator(spoken)]
Loose = Annotated[str, Field(max_length=TEXT), AfterValidator(writable)]
Instant = Annotated[float, Field(ge=-62_135_596_800, le=253_402_300_799, allow_inf_nan=False)]  # the years 1 to 9999
Id = Annotated[int, Field(ge=1, le=LAST)]
Role = Literal["system", "user", "assistant", "tool"]


class Body(BaseModel):
    """A request's body: unknown fields are errors, not silence."""

    model_config = ConfigDict(extra="forbid")


class Said(Body):
    """A message to remember."""

    text: Words
    role: Role = "user"
    person: Name | None = None
    at: Instant | None = None
    turn: Id | None = None
    meta: Annotated[dict[str, Any], AfterValidator(plain)] = Field(default_factory=dict)
    key: Name | None = Field(None, description="yours: a second message with the same key is not stored again, the first one is returned")

    def new(self) -> NewMessage:
        """Return it as the store takes it."""
        return NewMessage(self.role, self.text, self.person, self.at, self.meta, self.turn, self.key)


class SaidHere(Said):
    """A message to remember, and where."""

    conversation: Name = DEFAULT


class SaidMany(Body):
    """Messages of one conversation, in order."""

    conversation: Name = DEFAULT
    messages: list[Said] = Field(min_length=1, max_length=1000)


class Text(Body):
    """The text that a message shall have."""

    text: Words


class Which(Body):
    """Some messages: all conditions must hold."""

    conversation: Name | None = None
    ids: Annotated[list[Id], Field(min_length=1, max_length=10_000)] | None = None
    turns: tuple[Id, Id] | None = Field(None, description="first and last, both included; needs a conversation")
    person: Name | None = None
    role: Role | None = None
    since: Instant | None = None
    until: Instant | None = None

    def selection(self, space: str | None) -> Selection:
        """Return it as the store takes it."""
        ids = None if self.ids is None else tuple(self.ids)
        return Selection(space, self.conversation, ids, self.turns, self.person, self.role, self.since, self.until)


class Question(Which):
    """What to look for, and among which messages."""

    query: Query
    k: int = Field(10, ge=1, le=200)


class Doomed(Which):
    """What shall be forgotten, to be looked at first; with `query`: of these messages the `k` found for it."""

    query: Query | None = None
    k: int = Field(20, ge=1, le=200)


class Forgetting(Which):
    """What shall be forgotten: the `selection` of a preview, and its `confirm`."""

    confirm: Annotated[str, Field(min_length=64, max_length=64)]
    reason: Annotated[Loose, Field(max_length=500)] = ""


class Composing(Body):
    """What a prompt is made for."""

    user: Words
    system: Loose = ""
    conversation: Name = DEFAULT
    budget: int | None = Field(None, ge=1, le=10_000_000)
    scope: Literal["space", "conversation"] = "space"
    preview: bool = Field(False, description="look only: what enters the prompt is not noted as used")


class Stated(Body):
    """A fact, written by hand or drawn from messages."""

    text: Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(spoken)]
    conversation: Name | None = None
    sources: Annotated[list[Id], Field(max_length=1000)] = Field(default_factory=list)
    pinned: bool = False


class Making(Body):
    """How a space is made."""

    encrypt: bool = Field(False, description="seal its text and vectors with a key of its own, kept outside the store")


class Shown(Body):
    """A receipt to check."""

    receipt: dict[str, Any]
    trusted: Annotated[str, Field(max_length=100)] | None = Field(None, description="the public key (base64) that must have signed it")


def in_query(
    conversation: Name | None = None,
    person: Name | None = None,
    role: Role | None = None,
    since: Instant | None = None,
    until: Instant | None = None,
    first: Id | None = None,
    last: Id | None = None,
) -> Which:
    """Read a selection from a URL's query; turns as `first` and `last`."""
    turns = None if first is None and last is None else (first or 1, last or LAST)
    return Which(conversation=conversation, person=person, role=role, since=since, until=until, turns=turns)
