"""Generate long dialogues with planted facts: said once among chit-chat, some of them corrected later, asked for in other words long afterwards.

A cast of invented people (names, attributes, statements and questions of `data/biographies.py`) is talked about. Facts are planted in the user's turns at known
places; every value occurs in one fact of a dialogue only, so a value found in a prompt is that fact. Chit-chat names the same people and never a value. Questions
are the phrasings that no statement shares, and the value that is right is the one that held when the question is asked.

Source: the set-ups of HEMA (arXiv 2504.16754), whose dialogues are not published; the texts are ours. Cost: O(turns).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from remanence.data.biographies import ATTRIBUTES, FIRST_NAMES, LAST_NAMES
from remanence.errors import Mistake
from remanence.seeds import numpy_generator

EVERY = 10  # turns per planted fact
LATER = 150  # turns from planting to asking
DAY = 86400.0


class Turn(NamedTuple):
    """A message; `number` counts from 1."""

    number: int
    role: str
    text: str
    at: float


class Planted(NamedTuple):
    """A fact: said at turn `at`, and if it was corrected, again with another value at turn `corrected`."""

    name: str
    attribute: str
    value: str
    at: int
    newer: str | None
    corrected: int | None
    repeated: bool

    def right(self, turn: int) -> str:
        """Return the value that holds at a turn."""
        return self.newer if self.newer is not None and self.corrected is not None and self.corrected < turn else self.value

    def said(self, turn: int) -> int:
        """Return the turn that said what holds at a turn."""
        return self.corrected if self.corrected is not None and self.corrected < turn else self.at


class Asked(NamedTuple):
    """A question, asked after turn `after`; `kind` is later (150 turns after planting), repeated, or end."""

    after: int
    fact: int
    question: str
    kind: str


@dataclass(frozen=True)
class Dialogue:
    """Turns, the facts in them, and the questions, by the turn they are asked after."""

    turns: tuple[Turn, ...]
    facts: tuple[Planted, ...]
    asked: tuple[Asked, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


OPENINGS = _lines("""
    The morning began slowly and I spent most of it looking out of the window.
    I could not sleep well, so I got up early and tidied a few drawers.
    It rained again all afternoon and the street was full of umbrellas.
    The bus was late once more, which gave me time to think about the week.
    I met {name} by chance near the station and we talked for a good while.
    There was a long queue at the counter and everybody looked tired.
    {name} called in the evening, just to hear how things were going.
    We had guests on Sunday and the house was louder than usual.
    I finally answered the letters that had been lying on my desk.
    The neighbours are rebuilding their stairs, so the noise starts at seven.
    Somebody at the meeting mentioned {name}, and we all had a story to tell.
    I walked the long way home because the air was so mild.
    My old chair broke, and mending it took the better part of the day.
    {name} sent a postcard with nothing but greetings on it.
    The heating went out for two hours and we sat there in our coats.
    I read half of a novel that I will probably never finish.
""")
MIDDLES = _lines("""
    After that I made some tea and tried to put the rest of the plan in order.
    It reminded me of the summer when everything took twice as long as expected.
    I keep telling myself to start earlier, but somehow it never happens.
    We agreed that one should not take such small troubles too seriously.
    {name} laughed about it, as always, and promised to visit before the month is over.
    In the end it did not matter, since nobody was in a hurry.
    The prices went up again, and still the shelves were nearly empty by noon.
    I wrote a list of what has to be done and lost it within the hour.
    There was a fine view from up there, with clouds moving quickly over the hills.
    For a moment I considered calling {name}, but it was already late.
    The light in the kitchen flickers, and I do not dare to touch it.
    It felt good to have a quiet hour without any appointment.
    People say the winter will be long, though they say so every year.
    I found an old photograph of {name} between two books.
    The radio played the same three songs over and over.
    We stayed longer than we wanted and missed the last connection.
""")
CLOSINGS = _lines("""
    Anyway, that was all, and tomorrow is another day.
    How has your week been so far?
    I think I should go to bed earlier from now on.
    Maybe I worry too much about such things.
    Let us see what the weekend brings.
    Well, enough of that for today.
    I will tell you more when I know how it turned out.
    Somehow these small things stay in the mind.
    Do you ever have days like this?
    Next time I will be better prepared.
    It is good to talk about it.
    That is how it goes with plans.
""")
REPLIES = _lines("""
    That sounds like a full day, and I can see why you would want some calm after it.
    Thank you for telling me; small episodes like this say a lot about how a week really went.
    I understand. It often helps to leave a thing alone for an evening and look at it again afterwards.
    That is a nice picture, and I hope the next days leave you more time for such moments.
    It makes sense that this stayed with you, since it is the small things that we tend to remember.
    Good to hear from you. If you like, we can go through the list together and see what can wait.
    I see. It seems that nothing urgent came of it, which may be the best outcome.
    That happens to many people, and there is no need to be hard on yourself about it.
    Take your time with it. Not everything has to be settled before the end of the week.
    How kind of them. Moments like these are worth more than they seem at first.
""")
INTRODUCTIONS = _lines("""
    By the way, something I learned the other day:
    Before I forget it, let me note this down:
    I only found out recently, so please keep it in mind:
    You may want to remember this for later:
    Here is something that came up over lunch:
    One more thing that I wanted to tell you:
""")
CORRECTIONS = _lines("""
    I have to correct what I told you earlier.
    I was wrong about something, here is how it really is.
    Please update your notes, things have changed.
    What I said before no longer holds.
