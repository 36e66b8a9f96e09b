"""The recall tasks: what is asked for was told, and far enough before."""

from __future__ import annotations

import pytest
import torch

from remanence.data.recall_tasks import Recall, recall_accuracy
from remanence.errors import Mistake
from remanence.training.batches import IGNORED


@pytest.mark.parametrize(("tokens", "pairs"), [(64, 4), (64, 8), (63, 4), (256, 4)])
def test_every_value_asked_for_was_told_once_before_the_gap(tokens: int, pairs: int) -> None:
    task = Recall(tokens=tokens, pairs=pairs)
    batch = task[3]
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        asked = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(asked) == pairs
        for place in asked:
            key = ids[place - 1]
            told = [at for at, token in enumerate(ids) if token == key]
            assert len(told) == 2
            assert told[1] == place - 1
            assert ids[told[0] + 1] == labels[place] == ids[place]
            assert place - 1 - (told[0] + 1) > task.gap - 1
        assert sum(token >= task.filler for token in ids) == 4 * pairs


def test_batches_are_fresh_and_depend_on_seed_and_number_alone() -> None:
    task = Recall(seed=5)
    assert torch.equal(task[7]["input_ids"], Recall(seed=5)[7]["input_ids"])
    assert not torch.equal(task[7]["input_ids"], task[8]["input_ids"])
    assert not torch.equal(task[7]["input_ids"], Recall(seed=6)[7]["input_ids"])


def test_accuracy_by_hand() -> None:
    labels = torch.tensor([[IGNORED, 1, IGNORED, 0]])
    logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    assert recall_accuracy(logits, labels) == 0.5


@pytest.mark.parametrize("wrong", [{"pairs": 17}, {"tokens": 24}, {"values": 1}, {"pairs": 0}])
def test_a_task_that_cannot_be_made_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(Mistake):
        Recall(**wrong)
