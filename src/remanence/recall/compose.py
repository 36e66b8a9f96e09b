"""Compose a prompt within a hard budget of tokens: system rules, compact memory, retrieved chunks, the dialogue's tail, the user's turn, each in its own tag.

If it is too long, retrieved chunks go first, the least similar first; then the tail is shortened from its oldest turn; system, compact and user are never cut:
if these three alone do not fit, that is an error. What enters is always a prefix of the ranking, so a chunk that was dropped scores below every one that was
kept. Chunks stand in order of time with their dates, the newest last, because two of them may contradict each other. Tags inside texts lose their bracket, so
no text leaves its part (HEMA, arXiv 2504.16754; trimming of the tail, dates and order are ours).

Cost: each piece is counted once, and the whole text about twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate

from remanence.errors import Mistake
from remanence.recall.items import Hit, Message, Prompt
from remanence.recall.protocols import Tokenizer

TAGS = ("system", "compact", "retrieved", "dialogue_tail", "user")
SHORTEST = 16  # tokens of a turn of the tail that is cut; below, it is dropped
CUT = " [...]"
_TAG = re.compile(r"<(?=\s*/?\s*(?:system|compact|retrieved|dialogue_tail|user)\b)", re.IGNORECASE)


def compose(
    tokenizer: Tokenizer,
    budget: int,
    *,
    user: str,
    system: str = "",
    gist: str = "",
    facts: Sequence[str] = (),
    hits: Sequence[Hit] = (),
    tail: Sequence[Message] = (),
) -> Prompt:
    """Return the prompt.

    Args:
        tokenizer: of the model that reads it.
        budget: tokens at most.
        user: the current turn.
        system: rules.
        gist: the compact memory.
        facts: pinned ones, each a line of the compact part.
        hits: retrieved chunks, best first, none of them in the tail.
        tail: the last messages, oldest first.

    Raises:
        Mistake: system, compact and user alone are over the budget.
    """
    compact = "\n".join(filter(None, [gist, *facts]))
    fixed = {"system": neutral(system), "compact": neutral(compact), "user": neutral(user)}

    def whole(chosen: Sequence[Hit], turns: Sequence[tuple[Message, str]]) -> tuple[str, dict[str, str]]:
        ordered = sorted(chosen, key=lambda hit: (hit.chunk.at, hit.chunk.message, hit.chunk.id))
        parts = fixed | {
            "retrieved": "\n".join(_line(hit) for hit in ordered),
            "dialogue_tail": "\n".join(line for _, line in turns),
        }
        present = {tag: parts[tag] for tag in TAGS if parts[tag] or tag == "user"}
        return "\n".join(f"<{tag}>\n{content}\n</{tag}>" for tag, content in present.items()), present

    least = tokenizer.count(whole([], [])[0])
    if least > budget:
        remedy = "give a larger budget, shorter rules or a shorter turn, or unpin facts"
        raise Mistake("budget", f"system, compact memory and user turn take {least} tokens, the budget is {budget}", remedy)
    spoken = [(message, f"{message.role}: {neutral(message.text)}") for message in tail]
    room = budget - least - (tokenizer.count("<dialogue_tail>\n\n</dialogue_tail>") if spoken else 0)
    turns = _shortened(tokenizer, spoken, room)
    while turns and (over := tokenizer.count(whole([], turns)[0]) - budget) > 0:  # a text may count more than its lines
        room -= over
        turns = _shortened(tokenizer, spoken, room)
    left = budget - tokenizer.count(whole([], turns)[0]) - tokenizer.count("<retrieved>\n\n</retrieved>")
    sizes = accumulate(tokenizer.count(_line(hit)) for hit in hits)
    kept = sum(size <= left for size in sizes)
    while kept and tokenizer.count(whole(hits[:kept], turns)[0]) > budget:
        kept -= 1
    while kept < len(hits) and tokenizer.count(whole(hits[: kept + 1], turns)[0]) <= budget:
        kept += 1
    text, parts = whole(hits[:kept], turns)
    ordered = sorted(hits[:kept], key=lambda hit: (hit.chunk.at, hit.chunk.message, hit.chunk.id))
    return Prompt(
        text,
        parts,
        tokenizer.count(text),
        tuple(hit.chunk.id for hit in ordered),
        tuple(hit.parts.get("cosine", hit.score) for hit in ordered),
        tuple(hit.chunk.id for hit in hits[kept:]),
        tuple(message.id for message, _ in turns),
    )


def neutral(text: str) -> str:
    """Return a text in which no tag of a prompt's part opens or closes."""
    return _TAG.sub("&lt;", text)


def _line(hit: Hit) -> str:
    """Return a chunk with its date, its turn and who said it."""
    chunk = hit.chunk
    who = chunk.role if chunk.person is None else f"{chunk.role} {neutral(' '.join(chunk.person.split()))}"
    return f"[{datetime.fromtimestamp(chunk.at, UTC):%Y-%m-%d}, turn {chunk.turn}, {who}] {neutral(chunk.text)}"


def _shortened(tokenizer: Tokenizer, turns: Sequence[tuple[Message, str]], tokens: int) -> list[tuple[Message, str]]:
    """Return the newest turns that fit; the oldest of them may be cut."""
    kept: list[tuple[Message, str]] = []
    for message, line in reversed(turns):
        size = tokenizer.count(line)
        if size > tokens:
            room = tokens - tokenizer.count(CUT)
            if room >= SHORTEST:
                kept.append((message, tokenizer.cut(line, room) + CUT))
            break
        kept.append((message, line))
        tokens -= size
    return kept[::-1]
