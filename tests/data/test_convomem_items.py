"""The items of ConvoMem, LongMemEval and LoCoMo as the published files lay them out, and everything about them that is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from remanence.data.convomem import (
    CATEGORIES,
    FOLDERS,
    NO_INFORMATION,
    PUBLISHED,
    Conversation,
    EvidenceItem,
    Utterance,
    count_categories,
    iterate_convomem,
    load_convomem,
    load_fillers,
    save_fillers,
    save_items,
)
from remanence.data.convomem_import import load_locomo, load_longmemeval
from remanence.data.convomem_templates import template_fillers, template_items
from remanence.errors import Mistake


def published(folder: Path, counts: dict[str, int], k: int = 2) -> Path:
    """Write a small data set in the published layout: a folder per category, a folder per k, files of evidence_items."""
    for category, number in counts.items():
        name = next(key for key, value in FOLDERS.items() if value == category)
        place = folder / "core_benchmark" / "evidence_questions" / name / f"{k}_evidence"
        place.mkdir(parents=True, exist_ok=True)
        for half, size in enumerate((number // 2, number - number // 2)):
            rows = [row(category, f"{half}-{n}", k) for n in range(size)]
            (place / f"{half}.json").write_text(json.dumps({"evidence_items": rows, "checkpoint": "x"}))
    return folder


def row(category: str, name: str, k: int) -> dict:
    said = [{"speaker": "User", "text": f"{category} {name} evidence number {n} of this item"} for n in range(k)]
    return {
        "question": f"What about {category} {name}?",
        "answer": NO_INFORMATION if category == "abstention" else f"answer {name}",
        "message_evidences": said,
        "conversations": [
            {"messages": [{"speaker": "Assistant", "text": "Hello."}, one], "id": None, "containsEvidence": True, "model_name": "m"}
            for one in said
        ],
        "category": "Personal Life",  # in the published files the category of the use case
        "scenario_description": "a scenario",
        "personId": "p1",
        "use_case_model_name": "m",
        "core_model_name": "m",
    }


def test_the_loader_reproduces_the_six_category_counts_from_files_in_the_published_layout(tmp_path: Path) -> None:
    counts = dict(zip(CATEGORIES, (5, 4, 6, 3, 2, 1)))
    folder = published(tmp_path, counts)
    assert count_categories(folder) == counts
    assert len(load_convomem(folder)) == 21
    assert [item.category for item in load_convomem(folder, categories=["preferences"])] == ["preferences"] * 2
    assert len(load_convomem(folder, limit=2)) == 11
    assert {item.k for item in load_convomem(folder, ks=[2])} == {2}


def test_the_published_counts_are_those_of_the_paper() -> None:
    assert sum(PUBLISHED.values()) == 75_336
    assert PUBLISHED == {
        "user_facts": 16_733,
        "assistant_facts": 12_745,
        "changing_facts": 18_323,
        "abstention": 14_910,
        "preferences": 5_079,
        "implicit_connections": 7_546,
    }


@pytest.mark.skipif(
    "REMANENCE_CONVOMEM" not in os.environ, reason="REMANENCE_CONVOMEM does not name the published data set's evidence folder"
)
def test_the_real_files_have_the_published_counts() -> None:
    assert count_categories(os.environ["REMANENCE_CONVOMEM"]) == PUBLISHED


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    items, fillers = template_items(("user_facts", "abstention"), (1, 2), each=1, persons=2), template_fillers(persons=2, each=2)
    save_items(tmp_path / "items.json", items)
    save_fillers(tmp_path / "fillers.json", fillers)
    assert load_convomem(tmp_path / "items.json") == items
    assert load_fillers(tmp_path / "fillers.json") == fillers


def talk(*texts: str, name: str = "c") -> Conversation:
    return Conversation(tuple(Utterance("User", text) for text in texts), name)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"question": " "}, "question is empty"),
        ({"answer": ""}, "answer is empty"),
        ({"category": "user_fact"}, "did you mean 'user_facts'"),
        ({"conversations": ()}, "0 conversations for 1 evidence"),
        ({"evidence": (Utterance("Bot", "x"),)}, "speaker 'Bot'"),
        ({"conversations": (Conversation((Utterance("system", "x"),), "c"),)}, "speaker 'system'"),
    ],
)
def test_an_item_that_cannot_be_asked_is_refused(change: dict, word: str) -> None:
    whole = {
        "question": "Q?",
        "answer": "a",
        "evidence": (Utterance("User", "x"),),
        "conversations": (talk("x"),),
        "category": "user_facts",
    }
    with pytest.raises(Mistake, match=word):
        EvidenceItem(**(whole | change))


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"evidence_items": 3}', '{"evidence_items": [{"question": "q"}]}', '{"evidence_items": [{}]}']
)
def test_a_file_that_is_none_of_the_data_set_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "user_evidence").mkdir()
    path = tmp_path / "user_evidence" / "x.json"
    path.write_text(content)
    with pytest.raises(Mistake, match=r"x\.json"):
        list(iterate_convomem(path))


def test_a_filler_without_a_person_and_a_category_without_a_name_are_refused(tmp_path: Path) -> None:
    one = row("user_facts", "a", 1)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([one | {"personId": None}]))
    with pytest.raises(Mistake, match="no personId"):
        load_fillers(path)
    with pytest.raises(Mistake, match="category is unknown"):
        load_convomem(path)
    with pytest.raises(Mistake, match="does not exist"):
        load_convomem(tmp_path / "nothing")


def test_longmemeval_becomes_items_with_their_own_histories(tmp_path: Path) -> None:
    session = [{"role": "user", "content": "I moved to Riga.", "has_answer": True}, {"role": "assistant", "content": "Nice."}]
    other = [{"role": "user", "content": "What is tar?"}, {"role": "assistant", "content": "An archiver."}]
    base = {
        "question_date": "2023/05/30 (Tue)",
        "haystack_dates": ["2023/05/20", "2023/05/21", "2023/05/22"],
        "haystack_session_ids": ["s1", "a1", "s2"],
        "haystack_sessions": [other, session, other],
        "answer_session_ids": ["a1"],
    }
    rows = [
        base | {"question_id": "q1", "question_type": "knowledge-update", "question": "Where do I live?", "answer": "Riga"},
        base | {"question_id": "q2_abs", "question_type": "multi-session", "question": "Where does my aunt live?", "answer": "unknown"},
        base | {"question_id": "q3", "question_type": "temporal-reasoning", "question": "How many days?", "answer": 7},
    ]
    path = tmp_path / "longmemeval_s.json"
    path.write_text(json.dumps(rows))
    items, fillers = load_longmemeval(path)
    assert [item.category for item in items] == ["changing_facts", "abstention", "temporal"]
    assert items[1].answer == NO_INFORMATION
    assert items[2].answer == "7"
    assert "2023/05/30" in items[0].question
    assert items[0].evidence[0].text == "(2023/05/21) I moved to Riga."
    assert sorted(one.id for one in fillers if one.person == "q1") == ["q1/s1/1", "q1/s2/1"]
    path.write_text(json.dumps([rows[0] | {"question_type": "other"}]))
    with pytest.raises(Mistake, match="type 'other'"):
        load_longmemeval(path)


def test_locomo_becomes_items_with_the_rest_of_the_sample_as_filler(tmp_path: Path) -> None:
    talk = {
        "speaker_a": "Caroline",
        "speaker_b": "Melanie",
        "session_1": [
            {"speaker": "Caroline", "dia_id": "D1:1", "text": "I went hiking."},
            {"speaker": "Melanie", "dia_id": "D1:2", "text": "Lovely.", "blip_caption": "a hill"},
        ],
        "session_1_date_time": "1:56 pm on 8 May, 2023",
        "session_2": [{"speaker": "Melanie", "dia_id": "D2:1", "text": "I painted."}],
        "session_2_date_time": "2 pm on 9 May, 2023",
        "session_3": [],
    }
    asked = [
        {"question": "Who hiked and who painted?", "answer": "Caroline; Melanie", "evidence": ["D1:1; D2:1"], "category": 1},
        {"question": "When did Caroline hike?", "answer": 2023, "evidence": ["D1:1"], "category": 2},
        {"question": "Whose dog?", "adversarial_answer": "hers", "evidence": ["D2:1"], "category": 5},
        {"question": "Nowhere?", "answer": "x", "evidence": ["D9:9"], "category": 4},
    ]
    path = tmp_path / "locomo10.json"
    path.write_text(json.dumps([{"sample_id": "conv-26", "conversation": talk, "qa": asked}]))
    items, fillers = load_locomo(path)
    assert [(item.category, item.k) for item in items] == [("multi_session", 2), ("temporal", 1), ("abstention", 1)]
    assert items[0].evidence[0].text == "(1:56 pm on 8 May, 2023) Caroline: I went hiking."
    assert items[0].conversations[0].messages[1] == Utterance("Assistant", "Melanie: Lovely. [shares a picture: a hill]")
    assert [one.id for one in fillers if one.person == items[0].person] == []
    assert len([one for one in fillers if one.person == items[1].person]) == 1
    with pytest.raises(Mistake, match="does not exist"):
        load_locomo(tmp_path / "none.json")
