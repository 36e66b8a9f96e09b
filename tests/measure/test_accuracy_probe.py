"""Accuracy and predictions equal one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Image

from remanence.errors import Mistake
from remanence.measure.accuracy import Accuracy, choose
from remanence.stream import Moment, Probe
from toy import toy_classifier

DRAW = torch.Generator().manual_seed(1)
ROWS = Dataset.from_dict(
    {"features": torch.randn(23, 8, generator=DRAW).tolist(), "label": [n % 4 for n in range(23)], "id": [f"r{n}" for n in range(23)]}
)


@pytest.mark.parametrize("size", [1, 5, 256])
def test_predictions_equal_one_row_at_a_time(size):
    model = toy_classifier()
    with torch.no_grad():
        expected = [int(model(torch.tensor([row["features"]])).argmax()) for row in ROWS]
    found = Accuracy(ROWS, batch_size=size).measure(model, Moment())
    assert [item["predicted"] for item in found.items] == expected
    assert [item["item"] for item in found.items] == ROWS["id"][:]
    assert [item["correct"] for item in found.items] == [int(guess == truth) for guess, truth in zip(expected, ROWS["label"])]
    assert found.values["accuracy"] == pytest.approx(np.mean([guess == truth for guess, truth in zip(expected, ROWS["label"])]))


def test_known_classes_compete_among_themselves_only():
    rows = ROWS.filter(lambda row: row["label"] in (1, 3))
    model = toy_classifier()
    with torch.no_grad():
        logits = model(torch.tensor(rows["features"][:]))
    found = Accuracy(rows, classes=(3, 1)).measure(model, Moment())
    assert [item["predicted"] for item in found.items] == [1 if one >= three else 3 for one, three in logits[:, [1, 3]].tolist()]
    assert found.values["accuracy"] >= Accuracy(rows).measure(model, Moment()).values["accuracy"]


def test_images_are_read_too():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 2), dtype=np.uint8)
    from PIL import Image as Picture

    rows = Dataset.from_dict({"image": [Picture.fromarray(image) for image in pixels], "label": [0, 1, 2, 3, 0, 1]}).cast_column(
        "image", Image()
    )
    model = toy_classifier()
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels.astype(np.float32) / 255)).argmax(1)
    found = Accuracy(rows, "images", batch_size=4).measure(model, Moment())
    assert [item["predicted"] for item in found.items] == expected.tolist()


def test_a_logit_that_is_no_number_is_never_correct():
    logits = torch.tensor([[0.0, math.nan], [1.0, 1.0], [0.0, 2.0]])
    assert choose(logits, None).tolist() == [-1, 0, 1]
    assert choose(logits, [0]).tolist() == [0, 0, 0]


def test_the_model_is_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), toy_classifier()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (Accuracy(ROWS, batch_size=size).measure(model, Moment()).items for size in (1, 7))
    assert first == second
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Accuracy(Dataset.from_dict({"text": ["a"]}), "text"),
        lambda: Accuracy(ROWS, classes=(0, 1)),
        lambda: Accuracy(ROWS, batch_size=0),
        lambda: Accuracy(ROWS.remove_columns("label")),
        lambda: Accuracy(ROWS).measure(toy_classifier(classes=3), Moment()),
        lambda: Accuracy(ROWS, classes=range(9)).measure(toy_classifier(), Moment()),
    ],
)
def test_unusable_rows_are_refused(make):
    with pytest.raises(Mistake):
        make()


def test_accuracy_is_a_probe():
    assert isinstance(Accuracy(ROWS), Probe)
