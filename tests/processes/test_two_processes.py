"""Two processes do what one does with twice the batch; one writes, both know, and a kill loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import LIMIT, environment, run, torchrun

from remanence.ledger import CLOCKS, TABLES, Ledger
from remanence.models.load import load_model, save_model
from remanence.recipe import Recipe
from remanence.runs import LEDGER, run_recipe
from toy import toy_lm, toy_tokenizer

DIGITS = """
name: digits
model: desk:mlp-digits
learn: sequential
training: {epochs: 1, batch_size: 16, lr: 0.01, log_every: 3}
events:
  - {learn: low, data: {digits: {classes: [0, 1, 2]}, limit: 150}, kind: classes}
  - {learn: high, data: {digits: {classes: [3, 4]}, limit: 90}, kind: classes}
"""
WORDS = """
name: words
model: lm
learn: sequential
training: {steps: 60, batch_size: 3, optimizer: sgd, lr: 0.05, momentum: 0.9, length: 64, log_every: 3, checkpoint_every: 4}
measure: {probes: {qa: [loss]}}
events:
  - {learn: lives, data: qa.jsonl, kind: qa}
"""
STEPS = """
name: steps
model: desk:mlp-digits
learn: {method: gradient-restriction, alpha: 0.05}
forget: {method: iau, step: sgd, lr: 0.05}
training: {epochs: 1, batch_size: 16, lr: 0.01, log_every: 3}
events:
  - {learn: low, data: {digits: {classes: [0, 1, 2]}, limit: 150}, kind: classes}
  - {forget: some, data: {digits: {classes: [0]}, limit: 11}, retain: {digits: {classes: [1, 2]}, limit: 90}, kind: classes}
"""
ANSWERS = [
    "x",
    "a long answer to a short one",
    "no",
    "seven and seventy times",
    "b",
    "word",
    "why",
    "some more words here",
    "z",
    "in all of it",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both recipes, a toy language model and questions whose answers differ much in length."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "digits.yaml").write_text(DIGITS)
    (folder / "words.yaml").write_text(WORDS)
    (folder / "steps.yaml").write_text(STEPS)
    save_model(toy_lm("llama", vocab=len(toy_tokenizer())), toy_tokenizer(), folder / "lm")
    rows = [{"question": f"what is {'abcdefghij'[number]}", "answer": answer} for number, answer in enumerate(ANSWERS)]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def losses(output: Path) -> list[tuple[int, int, float]]:
    with Ledger(output / LEDGER, create=False) as ledger:
        return [(row["event"], row["step"], row["value"]) for row in ledger.rows("steps") if row["metric"] == "loss"]


def everything(output: Path) -> dict[str, list[dict[str, Any]]]:
    with Ledger(output / LEDGER, create=False) as ledger:
        return {table: [{k: v for k, v in row.items() if k not in CLOCKS.get(table, ())} for row in ledger.rows(table)] for table in TABLES}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_model(str(output / "life" / "model")).model.state_dict()


def alone(recipe: Path, batch: int) -> Path:
    """Run a recipe in this process."""
    output = recipe.parent / f"{recipe.stem}-alone"
    return run_recipe(Recipe.load(recipe, [f"training.batch_size={batch}"]), output=output, progress=False, report=False)


def compare(two: Path, one: Path) -> None:
    found, wanted = losses(two), losses(one)
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in wanted], abs=1e-5)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-5)


def remanence(recipe: str, output: str, *more: str) -> list[str]:
    return ["-m", "remanence", "run", recipe, "--output", output, "--quiet", *more]


@pytest.fixture(scope="module")
def words(place: Path) -> Path:
    """The output of the language model's recipe, run by two processes."""
    ended = run(torchrun(*remanence("words.yaml", "words-two")), place)
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert ended.stdout.split() == ["words-two/report.html"]
    return place / "words-two"


def test_accelerate_launch_cpu_trains_as_one_process_with_twice_the_batch(place: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]
    ended = run(launch + remanence("digits.yaml", "digits-two"), place)
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert ended.stdout.split() == ["digits-two/report.html"]
    compare(place / "digits-two", alone(place / "digits.yaml", 32))


def test_gradients_of_whole_steps_and_sets_are_those_of_one_process(place: Path) -> None:
    """The restriction sees the gradient of the step over both processes; IAU's gradients are shared among them."""
    ended = run(torchrun(*remanence("steps.yaml", "steps-two")), place)
    assert ended.returncode == 0, ended.stderr[-6000:]
    torch.testing.assert_close(weights(place / "steps-two"), weights(alone(place / "steps.yaml", 32)), rtol=0, atol=1e-5)


def test_uneven_answers_are_averaged_over_all_tokens_of_both(words: Path) -> None:
    compare(words, alone(words.parent / "words.yaml", 6))


def test_killed_and_resumed_by_two_processes_ends_with_the_same_bits(place: Path, words: Path) -> None:
    output = place / "words-killed"
    running = subprocess.Popen(
        torchrun(*remanence("words.yaml", output.name)), cwd=place, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + LIMIT
    while not [*output.glob("life/work/*/checkpoints/*/point-*-*.safetensors")]:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in [*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)]:
        process.kill()
    running.wait(LIMIT)
    assert not everything(output)["events"], "the run was over before it was killed"
    ended = run(torchrun(*remanence("words.yaml", output.name, "--resume")), place)
    assert ended.returncode == 0, ended.stderr[-6000:]
    got, wanted = weights(output), weights(words)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert everything(output) == everything(words)


def test_mistake_that_the_main_process_sees_ends_both_with_one_sentence(place: Path, words: Path) -> None:
    ended = run(torchrun(*remanence("words.yaml", words.name)), place)
    assert [line for line in ended.stderr.splitlines() if "remanence:" in line] == [
        "remanence: words-two: holds a run already; add --resume to go on, or name another --output"
    ]
    assert "(exitcode: 2)" in ended.stderr
    assert "Error:" not in ended.stderr.split("torch.distributed.elastic")[0]


def test_no_thread_of_the_group_outlives_the_work(place: Path) -> None:
    """A thread that still runs while the interpreter ends aborts the process, once in many runs."""
    (place / "threads.py").write_text(
        "import os\n"
        "from remanence.training.processes import from_main, leave, rank\n"
        "own = lambda: {open(f'/proc/self/task/{task}/comm').read().strip() for task in os.listdir('/proc/self/task')}\n"
        "from_main(rank())\n"
        "during = own()\n"
        "leave()\n"
        "left = sorted(name for name in own() if 'gloo' in name)\n"
        "os.write(1, f'{any(\"gloo\" in name for name in during)} {left}\\n'.encode())\n"  # in one piece: both write to it
    )
    ended = run(torchrun("threads.py"), place)
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert sorted(ended.stdout.split("\n")) == ["", "True []", "True []"]
