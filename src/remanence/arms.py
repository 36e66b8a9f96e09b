"""Run many commands of ours side by side, each in its own process: arms x seeds of a comparison or a claim."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from remanence.errors import Mistake


def run_arms(commands: Sequence[Sequence[str]], names: Sequence[str], *, workers: int | None = None, progress: bool = True) -> None:
    """Run `python -m remanence ARGS` for each list of arguments, `workers` at a time, the cores shared out evenly.

    Args:
        commands: arguments of each process.
        names: what to call them in progress and errors.
        workers: processes at a time; by default one per core.
        progress: print a line when one ends.

    Raises:
        Mistake: one of them failed; the sentence it printed is passed on, and no further one is started.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(workers or cores, len(commands)))
    source = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, cores // workers)),
        "PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    failed: list[tuple[str, str]] = []

    def run(number: int) -> None:
        if failed:
            return
        begun = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "remanence", *commands[number]], env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            failed.append((names[number], lines[-1].removeprefix("remanence: ") if lines else f"exit code {done.returncode}"))
        elif progress:
            print(f"{names[number]}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(len(commands))))
    if failed:
        name, sentence = failed[0]
        raise Mistake(name, sentence, "mend that arm; finished ones are kept and not run again")
