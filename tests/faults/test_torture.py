"""A run that was killed at any instant and resumed ends with the same weights and the same ledger as one that was left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tortured(*arguments: str) -> None:
    """Run the torture in a process of its own (it forks, and this one has threads) and hold that everything survived."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "benchmarks.torture", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    score = re.search(r"^(\d+)/(\d+)$", done.stdout, re.MULTILINE)
    assert score is not None
    assert score[1] == score[2] != "0"


def test_kills_at_random_instants_leave_no_trace() -> None:
    tortured("--times", "4", "--seed", "7")


def test_a_killed_process_of_the_command_line_resumes() -> None:
    tortured("--times", "1", "--seed", "1", "--spawn")


@pytest.mark.long
def test_a_kill_before_any_change_of_the_disk_leaves_no_trace() -> None:
    tortured("--writes", "5")
