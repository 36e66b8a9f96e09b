"""The table of verdicts: each can be reached, and none comes from one number alone."""

from __future__ import annotations

import math

import pytest

from remanence.errors import Mistake
from remanence.forget.audit.report import Finding
from remanence.forget.audit.settings import AuditSettings
from remanence.forget.audit.verdict import ORDER, Thresholds, judge, remains


def finding(name: str, group: str, value: float, reference: float | None, original: float | None = 0.9, *, width: float = 0.05) -> Finding:
    better = "higher" if group == "utility" else "reference"
    original = None if group == "utility" else original
    return Finding(
        name, group, value, value - width, value + width, better, reference, 60, "oracle" if reference is not None else "", original
    )


MEMORY = ("probability", "exact_memorisation", "extraction_strength", "rouge", "knowmem")
ATTACKS = ("paraphrase", "prefix", "quantization/int4", "relearning/shown")


def clean(**changes: float) -> list[Finding]:
    """Findings of a model that has forgotten, with some values changed (`utility` of all that must stay)."""
    found = [finding(name, "memory", changes.get(name, 0.1), 0.1) for name in MEMORY]
    found += [finding(name, "robustness", changes.get(name, 0.12), 0.12) for name in ATTACKS]
    found += [finding(f"auc/{name}", "membership", changes.get(name, 0.5), 0.5, 1.0) for name in ("loss", "zlib", "min_k")]
    found += [
        finding(f"retain/{name}", "utility", changes.get(f"retain_{name}", 0.9), 0.9)
        for name in ("probability", "rouge", "exact_memorisation")
    ]
    found.append(finding("utility", "utility", changes.get("utility", 0.9), 0.9))
    found.append(finding("nll", "quality", changes.get("nll", 4.0), 4.0, 0.1, width=0.3))
    found.append(
        Finding("privleak", "membership", changes.get("privleak", 0.0), -10 + changes.get("privleak", 0.0), 99, "reference", 0.0, 120)
    )
    found.append(Finding("forget_quality", "quality", changes.get("quality", 0.6), 0, 1, "higher", 1.0, 60))
    return found


VERDICTS = {
    "forgotten": {},
    "not forgotten": {"probability": 0.5, "exact_memorisation": 0.7},
    "harmed": {"retain_probability": 0.6, "retain_rouge": 0.5},
    "hidden": {"relearning/shown": 0.6},
    "over-forgotten": {"nll": 9.0, "privleak": 60.0},
}


@pytest.mark.parametrize("word", ORDER)
def test_every_verdict_can_be_reached_with_its_numbers(word: str) -> None:
    verdict = judge(clean(**VERDICTS[word]))
    assert verdict.word == word
    assert verdict.also == []
    for name, value in VERDICTS[word].items():
        told = name.replace("retain_", "retain/").replace("nll", "NLL").replace("privleak", "PrivLeak")
        assert any(told in reason and f"{value:.3g}".lstrip("+") in reason for reason in verdict.reasons), (name, verdict.reasons)
    assert sum(any(mark.isdigit() for mark in reason) for reason in verdict.reasons) >= 1


ALONE = [(word, name) for word in ("not forgotten", "harmed", "over-forgotten") for name in VERDICTS[word]]


@pytest.mark.parametrize(("word", "name"), [*ALONE, ("over-forgotten", "quality"), ("hidden", "loss")])
def test_no_verdict_comes_from_one_number_alone(word: str, name: str) -> None:
    value = {"quality": 1e-9, "loss": 0.95}.get(name, VERDICTS[word].get(name, 0.0))
    assert judge(clean(**{name: value})).word == "forgotten"


def test_an_attack_says_hidden_only_beside_outputs_that_look_forgotten() -> None:
    verdict = judge(clean(**VERDICTS["hidden"]))
    assert any(reason.startswith("what it says: probability 0.1 against 0.1 (oracle)") for reason in verdict.reasons)
    openly = judge(clean(**VERDICTS["hidden"], **VERDICTS["not forgotten"]))
    assert (openly.word, openly.also) == ("not forgotten", [])  # what is said openly is not hidden


