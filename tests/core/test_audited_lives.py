"""A recipe that audits: every served request is attacked against the model before it and the oracle's, and the verdict is in the receipt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from remanence.cli import main
from remanence.errors import Mistake
from remanence.ledger import Ledger
from remanence.models.load import save_model
from remanence.recipe import Recipe
from remanence.runs import run_recipe
from toy import toy_lm, toy_tokenizer

TREE: dict[str, Any] = {
    "name": "audited",
    "model": "desk:mlp-digits",
    "forget": "gradient-ascent",
    "training": {"epochs": 2, "batch_size": 16, "lr": 0.003},
    "forgetting": {"steps": 20, "lr": 0.001},
    "audit": {"relearn_steps": 2, "relearn_points": [0, 1, 2], "resamples": 100},
    "lives": {"served": {}, "never-saw-it": {"oracle": True}},
    "events": [
        {"learn": "digits", "kind": "classes", "data": {"digits": {"classes": [0, 1, 3]}, "limit": 200}},
        {
            "forget": "threes",
            "kind": "classes",
            "data": {"digits": {"classes": [3]}, "limit": 40},
            "retain": {"digits": {"classes": [0, 1]}, "limit": 60},
            "holdout": {"digits": {"classes": [3], "part": "test"}},
        },
    ],
}


def findings(place: Path) -> dict[str, Any]:
    receipt = json.loads(next((place / "receipts").glob("*.json")).read_text())
    return receipt["audit"] | {item["name"]: item for item in receipt["audit"]["findings"]}


def test_the_verdict_of_a_request_is_in_its_receipt_held_against_the_oracle(tmp_path: Path) -> None:
    place = run_recipe(Recipe.of(TREE), output=tmp_path / "out", progress=False)
    found = findings(place)
    assert found["verdict"] in ("forgotten", "hidden", "harmed", "over-forgotten", "not forgotten")
    assert found["reasons"]
    assert any(item["against"] == "the oracle" for item in found["findings"])
    assert not (place / "never-saw-it" / "models").exists()
    assert f"<strong>{found['verdict']}</strong>" in (place / "report.html").read_text()


def test_without_an_oracle_the_model_before_is_all_there_is(tmp_path: Path) -> None:
    place = run_recipe(Recipe.of(TREE | {"lives": {}}), output=tmp_path / "out", progress=False, report=False)
    found = findings(place)
    assert not any(item["against"] == "the oracle" for item in found["findings"])


def test_an_audit_leaves_weights_and_scores_as_they_were(tmp_path: Path) -> None:
    hashes = []
    for name, audit in (("with", TREE["audit"]), ("without", False)):
        place = run_recipe(Recipe.of(TREE | {"audit": audit}), output=tmp_path / name, progress=False, report=False)
        with Ledger(place / "ledger.sqlite", create=False) as ledger:
            hashes.append(
                (
                    [(row["run"], row["event"], row["weights_after"]) for row in ledger.rows("events")],
                    ledger.rows("scores"),
                )
            )
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("audit", "words"),
    [
        ({"relern_steps": 2}, "relern_steps: unknown key; did you mean 'relearn_steps'"),
        ({"parts": ["mood"]}, "unknown part 'mood'"),
    ],
)
def test_settings_that_are_none_are_refused_before_anything_is_written(audit: Any, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        Recipe.of(TREE | {"audit": audit})


def test_forget_audits_against_a_given_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--request", "{digits: {classes: [3]}, limit: 20}", "--holdout", "{digits: {classes: [3], part: test}}", "--kind", "classes"]
    words += ["--method", "gradient-ascent", "--set", "training.steps=1", "--set", "audit.relearn_steps=1", "--set", "audit.resamples=100"]
    monkeypatch.setattr(
        sys, "argv", ["remanence", "forget", "desk:mlp-digits", *words, "--oracle", "desk:mlp-digits", "--out", "a", "--quiet"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "add --audit" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--audit"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    receipt = json.loads((tmp_path / "a" / "receipt.json").read_text())
    assert any(item["against"] == "the oracle" for item in receipt["audit"]["findings"])


def test_what_cannot_be_audited_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Hold-out rows that were trained on, and an oracle of another kind."""
    seen = [TREE["events"][0], TREE["events"][1] | {"holdout": {"digits": {"classes": [0, 1]}, "limit": 60}}]
    with pytest.raises(Mistake, match="holdout stand in the retain set too"):
        run_recipe(Recipe.of(TREE | {"events": seen}), output=tmp_path / "out", progress=False)
    save_model(toy_lm("llama"), toy_tokenizer(), tmp_path / "lm")
    with pytest.raises(Mistake, match="audit, oracle: is a language model, the rows are of kind 'classes'"):
        run_recipe(Recipe.of(TREE), output=tmp_path / "out", progress=False, oracle_model=str(tmp_path / "lm"))
    assert not (tmp_path / "out").exists()
