"""ConvoMem's generator: items written by any language model in six stages, and the three verification rules that any models can hold them to.

Stages: persons -> use cases (all of a person's in one call, so that they differ) -> evidence core (question, answer, k messages) -> verification of the core ->
one conversation per evidence message, checked by `convomem_check` -> fillers by the same writer. A core or conversation that fails is written again, 20 times
at most; what still fails is left out and counted.

Rules (arXiv:2511.10523): with the evidence each of the answering models is right twice in a row; without it all fail; without any one of k > 1 messages all
fail (for changing facts: without the last one). Abstention is held to the first rule alone.

Cost, per item: 1 + k calls to write, and per answering model 2 + 1 + k to verify; times the tries.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from remanence.data.convomem import CATEGORIES, NO_INFORMATION, SPEAKERS, Conversation, EvidenceItem, Utterance
from remanence.data.convomem_check import check_conversations
from remanence.data.convomem_models import Model
from remanence.errors import Mistake, nearest
from remanence.seeds import derive

TRIES, TWICE = 20, 2
Answerer = Callable[[str, Sequence[Utterance]], str]  # (question, messages) -> reply
RULES = ("with evidence", "without evidence", "partial evidence")
KINDS_OF_CORE = {
    "user_facts": "The User states facts about themselves, one per message; the question asks for all of them together.",
    "assistant_facts": "The Assistant gives information, one piece per message (its speaker is Assistant); the question asks for all of it together.",
    "changing_facts": "The User states a fact and changes it in each later message; the question asks for the last state.",
    "abstention": f"The messages touch the question's subject without answering it; the answer is exactly: {NO_INFORMATION}",
    "preferences": "The User states likes and dislikes; the question asks for a recommendation without naming them; the answer is a rubric of what a "
    "good reply must and must not do.",
    "implicit_connections": "The messages state circumstances from which a good reply must draw a conclusion; the question does not name them; the answer "
    "is a rubric of what a good reply must and must not do.",
}


@dataclass(frozen=True)
class Verifier:
    """The three rules, for any answering models and any judge.

    Args:
        answerers: (question, messages) -> reply; two in the paper, small and cheap ones.
        right: (item, reply) -> whether it is right; `None` (no verdict) counts as not right, so it never lets an item pass the first rule.
    """

    answerers: Sequence[Answerer]
    right: Callable[[EvidenceItem, str], bool | None]

    def check(self, item: EvidenceItem) -> str | None:
        """Return the rule that an item's evidence breaks, `None` if it keeps all."""
        if not all(self._answered(item, item.evidence, answer) for answer in self.answerers for _ in range(TWICE)):
            return RULES[0]
        if item.category == "abstention":
            return None
        if self._any(item, ()):
            return RULES[1]
        if item.k > 1:
            dropped = (item.k - 1,) if item.category == "changing_facts" else range(item.k)
            if any(self._any(item, item.evidence[:place] + item.evidence[place + 1 :]) for place in dropped):
                return RULES[2]
        return None

    def _any(self, item: EvidenceItem, messages: Sequence[Utterance]) -> bool:
        return any(self._answered(item, messages, answer) for answer in self.answerers)

    def _answered(self, item: EvidenceItem, messages: Sequence[Utterance], answer: Answerer) -> bool:
        return self.right(item, answer(item.question, messages)) is True


def answerer(model: Model) -> Answerer:
    """Return a model as an answerer: the messages and the question in one prompt."""

    def answer(question: str, messages: Sequence[Utterance]) -> str:
        said = "\n".join(f"{one.speaker}: {one.text}" for one in messages) or "(nothing)"
        asked = f"Known from earlier conversations:\n{said}\n\nAnswer the question from that alone; if it is not there, say that you do not know.\n"
        return model(f"{asked}\nQuestion: {question}\n\nAnswer:").text

    return answer


@dataclass
class Generated:
    """Items, fillers, and how many attempts failed for which reason."""

    items: list[EvidenceItem] = field(default_factory=list)
    fillers: list[Conversation] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


