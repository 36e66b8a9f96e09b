"""Logits of the supervised time steps alone: the same losses and gradients as from all logits, on every family, under LoRA and for classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.models.adapters import add_lora
from remanence.models.forward import keeps_logits, logits_of
from remanence.training.batches import IGNORED, Batch
from remanence.training.losses import answer_logits, answer_nll, answer_tokens, nll
from toy import FAMILIES, toy_classifier, toy_lm

IDS = torch.randint(2, 64, (3, 11), generator=torch.Generator().manual_seed(0))


def supervised(*spans: tuple[int, int]) -> Batch:
    """Three rows of eleven tokens; of each the labels from the first place to before the second."""
    labels = torch.full_like(IDS, IGNORED)
    for row, (first, last) in enumerate(spans):
        labels[row, first:last] = IDS[row, first:last]
    return Batch(input_ids=IDS, labels=labels)


BATCHES = {
    "answers": supervised((6, 9), (4, 7), (8, 10)),
    "text": supervised((0, 11), (0, 11), (0, 11)),
    "one token": supervised((5, 6), (5, 6), (5, 6)),
    "a row without": supervised((6, 9), (0, 0), (0, 1)),
    "nothing": supervised((0, 1), (0, 0), (0, 0)),
}


def plain(model: nn.Module, batch: Batch) -> Tensor:
    """Every row's summed NLL from all logits, token by token."""
    logp, labels = logits_of(model, batch).log_softmax(-1), batch["labels"]
    rows = []
    for row in range(len(labels)):
        places = [place for place in range(1, labels.shape[1]) if labels[row, place] != IGNORED]
        rows.append(sum((-logp[row, place - 1, labels[row, place]] for place in places), logp.new_zeros(())))
    return torch.stack(rows)


@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_all_logits(family: str, case: str) -> None:
    model, batch = toy_lm(family, dtype=torch.float64), BATCHES[case]
    expected = plain(model, batch)
    torch.testing.assert_close(answer_nll(model, batch).sum(1), expected, rtol=1e-6, atol=1e-9)  # llama's norms round to fp32
    torch.testing.assert_close(nll(model, batch), expected.sum() / batch.tokens, rtol=1e-6, atol=1e-9)
    if expected.requires_grad:
        wanted = torch.autograd.grad(expected.sum() / batch.tokens, list(model.parameters()))
        for one, other in zip(torch.autograd.grad(nll(model, batch), list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_supervised_steps_are_asked_for(family: str, lora: bool) -> None:
    model: Any = toy_lm(family)
    model = add_lora(model, rank=2) if lora else model
    assert keeps_logits(model)
    logits, targets = answer_logits(model, BATCHES["answers"])
    assert logits.shape[:2] == targets.shape == (3, 6)  # steps 3 to 8, that predict the tokens 4 to 9
    flat, wanted = answer_tokens(model, BATCHES["answers"])
    assert len(flat) == len(wanted) == 8
    torch.testing.assert_close(F.cross_entropy(flat, wanted, reduction="sum"), plain(model, BATCHES["answers"]).sum(), rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_asked_gives_all_logits() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 64)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids)

    model = Own()
    assert not keeps_logits(model)
    torch.testing.assert_close(answer_nll(model, BATCHES["answers"]).sum(1), plain(model, BATCHES["answers"]))


def test_a_row_of_a_classifier_is_one_step() -> None:
    model, labels = toy_classifier(), torch.tensor([1, 3, 0])
    batch = Batch(pixel_values=torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), labels=labels)
    logits, targets = answer_logits(model, batch)
    assert logits.shape[:2] == targets.shape == (3, 1)
    assert torch.equal(nll(model, batch), F.cross_entropy(logits[:, 0], labels, reduction="sum") / 3)


def test_tokens_are_read_in_fp32_at_least() -> None:
    assert answer_tokens(toy_lm("llama", dtype=torch.bfloat16), BATCHES["answers"])[0].dtype == torch.float32
    assert answer_tokens(toy_lm("gpt2", dtype=torch.float64), BATCHES["answers"])[0].dtype == torch.float64
