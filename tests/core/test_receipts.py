"""Receipts: made from the ledger alone, signed by a local key, and checked against rows, model and ledger."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, Image
from PIL import Image as Picture
from torch import nn

from remanence import receipts
from remanence.cli import main
from remanence.errors import Mistake
from remanence.ledger import Ledger
from remanence.life import Deed, Life
from remanence.models.load import load_model, weights_hash
from remanence.recipe import Recipe
from remanence.runs import run_recipe
from remanence.stream import Moment, Request, fingerprint
from remanence.training.trainer import Settings

RECIPE = """
name: threes
model: desk:mlp-digits
forget: gradient-ascent
training: {steps: 2, batch_size: 8}
lives: {served: {}, never-saw-it: {oracle: true}}
events:
  - {learn: digits, kind: classes, data: {digits: {classes: [0, 3]}, limit: 60}}
  - {forget: a three, kind: classes, data: {digits: {classes: [3]}, limit: 4}, holdout: {digits: {classes: [3], part: test}, limit: 5}}
"""
THREES = "{digits: {classes: [3]}, limit: 4}"


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMANENCE_KEY", str(tmp_path / "keys" / "receipts.pem"))
    monkeypatch.chdir(tmp_path)


def ran(tmp_path: Path, name: str = "out") -> tuple[Path, dict[str, Any], Path]:
    """Run the recipe; return its folder, the receipt and its path."""
    place = run_recipe(Recipe.of(yaml.safe_load(RECIPE)), output=tmp_path / name, progress=False, report=False)
    paths = list((place / "receipts").glob("*.json"))
    assert [path.name for path in paths] == ["served-0-002-a-three.json"]  # the oracle served nothing
    return place, json.loads(paths[0].read_text()), paths[0]


def call(*words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["remanence", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return ended.value.code or 0, said.out + said.err  # type: ignore[return-value]


def test_a_receipt_says_what_was_asked_done_and_measured(tmp_path: Path) -> None:
    place, receipt, _ = ran(tmp_path)
    recipe = Recipe.of(yaml.safe_load(RECIPE))
    request = recipe.stream()[1]
    assert isinstance(request, Request)
    assert receipt["asked"] == {
        "kind": "classes",
        "forget": {"rows": 4, "sha256": fingerprint(request.forget, "classes")},
        "holdout": {"rows": 5, "sha256": fingerprint(request.sets["holdout"], "classes")},
    }
    assert receipt["method"] == "gradient-ascent"
    assert receipt["settings"]["training"]["steps"] == receipt["steps"] == 2
    assert receipt["weights"]["after"] == weights_hash(load_model(place / "served" / "model").model) != receipt["weights"]["before"]
    with Ledger(place / "ledger.sqlite", create=False) as ledger:
        for moment, number in (("before", 1), ("after", 2)):
            value = ledger.read(
                "SELECT value FROM scores WHERE run = 'threes/served/0' AND event = ? AND step = -1 AND subject = 'a three/forget' AND metric = 'loss'",
                number,
            )[0]["value"]
            assert receipt["scores"]["forget"]["loss"][moment] == value
    assert receipt["audit"] is None
    assert "signature" not in receipt


def test_a_fingerprint_names_rows_whatever_their_order_and_columns_beside() -> None:
    rows = Dataset.from_dict({"question": ["a", "b", "b"], "answer": ["1", "2", "2"], "id": [1, 2, 3]})
    assert fingerprint(rows, "qa") == fingerprint(rows.select([2, 0, 1]).remove_columns("id"), "qa")
    assert fingerprint(rows, "qa") != fingerprint(rows.select([0, 1]), "qa")
    moved = Dataset.from_dict({"question": ["a1", "b", "b"], "answer": ["", "2", "2"]})
    assert fingerprint(rows, "qa") != fingerprint(moved, "qa")
    assert fingerprint(Dataset.from_dict({"text": ["a", "b"]}), "text") != fingerprint(Dataset.from_dict({"text": ["ab"]}), "text")
    talk = [[{"role": "user", "content": "hi"}]]
    assert fingerprint(Dataset.from_dict({"messages": talk}), "chat") == fingerprint(Dataset.from_dict({"messages": talk}), "chat")


def test_a_fingerprint_of_pictures_and_features_goes_by_what_is_in_them() -> None:
    shades = [Picture.fromarray(np.full((2, 3, 3), shade, np.uint8)) for shade in (1, 2)]
    rows = Dataset.from_dict({"image": shades, "label": [0, 1]}).cast_column("image", Image())
    assert fingerprint(rows, "images") == fingerprint(rows.select([1, 0]), "images")
    assert fingerprint(rows, "images") != fingerprint(rows.select([1, 1]), "images")
    flat, square = ([0.0, 1.0, 2.0, 3.0], [[0.0, 1.0], [2.0, 3.0]])
    made = [fingerprint(Dataset.from_dict({"features": [value], "label": [1]}), "classes") for value in (flat, square)]
    assert made[0] != made[1]


def test_a_signed_receipt_is_checked_against_rows_model_ledger_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    code, public = call("receipt", "key", "--make", capsys=capsys, monkeypatch=monkeypatch)
    public = public.splitlines()[0]
    assert code == 0
    assert receipts.key_path().stat().st_mode & 0o777 == 0o600
    place, receipt, path = ran(tmp_path)
    assert receipt["signature"]["public_key"] == public
    told = ("--rows", THREES, "--model", str(place / "served" / "model"), "--ledger", str(place / "ledger.sqlite"))
    key = ("--key", public)
    code, said = call("receipt", "verify", str(path), *told, *key, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, said
    assert said.count("ok  ") == 4
    assert "FAILS" not in said

    for what, words in (
        ("rows", ("--rows", "{digits: {classes: [3]}, limit: 5}")),
        ("model", ("--model", str(place / "never-saw-it" / "model"))),
        ("signature", ("--key", "c29tZW9uZSBlbHNl")),
    ):
        code, said = call("receipt", "verify", str(path), *words, capsys=capsys, monkeypatch=monkeypatch)
        assert code == 1
        assert f"FAILS  {what}" in said


@pytest.mark.parametrize("change", [{"steps": 3}, {"request": "another"}, {"weights": {"before": "", "after": ""}}])
def test_a_changed_receipt_fails_its_signature(tmp_path: Path, change: dict[str, Any]) -> None:
    pytest.importorskip("cryptography")
    receipts.make_key()
    key = receipts.local_key()
    assert key is not None
    receipt = receipts.signed({"format": 1, "kind": "forgetting", "steps": 2, "request": "one", "weights": {}}, key)
    assert receipts.check_receipt(receipt)[0][1]
    found = receipts.check_receipt(receipt | change)[0]
    assert not found[1]
    assert "changed after it was signed" in found[2]


def test_an_unsigned_receipt_holds_only_where_no_key_is_asked_for() -> None:
    bare = {"format": 1, "kind": "forgetting"}
    assert receipts.check_receipt(bare) == [("signature", True, "the receipt is not signed")]
    assert not receipts.check_receipt(bare, trusted="abc")[0][1]


def test_a_ledger_that_says_otherwise_is_named_by_the_key_that_differs(tmp_path: Path) -> None:
    place, receipt, _ = ran(tmp_path)
    with Ledger(place / "ledger.sqlite", create=False) as ledger:
        assert receipts.check_receipt(receipt, ledger=ledger)[1] == ("ledger", True, "the ledger says the same")
        found = receipts.check_receipt(receipt | {"steps": 9}, ledger=ledger)[1]
        assert not found[1]
        assert "'steps'" in found[2]
        assert "no such request" in receipts.check_receipt(receipt | {"event": 9}, ledger=ledger)[1][2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "is no receipt"),
        ('{"kind": "forgetting"}', "is no receipt"),
        ('{"format": 1, "kind": "forgetting", "run": {}, "event": 1, "weights": {}}', "'run' is not what"),
        ('{"format": 1, "kind": "forgetting", "run": "a", "event": 1, "weights": {}, "asked": 3}', "'asked' is not what"),
        (
            '{"format": 1, "kind": "forgetting", "run": "a", "event": 1, "weights": {}, "asked": {"forget": []}}',
            "'asked.forget' is not what",
        ),
        ('{"format": 1, "kind": "forgetting", "run": "a", "event": 1, "weights": 5}', "'weights' is not what"),
    ],
)
def test_what_is_no_receipt_is_refused(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "receipt.json"
    if content is not None:
        path.write_text(content)
    code, said = call("receipt", "verify", str(path), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert words in said


def test_a_file_that_is_no_key_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    receipts.key_path().parent.mkdir()
    receipts.key_path().write_text("no key")
    with pytest.raises(Mistake, match="is no usable key"):
        ran(tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Mistake, match="is there already"):
        receipts.make_key()


def test_forget_leaves_a_receipt_beside_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "--request",
        THREES,
        "--kind",
        "classes",
        "--method",
        "gradient-ascent",
        "--set",
        "training.steps=1",
        "--out",
        "gone",
        "--quiet",
    )
    code, said = call("forget", "desk:mlp-digits", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, said
    code, said = call("receipt", "verify", "gone/receipt.json", "--model", "gone", "--rows", THREES, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, said
    code, said = call("receipt", "list", "gone/remanence/ledger.sqlite", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    assert "gradient-ascent" in said


class Spy:
    """An auditor that says what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str | None]] = []

    def check(self, model: nn.Module, request: Request, oracle: nn.Module | None, processor: Any) -> None:
        """Take everything."""

    def audit(self, model: nn.Module, request: Request, original: nn.Module, oracle: nn.Module | None, at: Moment) -> dict[str, Any]:
        self.seen.append((weights_hash(model), weights_hash(original), weights_hash(oracle) if oracle is not None else None))
        return {"verdict": "forgotten", "event": at.event}


def test_an_auditor_sees_the_model_before_and_after_and_its_words_are_in_the_receipt() -> None:
    from remanence.forget.gradient_ascent import GradientAscent

    event = Recipe.of(yaml.safe_load(RECIPE)).stream()[1]
    model, oracle, spy = load_model("desk:mlp-digits").model, load_model("desk:mlp-digits", seed=5).model, Spy()
    before = weights_hash(model)
    life = Life([Deed(event, GradientAscent(), Settings(steps=1))], model, auditor=spy, oracle_at=lambda number: oracle, progress=False)
    after = weights_hash(life.run())
    assert spy.seen == [(after, before, weights_hash(oracle))]
    assert life.ledger is not None
    assert receipts.receipts_of(life.ledger)[0]["audit"] == {"verdict": "forgotten", "event": 1}