def generate(
    categories: Sequence[str],
    ks: Sequence[int],
    personas: Sequence[str] | int,
    model: Model,
    verifier: Verifier,
    *,
    each: int = 1,
    fillers: int = 0,
    messages: int = 100,
    tries: int = TRIES,
) -> Generated:
    """Write items with a language model and return those that pass verification and validation.

    Args:
        categories: which ones.
        ks: numbers of evidence messages (changing facts need at least two).
        personas: descriptions, or how many to write.
        model: writes everything.
        verifier: holds the evidence to the three rules.
        each: items per person, category and k.
        fillers: conversations per person.
        messages: per conversation, give or take a fifth.
        tries: per core and per conversation.
    """
    for name in categories:
        if name not in CATEGORIES:
            raise Mistake("categories", f"there is no category '{name}'", nearest(name, CATEGORIES))
    if not ks or min(ks) < 1:
        raise Mistake("ks", "evidence needs at least one message", "name numbers from 1")
    made = Generated()
    if isinstance(personas, int):
        personas = _texts(_ask(model, _PERSONS.format(n=personas), tries, made, "persons"), personas)
    for number, persona in enumerate(personas):
        person = f"person{number}"
        cells = [(category, k) for category in categories for k in ks if category != "changing_facts" or k > 1]
        cases = _texts(
            _ask(model, _CASES.format(n=max(50, len(cells) * each), person=persona), tries, made, "use cases"), len(cells) * each
        )
        for position, scenario in enumerate(cases[: len(cells) * each]):
            category, k = cells[position // each]
            item = _core(category, k, person, persona, scenario, model, verifier, tries, made)
            conversations = item and _conversations(item, persona, model, messages, tries, made)
            if item and conversations:
                made.items.append(replace(item, conversations=conversations))
        for one in range(fillers):
            talk = _written(
                model, _TALK.format(n=messages, person=persona, scenario=cases[one % len(cases)], evidence=""), messages, tries, made
            )
            if talk:
                made.fillers.append(Conversation(talk, f"{person}/filler{one}", False, person))
    return made


def _core(
    category: str, k: int, person: str, persona: str, scenario: str, model: Model, verifier: Verifier, tries: int, made: Generated
) -> EvidenceItem | None:
    prompt = _CORE.format(kind=KINDS_OF_CORE[category], k=k, person=persona, scenario=scenario)
    for _ in range(tries):
        row = _json(model(prompt).text)
        try:
            evidence = tuple(Utterance(one["speaker"], one["text"]) for one in row["message_evidences"])
            answer = NO_INFORMATION if category == "abstention" else row["answer"]
            name = f"{derive(person, category, row['question'], answer):x}"
            empty = tuple(Conversation((), f"{name}/{place}", True, person) for place in range(len(evidence)))
            item = EvidenceItem(row["question"], answer, evidence, empty, category, person, scenario, name)
        except (KeyError, TypeError, AttributeError, Mistake):
            made.failures["core is not in the form asked for"] += 1
            continue
        problem = f"{len(evidence)} evidence messages instead of {k}" if len(evidence) != k else verifier.check(item)
        if problem is None:
            return item
        made.failures[problem] += 1
    return None


def _conversations(
    item: EvidenceItem, persona: str, model: Model, messages: int, tries: int, made: Generated
) -> tuple[Conversation, ...] | None:
    """Write the conversations of an item one by one, then check them together."""
    for _ in range(tries):
        talks = []
        for message in item.evidence:
            evidence = f"\nOne message must be, word for word, of {message.speaker}: {message.text}"
            talks.append(
                _written(model, _TALK.format(n=messages, person=persona, scenario=item.scenario, evidence=evidence), messages, tries, made)
            )
        conversations = tuple(Conversation(talk or (), f"{item.id}/{place}", True, item.person) for place, talk in enumerate(talks))
        faults = check_conversations(item.evidence, conversations)
        if not faults:
            return conversations
        made.failures.update(fault.kind for fault in faults)
    return None


def _written(model: Model, prompt: str, messages: int, tries: int, made: Generated) -> tuple[Utterance, ...] | None:
    for _ in range(tries):
        rows = _json(model(prompt).text)
        rows = rows.get("messages", ()) if isinstance(rows, dict) else rows or ()
        try:
            talk = tuple(Utterance(str(one["speaker"]), str(one["text"])) for one in rows)
        except (KeyError, TypeError):
            made.failures["conversation is not in the form asked for"] += 1
            continue
        if all(one.speaker in SPEAKERS for one in talk) and 0.8 * messages <= len(talk) <= 1.2 * messages:
            return talk
        made.failures["conversation has other speakers or another length"] += 1
    return None


def _ask(model: Model, prompt: str, tries: int, made: Generated, what: str) -> list[Any]:
    for _ in range(tries):
        rows = _json(model(prompt).text)
        if isinstance(rows, list) and rows:
            return rows
        made.failures[f"{what} are not in the form asked for"] += 1
    raise Mistake("model", f"it wrote no list of {what} in {tries} tries", "take a stronger model")


def _texts(rows: Sequence[Any], least: int) -> list[str]:
    found = list(dict.fromkeys(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    if len(found) < least:
        raise Mistake("model", f"it wrote {len(found)} where {least} were asked for", "ask for fewer or take a stronger model")
    return found


def _json(text: str) -> Any:
    """Return the first JSON value of a reply, fenced or not; `None` where there is none."""
    for found in re.finditer(r"[\[{]", text):
        try:
            return json.JSONDecoder().raw_decode(text[found.start() :])[0]
        except ValueError:
            continue
    return None


_PERSONS = "Invent {n} people who use an assistant, of different jobs, ages and lives, each in three sentences. Reply with a JSON list of {n} strings."
_CASES = """Here is a person: {person}
Write {n} situations in which they talk with their assistant, all different from each other, one sentence each. Reply with a JSON list of {n} strings."""
_CORE = """A person: {person}
A situation: {scenario}
Write a test of an assistant's memory. {kind}
There are exactly {k} evidence messages, each in a conversation of its own. The question cannot be answered without every one of them, nor by general knowledge.
Reply with JSON: {{"question": "...", "answer": "...", "message_evidences": [{{"speaker": "User", "text": "..."}}]}}"""
_TALK = """A person: {person}
A situation: {scenario}
Write their conversation with an assistant, about {n} messages, User and Assistant in turn.{evidence}
Reply with JSON: {{"messages": [{{"speaker": "User", "text": "..."}}, {{"speaker": "Assistant", "text": "..."}}]}}"""
