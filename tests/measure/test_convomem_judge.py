"""The judge's four templates, its one word, and its audit."""

from __future__ import annotations

import pytest

from remanence.data.convomem_models import Priced, Reply
from remanence.data.convomem_templates import template_items
from remanence.errors import Mistake
from remanence.measure.convomem_desk import desk_judge
from remanence.measure.convomem_judge import TEMPLATES, Judge, audit, judge_prompt, read_verdict, template_of, wrong_answers

ITEMS = template_items(each=2, persons=4, seed=5)


def test_all_four_templates_exist_and_each_category_has_its_own() -> None:
    assert set(TEMPLATES) == {"factual", "user", "rubric", "abstention"}
    wanted = {"user_facts": "user", "assistant_facts": "factual", "changing_facts": "factual", "abstention": "abstention"}
    wanted |= {"preferences": "rubric", "implicit_connections": "rubric", "temporal": "factual", "multi_session": "factual"}
    assert {name: template_of(name) for name in wanted} == wanted


def test_the_judge_sees_the_evidence_for_user_facts_alone_and_is_lenient_there_for_more_than_one() -> None:
    for item in ITEMS:
        prompt = judge_prompt(item, "a {reply}")
        shown = item.evidence[0].text in prompt
        assert shown == (item.category == "user_facts"), item.id
        assert ("Minor omissions" in prompt) == (item.category == "user_facts" and item.k > 1)
        assert item.question in prompt
        assert item.answer in prompt
        assert "a {reply}" in prompt


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("RIGHT", True),
        (" right.\n", True),
        ("WRONG", False),
        ("The answer is **WRONG**.", False),
        ("RIGHT, or is it WRONG?", False),
        ("wrong... no, right", False),
        ("", None),
        ("maybe", None),
        ("RIGHTS are WRONGED", None),
    ],
)
def test_a_verdict_is_one_word_and_both_words_are_wrong(text: str, verdict: bool | None) -> None:
    assert read_verdict(text) is verdict


def test_a_judge_without_a_verdict_is_asked_again_then_dropped_and_its_cost_counted() -> None:
    replies = iter(["hm", "well", "RIGHT"])
    judge = Judge(Priced(lambda prompt: Reply(next(replies), 10, 1), "j", price_in=1.0))
    found = judge(ITEMS[0], "x")
    assert (found.right, found.calls, found.input_tokens) == (True, 3, 30)
    assert found.cost == pytest.approx(30 / 1e6)
    mute = Judge(Priced(lambda prompt: "hm", "j"))(ITEMS[0], "x")
    assert (mute.right, mute.calls) == (None, 3)


def test_the_audit_reports_the_false_accept_rate_of_a_judge_that_accepts_everything() -> None:
    found = audit(Judge(Priced(lambda prompt: "RIGHT", "yes")), ITEMS)
    assert found.false_accept == 1.0
    assert found.false_reject == 0.0
    assert {row["truth"] for row in found.rows} == {"wrong", "right"}
    assert all(0 <= row["low"] <= 1 and row["n"] > 0 for row in found.rows)


def test_the_audit_finds_no_error_in_a_judge_that_compares_values() -> None:
    given = [(item, item.answer) for item in ITEMS if template_of(item.category) == "rubric"]
    distinct = [
        item for item in ITEMS if item.category != "preferences" or item.k == 1
    ]  # there are few wishes: one rubric may hold another's
    found = audit(Judge(Priced(desk_judge, "desk")), distinct, right=given)
    assert found.false_accept == 0.0
    assert found.false_reject == 0.0


def test_the_audit_feeds_wrong_answers_of_every_kind_the_same_each_time() -> None:
    fed = wrong_answers(ITEMS, seed=1)
    assert fed == wrong_answers(ITEMS, seed=1)
    assert {kind for _, kind, _ in fed} == {"other", "refusal", "question", "none"}
    assert all(answer != item.answer for item, _, answer in fed)
    assert not [kind for item, kind, _ in fed if item.category == "abstention" and kind != "other"]
    with pytest.raises(Mistake, match="no items"):
        audit(Judge(Priced(desk_judge, "desk")), [])
