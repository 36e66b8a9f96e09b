"""Check that each evidence message stands in exactly its own conversation: as a part of a message, as most of it, or nearly word for word.

The three ways are those of ConvoMem's validator (arXiv:2511.10523, official code `ConversationValidator`), for a message of the same speaker: the evidence
is a substring of it; it is a substring of the evidence and has at least 80 % of its length; or their Levenshtein distance is at most
max(10, 15 % of the evidence's length).

Cost: O(evidence x messages) substring searches; the distance is computed only where lengths and letters allow it, one numpy operation per letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remanence.data.convomem import NO_INFORMATION, SPEAKERS, Conversation, EvidenceItem, Utterance
from remanence.errors import Mistake

PARTIAL, FUZZY, FUZZY_FLOOR = 0.8, 0.15, 10
HEAD = 20  # letters by which evidence is looked up in fillers; shorter evidence must be the whole message
KINDS = ("speaker", "count", "not found", "several", "wrong conversation", "empty", "answer")


@dataclass(frozen=True)
class Fault:
    """Something wrong with an item: its kind, one of `KINDS`, and where."""

    kind: str
    place: str


def levenshtein(one: str, two: str, limit: int) -> int:
    """Return the edit distance of two strings, or `limit + 1` where it is above the limit."""
    if abs(len(one) - len(two)) > limit:
        return limit + 1
    here, there = Counter(one), Counter(two)
    if max((here - there).total(), (there - here).total()) > limit:  # every edit mends at most one letter on each side
        return limit + 1
    letters = np.array([ord(letter) for letter in two], dtype=np.int32)
    steps = np.arange(len(two) + 1, dtype=np.int32)
    row = steps.copy()
    for number, letter in enumerate(one, start=1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(best - steps) + steps  # insertions: the best of all cells to the left
        if row.min() > limit:
            return limit + 1
    return min(int(row[-1]), limit + 1)


def holds(conversation: Conversation, evidence: Utterance) -> bool:
    """Say whether a conversation holds an evidence message in one of the three ways."""
    texts = [message.text for message in conversation.messages if message.speaker == evidence.speaker]
    wanted = evidence.text
    if any(wanted in text for text in texts):
        return True
    if any(len(text) >= PARTIAL * len(wanted) and text in wanted for text in texts):
        return True
    limit = max(FUZZY_FLOOR, int(FUZZY * len(wanted)))
    return any(levenshtein(text, wanted, limit) <= limit for text in texts)


def check_conversations(evidence: Sequence[Utterance], conversations: Sequence[Conversation]) -> list[Fault]:
    """Return what is wrong with the conversations made for evidence messages; empty: nothing."""
    faults = [
        Fault("speaker", f"conversation {number}: '{speaker}'")
        for number, one in enumerate(conversations)
        for speaker in sorted({message.speaker for message in one.messages} - set(SPEAKERS))
    ]
    if len(conversations) != len(evidence):
        return [*faults, Fault("count", f"{len(conversations)} conversations for {len(evidence)} evidence messages")]
    for number, message in enumerate(evidence):
        found = [place for place, one in enumerate(conversations) if holds(one, message)]
        if not found:
            faults.append(Fault("not found", f"evidence {number}"))
        elif len(found) > 1:
            faults.append(Fault("several", f"evidence {number} in conversations {found}"))
        elif found != [number]:
            faults.append(Fault("wrong conversation", f"evidence {number} in conversation {found[0]}"))
    return faults


def check_item(item: EvidenceItem) -> list[Fault]:
    """Return everything that is wrong with an item."""
    faults = check_conversations(item.evidence, item.conversations)
    faults += [Fault("empty", f"conversation {number}") for number, one in enumerate(item.conversations) if not one.messages]
    if item.category == "abstention" and item.answer.strip().rstrip(".") != NO_INFORMATION:
        faults.append(Fault("answer", "an abstention item's answer is the fixed sentence"))
    return faults


class Leaks:
    """Evidence messages of items, looked up in other conversations: the whole message, or (from `HEAD` letters on) a part of one."""

    def __init__(self, items: Sequence[EvidenceItem]):
        self.whole: dict[tuple[str, str], str] = {}
        self.heads: dict[str, list[tuple[Utterance, str]]] = {}
        for item in items:
            for message in item.evidence:
                self.whole[message.speaker, message.text] = item.id
                if len(message.text) >= HEAD:
                    self.heads.setdefault(message.text[:HEAD], []).append((message, item.id))

    def found(self, one: Conversation) -> str | None:
        """Return the item of which a conversation holds an evidence message; one look-up per letter."""
        for message in one.messages:
            name = self.whole.get((message.speaker, message.text)) or self._inside(message)
            if name is not None:
                return name
        return None

    def refuse(self, fillers: Sequence[Conversation]) -> None:
        """Raise a `Mistake` that names the first filler with evidence in it: a history would hold it twice."""
        for one in fillers:
            name = self.found(one)
            if name is not None:
                raise Mistake(f"filler {one.id}", f"holds an evidence message of item {name}", "remove the filler or the item")

    def _inside(self, message: Utterance) -> str | None:
        text = message.text
        for place in range(len(text) - HEAD + 1):
            for evidence, name in self.heads.get(text[place : place + HEAD], ()):
                if evidence.speaker == message.speaker and text.startswith(evidence.text, place):
                    return name
        return None
