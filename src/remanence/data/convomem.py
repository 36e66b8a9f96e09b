"""The items of the ConvoMem benchmark: a question, its answer, and the conversations that hold the evidence; read from and written to the published JSON.

ConvoMem (Pakhomov, Nijkamp and Xiong 2025, arXiv:2511.10523) keeps a question fixed and grows the history around it. The published data set is a folder
`.../<category folder>/<k>_evidence/*.json`, each file `{"evidence_items": [...]}`; the fillers have the same layout. It is far larger than memory at
full size, so files are read one at a time and `limit` keeps the first items of every (category, k).

Cost: one pass over the files; memory is that of the largest file and of what is kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from remanence.errors import Mistake, nearest
from remanence.seeds import derive
from remanence.storage import write_text

SPEAKERS = ("User", "Assistant")
PUBLISHED = {  # the six categories and how many questions of each were published
    "user_facts": 16_733,
    "assistant_facts": 12_745,
    "changing_facts": 18_323,
    "abstention": 14_910,
    "preferences": 5_079,
    "implicit_connections": 7_546,
}
CATEGORIES = tuple(PUBLISHED)
OTHERS = ("multi_session", "single_session", "temporal", "open_domain")  # of LongMemEval and LoCoMo
FOLDERS = {
    "user_evidence": "user_facts",
    "assistant_facts_evidence": "assistant_facts",
    "changing_evidence": "changing_facts",
    "abstention_evidence": "abstention",
    "preference_evidence": "preferences",
    "implicit_connection_evidence": "implicit_connections",
}
SIZES = (1, 2, 3, 4, 5, 6, 10, 20, 30, 50, 70, 100, 150, 200, 300)  # of the released result files
NO_INFORMATION = "There is no information in prior conversations to answer this question"


@dataclass(frozen=True)
class Utterance:
    """One message of a conversation; the speaker is one of `SPEAKERS`."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order; `person` is whose assistant it was, `evidence` whether it holds a message that a question needs."""

    messages: tuple[Utterance, ...]
    id: str
    evidence: bool = False
    person: str | None = None


@dataclass(frozen=True)
class EvidenceItem:
    """A question whose answer lies in `evidence`, one message in each of `conversations`, in the same order.

    Args:
        question: never empty.
        answer: for preferences and implicit connections a rubric (what a good reply must and must not do), for abstention `NO_INFORMATION`.
        evidence: the k messages.
        conversations: as many, the i-th holds the i-th message.
        category: one of `CATEGORIES`, or of `OTHERS`.
        person: whose history it belongs to; fillers of the same person come first.
        scenario: what the conversations are about.
        id: unique; made from the content if the file has none.
    """

    question: str
    answer: str
    evidence: tuple[Utterance, ...]
    conversations: tuple[Conversation, ...]
    category: str
    person: str | None = None
    scenario: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        place = self.id or "item"
        if not self.question.strip():
            raise Mistake(place, "the question is empty", "remove the item or give it a question")
        if not self.answer.strip():
            raise Mistake(place, "the answer is empty", "remove the item or give it an answer")
        if self.category not in CATEGORIES + OTHERS:
            raise Mistake(place, f"there is no category '{self.category}'", nearest(self.category, CATEGORIES + OTHERS))
        if len(self.conversations) != len(self.evidence):
            problem = f"{len(self.conversations)} conversations for {len(self.evidence)} evidence messages"
            raise Mistake(place, problem, "give one conversation per evidence message, in the same order")
        for message in (*self.evidence, *(message for one in self.conversations for message in one.messages)):
            if message.speaker not in SPEAKERS:
                raise Mistake(place, f"the speaker '{message.speaker}' is unknown", f"name {' or '.join(SPEAKERS)}")

    @property
    def k(self) -> int:
        """The number of evidence messages."""
        return len(self.evidence)


