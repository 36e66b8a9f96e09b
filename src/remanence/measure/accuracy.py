"""Accuracy of a classifier, with every row's prediction.

With `classes` only these outputs compete (the task is known: task-incremental); without, all do (class-incremental). Cost: one forward pass
over the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake
from remanence.measure.loss import class_logits
from remanence.models.forward import evaluating
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import Batches
from remanence.training.scoring import check_size, encoded, item_names, walk

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Measure the share of rows whose label has the highest output.

    Values: `accuracy`. Items: `label`, `predicted`, `correct` (0 or 1) of each row.

    Args:
        rows: what to measure on.
        kind: classes | images.
        classes: outputs that compete, by default all.
        batch_size: rows per forward pass.

    Raises:
        Mistake: another kind, wrong columns, no rows, a label outside `classes` or without an output.
    """

    rows: Dataset
    kind: str = "classes"
    classes: Sequence[int] | None = None
    batch_size: int = 256
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("accuracy", self.rows, self.kind)
        check_size("accuracy", self.batch_size)
        if self.kind not in ("classes", "images"):
            raise Mistake("accuracy", f"rows of kind '{self.kind}' have no classes", "use recall for qa, loss for text and chat")
        if self.classes is not None:
            stray = sorted(set(self.rows.with_format(None)["label"]) - set(self.classes))
            if stray:
                raise Mistake("accuracy", f"label {stray[0]} is not among the classes {list(self.classes)}", "add it or filter the rows")

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the accuracy and each row's prediction."""
        rows = encoded(self._kept, at.processor, self.rows, self.kind, 0, TEMPLATE)
        label, predicted = np.zeros(rows.count, np.int64), np.zeros(rows.count, np.int64)
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                label[numbers] = batch["labels"].cpu().numpy()
                predicted[numbers] = choose(class_logits("accuracy", model, batch), self.classes).cpu().numpy()
        correct = label == predicted
        items = [
            {"item": item, "label": int(truth), "predicted": int(guess), "correct": int(hit)}
            for item, truth, guess, hit in zip(item_names(self.rows), label, predicted, correct)
        ]
        return Scores({"accuracy": float(correct.mean())}, items)


def choose(logits: Float[Tensor, "B K"], classes: Sequence[int] | None) -> Int[Tensor, " B"]:
    """Return the class with the highest logit among `classes` (the lowest number of equals); -1 where a logit is NaN."""
    among = torch.arange(logits.shape[1], device=logits.device) if classes is None else torch.tensor(sorted(classes), device=logits.device)
    if int(among.max()) >= logits.shape[1]:
        raise Mistake(
            "accuracy", f"class {int(among.max())} has no output, the model has {logits.shape[1]}", "give the model one output per class"
        )
    competing = logits[:, among]
    return among[competing.argmax(1)].masked_fill(competing.isnan().any(1), -1)
