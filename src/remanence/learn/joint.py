"""Train on all tasks so far together: the upper bound, needed for intransigence and for normalised retention.

    min over theta of the mean of L over the union of the tasks 1..t

The model goes on from the weights it has. Rows that were forgotten on request since are not in the union (`Trainer.history` leaves them out).
With settings in epochs the cost grows with the stream: t tasks take t times the steps of the last one; all rows must still be at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
from torch import nn

from remanence.errors import Mistake
from remanence.seeds import derive
from remanence.stream import Task
from remanence.training.batches import Batches
from remanence.training.trainer import Trainer


@dataclass
class Joint:
    """Train on the history and the task, shuffled together. Nothing to set and nothing to keep."""

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the union of the rows; alone in the stream it equals plain training.

        Raises:
            Mistake: tasks whose encoded rows have different columns (texts and images).
        """
        return trainer.fit(model, union(task, trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


def union(task: Task, trainer: Trainer) -> Batches:
    """Return shuffled batches over the rows of all tasks so far; texts, questions and chats may be mixed."""
    encoded = [(each.name, trainer.encode(each.train, each.kind)) for each in (*trainer.history, task)]
    strange = next((name for name, rows in encoded if set(rows.column_names) != set(encoded[-1][1].column_names)), None)
    if strange is not None:
        raise Mistake(f"task '{strange}'", f"its rows cannot be mixed with those of '{task.name}'", "keep one modality per stream")
    rows = datasets.concatenate_datasets([part.select_columns(encoded[-1][1].column_names) for _, part in encoded])
    pad = getattr(trainer.processor, "pad_token_id", None) or 0
    return Batches(rows, trainer.settings.batch_size, seed=derive(trainer.seed, "task"), pad=pad)
