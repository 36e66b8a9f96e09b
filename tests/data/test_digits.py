"""scikit-learn's digits as rows of kind classes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from remanence.data.digits import digits
from remanence.errors import Mistake
from remanence.stream import Task


def test_train_and_test_are_the_whole_set_once():
    images, labels = load_digits(return_X_y=True)
    parts = [digits(part).with_format("numpy") for part in ("train", "test")]
    together = np.concatenate([part["features"][:] for part in parts]).reshape(-1, 64)
    both = np.concatenate([part["label"][:] for part in parts])
    rows = sorted(zip(map(bytes, (images / 16).astype(np.float32)), labels.tolist()))
    assert sorted(zip(map(bytes, together), both.tolist())) == rows
    assert together.dtype == np.float32
    assert together.min() == 0
    assert together.max() == 1


def test_the_split_is_stratified_and_always_the_same():
    first, again = digits("test"), digits("test")
    assert first.to_list() == again.to_list()
    counts = np.bincount(np.array(first["label"][:]))
    whole = np.bincount(load_digits(return_X_y=True)[1])
    assert np.abs(counts / len(first) - whole / whole.sum()).max() < 1 / len(first) * 2
    assert len(first) == 360


def test_a_class_filter_keeps_the_class_numbers():
    rows = digits("train", classes=[7, 3])
    whole = digits("train")
    assert set(rows["label"]) == {3, 7}
    assert rows.to_list() == [row for row in whole if row["label"] in (3, 7)]
    assert np.shape(rows[0]["features"]) == (8, 8)
    Task("digits", rows, kind="classes")


@pytest.mark.parametrize(
    ("arguments", "words"), [({"part": "tst"}, "did you mean 'test'"), ({"classes": [10]}, "class 10"), ({"classes": []}, "empty")]
)
def test_unknown_parts_and_classes_are_refused(arguments, words):
    with pytest.raises(Mistake, match=words):
        digits(**arguments)
