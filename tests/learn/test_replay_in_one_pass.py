"""Replay's loss in one forward pass: the value and gradients of two, two passes where batch norm or shapes forbid it."""

import pytest
import torch
from datasets import Dataset
from torch import nn

from remanence.learn.replay import Replay, replay_nll
from remanence.stream import Task
from remanence.training.batches import Batch
from remanence.training.losses import nll
from remanence.training.trainer import Settings, Trainer
from toy import toy_batch, toy_classifier, toy_lm, toy_tokenizer


def images(rows, seed):
    draw = torch.Generator().manual_seed(seed)
    return Batch(pixel_values=torch.randn(rows, 8, generator=draw), labels=torch.randint(4, (rows,), generator=draw))


def words(rows, seed, tokens=9):
    made = Batch(toy_batch(rows=rows, tokens=tokens, seed=seed))
    made["labels"][0, : tokens // 2] = -100
    return made


def with_norm():
    return nn.Sequential(toy_classifier(), nn.BatchNorm1d(4))


def passes(model):
    """Count the rows of each forward pass from now on."""
    seen = []
    model.register_forward_hook(lambda layer, given, out: seen.append(len(out if isinstance(out, torch.Tensor) else out.logits)))
    return seen


CASES = {
    "classifier": (toy_classifier, images(5, 1), images(3, 2), [8]),
    "language model": (lambda: toy_lm("llama"), words(4, 1), words(2, 2), [6]),
    "other length": (lambda: toy_lm("llama"), words(4, 1), words(2, 2, tokens=7), [4, 2]),
    "batch norm in training": (lambda: with_norm().train(), images(5, 1), images(3, 2), [5, 3]),
    "batch norm in evaluation": (lambda: with_norm().eval(), images(5, 1), images(3, 2), [8]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("own", [True, False])
def test_one_pass_is_the_sum_of_the_means(case, own):
    make, new, old, expected = CASES[case]
    new, old = Batch(new), Batch(old)
    if not own:  # denominators of a whole step, as the trainer sets them
        new._rows, new._tokens, old._rows, old._tokens = 7.0, 50.0, 2.5, 11.0
    model, other = make(), make()
    total = nll(other, new) + nll(other, old)
    seen = passes(model)
    value = replay_nll(model, Batch(new=new, old=old))
    assert seen == expected
    torch.testing.assert_close(value, total, rtol=1e-6, atol=1e-6)
    for mine, plain in zip(torch.autograd.grad(value, list(model.parameters())), torch.autograd.grad(total, list(other.parameters()))):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_batch_norm_keeps_the_statistics_of_two_passes():
    _, new, old, _ = CASES["batch norm in training"]
    model, other = with_norm().train(), with_norm().train()
    replay_nll(model, Batch(new=new, old=old))
    nll(other, new), nll(other, old)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)


@pytest.mark.parametrize("memory", ["reservoir", "balanced"])
@pytest.mark.parametrize("kind", ["classes", "text"])
def test_rows_that_come_back_from_a_memory_share_the_pass_with_the_new_ones(memory, kind):
    rows = (
        Dataset.from_dict(
            {"features": torch.randn(12, 8, generator=torch.Generator().manual_seed(3)).tolist(), "label": [n % 4 for n in range(12)]}
        )
        if kind == "classes"
        else Dataset.from_dict({"text": ["abc def ghi jkl mno " * 8]})
    )
    model = toy_classifier() if kind == "classes" else toy_lm("llama")
    seen = passes(model)
    trainer = Trainer(Settings(steps=4, batch_size=4, length=16), processor=toy_tokenizer(), progress=False)
    Replay(capacity=8, memory=memory).learn(model, Task("one", rows, kind=kind), trainer)
    assert seen == [4, 8, 8, 8]
