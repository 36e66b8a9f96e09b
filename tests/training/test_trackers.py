"""Trackers get the losses that the ledger gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from remanence.errors import Mistake
from remanence.training.batches import Batches
from remanence.training.trainer import Settings, Trainer

POINTS = {"pixel_values": torch.eye(4), "labels": torch.arange(4)}


def test_tensorboard_holds_the_losses_of_the_ledger(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows: list[dict] = []
    trainer = Trainer(
        Settings(steps=6, log_every=2, trackers=("tensorboard",)),
        name="monday",
        record=lambda _, new: rows.extend(new),
        tracked=("week", tmp_path),
    )
    trainer.fit(nn.Linear(4, 4), Batches(POINTS, 2))
    found = reader.EventAccumulator(str(tmp_path / "week")).Reload()
    losses = {row["step"] + 1: row["value"] for row in rows if row["metric"] == "loss"}
    told = {event.step: event.value for event in found.Scalars("monday/loss")}
    assert list(told) == [2, 4, 6]
    assert told == pytest.approx({step: losses[step] for step in told})


def test_an_unknown_tracker_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    trainer = Trainer(Settings(steps=1, log_every=1, trackers=("tensorbord",)), tracked=("week", tmp_path))
    with pytest.raises(Mistake, match="did you mean 'tensorboard'"):
        trainer.fit(nn.Linear(4, 4), Batches(POINTS, 2))
