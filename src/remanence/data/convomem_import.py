"""LongMemEval and LoCoMo as ConvoMem items: the same questions asked of the same memories.

LongMemEval (Wu et al. 2024, arXiv:2410.10813; `longmemeval_*.json`): each question has its own history, whose sessions without the answer become fillers of
a person named after the question. LoCoMo (Maharana et al. 2024, arXiv:2402.17753; `locomo10.json`, CC BY-NC 4.0: not for redistribution): of a sample's
sessions, those that a question does not need are its fillers. Sessions stand in several histories, so pack both with `spill=False`, in standard packing.

Evidence is one message per session, as the schema asks: of a session with several, they are joined by line breaks. Where no message is marked (abstention),
the session's first user message stands in. Dates open the session's first message, since temporal questions need them.

Cost: one pass over the file, which is held in memory (LongMemEval-S has 278 MB).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remanence.data.convomem import NO_INFORMATION, Conversation, EvidenceItem, Utterance, read_json
from remanence.errors import Mistake

LONGMEMEVAL = {  # question_type -> category
    "single-session-user": "user_facts",
    "single-session-assistant": "assistant_facts",
    "single-session-preference": "preferences",
    "knowledge-update": "changing_facts",
    "multi-session": "multi_session",
    "temporal-reasoning": "temporal",
}
LOCOMO = {1: "multi_session", 2: "temporal", 3: "open_domain", 4: "single_session", 5: "abstention"}
ROLES = {"user": "User", "assistant": "Assistant"}


def load_longmemeval(path: str | Path) -> tuple[list[EvidenceItem], list[Conversation]]:
    """Return items and fillers of a LongMemEval file; a session that two questions share is a filler of each, under its own id."""
    items, fillers = [], []
    for number, row in enumerate(_list_of(Path(path))):
        place = f"{path}, question {number}"
        _need(row, place, "question_id", "question_type", "question", "answer", "haystack_sessions", "haystack_session_ids")
        name = str(row["question_id"])
        refused = name.endswith("_abs")
        if not refused and row["question_type"] not in LONGMEMEVAL:
            raise Mistake(place, f"the type '{row['question_type']}' is unknown", f"known are {', '.join(LONGMEMEVAL)}")
        dates = row.get("haystack_dates") or [""] * len(row["haystack_sessions"])
        if not len(dates) == len(row["haystack_sessions"]) == len(row["haystack_session_ids"]):
            raise Mistake(place, "sessions, ids and dates differ in number", "fetch the file again")
        wanted = set(row.get("answer_session_ids") or ())
        evidence, holders = [], []
        seen: dict[str, int] = {}
        for session, label, date in zip(row["haystack_sessions"], row["haystack_session_ids"], dates):
            seen[label] = seen.get(label, 0) + 1  # a history may hold a session twice
            one = Conversation(
                _dated([_turn(turn, place) for turn in session], str(date)), f"{name}/{label}/{seen[label]}", label in wanted, name
            )
            if label in wanted and seen[label] == 1 and one.messages:
                marked = [place for place, turn in enumerate(session) if turn.get("has_answer")]
                evidence.append(_joined(one, marked))
                holders.append(one)
            elif label not in wanted and one.messages:
                fillers.append(one)
        answer = NO_INFORMATION if refused else str(row["answer"])
        category = "abstention" if refused else LONGMEMEVAL[row["question_type"]]
        question = f"(Asked on {row['question_date']}.) {row['question']}" if row.get("question_date") else str(row["question"])
        items.append(EvidenceItem(question, answer, tuple(evidence), tuple(holders), category, name, None, name))
    return items, fillers


def load_locomo(path: str | Path) -> tuple[list[EvidenceItem], list[Conversation]]:
    """Return items and fillers of a LoCoMo file; each question is a person of its own, whose fillers are the other sessions of its sample.

    Questions whose evidence names no message of the sample are left out (some of the published ones do not).
    """
    items: list[EvidenceItem] = []
    fillers: list[Conversation] = []
    for number, sample in enumerate(_list_of(Path(path))):
        place = f"{path}, sample {number}"
        _need(sample, place, "sample_id", "conversation", "qa")
        talk = sample["conversation"]
        _need(talk, place, "speaker_a", "speaker_b")
        sessions: dict[int, tuple[tuple[Utterance, ...], dict[str, int]]] = {}
        for key, turns in talk.items():
            match = re.fullmatch(r"session_(\d+)", key)
            if match and turns:
                said = _dated([_named(turn, talk, place) for turn in turns], str(talk.get(f"{key}_date_time", "")))
                sessions[int(match[1])] = said, {str(turn["dia_id"]): position for position, turn in enumerate(turns)}
        for position, row in enumerate(sample["qa"]):
            name = f"{sample['sample_id']}/q{position}"
            item = _locomo_item(row, name, sessions, f"{place}, question {position}")
            if item is not None:
                items.append(item)
                own = {one.id for one in item.conversations}
                others = (Conversation(said, f"{name}/{session}", False, name) for session, (said, _) in sorted(sessions.items()))
                fillers += [one for one in others if one.id not in own]
    return items, fillers


def _locomo_item(
    row: dict[str, Any], name: str, sessions: dict[int, tuple[tuple[Utterance, ...], dict[str, int]]], place: str
) -> EvidenceItem | None:
    """Return a question as an item, `None` where its evidence names no message of the sample."""
    _need(row, place, "question", "category")
    category = LOCOMO.get(row["category"])
    if category is None:
        raise Mistake(place, f"the category {row['category']!r} is unknown", "known are 1 to 5")
    marks: dict[int, list[int]] = {}
    for label in re.findall(r"D\d+:\d+", " ".join(map(str, row.get("evidence") or []))):
        session = int(label[1 : label.index(":")])
        if session in sessions and label in sessions[session][1]:
            marks.setdefault(session, []).append(sessions[session][1][label])
    answer = NO_INFORMATION if category == "abstention" else str(row.get("answer", ""))
    if not marks or not answer.strip():
        return None
    holders = tuple(Conversation(sessions[session][0], f"{name}/{session}", True, name) for session in sorted(marks))
    evidence = tuple(_joined(one, sorted(marks[session])) for one, session in zip(holders, sorted(marks)))
    return EvidenceItem(str(row["question"]), answer, evidence, holders, category, name, None, name)


def _list_of(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise Mistake(path, "does not exist", "name the file on this machine")
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Mistake(path, "is no list of objects", "name the published JSON file")
    return rows


def _need(row: Any, place: str, *keys: str) -> None:
    missing = next((key for key in keys if not isinstance(row, dict) or key not in row), None)
    if missing is not None:
        raise Mistake(place, f"lacks '{missing}'", "name the published JSON file")


def _turn(turn: Any, place: str) -> Utterance:
    _need(turn, place, "role", "content")
    if turn["role"] not in ROLES:
        raise Mistake(place, f"the role '{turn['role']}' is unknown", f"known are {', '.join(ROLES)}")
    return Utterance(ROLES[turn["role"]], str(turn["content"]))


def _named(turn: Any, talk: dict[str, Any], place: str) -> Utterance:
    """Return a turn of two people: the first speaks as User, the second as Assistant, each with the name that questions use."""
    _need(turn, place, "speaker", "dia_id", "text")
    if turn["speaker"] not in (talk["speaker_a"], talk["speaker_b"]):
        raise Mistake(place, f"the speaker '{turn['speaker']}' is unknown", "fetch the file again")
    picture = f" [shares a picture: {turn['blip_caption']}]" if turn.get("blip_caption") else ""
    return Utterance("User" if turn["speaker"] == talk["speaker_a"] else "Assistant", f"{turn['speaker']}: {turn['text']}{picture}")


def _dated(messages: Sequence[Utterance], date: str) -> tuple[Utterance, ...]:
    if not date or not messages:
        return tuple(messages)
    return (Utterance(messages[0].speaker, f"({date}) {messages[0].text}"), *messages[1:])


def _joined(one: Conversation, marked: Sequence[int]) -> Utterance:
    if not marked:
        return next((message for message in one.messages if message.speaker == "User"), one.messages[0])
    chosen = [one.messages[place] for place in marked if one.messages[place].speaker == one.messages[marked[0]].speaker]
    return Utterance(chosen[0].speaker, "\n".join(message.text for message in chosen))