""")


@functools.cache
def _pools() -> tuple[tuple[str, ...], ...]:
    """Return per attribute the values that are no part of another value."""
    every = [value for attribute in ATTRIBUTES for value in attribute.values]
    alone = {value for value in every if sum(bool(re.search(rf"\b{re.escape(value)}\b", other, re.IGNORECASE)) for other in every) == 1}
    return tuple(tuple(value for value in attribute.values if value in alone) for attribute in ATTRIBUTES)


def dialogue(turns: int, seed: int, *, every: int = EVERY, corrected: float = 0.2, repeated: float = 0.2, later: int = LATER) -> Dialogue:
    """Generate a dialogue.

    Args:
        turns: of user and assistant together, alternating; the user begins.
        seed: of everything.
        every: a fact is planted every so many turns, at a random turn of the user's.
        corrected: share of facts that get another value before they are asked for.
        repeated: share of facts that are asked for again, every half of `later` turns.
        later: turns from planting to the first question.

    Raises:
        Mistake: so many facts that values run out.
    """
    random, words = numpy_generator("dialogue", seed, turns), numpy_generator("chit-chat", seed, turns)
    number = max(1, turns // every)
    pools = [[pool[place] for place in random.permutation(len(pool))] for pool in _pools()]
    if number * (1 + corrected) > 0.9 * sum(map(len, pools)):
        raise Mistake("dialogue", f"{turns} turns need more facts than there are values", "give a larger `every`")
    people = random.permutation(len(FIRST_NAMES) * len(LAST_NAMES))[: max(2, number // 3)]
    cast = [f"{FIRST_NAMES[code // len(LAST_NAMES)]} {LAST_NAMES[code % len(LAST_NAMES)]}" for code in people]
    pairs = random.permutation(len(cast) * len(ATTRIBUTES))
    users = np.arange(1, turns + 1, 2)
    free = set(users.tolist())
    facts: list[Planted] = []
    said: dict[int, tuple[str, bool]] = {}
    at = iter(np.sort(random.choice(users, number, replace=False)).tolist())
    for pair in pairs:
        who, what = divmod(int(pair), len(ATTRIBUTES))
        if len(pools[what]) < 2:
            continue
        turn = next(at, None)
        if turn is None:
            break
        free.discard(turn)
        facts.append(Planted(cast[who], ATTRIBUTES[what].name, pools[what].pop(), turn, None, None, bool(random.random() < repeated)))
        said[turn] = (_said(facts[-1], facts[-1].value, random), False)
    for place, fact in enumerate(facts):
        later_turns = [turn for turn in range(fact.at + 11, fact.at + later - 9) if turn in free]
        pool = pools[[attribute.name for attribute in ATTRIBUTES].index(fact.attribute)]
        if random.random() < corrected and later_turns and pool:
            turn = int(random.choice(later_turns))
            free.discard(turn)
            facts[place] = fact._replace(newer=pool.pop(), corrected=turn)
            said[turn] = (_said(facts[place], str(facts[place].newer), random), True)
    lines = [Turn(turn, ("assistant", "user")[turn % 2], _text(turn, said, cast, words), turn * DAY / 4) for turn in range(1, turns + 1)]
    return Dialogue(tuple(lines), tuple(facts), tuple(sorted(_asked(facts, turns, later), key=lambda asked: asked.after)))


def _said(fact: Planted, value: str, random: np.random.Generator) -> str:
    attribute = next(item for item in ATTRIBUTES if item.name == fact.attribute)
    return str(random.choice(np.array(attribute.statements))).format(name=fact.name, value=value)


def _text(turn: int, said: dict[int, tuple[str, bool]], cast: list[str], random: np.random.Generator) -> str:
    """Return the text of a turn: a reply, chit-chat, or chit-chat with a fact in it."""

    def pick(bank: tuple[str, ...]) -> str:
        return bank[int(random.integers(len(bank)))].format(name=cast[int(random.integers(len(cast)))])

    if turn % 2 == 0:
        return f"{pick(REPLIES)} {pick(CLOSINGS)}"
    if turn not in said:
        return f"{pick(OPENINGS)} {pick(MIDDLES)} {pick(CLOSINGS)}"
    statement, corrects = said[turn]
    return f"{pick(OPENINGS)} {pick(CORRECTIONS if corrects else INTRODUCTIONS)} {statement} {pick(CLOSINGS)}"


def _asked(facts: list[Planted], turns: int, later: int) -> list[Asked]:
    """Return all questions: `later` turns after planting, again every half of that for repeated facts, and all at the end."""
    asked = []
    for place, fact in enumerate(facts):
        attribute = next(item for item in ATTRIBUTES if item.name == fact.attribute)
        first, second = (question.format(name=fact.name) for question in attribute.questions[-2:])
        if fact.at + later < turns:
            asked.append(Asked(fact.at + later, place, first, "later"))
        if fact.repeated:
            asked += [Asked(after, place, second, "repeated") for after in range(fact.at + later + later // 2, turns, later // 2)]
        asked.append(Asked(turns, place, second, "end"))
    return asked


def found(value: str, text: str) -> bool:
    """Return whether a value stands in a text as a whole word, case and blanks aside."""
    wanted = r"\s+".join(map(re.escape, value.split()))
    return re.search(rf"(?<!\w){wanted}(?!\w)", text, re.IGNORECASE) is not None
