"""What forgetters ask of the loop: a value for every row, a column more, and a stage that ends early."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from remanence.training.batches import Batches
from remanence.training.checkpoint import Checkpoints
from remanence.training.trainer import Settings, Step, Trainer
from toy import toy_classifier, toy_lm

MADE = torch.Generator().manual_seed(0)
ROWS = {"pixel_values": torch.randn(11, 8, generator=MADE), "labels": torch.randint(4, (11,), generator=MADE)}


def losses(model: nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"], reduction="none")


@pytest.mark.parametrize("size", [1, 4, 11, 30])
def test_over_rows_is_in_the_order_of_the_rows(size: int) -> None:
    model = nn.Sequential(toy_classifier(), nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    found = Trainer().over_rows(model, Batches(ROWS, size, seed=3), losses)
    with torch.no_grad():
        expected = losses(model[0], ROWS)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-7)
    assert not found.requires_grad
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_a_summed_gradient_is_the_sum_over_single_rows_whatever_the_batches(size: int) -> None:
    model = nn.Sequential(toy_classifier(), nn.BatchNorm1d(4), nn.Dropout(0.5)).double().train()
    model[0][1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones(4, dtype=torch.float64)
    rows = {"pixel_values": ROWS["pixel_values"].double(), "labels": ROWS["labels"]}
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    found = Trainer().summed_gradient(model, Batches(rows, size))
    still = copy.deepcopy(model).eval()
    still.zero_grad()
    for number in range(11):
        losses(still, {name: value[number : number + 1] for name, value in rows.items()}).sum().backward()
    assert "0.1.bias" not in found
    for name, weight in still.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-10, atol=1e-13)
    assert model.training
    assert torch.equal(model[1].weight.grad, torch.ones(4, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_summed_gradient_of_a_language_model_is_that_of_its_tokens(size: int) -> None:
    model = toy_lm("gpt2", dtype=torch.float64)
    ids = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [9, 9, 9, 9]]
    labels = [[-100, 6, 7], [-100, -100, 10, 11, 12], [-100, -100], [9, 9, 9, 9]]  # one row has nothing to say
    found = Trainer().summed_gradient(model, Batches(Dataset.from_dict({"input_ids": ids, "labels": labels}), size))
    for row, wanted in zip(ids, labels):
        logp = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        sum((-logp[place - 1, label] for place, label in enumerate(wanted) if place and label != -100), 0 * logp.sum()).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-9, atol=1e-12)


def test_over_rows_takes_values_of_any_shape() -> None:
    def pairs(model: nn.Module, batch: dict) -> torch.Tensor:
        return torch.stack([losses(model, batch), batch["labels"].float()], 1)

    found = Trainer().over_rows(toy_classifier(), Batches(ROWS, 4), pairs, (2,))
    assert torch.equal(found[:, 0], Trainer().over_rows(toy_classifier(), Batches(ROWS, 4), losses))
    assert torch.equal(found[:, 1], ROWS["labels"].double())


def test_a_column_more_goes_with_its_row() -> None:
    batches = Batches(ROWS, 4, seed=3)
    wider = batches.with_column("number", torch.arange(11))
    for index in range(6):
        assert torch.equal(wider[index]["labels"], ROWS["labels"][wider[index]["number"]])
        assert wider[index]["number"].tolist() == batches.numbers(index).tolist()
    assert "number" not in batches[0]


def test_a_column_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Batches(ROWS, 4).with_column("number", torch.arange(10))
    with pytest.raises(ValueError, match="does not fit"):
        Batches(ROWS, 4).with_column("labels", torch.arange(11))


def test_a_stage_that_ends_early_equals_a_short_one_and_stays_ended(tmp_path: Path) -> None:
    def third(model: nn.Module, step: Step) -> bool:
        return step.number == 2

    def go(steps: int, folder: Path | None = None, after_step=None) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
        model = toy_classifier()
        trainer = Trainer(Settings(lr=0.01), checkpoints=Checkpoints(folder, every=2) if folder else None, progress=False)
        trainer.fit(model, Batches(ROWS, 4), steps=steps, after_step=after_step)
        return [weight.detach().numpy().copy() for weight in model.parameters()]

    short, early, again = go(3), go(50, tmp_path, third), go(50, tmp_path, third)
    for one, two, three in zip(short, early, again, strict=True):
        assert np.array_equal(one, two)
        assert np.array_equal(one, three)
