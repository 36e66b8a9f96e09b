"""Norms of single rows' gradients equal plain backward passes, in one pass or row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.measure.gradient_norms import GradientNorms
from remanence.models.adapters import add_lora
from remanence.models.desk_vision import build
from remanence.stream import Moment, Probe
from toy import toy_classifier, toy_lm, toy_tokenizer

ROWS = Dataset.from_dict(
    {
        "features": torch.randn(23, 8, generator=torch.Generator().manual_seed(1)).tolist(),
        "label": [n % 4 for n in range(23)],
        "id": [f"r{n}" for n in range(23)],
    }
)
QA = Dataset.from_dict({"question": ["who?", "where is it now?", "why"], "answer": ["bo", "in rome, i think", "so"], "id": ["a", "b", "c"]})


class Touching(nn.Module):
    """Rows that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.line = toy_classifier()

    def forward(self, x: Tensor) -> Tensor:
        out = self.line(x)
        return out - 0.5 * out.mean(0)


def plain(model: nn.Module, losses: list[Tensor]) -> list[float]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    norms = []
    for loss in losses:
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        norms.append(torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum().sqrt().item())
    return norms


@pytest.mark.parametrize("size", [1, 5, 64])
@pytest.mark.parametrize("model", [toy_classifier(), build("cnn-digits", image_size=8, classes=4)], ids=["perceptron", "cnn"])
def test_norms_of_classes_equal_single_backward_passes(model: nn.Module, size: int) -> None:
    rows = ROWS
    if hasattr(model, "config"):
        pixels = torch.rand(23, 8, 8, generator=torch.Generator().manual_seed(1))
        rows = Dataset.from_dict({"features": pixels.tolist(), "label": ROWS["label"][:], "id": ROWS["id"][:]})
    x, y = torch.tensor(rows["features"][:]), torch.tensor(rows["label"][:])
    out = [model(x[n : n + 1]) for n in range(23)]
    expected = plain(model, [F.cross_entropy(getattr(logits, "logits", logits), y[n : n + 1]) for n, logits in enumerate(out)])
    probe = GradientNorms(rows, "classes", batch_size=size)
    assert isinstance(probe, Probe)
    found = probe.measure(model, Moment())
    assert [item["norm"] for item in found.items] == pytest.approx(expected, rel=1e-4)
    assert [item["item"] for item in found.items] == ROWS["id"][:]
    assert found.values["max"] == pytest.approx(max(expected), rel=1e-4)
    assert found.values["p99"] == pytest.approx(np.quantile(expected, 0.99), rel=1e-4)
    assert found.values["tail"] == pytest.approx(np.quantile(expected, 0.99) / np.median(expected), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "lora"])
def test_norms_of_tokens_are_of_the_rows_mean(family: str) -> None:
    tokenizer = toy_tokenizer()
    model = add_lora(toy_lm("llama"), rank=2) if family == "lora" else toy_lm(family)
    found = GradientNorms(QA, "qa", batch_size=2, length=48).measure(model, Moment(processor=tokenizer))
    from remanence.training.losses import nll
    from remanence.training.trainer import Settings, Trainer

    batches = Trainer(Settings(batch_size=1, length=48), processor=tokenizer).batches(QA, "qa", shuffle=False)
    expected = plain(model, [nll(model, batch) for batch in batches])
    assert [item["norm"] for item in found.items] == pytest.approx(expected, rel=1e-3)
    assert [item["item"] for item in found.items] == ["a", "b", "c"]


def test_rows_that_touch_each_other_are_taken_one_by_one_with_a_warning() -> None:
    model = Touching()
    with pytest.warns(UserWarning, match="row by row"):
        found = GradientNorms(ROWS, "classes").measure(model, Moment())
    x, y = torch.tensor(ROWS["features"][:]), torch.tensor(ROWS["label"][:])
    expected = plain(model, [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(23)])
    assert [item["norm"] for item in found.items] == pytest.approx(expected, rel=1e-4)


def test_it_leaves_no_trace() -> None:
    model = nn.Sequential(toy_classifier(), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    GradientNorms(ROWS, "classes").measure(model, Moment())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(Mistake, match="no parameter in training"):
        GradientNorms(ROWS, "classes").measure(toy_classifier().requires_grad_(False), Moment())
