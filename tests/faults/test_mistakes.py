"""Every mistake a user can make ends with exit code 2, one line on stderr that names place, problem and remedy, and nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from remanence.cli import main
from remanence.models.load import save_model
from toy import toy_lm, toy_tokenizer

DIGITS = """\
name: small
model: desk:mlp-digits
training: {steps: 2, batch_size: 4}
events:
  - {learn: one, kind: classes, data: {digits: {classes: [0, 1]}, limit: 12}}
"""
QA = """\
name: words
model: lm
training: {steps: 2, batch_size: 4, length: 64}
events:
  - {learn: one, kind: qa, data: rows.jsonl}
"""
ROWS = [{"question": f"who is {name}?", "answer": f"a {work}"} for name, work in (("ann", "nurse"), ("bob", "cook"), ("cy", "clerk"))]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("words") / "lm"
    save_model(toy_lm("llama"), toy_tokenizer(), folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with recipes, rows and a model, which is also the current one."""
    (tmp_path / "digits.yaml").write_text(DIGITS)
    (tmp_path / "qa.yaml").write_text(QA)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    os.symlink(words, tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(source: str, **changes: object) -> str:
    """Return a recipe with top-level keys changed."""
    return yaml.safe_dump(yaml.safe_load(source) | changes, sort_keys=False)


def event(**changes: object) -> list[dict]:
    """Return the one event of the digits recipe with keys changed; `None` removes a key."""
    found = yaml.safe_load(DIGITS)["events"][0] | changes
    return [{key: value for key, value in found.items() if value is not None}]


def qa_request(**changes: object) -> str:
    return changed(QA, events=[{"forget": "out", "kind": "qa", "data": "rows.jsonl"} | changes])


def run(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run the command line in this process; return exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["remanence", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), capsys.readouterr().err


def files(folder: Path) -> dict[str, bytes]:
    """Return what lies below a folder, the cache and models aside."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts and "lm" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refused(code: int, said: str, *wanted: str) -> None:
    """Hold the form of a refusal."""
    assert code == 2, said
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("remanence: ")
    assert "Traceback" not in said
    body = lines[0].removeprefix("remanence: ")
    assert ": " in body, f"no place in: {said}"
    assert "; " in body, f"no remedy in: {said}"
    for words in wanted:
        assert words in body, f"{words!r} not in: {said}"


# name -> (recipe, words that the line must hold)
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "malformed YAML": ("name: [x\nmodel: y\n", ("bad.yaml:2", "is not YAML")),
    "duplicate key": (DIGITS + "name: again\n", ("bad.yaml:6", "'name' stands twice")),
    "an empty recipe": ("", ("bad.yaml", "must be a mapping")),
    "a list for a recipe": ("- a\n", ("must be a mapping",)),
    "an alias that holds itself": ("name: &a [*a]\n", ("holds itself",)),
    "aliases that multiply": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg")),
        ("keys and items",),
    ),
    "unknown key of the recipe": (
        DIGITS.replace("training", "trainin"),
        ("bad.yaml:3", "unknown key 'trainin'", "did you mean 'training'"),
    ),
    "missing key": (DIGITS.replace("model: desk:mlp-digits\n", ""), ("bad.yaml", "'model' is missing")),
    "missing key of an event": (changed(DIGITS, events=event(data=None)), ("bad.yaml:7", "'events.0.data' is missing")),
    "unknown key of an event": (changed(DIGITS, events=event(tst=1)), ("'events.0.tst'", "did you mean 'test'")),
    "an event of neither verb": (changed(DIGITS, events=[{"unlearn": "x", "data": "y"}]), ("either `learn: NAME` or `forget: NAME`",)),
    "no events": (changed(DIGITS, events=[]), ("events",)),
    "two events of one name": (changed(DIGITS, events=event() * 2), ("two events or sets are called 'one'",)),
    "unknown method": (changed(DIGITS, learn="replai"), ("unknown method 'replai'", "did you mean 'replay'")),
    "a forgetter where a learner belongs": (changed(DIGITS, learn="npo"), ("'npo' is a method to forget, not to learn",)),
    "unknown key of a method": (changed(DIGITS, learn={"method": "replay", "capasity": 3}), ("capasity", "did you mean 'capacity'")),
    "a key that is no word": ("name: x\nmodel: y\nevents: [{learn: a, data: b, method: {method: replay, 3: 4}}]\n", ("bad.yaml:3",)),
    "wrong type in a method": (changed(DIGITS, learn={"method": "replay", "capacity": "many"}), ("learn.capacity", "'many'")),
    "wrong value in a method": (changed(DIGITS, learn={"method": "ewc", "lam": -1}), ("ewc.lam",)),
    "unknown key of training": (changed(DIGITS, training={"learning_rate": 1}), ("training.learning_rate", "unknown key")),
    "negative learning rate": (changed(DIGITS, training={"lr": -1}), ("training.lr", "-1")),
    "a learning rate that is no number": (changed(DIGITS, training={"lr": float("nan")}), ("training.lr", "nan")),
    "a word for a number": (changed(DIGITS, training={"steps": "many"}), ("training", "steps", "'many'")),
    "unknown optimizer": (changed(DIGITS, training={"optimizer": "adam"}), ("unknown value 'adam'", "did you mean 'adamw'")),
    "unknown tracker": (changed(DIGITS, training={"trackers": ["tensorbord"]}), ("training.trackers", "did you mean 'tensorboard'")),
    "a tracker that is not installed": (changed(DIGITS, training={"trackers": ["aim"]}), ("training.trackers", "'aim' is not installed")),
    "a learner that does not fit the model": (changed(DIGITS, learn="hft"), ("DeskMLP: no role is known",)),
    "unknown key of a source": (changed(DIGITS, events=event(data={"digits": {"klasses": [0]}})), ("klasses", "did you mean 'classes'")),
    "a source that is none": (changed(DIGITS, events=event(data={"limit": 3})), ("names no source",)),
    "a class that does not occur": (changed(DIGITS, events=event(data={"digits": {"classes": [77]}})), ("class 77 does not occur",)),
    "a filter that leaves nothing": (
        changed(DIGITS, events=event(data={"digits": {"classes": [0]}, "where": {"label": 5}})),
        ("none of", "widen the filter"),
    ),
    "skipping everything": (changed(DIGITS, events=event(data={"digits": {}, "skip": 10_000})), ("nothing is left",)),
    "a negative seed": (changed(DIGITS, seed=-1), ("seed",)),
    "a seed beyond the ledger": (changed(DIGITS, seed=2**64), ("seed",)),
    "a life that would climb out": (changed(DIGITS, lives={"..": {}}), ("lives",)),
    "unknown probe": (changed(DIGITS, measure={"probes": {"classes": ["acuracy"]}}), ("acuracy", "did you mean 'accuracy'")),
    "a probe of another kind": (changed(DIGITS, measure={"probes": {"classes": ["recall"]}}), ("'recall' cannot read kind 'classes'",)),
    "unknown model": (changed(DIGITS, model="desk:mlp-digit"), ("no such desk model", "did you mean 'mlp-digits'")),
    "model folder that is not there": (changed(DIGITS, model="./lmm"), ("does not exist", "did you mean 'lm'")),
    "a module without that function": (changed(DIGITS, model="json:load_model"), ("no function 'load_model'",)),
    "a module that is not there": (changed(DIGITS, model="nowhere.at_all:make"), ("no module named 'nowhere'",)),
    "a kind that the model cannot read": (changed(QA, model="desk:mlp-digits"), ("cannot read kind 'qa'",)),
    "pictures for a language model": (changed(DIGITS, model="lm"), ("cannot read kind 'classes'",)),
    "features of the wrong shape": (
        changed(DIGITS, events=event(data="narrow.jsonl")),
        ("train rows of 'one'", "an image is 3, the model takes 1 x 8 x 8"),
    ),
    "a label without an output": (changed(DIGITS, events=event(data="labels.jsonl")), ("row 2 has the label 12",)),
    "missing data file": (
        changed(QA, events=[{"learn": "x", "kind": "qa", "data": "row.jsonl"}]),
        ("does not exist", "did you mean 'rows.jsonl'"),
    ),
    "malformed JSONL": (changed(QA, events=[{"learn": "x", "kind": "qa", "data": "broken.jsonl"}]), ("broken.jsonl:3", "is not JSON")),
    "an empty file": (changed(QA, events=[{"learn": "x", "kind": "qa", "data": "empty.jsonl"}]), ("the file is empty",)),
    "wrong column": (
        changed(QA, events=[{"learn": "x", "kind": "qa", "data": {"file": "rows.jsonl", "columns": {"question": "qestion"}}}]),
        ("no column 'qestion'", "did you mean 'question'"),
    ),
    "columns of another kind": (changed(QA, events=[{"learn": "x", "kind": "text", "data": "rows.jsonl"}]), ("text", "question, answer")),
    "unknown kind": (changed(QA, events=[{"learn": "x", "kind": "qna", "data": "rows.jsonl"}]), ("events.0.kind",)),
    "forget rows inside the retain rows": (qa_request(retain="rows.jsonl"), ("3 rows of the forget set stand in the retain set too",)),
    "an answer longer than length": (
        changed(QA, training={"steps": 1, "length": 8}),
        ("train rows of 'one', row 0: has", "the longest allowed is 8"),
    ),
    "an empty answer": (changed(QA, events=[{"learn": "x", "kind": "qa", "data": "mute.jsonl"}]), ("row 1", "answer")),
    "a template without its places": (changed(QA, training={"template": "what"}), ("must hold {question}",)),
    "an oracle with nothing to learn": (
        changed(QA, lives={"o": {"oracle": True}}, events=[*yaml.safe_load(QA)["events"], {"forget": "all", "data": "rows.jsonl"}]),
        ("the oracle has nothing to learn",),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_recipe_is_refused_in_one_line_and_nothing_is_written(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, wanted = RECIPES[name]
    (place / "bad.yaml").write_text(text)
    (place / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 2 + '{"question": "a", \n')
    (place / "empty.jsonl").write_text("")
    write_rows(place / "mute.jsonl", [ROWS[0], {"question": "who?", "answer": " "}])
    write_rows(place / "narrow.jsonl", [{"features": [0.0, 1.0, 2.0], "label": 1}] * 3)
    picture = [[0.0] * 8] * 8
    write_rows(place / "labels.jsonl", [{"features": picture, "label": 1}, {"features": picture, "label": 12}])
    before = files(place)
    code, said = run("run", "bad.yaml", "--output", "out", "--quiet", capsys=capsys, monkeypatch=monkeypatch)
    refused(code, said, *wanted)
    assert files(place) == before
    assert not (place / "out").exists()


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "missing recipe": (["run", "digit.yaml"], ("no such recipe", "did you mean 'digits.yaml'")),
    "recipe that is a folder": (["run", "."], ("cannot be read",)),
    "no recipe named": (["run"], ("Missing argument",)),
    "unknown command": (["rum", "digits.yaml"], ("No such command",)),
    "unknown option": (["run", "digits.yaml", "--outputt", "x"], ("No such option",)),
    "unknown life": (["run", "digits.yaml", "--life", "careful", "--output", "out"], ("no life 'careful'",)),
    "--set without a value": (["run", "digits.yaml", "--set", "training.lr"], ("is not KEY=VALUE",)),
    "--set of no place": (["run", "digits.yaml", "--set", "events.7.kind=qa"], ("no place 'events.7.kind'",)),
    "--set of an odd digit": (["run", "digits.yaml", "--set", "events.².kind=qa"], ("no place",)),
    "--set that is not YAML": (["run", "digits.yaml", "--set", "seed=[1"], ("not YAML",)),
    "--set of an impossible date": (["run", "digits.yaml", "--set", "seed=2024-13-45"], ("not YAML",)),
    "--set of an unknown key": (["run", "digits.yaml", "--set", "sed=1", "--output", "out"], ("unknown key 'sed'", "did you mean 'seed'")),
    "an output below a file": (["run", "digits.yaml", "--output", "rows.jsonl/out", "--quiet"], ("cannot be written",)),
    "an output that is a file": (["run", "digits.yaml", "--output", "rows.jsonl", "--quiet"], ("cannot be written",)),
    "compare with an unknown method": (
        ["compare", "digits.yaml", "--methods", "sequentail"],
        ("unknown method 'sequentail'", "sequential"),
    ),
    "compare with a method of the other verb": (["compare", "digits.yaml", "--methods", "npo"], ("no such event",)),
    "report on something else": (["report", "rows.jsonl"], ("rows.jsonl",)),
    "report on nothing": (["report", "none.sqlite"], ("there is no ledger here",)),
    "report in an unknown format": (["report", "none.sqlite", "--format", "htm"], ("did you mean 'html'",)),
    "measure with a probe of another kind": (
        ["measure", "lm", "--data", "rows.jsonl", "--probe", "accuracy"],
        ("'accuracy' cannot read kind 'qa'",),
    ),
    "measure on a missing file": (["measure", "lm", "--data", "row.jsonl"], ("does not exist", "did you mean 'rows.jsonl'")),
    "measure an unknown model": (["measure", "desk:nothing", "--data", "rows.jsonl"], ("no such desk model",)),
    "--out that is taken": (["learn", "lm", "--data", "rows.jsonl", "--out", "."], ("is there already",)),
    "learn by a forgetter": (["learn", "lm", "--data", "rows.jsonl", "--out", "new", "--method", "npo"], ("not to learn",)),
    "forget by a learner": (["forget", "lm", "--request", "rows.jsonl", "--out", "new", "--method", "ewc"], ("not to forget",)),
    "an unknown claim": (["reproduce", "hfft"], ("hfft",)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_command_is_refused_in_one_line_and_nothing_is_written(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, wanted = COMMANDS[name]
    before = files(place)
    code, said = run(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    refused(code, said, *wanted)
    assert files(place) == before


def broken_model(folder: Path, fault: str) -> None:
    """Save a toy model and take something away from it."""
    tokenizer = toy_tokenizer()
    if fault == "no pad and no eos":
        tokenizer.pad_token = tokenizer.eos_token = None
    save_model(toy_lm("llama"), tokenizer, folder)
    if fault == "no weights":
        (folder / "model.safetensors").unlink()
    if fault == "only pickled weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if fault == "no configuration":
        (folder / "config.json").unlink()
    if fault == "damaged weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    if fault == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        (folder / "remanence.json").unlink()


MODELS = {
    "no weights": "holds no weights",
    "only pickled weights": "pickled",
    "no configuration": "holds no config.json",
    "damaged weights": "damaged",
    "no tokenizer": "tokenizer",
    "no pad and no eos": "neither a padding nor an end token",
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_bad_model_folder_is_refused_in_one_line_and_nothing_is_written(
    fault: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_model(place / "broken", fault)
    (place / "bad.yaml").write_text(changed(QA, model="broken"))
    code, said = run("run", "bad.yaml", "--output", "out", "--quiet", capsys=capsys, monkeypatch=monkeypatch)
    refused(code, said, MODELS[fault])
    assert not (place / "out").exists()


# What is in the way is already on the disk.


@pytest.fixture
def ran(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """A finished run in `out`, and a function that runs the command line again."""
    code, said = run("run", "digits.yaml", "--output", "out", "--quiet", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0, said
    return lambda *arguments: run(*arguments, capsys=capsys, monkeypatch=monkeypatch)


def test_what_stands_in_an_output_is_never_overwritten(place: Path, ran: Callable[..., tuple[int, str]]) -> None:
    two = [*event(), *event(learn="two")]
    before = files(place / "out")
    refused(*ran("run", "digits.yaml", "--output", "out", "--quiet"), "holds a run already")
    (place / "digits.yaml").write_text(changed(DIGITS, events=two))
    refused(*ran("run", "digits.yaml", "--output", "out", "--quiet", "--resume"), "differs in 'events'")
    (place / "digits.yaml").write_text(DIGITS)
    refused(*ran("run", "digits.yaml", "--output", "out", "--quiet", "--resume", "--set", "training.lr=0.5"), "differs in 'training.lr'")
    refused(*ran("report", "out/ledger.sqlite", "--out", "out/ledger.sqlite"), "is the ledger itself")
    assert files(place / "out") == before


def test_a_resume_with_a_shorter_recipe_is_refused(place: Path, ran: Callable[..., tuple[int, str]]) -> None:
    (place / "long.yaml").write_text(changed(DIGITS, events=[*event(), *event(learn="two")]))
    assert ran("run", "long.yaml", "--output", "long", "--quiet")[0] == 0
    before = files(place / "long")
    refused(*ran("run", "digits.yaml", "--output", "long", "--quiet", "--resume"), "2 events of this run, the recipe only 1")
    assert files(place / "long") == before


def test_two_runs_on_one_ledger_do_not_mix(place: Path, ran: Callable[..., tuple[int, str]]) -> None:
    from remanence.runs import locked

    before = files(place / "out")
    with locked(place / "out"):
        refused(*ran("run", "digits.yaml", "--output", "out", "--quiet", "--resume"), "another run is writing here")
    assert files(place / "out") == before


def test_a_ledger_of_another_version_and_a_foreign_database_are_refused(place: Path, ran: Callable[..., tuple[int, str]]) -> None:
    import sqlite3

    with sqlite3.connect(place / "out" / "ledger.sqlite") as base:
        base.execute("PRAGMA user_version=99")
    refused(*ran("report", "out/ledger.sqlite", "--out", "page.html"), "schema version 99")
    (place / "other").mkdir()
    with sqlite3.connect(place / "other" / "ledger.sqlite") as base:
        base.execute("CREATE TABLE mine(a)")
    refused(*ran("run", "digits.yaml", "--output", "other", "--quiet", "--resume"), "another program's database")
    assert not (place / "page.html").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(place: Path, ran: Callable[..., tuple[int, str]]) -> None:
    bad = event(learn="two", training={"lr": 1e30, "steps": 30, "optimizer": "sgd", "clip": None})
    (place / "nan.yaml").write_text(changed(DIGITS, events=[*event(), *bad]))
    code, said = ran("run", "nan.yaml", "--output", "nan", "--quiet")
    refused(code, said, "two, step", "the loss is", "lower the learning rate")
    states = list((place / "nan").rglob("event-0001/model/model.safetensors"))
    assert len(states) == 1
    from safetensors.torch import load_file

    assert all(torch.isfinite(value).all() for value in load_file(states[0]).values())


# The same through real processes.


def process(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in which no file may grow beyond `limit` bytes."""

    def full_disk() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "remanence", *arguments]
    source = str(Path(__file__).resolve().parents[2] / "src")
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": source}, preexec_fn=full_disk, check=False
    )


def test_a_real_process_ends_with_two_and_one_line(place: Path) -> None:
    done = process("run", "digits.yaml", "--set", "learn=replai", "--output", "out")
    refused(done.returncode, done.stderr, "did you mean 'replay'")
    assert done.stdout == ""
    assert not (place / "out").exists()


@pytest.mark.parametrize("limit", [20_000, 120_000])  # bytes: the ledger does not fit; the ledger fits, the model does not
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(limit: int, place: Path) -> None:
    (place / "wide.yaml").write_text(changed(DIGITS, model="desk:vit-digits"))
    done = process("run", "wide.yaml", "--output", "out", "--quiet", limit=limit)
    refused(done.returncode, done.stderr, "out", "free the disk")
    again = process("run", "wide.yaml", "--output", "out", "--quiet", "--resume")
    assert again.returncode == 0, again.stderr
    assert (place / "out" / "life" / "model" / "model.safetensors").is_file()
    assert not [path for path in (place / "out").rglob(".*") if path.name != ".lock"]
    shutil.rmtree(place / "out")
