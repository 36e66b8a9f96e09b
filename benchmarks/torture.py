"""Kill a run at random instants, resume it, and compare weights and ledger with those of a run that was left alone.

    python -m benchmarks.torture                 # 100 random instants
    python -m benchmarks.torture --writes 1      # before every single change of the disk (1: each, 5: every fifth), one run per point
    python -m benchmarks.torture --spawn         # a new interpreter per run, so that imports and the reading of data are hit as well

A victim is a forked copy of this process (imports done, one thread), which runs the recipe and is killed with SIGKILL; one resume in two is killed once more.
A run survives if `--resume` ends with the same bytes in every model file, the same rows in every table of the ledger (clocks aside), and no file that the
undisturbed run does not have. The recipe holds replay, EWC, half fine-tuning, a request, probes inside events, checkpoints every other step.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """
name: torture
model: benchmarks.torture:tiny_llama
learn: {method: replay, capacity: 20}
forget: {method: npo}
training: {steps: 5, batch_size: 4, lr: 0.003, length: 160, checkpoint_every: 2, log_every: 3}
measure: {every: 3, limit: 4, probes: {qa: [{probe: recall, paraphrased: false}]}}
events:
  - {learn: one, kind: qa, data: {biographies: {people: 4, attributes: 3}}}
  - {learn: two, kind: qa, data: {biographies: {people: 4, first: 4, attributes: 3}}, method: {method: ewc, rows: 4, lam: 10}}
  - {learn: three, kind: qa, data: {biographies: {people: 4, first: 8, attributes: 3}}, method: {method: hft}}
  - forget: some
    kind: qa
    data: {biographies: {people: 4, attributes: 3}, limit: 3}
    retain: {biographies: {people: 4, attributes: 3}, skip: 3}
  - {learn: four, kind: qa, data: {biographies: {people: 4, first: 12, attributes: 3}}}
"""


def tiny_llama(seed: int = 0) -> tuple[Any, Any]:
    """Return a real Llama of one layer and a tokenizer of single characters."""
    import string

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = ["<pad>", "<eos>", "<unk>", *string.printable]
    plain = Tokenizer(models.WordLevel({token: number for number, token in enumerate(known)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(known), pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=256, **shape)
    return LlamaForCausalLM(config), tokenizer


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR


def run_here(recipe: Path, output: Path, resume: bool) -> None:
    """Run the recipe in this process, quietly."""
    from remanence.recipe import Recipe
    from remanence.runs import run_recipe

    run_recipe(
        Recipe.load(recipe), output=output, resume=resume, progress=False, report=False
    )  # pages are made whole from the ledger alone


def forked(work: Callable[[], None], patience: float | None = None) -> bool:
    """Do the work in a forked copy of this process; after `patience` seconds kill it. Return whether it ended by itself.

    Raises:
        RuntimeError: it failed; its traceback was printed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = None if patience is None else time.monotonic() + patience
    while True:
        done, status = os.waitpid(child, os.WNOHANG if end is not None else 0)
        if done:
            break
        if end is not None and time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.001)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"the run failed with exit code {os.waitstatus_to_exitcode(status)}")
    return True


def spawned(recipe: Path, output: Path, resume: bool, patience: float | None = None) -> bool:
    """Do the same with a new interpreter and the command line."""
    command = [sys.executable, "-m", "remanence", "run", str(recipe), "--output", str(output), "--quiet", *(["--resume"] if resume else [])]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = child.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return False
    if child.returncode:
        raise RuntimeError(said.strip())
    return True


