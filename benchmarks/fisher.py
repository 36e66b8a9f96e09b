"""The per-example Fisher diagonal against a loop over examples: one backward pass per example, the gradient squared and added, as method code has it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.loop import desk_llama, perceptron
from benchmarks.timing import Figure, figure, paired
from remanence.models.desk_vision import build
from remanence.training.fisher import diagonal_fisher


class Named(nn.Module):
    """A plain module that takes its batch's column by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)


def by_loop(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean squared gradient of single examples' losses, one after another."""
    model.eval()
    named = dict(model.named_parameters())
    totals = {name: torch.zeros_like(weight) for name, weight in named.items()}
    count = len(batch["labels"])
    for number in range(count):
        model.zero_grad()
        row = {name: value[number : number + 1] for name, value in batch.items()}
        labels = row.pop("labels")
        out = model(**row)
        logits = out if isinstance(out, Tensor) else out.logits
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        F.cross_entropy(logits, labels).backward()
        for name, weight in named.items():
            if weight.grad is not None:
                totals[name] += weight.grad**2
    model.zero_grad()
    return {name: total / count for name, total in totals.items()}


def compare(name: str, model: nn.Module, batch: dict[str, Tensor], rounds: int) -> Figure:
    """Time both on one batch, and check that they agree."""
    ours = diagonal_fisher(model, [batch])
    for key, value in by_loop(model, batch).items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-9)
    seconds = paired(lambda: diagonal_fisher(model, [batch]), lambda: by_loop(model, batch), rounds)
    examples = len(batch["labels"])
    return figure(f"Fisher per example, {name}, loop / ours", *seconds, "speedup", 10.0, {"examples": examples})


def run(*, tiny: bool = False) -> list[Figure]:
    """Compare on a perceptron, a convolutional net and a Llama of a million weights."""
    drawn = torch.Generator().manual_seed(0)
    many, few, tokens, rounds = (8, 4, 6, 2) if tiny else (256, 64, 32, 5)
    labels = torch.randint(10, (many,), generator=drawn)
    ids = torch.randint(64 if tiny else 512, (few, tokens), generator=drawn)
    llama = desk_llama(1, 32, 64) if tiny else desk_llama()
    return [
        compare(
            "perceptron 64-256-10", Named(perceptron()), {"pixel_values": torch.randn(many, 64, generator=drawn), "labels": labels}, rounds
        ),
        compare("CNN 24k, 8 x 8", build("cnn-digits"), {"pixel_values": torch.rand(many, 8, 8, generator=drawn), "labels": labels}, rounds),
        compare(f"Llama 1M, {tokens} tokens", llama, {"input_ids": ids, "labels": ids}, rounds),
    ]
