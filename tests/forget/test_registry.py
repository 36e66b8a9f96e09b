"""The list of all ways to forget: complete by the survey, in words that are explained, and true about what is built."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from remanence.catalogue import ENTRIES, build
from remanence.cli import app
from remanence.forgetters import COSTS, FAMILIES, GUARANTEES, INPUTS, KNOWN, TARGETS, Known, markdown, methods

FORGETTERS = {entry.name: entry for entry in ENTRIES if entry.verb == "forget"}
SURVEY = [
    "Retrain",
    "SISA",
    "Leave-one-out ensemble",
    "Gradient ascent",
    "SeUL",
    "Gradient difference",
    "Ascent with KL",
    "Yao",
    "Refusal tuning",
    "Random labels",
    "NPO",
    "DPO towards a refusal",
    "AltPO",
    "SimNPO",
    "WGA",
    "SatImp",
    "CE-U",
    "UNDIAL",
    "PDU",
    "KGA",
    "Who's Harry Potter",
    "Quark",
    "RMU",
    "Task vector",
    "F-Learning",
    "PCGU",
    "DEPN",
    "Selective pruning",
    "SSD",
    "OFMU",
    "FIT",
    "MELU",
    "SAE-guided",
    "EUL",
    "LEACE",
    "Orthogonal bias subspace",
    "ICUL",
    "Zero-shot self-debiasing",
    "SERAC",
    "MemPrompt",
]


def test_every_method_of_the_survey_is_listed_once() -> None:
    names = [known.name for known in KNOWN]
    assert len(set(names)) == len(names)
    assert set(SURVEY) <= set(names)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_every_row_uses_words_that_are_explained(known: Known) -> None:
    assert known.family in FAMILIES
    assert set(known.needs) <= set(INPUTS)
    assert known.guarantee in GUARANTEES
    assert known.targets
    assert set(known.targets) <= set(TARGETS)
    assert known.cost in COSTS
    assert known.what
    assert not known.arxiv or re.fullmatch(r"\d{4}\.\d{5}", known.arxiv)
    assert not known.how or known.entry


def test_must_have_baselines_are_known_and_those_of_this_file_are_built() -> None:
    rows = {row["name"]: row for row in methods()}
    for name in (
        "Retrain",
        "SISA",
        "Gradient ascent",
        "Gradient difference",
        "Ascent with KL",
        "NPO",
        "RMU",
        "Task vector",
        "ICUL",
        "Guardrail",
    ):
        assert rows[name]["status"] == "built", name
    assert {"SimNPO", "DPO towards a refusal", "Refusal tuning", "UNDIAL", "WGA"} <= rows.keys()


def test_status_says_what_the_catalogue_has() -> None:
    for row in methods():
        assert (row["status"] == "built") == (row["method"] in FORGETTERS)
        if row["method"] and row["how"]:
            key, _, value = row["how"].partition(": ")
            build({"method": row["method"], key: value}, "forget", "registry")


def test_every_forgetter_of_the_catalogue_is_in_the_list() -> None:
    assert {row["method"] for row in methods() if row["method"]} == set(FORGETTERS)
    one = methods([])
    assert [row["method"] for row in one] == list(FORGETTERS)


def test_guarantees_are_exact_only_where_training_is_done_again_and_none_where_weights_stay() -> None:
    rows = {row["name"]: row for row in methods()}
    assert {name for name, row in rows.items() if row["guarantee"] == "exact"} == {"Retrain", "SISA", "SISA-FC, SISA-A"}
    assert all(row["guarantee"] == "none" for row in rows.values() if row["family"] == "input and output")


def test_papers_are_those_of_the_catalogue() -> None:
    for known in KNOWN:
        if known.entry in FORGETTERS and not known.how and known.arxiv and FORGETTERS[known.entry].arxiv:
            assert FORGETTERS[known.entry].arxiv == known.arxiv, known.name


def test_the_command_line_shows_the_list() -> None:
    shown = CliRunner().invoke(app, ["systems", "--forgetters", "--json"])
    assert json.loads(shown.stdout) == methods()
    table = CliRunner().invoke(app, ["systems", "--forgetters"], env={"COLUMNS": "200"})
    assert "Who's Harry Potter" in table.stdout
    assert "task-vector" in table.stdout


def test_the_page_has_every_method_and_every_word() -> None:
    page = markdown()
    assert all(f"[{known.name}]" in page or f"| {known.name} |" in page for known in KNOWN)
    assert all(word in page for word in (*GUARANTEES, *INPUTS, *TARGETS))
    for line in page.splitlines():  # no bar inside a cell
        if line.startswith("| ") and "https" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 8
    assert "`task-vector` with `then: new`" in page