@contextlib.contextmanager
def disk_changes(below: Path, tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` before every change of the disk below a folder: files opened for writing, renamed or removed, folders, and SQLite's commits.

    For the rest of the process's life: an audit hook cannot be taken off, so it goes deaf behind the block.
    """
    listening, prefix, connect = True, str(below), sqlite3.connect

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not listening:
            return
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            path = arguments[0] if isinstance(arguments[0], str | bytes | os.PathLike) else ""
            name = os.fsdecode(path)
            if not name.startswith("/") or name.startswith(prefix):  # a relative name: the removal of a tree by folder handles
                tell()

    def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
        base = connect(*arguments, **options)
        base.set_trace_callback(lambda statement: tell() if statement.startswith(("COMMIT", "PRAGMA journal_mode")) else None)
        return base

    sys.addaudithook(hook)
    sqlite3.connect = connected  # type: ignore[assignment]
    try:
        yield
    finally:
        listening, sqlite3.connect = False, connect


def count_changes(recipe: Path, output: Path, pipe: Any) -> None:
    """Run undisturbed and send the number of changes of the disk."""
    count = 0

    def tell() -> None:
        nonlocal count
        count += 1

    with disk_changes(output, tell):
        run_here(recipe, output, False)
    pipe.send(count)


def die_before(recipe: Path, output: Path, number: int, resume: bool = False) -> None:
    """Run, and kill this process before the given change of the disk (from 0)."""
    left = number

    def tell() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    with disk_changes(output, tell):
        run_here(recipe, output, resume)


def differences(reference: Path, output: Path) -> list[str]:
    """Name what differs between two finished outputs: files, bytes of the models, rows of the ledgers."""
    from remanence.ledger import TABLES, Ledger

    def names(place: Path) -> set[str]:
        return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm"))}

    found = [f"only in one: {name}" for name in sorted(names(reference) ^ names(output))]
    found += [
        f"bytes of {path.relative_to(reference)}"
        for path in sorted(reference.rglob("*.safetensors"))
        if (other := output / path.relative_to(reference)).is_file() and path.read_bytes() != other.read_bytes()
    ]
    with Ledger(reference / "ledger.sqlite", create=False) as one, Ledger(output / "ledger.sqlite", create=False) as other:
        for table in TABLES:
            rows, others = one.rows(table, clocks=False), other.rows(table, clocks=False)
            if rows != others:
                first = next((pair for pair in zip(rows, others) if pair[0] != pair[1]), (len(rows), len(others)))
                found.append(f"table {table}: {first[0]} against {first[1]}")
    return found


def torture(
    folder: Path, *, recipe: str = RECIPE, times: int = 100, seed: int = 0, writes: int = 0, spawn: bool = False
) -> tuple[int, int]:
    """Kill and resume again and again; print what did not survive; return (survived, tried)."""
    path = folder / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    reference = folder / "reference"
    begun = time.monotonic()
    if spawn:
        spawned(path, reference, False)
    else:
        forked(lambda: run_here(path, reference, False))
    duration = time.monotonic() - begun
    draw = np.random.default_rng(seed)

    def attempt(output: Path, resume: bool, patience: float | None) -> bool:
        if spawn:
            return spawned(path, output, resume, patience)
        return forked(lambda: run_here(path, output, resume), patience)

    def at_instants(output: Path) -> str:
        when = [duration * draw.random() for _ in range(1 + draw.integers(2))]
        for number, patience in enumerate(when):
            attempt(output, number > 0, patience)
        attempt(output, True, None)
        return " and ".join(f"{patience:.3f} s" for patience in when)

    def at_change(number: int) -> Callable[[Path], str]:
        def kill(output: Path) -> str:
            forked(lambda: die_before(path, output, number))
            if number % 2:
                forked(lambda: die_before(path, output, number // 3, resume=True))
            forked(lambda: run_here(path, output, True))
            return f"change {number} of the disk"

        return kill

    if writes:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        forked(lambda: count_changes(path, folder / "counted", sender))
        kills = [at_change(number) for number in range(int(seed % writes), receiver.recv(), writes)]
    else:
        kills = [at_instants] * times
    survived = 0
    for number, kill in enumerate(kills):
        output = folder / f"victim-{number}"
        try:
            where = kill(output)
            wrong = differences(reference, output)
        except RuntimeError as error:
            where, wrong = f"kill {number}", [str(error)]
        survived += not wrong
        if sys.stderr.isatty() or (number + 1) % 10 == 0:
            print(f"{survived}/{number + 1} of {len(kills)}, last killed at {where}", file=sys.stderr, flush=True)
        for line in wrong[:5]:
            print(f"killed at {where}: {line}", flush=True)
        shutil.rmtree(output, ignore_errors=True)
    return survived, len(kills)


def main() -> None:
    """Torture, print `survived/tried`, exit with 1 if any did not survive."""
    parser = argparse.ArgumentParser(description="Kill a run, resume it, compare.")
    parser.add_argument("--times", type=int, default=100, help="random instants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--writes", type=int, default=0, help="instead: before every n-th change of the disk")
    parser.add_argument("--spawn", action="store_true", help="a new interpreter per run")
    parser.add_argument("--recipe", type=Path, help="another recipe (its paths must be absolute)")
    chosen = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    import datasets
    import peft  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import transformers.models.auto  # noqa: F401

    import remanence.models.load
    import remanence.report.page
    import remanence.runs  # noqa: F401

    datasets.disable_progress_bars()
    recipe = RECIPE if chosen.recipe is None else chosen.recipe.read_text(encoding="utf-8")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        survived, tried = torture(
            Path(folder), recipe=recipe, times=chosen.times, seed=chosen.seed, writes=chosen.writes, spawn=chosen.spawn
        )
    print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    print(f"{survived}/{tried}")
    sys.exit(survived < tried)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
