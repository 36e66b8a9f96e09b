"""Selective synaptic dampening against one re-training, on the same network and rows: what does a deletion request cost?

A convolutional net learns scikit-learn's digits; all rows of one digit are to go. Re-training trains a fresh network on the rest; dampening measures the
importance of the weights for all rows and for those that go, and shrinks what belongs to the latter. The accuracies say what each kept and removed.
"""

from __future__ import annotations

import copy
import warnings

import torch
from datasets import concatenate_datasets
from torch import nn

from benchmarks.timing import Figure, figure, paired
from remanence.data.digits import digits
from remanence.forget.retrain import Retrain
from remanence.forget.ssd import SSD
from remanence.models.desk_vision import build
from remanence.stream import Request, Task
from remanence.training.trainer import Settings, Trainer

FORGOTTEN = 3


def accuracy(model: nn.Module, rows) -> float:  # a Dataset of kind classes
    """Return the share of rows whose best class is right."""
    held = rows.with_format("torch")[:]
    model.eval()
    with torch.no_grad():
        return (model(pixel_values=held["features"].float()).logits.argmax(1) == held["label"]).float().mean().item()


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare on a whole class of digits to be forgotten, of all that was learned."""
    epochs, rounds = (1, 1) if tiny else (20, 3)
    rest = [digit for digit in range(10) if digit != FORGOTTEN]
    forget, retain = digits("train", (FORGOTTEN,)), digits("train", rest)
    tests = {"forget": digits("test", (FORGOTTEN,)), "retain": digits("test", rest)}
    task = Task("digits", concatenate_datasets([forget, retain]), kind="classes")
    request = Request("one digit", forget, retain, kind="classes")
    settings = Settings(epochs=epochs, batch_size=32)
    learned = build("cnn-digits", seed=0)
    start = Trainer(settings, progress=False)
    start.fit(learned, start.batches(task.train, "classes"))
    ends: dict[str, nn.Module] = {"before": learned}

    def dampen() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that much is selected is what a whole class brings
            ends["ours"] = SSD().forget(copy.deepcopy(learned), request, Trainer(settings, progress=False))

    def train_again() -> None:
        ends["retrained"] = Retrain().forget(copy.deepcopy(learned), request, Trainer(settings, history=[task], progress=False))

    seconds = paired(dampen, train_again, rounds)
    more = {f"{end}_{part}": accuracy(model, rows) for end, model in ends.items() for part, rows in tests.items()}
    return [
        figure(
            f"forget a digit, CNN 24k, re-training {epochs} epochs / dampening", *seconds, "speedup", None, more | {"rows": len(task.train)}
        )
    ]
