"""Masks: what is held does not move by a bit, whatever the optimizer does."""

import pytest
import torch
from torch import nn

from remanence.errors import Mistake
from remanence.seeds import generator
from remanence.training.masks import frozen, hold_rows, moved, weights_of


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.inner.weight
        draw = generator("masks")
        for weight in self.parameters():
            weight.data.normal_(generator=draw)

    def forward(self, ids):
        return self.head(self.body(self.inner(ids)).tanh())


def train(model, steps=4, after_step=(), optimizer=None):
    optimizer = optimizer or torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.1, weight_decay=0.5)
    for step in range(steps):
        ids = torch.randint(0, 6, (5,), generator=generator("ids", step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
        for act in after_step:
            act(model, step)
    return optimizer


def test_only_the_named_train_and_flags_come_back():
    model = Tied()
    model.body.bias.requires_grad_(False)
    before = weights_of(model)
    with frozen(model, ["body.weight"]) as held:
        assert held == ["inner.weight", "body.bias"]
        optimizer = train(model)
        assert len(optimizer.state) == 1
    assert [row["weight"] for row in moved(before, model)] == ["body.weight"]
    assert [weight.requires_grad for weight in model.parameters()] == [True, True, False]


def test_a_named_parameter_that_was_frozen_trains_for_a_while():
    model = Tied().requires_grad_(False)
    with frozen(model, ["body.weight"]):
        assert model.body.weight.requires_grad
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", ["inner.weight", "head.weight"])
def test_a_tied_weight_trains_under_any_of_its_names(name):
    model = Tied()
    with frozen(model, [name]) as held:
        assert model.head.weight.requires_grad
        assert model.inner.weight.requires_grad
        assert held == ["body.weight", "body.bias"]


def test_an_old_gradient_cannot_move_a_frozen_weight():
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    before = weights_of(model)
    with frozen(model, ["body.bias"]):
        optimizer.step()
    assert [row["weight"] for row in moved(before, model)] == ["body.bias"]


def test_flags_come_back_after_a_failure():
    model = Tied()

    def fail():
        with frozen(model, ["body.bias"]):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert all(weight.requires_grad for weight in model.parameters())


def test_unknown_names_and_no_names_are_refused_and_change_nothing():
    model = Tied()
    for names, words in ((["body.wieght"], "did you mean 'body.weight'"), ([], "no parameter would be trained")):
        with pytest.raises(Mistake, match=words), frozen(model, names):
            pass
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        (slice(1, 3), [1, 2]),
        (range(2), [0, 1]),
        ([3, 0], [0, 3]),
        ([-1], [3]),
        (torch.tensor([2]), [2]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_held_rows_are_bit_identical_under_momentum_and_decay(rows, held, axis):
    model = Tied()
    optimizer = train(model)  # the moments are not zero when the rows are held
    start = model.body.weight.detach().clone()
    with hold_rows(model.body.weight, rows, axis) as mask:
        train(model, after_step=[mask], optimizer=optimizer)
        assert model.body.weight.grad.index_select(axis, torch.tensor(held)).abs().sum() == 0
    same = (model.body.weight == start).all(dim=1 if axis == 0 else 0)
    assert torch.nonzero(same)[:, 0].tolist() == held


def test_free_rows_train_as_they_would_without_the_mask():
    """Under SGD a row's step does not depend on the others, for one step."""
    free, masked = Tied(), Tied()
    mask = hold_rows(masked.body.weight, slice(0, 2))
    for model, after in ((free, []), (masked, [mask])):
        train(model, 1, after, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
    assert torch.equal(free.body.weight[2:], masked.body.weight[2:])
    assert not torch.equal(free.body.weight[:2], masked.body.weight[:2])


def test_released_rows_move_again():
    model = Tied()
    mask = hold_rows(model.body.weight, slice(0, 2))
    mask.release()
    before = weights_of(model)
    train(model, 1)
    assert model.body.weight.grad[:2].abs().sum() > 0
    assert {row["weight"]: row["changed"] for row in moved(before, model)}["body.weight"] == 16


@pytest.mark.parametrize(("rows", "axis"), [([4], 0), (torch.tensor([True]), 0), ([], 0), (slice(2, 2), 0), ([0], 2)])
def test_rows_that_are_not_there_are_refused(rows, axis):
    with pytest.raises(Mistake, match="row mask"):
        hold_rows(Tied().body.weight, rows, axis)


def test_what_moved_by_hand():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.zero_()
        before = weights_of(model)
        assert moved(before, model) == []
        model.weight[0, 1] += 1
        model.bias += 2
    assert moved(before, model) == [
        {"weight": "weight", "size": 2, "changed": 1, "relative": 0.2},
        {"weight": "bias", "size": 1, "changed": 1, "relative": None},
    ]
    assert moved({"weight": torch.zeros(3)}, model) == [
        {"weight": "weight", "size": 2, "changed": 2, "relative": None},
        {"weight": "bias", "size": 1, "changed": 1, "relative": None},
    ]


def test_a_tied_weight_moves_once():
    model = Tied()
    before = weights_of(model)
    train(model)
    assert [row["weight"] for row in moved(before, model)] == ["inner.weight", "body.weight", "body.bias"]
