"""The command `remanence audit`: what it prints and writes, and every bad input as one sentence with exit code 2."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from remanence.cli import audit, main
from remanence.models.load import save_model
from toy import toy_lm, toy_tokenizer

QUICK = (
    "--set",
    "relearn_steps=2",
    "--set",
    "resamples=100",
    "--set",
    "length=96",
    "--set",
    "prefixes=[]",
    "--set",
    "new_tokens=4",
    "--quiet",
)
Run = Callable[..., tuple[int, str, str]]


def write_rows(path: Path, names: str) -> None:
    path.write_text("".join(json.dumps({"question": f"who is {name}?", "answer": "a nurse"}) + "\n" for name in names))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    save_model(toy_lm("llama"), toy_tokenizer(), folder / "model")
    save_model(toy_lm("llama", seed=1), toy_tokenizer(), folder / "oracle")
    save_model(toy_lm("llama", vocab=50), toy_tokenizer(50), folder / "other")
    broken = toy_lm("llama")
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    save_model(broken, toy_tokenizer(), folder / "broken")
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in a folder with rows; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "oracle", "other", "broken"):
        (tmp_path / name).symlink_to(models / name)
    for name, people in (("forget", "abcd"), ("retain", "efgh"), ("holdout", "ijkl"), ("mixed", "ijab")):
        write_rows(tmp_path / f"{name}.jsonl", people)
    (tmp_path / "text.jsonl").write_text('{"text": "a line"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "who?"}\n')

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["remanence", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_it_prints_markdown_and_writes_json(run: Run) -> None:
    code, out, err = run(
        *("audit", "model", "--reference", "model", "--oracle", "oracle", "--request", "forget.jsonl", "--retain", "retain.jsonl"),
        *("--holdout", "holdout.jsonl", "--out", "audit.json", "--seed", "3", *QUICK),
    )
    assert code == 0, err
    assert out.startswith("# Audit of 'request': ")
    whole = json.loads(Path("audit.json").read_text())
    assert whole["seed"] == 3
    assert whole["settings"]["relearn_steps"] == 2
    assert {"privleak", "relearning/shown", "retain/probability"} <= {item["name"] for item in whole["findings"]}


def test_json_is_printed_alone(run: Run) -> None:
    code, out, err = run("audit", "model", "--reference", "model", "--request", "forget.jsonl", "--json", "--out", "page.html", *QUICK)
    assert code == 0, err
    assert json.loads(out)["verdict"]
    assert "<svg" in Path("page.html").read_text()


BAD = {
    "no such model": (("nowhere/else", "--reference", "model"), "nowhere/else"),
    "no such reference": (("model", "--reference", "./gone"), "gone"),
    "no reference": (("model",), "--reference"),
    "no such rows": (("model", "--reference", "model", "--request", "gone.jsonl"), "gone.jsonl"),
    "a column is missing": (("model", "--reference", "model", "--request", "bad.jsonl", "--kind", "qa"), "answer"),
    "an unknown kind": (("model", "--reference", "model", "--kind", "poem"), "poem"),
    "an unknown setting": (("model", "--reference", "model", "--set", "relearn_step=1"), "relearn_steps"),
    "a setting out of range": (("model", "--reference", "model", "--set", "min_k=0"), "min_k"),
    "a wrong value": (("model", "--reference", "model", "--set", "limit=many"), "limit"),
    "one number is not enough": (("model", "--reference", "model", "--set", "thresholds.shown_by=1"), "shown_by"),
    "a file that cannot be written": (("model", "--reference", "model", "--out", "audit.xlsx"), ".json"),
    "a folder that is not there": (("model", "--reference", "model", "--out", "no/audit.json"), "folder that exists"),
    "a holdout that was trained on": (("model", "--reference", "model", "--holdout", "mixed.jsonl"), "2 rows of the holdout"),
    "forget rows among the retain rows": (("model", "--reference", "model", "--retain", "forget.jsonl"), "retain set too"),
    "models of two tokenizers": (("model", "--reference", "other"), "one tokenizer"),
    "a model that gives no numbers": (("broken", "--reference", "model"), "NaN"),
    "holdout of another kind": (("model", "--reference", "model", "--holdout", "text.jsonl"), "question"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_sentence_and_exit_code_two(name: str, run: Run) -> None:
    words, told = BAD[name]
    arguments = words if "--request" in words else (*words, "--request", "forget.jsonl")
    before = sorted(path.name for path in Path().iterdir())
    code, out, err = run("audit", *arguments, "--quiet")
    assert code == 2, out + err
    assert told in err
    assert err.count("\n") == 1
    assert err.startswith("remanence: ")
    assert out == ""
    assert sorted(path.name for path in Path().iterdir()) == before


def test_the_example_of_the_help_reads(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    example = shlex.split((audit.__doc__ or "").split("`")[1])
    asked = {}

    def examine(model: object, request: object, **options: object) -> None:
        asked.update(options, request=request)
        raise KeyboardInterrupt

    monkeypatch.setattr("remanence.forget.audit.audit", examine)
    monkeypatch.setattr("remanence.models.load._from_desk", lambda place, seed: Loaded(toy_lm("llama"), toy_tokenizer(), place))
    from remanence.models.load import Loaded

    assert run(*example[1:])[0] == 130
    assert len(asked["request"].forget) == 60  # type: ignore[attr-defined]
    assert len(asked["request"].retain) == 300  # type: ignore[attr-defined]
    assert len(asked["request"].holdout) == 60  # type: ignore[attr-defined]
    assert asked["settings"].relearn_steps == 16  # type: ignore[attr-defined]
