"""Trackers beside the ledger (TensorBoard, Weights & Biases, ...), through Accelerate's classes; opened on first use, one per run."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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
    made = tracker_class(kind)
    try:
        tracker = made(run, logging_dir=folder) if made.requires_logging_directory else made(run)
        tracker.start()
    except ImportError as error:
        raise Mistake("training.trackers", f"'{kind}' is not installed ({error})", "pip install 'remanence[trackers]'") from error
    return tracker


def tracker_class(kind: str) -> Any:
    """Return Accelerate's class of a tracker.

    Raises:
        Mistake: an unknown kind.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if kind not in LOGGER_TYPE_TO_CLASS:
        raise Mistake("training.trackers", f"unknown tracker '{kind}'", nearest(kind, LOGGER_TYPE_TO_CLASS))
    return LOGGER_TYPE_TO_CLASS[kind]


def refuse_trackers(kinds: Iterable[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is written.

    Raises:
        Mistake: naming the first of them.
    """
    from accelerate.tracking import get_available_trackers

    installed = {str(kind) for kind in get_available_trackers()}
    for kind in kinds:
        tracker_class(kind)
        if kind not in installed:
            raise Mistake(
                "training.trackers", f"'{kind}' is not installed", "pip install 'remanence[trackers]', or the tracker's own package"
            )
