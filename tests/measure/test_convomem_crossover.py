"""From which size on which policy pays: by hand on made answers, as text, CSV and picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from remanence.errors import Mistake
from remanence.measure.convomem_crossover import advice, crossovers, draw_crossover, write_crossover
from remanence.measure.convomem_results import Results, Row
from remanence.report.curves import draw_curves

SIZES = (1, 10, 100)


def answers(policy: str, right: dict[int, float], cost: dict[int, float], *, items: int = 40, **changes: object) -> list[Row]:
    """Return answers of a policy of which so large a share is right, the same items first at every size."""
    rows = []
    for size in SIZES:
        for number in range(items):
            row = {
                "policy": policy,
                "model": "m",
                "helper": "m",
                "judge": "j",
                "packing": "standard",
                "size": size,
                "case": f"{number}@{size}",
                "item": f"i{number}",
                "category": "user_facts",
                "k": 1 + number % 2,
                "text": "",
                "right": number < right[size] * items,
                "calls": 1,
                "input_tokens": size,
                "output_tokens": 1,
                "cached_tokens": 0,
                "final_tokens": size,
                "seconds": cost[size] * 10,
                "cost": cost[size],
                "judge_calls": 1,
                "judge_cost": 0.0,
                "evidence_used": 1,
            }
            rows.append(Row(**(row | changes)))
    return rows


FULL = answers("full-context", {1: 0.9, 10: 0.8, 100: 0.4}, {1: 1.0, 10: 10.0, 100: 100.0})
FLAT = answers("retrieval", {1: 0.6, 10: 0.6, 100: 0.6}, {1: 2.0, 10: 2.0, 100: 2.0})


def test_the_crossover_is_the_first_size_from_which_on_the_challenger_stays_as_good() -> None:
    found = {one.measure: one for one in crossovers(Results((*FULL, *FLAT)))}
    assert found["accuracy"].size == 100
    assert found["cost"].size == 10
    assert found["latency"].size == 10
    assert (found["cost"].low, found["cost"].high) == (10, 10)
    assert found["accuracy"].low <= 100 <= found["accuracy"].high
    assert found["accuracy"].n == 40
    assert found["accuracy"].baseline_large == pytest.approx(0.4)
    assert found["accuracy"].challenger_large == pytest.approx(0.6)


def test_a_challenger_that_is_ahead_and_falls_behind_again_has_not_crossed() -> None:
    wave = answers("wave", {1: 1.0, 10: 1.0, 100: 0.1}, {1: 2.0, 10: 2.0, 100: 2.0})
    (one,) = [one for one in crossovers(Results((*FULL, *wave))) if one.measure == "accuracy"]
    assert math.isinf(one.size)
    assert "at no size up to 100" in advice([one])


def test_a_tolerance_moves_the_crossover_left() -> None:
    sizes = [
        next(one.size for one in crossovers(Results((*FULL, *FLAT)), tolerance=t) if one.measure == "accuracy") for t in (0.0, 0.2, 0.3)
    ]
    assert sizes == [100, 10, 1]


def test_few_questions_give_a_wide_interval() -> None:
    few = Results((*answers("full-context", {1: 1, 10: 0.6, 100: 0.4}, dict.fromkeys(SIZES, 1.0), items=5),))
    few += Results((*answers("retrieval", dict.fromkeys(SIZES, 0.6), dict.fromkeys(SIZES, 2.0), items=5),))
    one = crossovers(few)[0]
    assert one.low < one.high or one.size in (one.low, one.high)
    assert one.high > 1


def test_packings_models_and_judges_are_not_compared_with_each_other() -> None:
    for name, value in (("packing", "batched"), ("model", "n"), ("judge", "k")):
        other = answers("retrieval", dict.fromkeys(SIZES, 0.6), dict.fromkeys(SIZES, 2.0), **{name: value})
        with pytest.raises(Mistake, match=f"several {name}s"):
            crossovers(Results((*FULL, *other)))
    with pytest.raises(Mistake, match="no results of 'full-context'"):
        crossovers(Results(tuple(FLAT)))


def test_categories_are_kept_apart_and_one_k_can_be_asked_for() -> None:
    other = answers("retrieval", dict.fromkeys(SIZES, 1.0), dict.fromkeys(SIZES, 2.0), category="abstention")
    base = answers("full-context", dict.fromkeys(SIZES, 0.9), dict.fromkeys(SIZES, 3.0), category="abstention")
    found = [one for one in crossovers(Results((*FULL, *FLAT, *other, *base))) if one.measure == "accuracy"]
    assert {one.category: one.size for one in found} == {"user_facts": 100, "abstention": 1}
    assert crossovers(Results((*FULL, *FLAT)), k=2)[0].n == 20


def test_the_user_is_told_from_which_size_on_which_policy_pays(tmp_path: Path) -> None:
    results = Results((*FULL, *FLAT))
    text = write_crossover(results, tmp_path)
    assert text == (tmp_path / "crossover.txt").read_text()
    assert "user_facts: retrieval instead of full-context (n = 40 questions)" in text
    assert "as accurate from 100 conversations on (95 % interval" in text
    assert "cheaper from 10 conversations on (95 % interval 10 to 10); by a factor of 50 at 100" in text
    assert "it pays from 100 conversations on" in text
    rows = list(csv.DictReader((tmp_path / "crossover.csv").read_text().splitlines()))
    assert [row["measure"] for row in rows] == ["accuracy", "cost", "latency"]
    assert (tmp_path / "crossover.png").read_bytes().startswith(b"\x89PNG")
    loses = answers("retrieval", dict.fromkeys(SIZES, 0.1), dict.fromkeys(SIZES, 2.0))
    assert "it pays only where 30% of accuracy may go" in advice(crossovers(Results((*FULL, *loses))))
    dear = answers("retrieval", dict.fromkeys(SIZES, 0.1), dict.fromkeys(SIZES, 2000.0))
    assert "it does not pay: never cheaper" in advice(crossovers(Results((*FULL, *dear))))


def test_a_picture_of_another_kind_or_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"'\.pdf' file"):
        draw_crossover(Results(tuple(FULL)), tmp_path / "x.pdf")
    with pytest.raises(Mistake, match="nothing to draw"):
        draw_curves("t", "x", [], tmp_path / "x.png")
    assert draw_crossover(Results(tuple(FULL)), tmp_path / "x.svg").read_text().startswith("<?xml")