def files_of(path: str | Path) -> list[Path]:
    """Return the JSON files of a folder (all levels, sorted), or the one that is named."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise Mistake(path, "does not exist", "name the folder or file of the data set on this machine")
    found = sorted(file for file in path.rglob("*.json") if not file.name.startswith("."))
    if not found:
        raise Mistake(path, "holds no .json file", "name the folder that holds the evidence files")
    return found


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(path, f"cannot be read ({error.strerror or error})", "check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise Mistake(path, f"is no JSON ({error})", "fetch the file again") from error


def iterate_convomem(path: str | Path, *, category: str | None = None) -> Iterator[EvidenceItem]:
    """Yield the items of a file or folder in the published layout.

    Args:
        category: of all items; `None` takes the folder's name (`user_evidence`, ...), or the item's own `category` where that is one of ours
            (in the published files it is the use case's).
    """
    for file in files_of(path):
        folder = next((FOLDERS[part] for part in reversed(file.parts) if part in FOLDERS), None)
        for number, row in enumerate(_rows(file)):
            yield _item(row, f"{file}, item {number}", category or folder)


def load_convomem(
    path: str | Path, *, categories: Sequence[str] = CATEGORIES, ks: Iterable[int] | None = None, limit: int | None = None
) -> list[EvidenceItem]:
    """Return items of the published layout.

    Args:
        path: file or folder.
        categories: which ones.
        ks: numbers of evidence messages; `None`: all.
        limit: at most so many of each (category, k), the first in order of the files.
    """
    for name in categories:
        if name not in CATEGORIES + OTHERS:
            raise Mistake("categories", f"there is no category '{name}'", nearest(name, CATEGORIES + OTHERS))
    wanted = None if ks is None else set(ks)
    seen: Counter[tuple[str, int]] = Counter()
    kept = []
    for item in iterate_convomem(path):
        cell = (item.category, item.k)
        if item.category in categories and (wanted is None or item.k in wanted) and (limit is None or seen[cell] < limit):
            seen[cell] += 1
            kept.append(item)
    if not kept:
        raise Mistake(path, "holds no item of the categories and numbers of evidence asked for", "ask for others")
    return kept


def count_categories(path: str | Path) -> dict[str, int]:
    """Return the number of items of each of the six categories, without keeping them (the published files give `PUBLISHED`)."""
    found = Counter(item.category for item in iterate_convomem(path))
    return {name: found[name] for name in CATEGORIES}


def load_fillers(path: str | Path) -> list[Conversation]:
    """Return all conversations of a file or folder as fillers, with their persons.

    Raises:
        Mistake: a conversation has no person: it would be mixed silently into anybody's history.
    """
    found = []
    for file in files_of(path):
        for number, row in enumerate(_rows(file)):
            place = f"{file}, item {number}"
            person = row.get("personId")
            for position, one in enumerate(_list(row, "conversations", place)):
                owner = one.get("person") or person
                if not owner:
                    raise Mistake(place, "a filler has no personId", "add personId to the item")
                made = _conversation(one, place, f"{derive(file.name, number, position):x}", str(owner), evidence=False)
                if any(message.speaker not in SPEAKERS for message in made.messages):
                    raise Mistake(place, "a filler has an unknown speaker", f"name {' or '.join(SPEAKERS)}")
                found.append(made)
    return found


def save_items(path: str | Path, items: Iterable[EvidenceItem]) -> None:
    """Write items in the published layout, one file, whole or not at all."""
    rows = [
        {
            "question": item.question,
            "answer": item.answer,
            "message_evidences": [_plain(message) for message in item.evidence],
            "conversations": [_plain_conversation(one) for one in item.conversations],
            "category": item.category,
            "scenario_description": item.scenario,
            "personId": item.person,
            "id": item.id,
        }
        for item in items
    ]
    write_text(path, json.dumps({"evidence_items": rows}, ensure_ascii=False, indent=1))


def save_fillers(path: str | Path, fillers: Iterable[Conversation]) -> None:
    """Write fillers in the published layout: one item per person."""
    by_person: dict[str | None, list[dict[str, Any]]] = {}
    for one in fillers:
        by_person.setdefault(one.person, []).append(_plain_conversation(one))
    rows = [{"personId": person, "conversations": conversations} for person, conversations in by_person.items()]
    write_text(path, json.dumps({"evidence_items": rows}, ensure_ascii=False, indent=1))


def flagged(item: EvidenceItem) -> EvidenceItem:
    """Return the item with its conversations flagged as evidence and given its person."""
    return replace(item, conversations=tuple(replace(one, evidence=True, person=item.person) for one in item.conversations))


def _rows(file: Path) -> list[dict[str, Any]]:
    content = read_json(file)
    if isinstance(content, dict):
        content = content.get("evidence_items", content.get("evidenceItems"))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise Mistake(file, "has no list 'evidence_items'", "name files of the published data set, or such as save_items writes")
    return content


def _item(row: dict[str, Any], place: str, category: str | None) -> EvidenceItem:
    named = category or row.get("category")
    if named not in CATEGORIES + OTHERS:
        raise Mistake(place, "its category is unknown", f"keep the folder names of the data set ({', '.join(FOLDERS)}) or set 'category'")
    person = None if row.get("personId") is None else str(row["personId"])
    evidence = tuple(_utterance(one, place) for one in _list(row, "message_evidences", place))
    question, answer = str(row.get("question") or ""), str(row.get("answer") or "")
    name = str(row.get("id") or f"{derive(named, question, answer, *(one.text for one in evidence)):x}")
    conversations = tuple(
        _conversation(one, place, f"{name}-{position}", person, evidence=True)
        for position, one in enumerate(_list(row, "conversations", place))
    )
    try:
        return EvidenceItem(question, answer, evidence, conversations, named, person, row.get("scenario_description"), name)
    except Mistake as error:
        raise Mistake(place, error.problem, error.remedy) from None


def _conversation(row: dict[str, Any], place: str, name: str, person: str | None, *, evidence: bool) -> Conversation:
    messages = tuple(_utterance(one, place) for one in _list(row, "messages", place))
    return Conversation(messages, str(row.get("id") or name), evidence, person)


def _list(row: Any, key: str, place: str) -> list[Any]:
    found = row.get(key) if isinstance(row, dict) else None
    if not isinstance(found, list):
        raise Mistake(place, f"has no list '{key}'", "give it one, as in the published data set")
    return found


def _utterance(row: Any, place: str) -> Utterance:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not isinstance(row.get("speaker"), str):
        raise Mistake(place, "a message lacks 'speaker' or 'text'", "give it both, as strings")
    return Utterance(row["speaker"], row["text"])


def _plain(message: Utterance) -> dict[str, str]:
    return {"speaker": message.speaker, "text": message.text}


def _plain_conversation(one: Conversation) -> dict[str, Any]:
    return {"id": one.id, "containsEvidence": one.evidence, "messages": [_plain(message) for message in one.messages]}
