"""The desk reader is a declared model: what it reads, how it fails, and what its curves are fitted to."""

from __future__ import annotations

import math

import pytest

from remanence.data.convomem_solver import UNKNOWN
from remanence.data.convomem_templates import template_fillers, template_items
from remanence.measure.convomem import ConvoMemBench
from remanence.measure.convomem_desk import RELEASED, SIZES, Curve, DeskReader, desk_judge, desk_reader, fitted, parts, words
from remanence.measure.convomem_judge import Judge
from remanence.measure.convomem_memories import make_memory
from remanence.measure.convomem_policies import NOTHING, answer_prompt, shown

ITEMS = template_items(each=1, persons=4, seed=2)
FILLERS = template_fillers(persons=4, each=30, seed=2)


def test_the_curves_stay_within_six_points_of_the_released_accuracies() -> None:
    for reader in RELEASED.values():
        for tokens, accuracy in reader.values():
            assert len(tokens) == len(accuracy) == len(SIZES)
            curve = fitted(tokens, accuracy)
            assert max(abs(100 * curve(1000 * t) - a) for t, a in zip(tokens, accuracy)) < 6


def test_the_fit_is_exact_on_its_own_form() -> None:
    tokens = (1.0, 10.0, 100.0, 400.0)
    curve = fitted(tokens, tuple(100 * 0.9 * math.exp(-1000 * t / 5e5) for t in tokens))
    assert curve.ceiling == pytest.approx(0.9)
    assert curve.length == pytest.approx(5e5)


def test_a_longer_prompt_fails_wherever_a_shorter_one_did() -> None:
    reader = desk_reader("flash-lite", seed=1)
    judge = Judge(desk_judge_model(), "desk judge")
    results = ConvoMemBench(ITEMS, FILLERS, (6, 12, 30)).run(make_memory("full-context"), reader, judge)
    for item in ITEMS:
        right = [row.right for row in sorted(results.rows, key=lambda row: row.size) if row.item == item.id]
        assert right == sorted(right, reverse=True), item.id


def desk_judge_model():
    from remanence.data.convomem_models import Priced

    return Priced(desk_judge, "desk judge")


def test_what_stands_before_the_window_is_not_read() -> None:
    item = next(item for item in ITEMS if item.category == "user_facts" and item.k == 1)
    prompt = answer_prompt(item.question, shown([*item.conversations, *FILLERS[:10]]))
    assert DeskReader()(prompt) == item.answer
    assert DeskReader(window=300)(prompt) == UNKNOWN
    late = answer_prompt(item.question, shown([*FILLERS[:10], *item.conversations]))
    assert DeskReader(window=300)(late) == item.answer


def test_where_nothing_is_known_it_refuses_or_invents_as_its_curve_says() -> None:
    item = next(item for item in ITEMS if item.category == "abstention")
    prompt = answer_prompt(item.question, shown(item.conversations))
    assert DeskReader()(prompt) == UNKNOWN
    assert DeskReader(abstention=Curve(0.0, 1.0))(prompt) != UNKNOWN


def test_quotes_are_the_messages_that_the_answer_rests_on() -> None:
    from remanence.data.convomem_models import Priced
    from remanence.measure.convomem_policies import extracted

    item = next(item for item in ITEMS if item.category == "assistant_facts" and item.k == 3)
    helper = Priced(DeskReader(), "h")
    found = extracted([*FILLERS[:5], *item.conversations], item.question, helper)
    assert found.text is not None
    assert sorted(found.text.split("\n")) == sorted(f"{one.speaker}: {one.text}" for one in item.evidence)
    assert helper("<memory>\nUser: hello\n</memory>\n\nQuestion: Which laptop should I get?\n\nQuotes:").text == NOTHING


def test_parts_of_a_prompt_are_found_and_words_counted() -> None:
    assert parts(answer_prompt("What is it?", "User: a\nUser: b")) == ("User: a\nUser: b", "What is it?")
    assert parts(answer_prompt("What is it?", "")) == ("", "What is it?")
    assert words("two words") == 2
    assert desk_judge("nothing of the kind") not in ("RIGHT", "WRONG")