def test_membership_says_hidden_only_by_two_scores() -> None:
    assert judge(clean(loss=0.8, min_k=0.8)).word == "hidden"
    assert judge(clean(loss=0.6, min_k=0.6)).word == "forgotten"


def test_rouge_recall_and_f1_of_one_continuation_count_once() -> None:
    assert judge(clean(rouge=0.9, knowmem=0.9)).word == "forgotten"
    assert judge(clean(rouge=0.9, knowmem=0.9, probability=0.8)).word == "not forgotten"


def test_the_harmonic_mean_does_not_count_beside_what_it_is_made_of() -> None:
    assert judge(clean(retain_rouge=0.1, utility=0.2)).word == "forgotten"


def test_forget_quality_needs_another_number_beside_it() -> None:
    assert judge(clean(nll=9.0, quality=1e-9)).word == "over-forgotten"
    assert judge(clean(privleak=60.0, quality=1e-9)).word == "over-forgotten"


def test_what_else_fired_is_named() -> None:
    verdict = judge(clean(**VERDICTS["harmed"], **VERDICTS["over-forgotten"]))
    assert (verdict.word, verdict.also) == ("harmed", ["over-forgotten"])
    verdict = judge(clean(**VERDICTS["harmed"], **VERDICTS["hidden"]))
    assert (verdict.word, verdict.also) == ("harmed", ["hidden"])


def test_a_number_whose_interval_reaches_the_reference_does_not_count() -> None:
    wide = [finding(name, "memory", 0.5, 0.1, width=0.6) for name in MEMORY]
    assert judge([*wide, *clean()[len(MEMORY) :]]).word == "forgotten"


def test_an_attack_without_a_reference_proves_nothing() -> None:
    found = [f for f in clean() if f.group != "robustness"] + [finding("relearning/shown", "robustness", 0.99, None)]
    verdict = judge(found)
    assert verdict.word == "forgotten"
    assert "no attack had a reference: hidden memory cannot be excluded" in verdict.reasons


def test_what_was_not_measured_is_said() -> None:
    verdict = judge([f for f in clean() if f.group in ("memory", "robustness")])
    assert "membership was not measured" in verdict.reasons
    assert "what must stay was not measured: harm cannot be excluded" in verdict.reasons


def test_an_original_that_knew_no_more_than_the_reference_measures_nothing() -> None:
    assert math.isnan(remains(finding("probability", "memory", 0.5, 0.4, 0.42)))
    assert remains(finding("probability", "memory", 0.5, 0.1, 0.9)) == pytest.approx(0.5)
    assert remains(finding("probability", "memory", 0.5, None, None)) == 0.5


@pytest.mark.parametrize("name", ["shown_by", "harmed_by"])
def test_one_number_cannot_be_made_enough(name: str) -> None:
    with pytest.raises(Mistake, match="no verdict comes from one number alone"):
        Thresholds(**{name: 1})


def test_thresholds_and_settings_can_be_changed_and_say_what_is_wrong() -> None:
    settings = AuditSettings().changed("--set", {"thresholds": {"harmed": 0.3}, "bits": [4], "relearn_steps": 8})
    assert (settings.thresholds.harmed, settings.bits, settings.relearn_steps) == (0.3, (4,), 8)
    assert settings.thresholds.remembered == Thresholds().remembered
    assert judge(clean(retain_probability=0.7, retain_rouge=0.7), settings.thresholds).word == "forgotten"
    for wrong, word in (
        ({"relearn_step": 8}, "relearn_steps"),
        ({"thresholds": {"harm": 1}}, "harmed"),
        ({"bits": ["x"]}, "bits"),
        ({"min_k": 2.0}, "min_k"),
        ({"parts": ["memoir"]}, "memory"),
        ({"truth_ratio": "loss"}, "losses"),
    ):
        with pytest.raises(Mistake, match=word):
            AuditSettings().changed("--set", wrong)
