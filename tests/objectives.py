"""Look at what a forgetter would fit: its batches and its loss, on toy models in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.losses import nll
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
LABELS = torch.tensor([[IGNORED, IGNORED, 3, 4, 1], [IGNORED, 5, 1, IGNORED, IGNORED]])
COUNTS = [[False, True, True, True, False], [True, True, False, False, False]]  # the positions whose logits predict one of LABELS


class Spy(Trainer):
    """Catches what a method would fit."""

    caught: tuple[Any, Any, dict[str, Any]]

    def fit(self, model: nn.Module, batches: Any, loss: Any = nll, **more: Any) -> nn.Module:
        self.caught = (batches, loss, more)
        return model


def lm(seed: int = 0) -> Any:
    """Return a toy whose every number is in double precision (llama's norms round to fp32)."""
    return toy_lm("gpt2", seed=seed, vocab=len(TOKENIZER), dtype=torch.float64)


def objective(method: Any, model: nn.Module, request: Request, size: int = 4) -> tuple[Batch, Any]:
    """Return the first batch and the loss that the method would fit on the model as it is now."""
    spy = Spy(Settings(batch_size=size), processor=TOKENIZER, seed=3)
    assert method.forget(model, request, spy) is model
    batches, loss, _ = spy.caught
    return batches[0], loss


def moved(model: nn.Module) -> nn.Module:
    """Return the model after a random step."""
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)
    return model


def check_slope(model: nn.Module, batch: Batch, loss: Any) -> None:
    """Hold the gradient of a loss to its finite difference along a random direction."""
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss(model, batch), parameters)
    noise = torch.Generator().manual_seed(4)
    way = [torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype) for parameter in parameters]
    values = []
    for side in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, way):
                parameter += side * 1e-6 * direction
            values.append(loss(model, batch).item())
    expected = sum((slope * direction).sum().item() for slope, direction in zip(slopes, way))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-7)


def widened(batch: Batch) -> Batch:
    """Return a batch, or a batch of batches, with six more columns of padding."""
    if "input_ids" not in batch:
        return Batch({name: widened(part) for name, part in batch.items()})
    fill = {"input_ids": TOKENIZER.pad_token_id, "labels": IGNORED}
    pad = {name: torch.full((len(batch["labels"]), 6), value) for name, value in fill.items()}
    return Batch({name: torch.cat([value, pad[name]], 1) if name in pad else value for name, value in batch.items()})


class Table(nn.Module):
    """Logits that are parameters, so that a gradient shows which positions count."""

    def __init__(self, seed: int, wide: int = 8):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(2, 5, wide, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits
