"""Start real processes, with one thread each and a time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
LIMIT = 240  # seconds; only a hang comes near


def environment() -> dict[str, str]:
    """Return the environment of this process without what a launcher may have left in it."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    folders = [str(TESTS), str(TESTS.parent / "src"), kept.get("PYTHONPATH", "")]
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}


def torchrun(*command: str) -> list[str]:
    """Return the command that starts two processes on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it said."""
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT, check=False)
