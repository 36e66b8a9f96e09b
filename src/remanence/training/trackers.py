"""Trackers beside the ledger (TensorBoard, Weights & Biases, ...), through Accelerate's classes; opened on first use, one per run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from remanence.errors import Mistake, nearest


@functools.cache
def open_tracker(kind: str, run: str, folder: Path) -> Any:
    """Return the tracker of a run.

    Args:
        kind: as Accelerate names them (tensorboard, wandb, mlflow, ...).
        run: its name; TensorBoard makes a folder of it.
        folder: where trackers that write files put them.

    Raises:
        Mistake: an unknown kind, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if kind not in LOGGER_TYPE_TO_CLASS:
        raise Mistake("training.trackers", f"unknown tracker '{kind}'", nearest(kind, LOGGER_TYPE_TO_CLASS))
    made = LOGGER_TYPE_TO_CLASS[kind]
    try:
        tracker = made(run, logging_dir=folder) if made.requires_logging_directory else made(run)
        tracker.start()
    except ImportError as error:
        raise Mistake("training.trackers", f"'{kind}' is not installed ({error})", "pip install 'remanence[trackers]'") from error
    return tracker
