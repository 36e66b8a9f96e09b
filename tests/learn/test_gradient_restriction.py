"""Gradient restriction: the penalty's gradient by finite differences, zero gradients, dropout and batch norm in the second pass, and what it is for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.learn.gradient_restriction import GradientRestriction, direction, size_of
from remanence.learn.sequential import Sequential
from remanence.measure.gradient_norms import GradientNorms
from remanence.stream import Moment, Task
from remanence.training.batches import Batch
from remanence.training.trainer import Settings, Trainer
from toy import Double, toy_lm, toy_tokenizer

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 5, generator=DRAW), torch.randint(3, (12,), generator=DRAW)
TASK = Task("rows", Dataset.from_dict({"features": X.tolist(), "label": Y.tolist()}), kind="classes")


def three_layers(*between: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Double(nn.Linear(5, 6), nn.Tanh(), *between, nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def taught(model: nn.Module, method: Any, steps: int = 1, **settings: Any) -> nn.Module:
    plain = {"steps": steps, "batch_size": 12, "optimizer": "sgd", "lr": 1.0, "clip": None}
    return method.learn(model, TASK, Trainer(Settings(**(plain | settings)), seed=2, progress=False))


def objective(model: nn.Module, alpha: float, norm: str) -> float:
    """L + a S(grad L) by its definition."""
    value = F.cross_entropy(model(X), Y)
    norms = [slope.norm() for slope in torch.autograd.grad(value, list(model.parameters()))]
    size = sum(norms) if norm == "per_tensor" else torch.stack(norms).norm()
    return (value + alpha * size).item()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("norm", ["per_tensor", "global"])
def test_06_the_gradient_matches_finite_differences_of_the_objective(norm: str, accumulate: int) -> None:
    start = three_layers()
    end = taught(copy.deepcopy(start), GradientRestriction(0.3, norm), batch_size=12 // accumulate, accumulate=accumulate)
    for weight, moved in zip(start.parameters(), end.parameters(), strict=True):
        slope = (weight - moved).detach()  # one step of rate 1
        for place in range(0, weight.numel(), 4):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    weight.view(-1)[place] += step
                ends.append(objective(start, 0.3, norm))
                with torch.no_grad():
                    weight.view(-1)[place] -= step
            assert slope.view(-1)[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("norm", ["per_tensor", "global"])
def test_06_a_zero_gradient_gives_no_nan(norm: str) -> None:
    model = three_layers(nn.ReLU())
    with torch.no_grad():
        model.body[0].bias.fill_(-100)
        model.body[0].weight.zero_()
    before = copy.deepcopy(model.body[0])
    for accumulate in (1, 2):
        end = taught(copy.deepcopy(model), GradientRestriction(0.3, norm), batch_size=12 // accumulate, accumulate=accumulate)
        assert all(bool(weight.isfinite().all()) for weight in end.parameters())
        assert torch.equal(end.body[0].weight, before.weight)
        assert not torch.equal(end.body[5].weight, model.body[5].weight)


def test_size_and_direction_by_hand() -> None:
    gradient = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]]), "c": torch.zeros(2)}
    assert size_of(gradient.values(), "per_tensor").item() == pytest.approx(17)
    assert size_of(gradient.values(), "global").item() == pytest.approx(13)
    each, whole = direction(gradient, "per_tensor"), direction(gradient, "global")
    assert [*each["a"].tolist(), each["b"].item(), *each["c"].tolist()] == pytest.approx([0.6, 0.8, 1, 0, 0])
    assert [*whole["a"].tolist(), whole["b"].item()] == pytest.approx([3 / 13, 4 / 13, 12 / 13])


def test_the_surrogate_is_near_the_exact_derivative() -> None:
    exact, near, plain = (
        taught(three_layers(), method, steps=5, lr=0.3)
        for method in (GradientRestriction(0.2), GradientRestriction(0.2, derivative="finite", eps=1e-4), Sequential())
    )

    def gap(one: nn.Module, other: nn.Module) -> float:
        return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(one.parameters(), other.parameters(), strict=True)))

    assert gap(exact, near) < 1e-3 * gap(exact, plain)


@pytest.mark.parametrize("derivative", ["exact", "finite"])
def test_strength_zero_is_plain_training_bit_for_bit(derivative: str) -> None:
    one = taught(three_layers(nn.Dropout(0.3)), GradientRestriction(0, derivative=derivative), steps=6, batch_size=5)
    other = taught(three_layers(nn.Dropout(0.3)), Sequential(), steps=6, batch_size=5)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_second_pass_sees_the_same_dropout_and_leaves_batch_norm_alone() -> None:
    """Two passes over the step's one micro-batch equal the single pass that is differentiated through."""

    class TwoPasses(GradientRestriction):
        def restricted(self, model: nn.Module, batch: Batch) -> Tensor:
            raise AssertionError("one pass")

    layers = nn.BatchNorm1d(6), nn.Dropout(0.4)
    one = taught(three_layers(*copy.deepcopy(layers)), GradientRestriction(0.3), steps=3, batch_size=5)
    method = TwoPasses(0.3)
    trainer = Trainer(Settings(steps=3, batch_size=5, optimizer="sgd", lr=1.0, clip=None), seed=2, progress=False)
    noise: list = []
    from remanence.learn.gradient_restriction import noise_state
    from remanence.training.losses import nll

    def plain(model: nn.Module, batch: Batch) -> Tensor:
        noise.append(noise_state(torch.device("cpu")))
        return nll(model, batch)

    def restrict(model: nn.Module, step: Any) -> None:
        method._add_penalty(model, step, trainer, noise)
        noise.clear()

    other = trainer.fit(three_layers(*copy.deepcopy(layers)), trainer.batches(TASK.train, "classes"), plain, after_backward=restrict)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", [GradientRestriction(0.3), GradientRestriction(0.3, derivative="finite")], ids=["exact", "finite"])
