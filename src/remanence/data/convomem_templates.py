"""ConvoMem items and fillers out of sentences: all six categories, no model needed, every item verified by the solver, fillers by the same generator.

Each person's subjects, requests and acquaintances are split in two: those that questions are about, and those that fillers talk of, so a filler never answers
or contradicts a question of its own person (it may one of another person's: give each person as many fillers as the largest size needs). Conversations with
evidence hold sentences of fillers too, so style is no cue.

Cost: microseconds per message; 20 persons with 160 fillers of 12 messages each take about a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from remanence.data import convomem_words as words
from remanence.data.convomem import CATEGORIES, NO_INFORMATION, Conversation, EvidenceItem, Utterance
from remanence.data.convomem_check import check_item
from remanence.data.convomem_generate import Verifier
from remanence.data.convomem_solver import names, right, solve, subjects
from remanence.errors import Mistake, nearest
from remanence.seeds import numpy_generator

ASKED = 60  # of the 96 subjects, each person's, those that questions are about
TRIES = 200
TALK = 0.35  # share of a conversation's messages that state something


@dataclass
class _Person:
    """One person's halves: what questions are about, used up one by one, and what fillers talk of."""

    name: str
    seed: int
    fresh: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    asked: dict[str, list[str]] = field(default_factory=dict)
    other: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = numpy_generator(self.seed, "person", self.name)
        all_subjects = subjects()
        order = [all_subjects[n] for n in draw.permutation(len(all_subjects))]
        self.fresh, self.idle = order[:ASKED], order[ASKED:]
        for kind, pool in (
            ("domain", list(words.WISHES)),
            ("event", [request for _, request, _ in words.CIRCUMSTANCES]),
            ("name", list(words.PEOPLE)),
            ("link", list(words.LINKS)),
        ):
            shuffled = [pool[n] for n in draw.permutation(len(pool))]
            self.asked[kind], self.other[kind] = shuffled[: len(pool) // 2], shuffled[len(pool) // 2 :]


def template_items(
    categories: Sequence[str] = CATEGORIES,
    ks: Iterable[int] = (1, 2, 3, 4, 5, 6),
    *,
    each: int = 20,
    persons: int = 20,
    messages: int = 12,
    seed: int = 0,
) -> list[EvidenceItem]:
    """Return `each` items of every (category, k), shared out over persons; changing facts begin at k = 2, where something changes.

    Raises:
        Mistake: an unknown category, a k that the templates do not have, or more items than a person has subjects for.
    """
    for name in categories:
        if name not in CATEGORIES:
            raise Mistake("categories", f"there is no category '{name}'", nearest(name, CATEGORIES))
    chosen = sorted(set(ks))
    if not chosen or chosen[0] < 1 or chosen[-1] > 6:
        raise Mistake("ks", "evidence has 1 to 6 messages", "name numbers between 1 and 6")
    if each < 1 or persons < 1 or messages < 4:
        raise Mistake("generate", "items, persons and messages are too few", "ask for at least 1 item, 1 person and 4 messages")
    people = [_Person(f"person{number}", seed) for number in range(persons)]
    verifier = Verifier([lambda question, said: solve(question, said).reply], lambda item, reply: right(item.category, item.answer, reply))
    found: list[EvidenceItem] = []
    for category in categories:
        for k in chosen:
            if category == "changing_facts" and k == 1:
                continue
            for number in range(each):
                person = people[(number + len(found)) % persons]
                found.append(_verified(category, k, number, person, messages, seed, verifier))
                if category not in ("preferences", "implicit_connections"):
                    person.fresh.pop()
    return found


def template_fillers(*, persons: int = 20, each: int = 160, messages: int = 12, seed: int = 0) -> list[Conversation]:
    """Return `each` conversations without evidence for every person."""
    found = []
    for number in range(persons):
        person = _Person(f"person{number}", seed)
        for one in range(each):
            draw = numpy_generator(seed, "filler", person.name, one)
            found.append(Conversation(_talk(person, messages, draw), f"{person.name}/filler{one}", False, person.name))
    return found


def _verified(category: str, k: int, number: int, person: _Person, messages: int, seed: int, verifier: Verifier) -> EvidenceItem:
    """Draw an item until it keeps the rules: short sentences of a kind may be so alike that the validator finds one in two conversations."""
    for attempt in range(TRIES):
        item = _item(f"{category}/{k}/{number}", category, k, person, messages, numpy_generator(seed, "item", category, k, number, attempt))
        if verifier.check(item) is None and not check_item(item):
            return item
    raise RuntimeError(f"no item {category}/{k}/{number} keeps the rules in {TRIES} tries")  # the templates are at fault, not the user


def _item(name: str, category: str, k: int, person: _Person, messages: int, draw: np.random.Generator) -> EvidenceItem:
    question, answer, evidence = _core(category, k, person, draw)
    conversations = []
    for position, message in enumerate(evidence):
        talk = list(_talk(person, messages, draw))
        places = [place for place, one in enumerate(talk) if one.speaker == message.speaker]
        talk[places[draw.integers(len(places))]] = message
        conversations.append(Conversation(tuple(talk), f"{name}/{position}", True, person.name))
    return EvidenceItem(question, answer, tuple(evidence), tuple(conversations), category, person.name, None, name)


def _core(category: str, k: int, person: _Person, draw: np.random.Generator) -> tuple[str, str, list[Utterance]]:
    """Return question, answer and evidence."""
    if category == "preferences":
        domain = str(draw.choice(person.asked["domain"]))
        request, wishes = words.WISHES[domain]
        chosen = [wishes[n] for n in draw.permutation(len(wishes))[:k]]
        return request, _rubric(heed for _, heed in chosen), [Utterance("User", text) for text, _ in chosen]
    if category == "implicit_connections" and k == 1:
        request = str(draw.choice(person.asked["event"]))
        happened, heed = next((text, heed) for text, asked, heed in words.CIRCUMSTANCES if asked == request)
        return request, _rubric([heed]), [Utterance("User", happened)]
    if category == "implicit_connections":
        who, link = str(draw.choice(person.asked["name"])), str(draw.choice(person.asked["link"]))
        traits = [words.TRAITS[n] for n in draw.permutation(len(words.TRAITS))[: k - 1]]
        said = [words.LINKED.format(n=who, link=link), *(text.format(n=who) for text, _ in traits)]
        order = draw.permutation(k)
        return words.HOST.format(link=link), _rubric(heed for _, heed in traits), [Utterance("User", said[n]) for n in order]
    if not person.fresh:
        raise Mistake("generate", f"{person.name} has no subject left to ask about", "ask for fewer items or more persons")
    subject = person.fresh[-1]
    slots = [str(slot) for slot in draw.permutation(list(words.SLOTS))]
    if category == "changing_facts":
        states = [str(value) for value in draw.permutation(list(words.SLOTS[slots[0]][0]))[:k]]
        said = [_fact(slots[0], subject, states[0], draw), *(_change(slots[0], subject, value, draw) for value in states[1:])]
        return words.ASK_NOW.format(slot=slots[0], s=subject), f"{slots[0]}: {states[-1]}", [Utterance("User", text) for text in said]
    drawn = [(slot, str(draw.choice(words.SLOTS[slot][0]))) for slot in slots[:k]]
    answer = "; ".join(f"{slot}: {value}" for slot, value in sorted(drawn))
    if category == "assistant_facts":
        told = [Utterance("Assistant", _said(slot, subject, value, draw)) for slot, value in drawn]
        question = words.ASK_SAID.format(slot=slots[0], s=subject) if k == 1 else words.ASK_SAID_ALL.format(s=subject)
        return question, answer, told
    told = [Utterance("User", _fact(slot, subject, value, draw)) for slot, value in drawn]
    if category == "abstention":
        return words.ASK.format(slot=slots[k], s=subject), NO_INFORMATION, told
    question = words.ASK.format(slot=slots[0], s=subject) if k == 1 else words.ASK_ALL.format(s=subject)
    return question, answer, told


def _talk(person: _Person, messages: int, draw: np.random.Generator) -> tuple[Utterance, ...]:
    """Return a conversation about what no question asks."""
    found = []
    for place in range(messages):
        speaker = ("User", "Assistant")[place % 2]
        if draw.random() < TALK:
            text = _statement(person, speaker, draw)
        else:
            text = str(draw.choice(words.CHAT_USER if speaker == "User" else words.CHAT_ASSISTANT))
        found.append(Utterance(speaker, text))
    return tuple(found)


def _statement(person: _Person, speaker: str, draw: np.random.Generator) -> str:
    subject = str(draw.choice(person.idle))
    slot = str(draw.choice(list(words.SLOTS)))
    value = str(draw.choice(words.SLOTS[slot][0]))
    if speaker == "Assistant":
        return _said(slot, subject, value, draw)
    kind = draw.random()
    if kind < 0.5:
        return _fact(slot, subject, value, draw)
    if kind < 0.65:
        return _change(slot, subject, value, draw)
    if kind < 0.8:
        wishes = words.WISHES[str(draw.choice(person.other["domain"]))][1]
        return wishes[draw.integers(len(wishes))][0]
    who = str(draw.choice(person.other["name"]))
    if kind < 0.87:
        return words.LINKED.format(n=who, link=str(draw.choice(person.other["link"])))
    if kind < 0.95:
        return words.TRAITS[draw.integers(len(words.TRAITS))][0].format(n=who)
    request = str(draw.choice(person.other["event"]))
    return next(text for text, asked, _ in words.CIRCUMSTANCES if asked == request)


def _fact(slot: str, subject: str, value: str, draw: np.random.Generator) -> str:
    return _filled(words.SLOTS[slot][1], slot, subject, value, draw)


def _said(slot: str, subject: str, value: str, draw: np.random.Generator) -> str:
    return _filled(words.SAID, slot, subject, value, draw)


def _change(slot: str, subject: str, value: str, draw: np.random.Generator) -> str:
    return _filled(words.CHANGED, slot, subject, value, draw)


def _filled(texts: Sequence[str], slot: str, subject: str, value: str, draw: np.random.Generator) -> str:
    """Write one of the sentences, the subject under either of its names, each as likely."""
    return texts[int(draw.integers(len(texts)))].format(slot=slot, s=names(subject)[draw.integers(2)], v=value)


def _rubric(criteria: Iterable[str]) -> str:
    return "The reply must take into account: " + "; ".join(criteria) + "."
