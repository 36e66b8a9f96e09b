"""A solver for the template items: it reads the generator's sentences back by their patterns, and so knows whether an item can be answered at all.

It has no knowledge but the patterns: which sentence states which slot of which subject (under both of its names), which wish or circumstance bears on which
request, and who is meant by "the person who lent me the tent". It enforces the verification rules when items are made, and it is what the desk reader of
the claim sees with.

Cost: one regular expression per sentence pattern, once per distinct message (kept).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from remanence.data import convomem_words as words
from remanence.data.convomem import Utterance

UNKNOWN = "I don't have any information about that."


@dataclass(frozen=True)
class Meaning:
    """What a sentence says: kind fact | said | change | wish | event | link | trait, what it is about, and the value."""

    kind: str
    about: str
    slot: str
    value: str


@dataclass(frozen=True)
class Solution:
    """The reply, and the places of the messages that it rests on."""

    reply: str
    used: tuple[int, ...]


def names(subject: str) -> tuple[str, str]:
    """Return both names of a subject such as "our book club"."""
    for owner in words.OWNERS:
        for short, long in words.SUBJECTS:
            if subject == f"{owner} {short}":
                return subject, long.format(who=words.BEHIND[owner])
    raise KeyError(subject)


def subjects() -> list[str]:
    """Return all subjects by their first name."""
    return [f"{owner} {short}" for owner in words.OWNERS for short, _ in words.SUBJECTS]


@lru_cache(maxsize=1)
def _known() -> dict[str, str]:
    return {name: subject for subject in subjects() for name in names(subject)}


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], str, str]]:
    """Return (pattern with groups s and v, kind, slot) of every sentence about a subject."""
    listed = [(text, "fact", slot) for slot, (_, texts) in words.SLOTS.items() for text in texts]
    listed += [(text.replace("{slot}", slot), "said", slot) for slot in words.SLOTS for text in words.SAID]
    listed += [(text.replace("{slot}", slot), "change", slot) for slot in words.SLOTS for text in words.CHANGED]
    return [(_pattern(text), kind, slot) for text, kind, slot in listed]


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{s\}", "(?P<s>.+?)").replace(r"\{v\}", "(?P<v>.+?)"))


@lru_cache(maxsize=1 << 17)
def read(text: str) -> Meaning | None:
    """Return what a sentence of the generator says, `None` for small talk and anything else."""
    for domain, (_, wishes) in words.WISHES.items():
        for wish, heed in wishes:
            if text == wish:
                return Meaning("wish", domain, "", heed)
    for happened, request, heed in words.CIRCUMSTANCES:
        if text == happened:
            return Meaning("event", request, "", heed)
    name, _, rest = text.partition(" ")
    if name in words.PEOPLE:
        if rest[:-1] in words.LINKS:
            return Meaning("link", rest[:-1], "", name)
        return next((Meaning("trait", name, "", heed) for trait, heed in words.TRAITS if trait == f"{{n}} {rest}"), None)
    for pattern, kind, slot in _patterns():
        found = pattern.fullmatch(text)
        if found and _lower(found["s"]) in _known():
            return Meaning(kind, _known()[_lower(found["s"])], slot, found["v"])
    return None


def solve(question: str, messages: Sequence[Utterance]) -> Solution:
    """Answer a question of the generator from messages in order; the reply is `UNKNOWN` where they do not say."""
    meanings = [(place, read(message.text), message.speaker) for place, message in enumerate(messages)]
    told = [
        (place, meaning)
        for place, meaning, speaker in meanings
        if meaning is not None and (meaning.kind == "said") == (speaker == "Assistant")
    ]
    for domain, (request, _) in words.WISHES.items():
        if question == request:
            return _heed([(place, one) for place, one in told if one.kind == "wish" and one.about == domain])
    events = [(place, one) for place, one in told if one.kind == "event" and one.about == question]
    if events or any(question == request for _, request, _ in words.CIRCUMSTANCES):
        return _heed(events)
    for link in words.LINKS:
        if question == words.HOST.format(link=link):
            known = {one.value: place for place, one in told if one.kind == "link" and one.about == link}
            traits = [(place, one) for place, one in told if one.kind == "trait" and one.about in known]
            return _heed(traits, tuple(known.values()))
    return _facts(question, told)


def _facts(question: str, told: Sequence[tuple[int, Meaning]]) -> Solution:
    """Answer from facts about a subject; a later statement of a slot replaces an earlier one."""
    for text in (words.ASK_ALL, words.ASK_SAID_ALL, words.ASK_NOW, words.ASK_SAID, words.ASK):
        for slot in words.SLOTS if "{slot}" in text else ("",):
            found = re.fullmatch(re.escape(text.replace("{slot}", slot)).replace(r"\{s\}", "(?P<s>.+?)"), question)
            if not found or found["s"] not in _known():
                continue
            kinds = ("said",) if text in (words.ASK_SAID, words.ASK_SAID_ALL) else ("fact", "change")
            about = _known()[found["s"]]
            last: dict[str, tuple[int, str]] = {}
            for place, one in told:
                if one.kind in kinds and one.about == about and slot in ("", one.slot):
                    last[one.slot] = (place, one.value)
            if not last:
                return Solution(UNKNOWN, ())
            reply = "; ".join(f"{name}: {value}" for name, (_, value) in sorted(last.items()))
            return Solution(reply, tuple(sorted(place for place, _ in last.values())))
    return Solution(UNKNOWN, ())


def _heed(found: Sequence[tuple[int, Meaning]], also: tuple[int, ...] = ()) -> Solution:
    if not found:
        return Solution(UNKNOWN, also)
    heeded = dict.fromkeys(one.value for _, one in found)
    return Solution("Taking into account: " + "; ".join(heeded) + ".", tuple(sorted({*also, *(place for place, _ in found)})))


def right(category: str, answer: str, reply: str) -> bool:
    """Say whether a reply is right by the template item's answer: every value of it, and for changing facts no other one; abstention: nothing but refusal."""
    if category == "abstention":
        return reply.strip() == UNKNOWN or reply.startswith("I don't have any information")
    wanted = values(answer)
    if category == "changing_facts":
        return values(reply) == wanted
    return all(value in reply for value in wanted)


def values(answer: str) -> list[str]:
    """Return the values of "slot: value; slot: value", or the criteria of a rubric."""
    return [part.rpartition(": ")[2].strip(" .") for part in answer.split(";")]


def _lower(name: str) -> str:
    return name[:1].lower() + name[1:]