def test_07_the_largest_gradients_of_single_rows_fall_with_the_strength(method: GradientRestriction) -> None:
    """A tenth of the labels is wrong; where every row is learned by heart, plain training has small gradients too."""
    made = torch.Generator().manual_seed(4)
    labels = torch.randint(3, (90,), generator=made)
    features = torch.randn(90, 5, generator=made) + 2 * F.one_hot(labels, 5)
    labels[:9] = (labels[:9] + 1) % 3
    rows = Dataset.from_dict({"features": features.tolist(), "label": labels.tolist()})
    task, tails = Task("rows", rows, kind="classes"), []
    for alpha in (0.0, 0.1, 0.5):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model: nn.Module = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 3))
        learner = GradientRestriction(alpha, derivative=method.derivative)
        learner.learn(model, task, Trainer(Settings(epochs=25, batch_size=15, lr=0.01), seed=1, progress=False))
        tails.append(GradientNorms(rows, "classes").measure(model, Moment()).values)
    for metric in ("p99", "max"):
        assert tails[0][metric] > tails[1][metric] > tails[2][metric]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    tokenizer, ends = toy_tokenizer(), []
    rows = Dataset.from_dict({"question": [f"who is {n}" for n in range(8)], "answer": [f"{n * 7}" for n in range(8)]})
    for checkpointing, accumulate in ((False, 1), (True, 1), (True, 2)):
        settings = Settings(
            steps=2, batch_size=8 // accumulate, accumulate=accumulate, lr=0.1, optimizer="sgd", gradient_checkpointing=checkpointing
        )
        model = toy_lm(family, vocab=len(tokenizer))
        GradientRestriction(0.1).learn(model, Task("rows", rows, kind="qa"), Trainer(settings, processor=tokenizer, progress=False))
        ends.append(model.state_dict())
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope * 2


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x)


def test_a_layer_without_a_second_derivative_is_refused_by_name_and_the_surrogate_takes_it() -> None:
    with pytest.raises(Mistake, match=r"gradient_restriction: the layer 'body\.2' cannot be differentiated twice.*derivative: finite"):
        taught(three_layers(Once()), GradientRestriction(0.1))
    end = taught(three_layers(Once()), GradientRestriction(0.1, derivative="finite"))
    assert not torch.equal(end.body[0].weight, three_layers(Once()).body[0].weight)


@pytest.mark.parametrize(
    ("options", "place"),
    [({"alpha": -1}, "alpha"), ({"norm": "per_tenser"}, "norm"), ({"derivative": "both"}, "derivative"), ({"eps": 0}, "eps")],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=f"gradient_restriction.{place}"):
        GradientRestriction(**options)
