"""NPO and DPO by hand, and how forget rows meet retain rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from remanence.errors import Mistake
from remanence.training.batches import Batch, Batches, Pairs
from remanence.training.preference import dpo_loss, npo_loss
from remanence.training.requests import check_terms
from remanence.training.trainer import Settings, Trainer
from toy import toy_tokenizer


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand_and_at_the_reference() -> None:
    found = dpo_loss(numbers(1.0, 2.0), numbers(3.0, 2.0), numbers(5.0, 4.0), numbers(4.0, 4.0), 0.5)
    assert found.tolist() == pytest.approx([math.log1p(math.exp(-0.5 * (2 - -1))), math.log(2)])


def test_dpo_falls_where_the_winner_gains_and_the_loser_loses() -> None:
    won, lost = numbers(2.0).requires_grad_(), numbers(2.0).requires_grad_()
    dpo_loss(won, numbers(2.0), lost, numbers(2.0), 0.1).sum().backward()
    assert won.grad is not None
    assert lost.grad is not None
    assert won.grad.item() == pytest.approx(0.05)
    assert lost.grad.item() == pytest.approx(-0.05)


def test_npo_at_the_reference() -> None:
    assert npo_loss(numbers(3.0), numbers(3.0), 0.1).item() == pytest.approx(20 * math.log(2))


def streams() -> tuple[Trainer, Batches, Batches]:
    trainer = Trainer(Settings(batch_size=2, epochs=3), processor=toy_tokenizer(), progress=False)
    rows = [
        Dataset.from_dict({"question": [f"{word} {n}" for n in range(count)], "answer": ["x"] * count})
        for word, count in (("a", 5), ("b", 9))
    ]
    return trainer, trainer.batches(rows[0], "qa", stream="forget"), trainer.batches(rows[1], "qa", stream="retain")


def test_pairs_are_two_streams_and_a_pass_is_over_the_forget_rows() -> None:
    trainer, forget, retain = streams()
    pairs = trainer.pairs(forget, retain)
    assert isinstance(pairs, Pairs)
    assert len(pairs) == 3
    assert trainer.steps_for(pairs) == 9
    assert torch.equal(pairs[4]["forget"]["input_ids"], forget[4]["input_ids"])
    assert torch.equal(pairs[4]["retain"]["input_ids"], retain[4]["input_ids"])
    assert trainer.pairs(forget, None)[0].keys() == {"forget"}


def test_a_wrapping_method_decides_who_meets_whom_inside_its_block_alone() -> None:
    trainer, forget, retain = streams()

    class Fixed:
        def __getitem__(self, index: int) -> Batch:
            rows = np.array([index % 5])
            return Batch(forget=forget.take(rows), retain=retain.take(rows))

        def __len__(self) -> int:
            return 5

    with trainer.paired(lambda one, other: Fixed()):
        assert trainer.steps_for(trainer.pairs(forget, retain)) == 15
    assert isinstance(trainer.pairs(forget, retain), Pairs)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((-1, 1), "m.gamma: must be 0 or more"),
        ((1, math.inf), "m.alpha: must be 0 or more"),
        ((1, 1, "nl"), "m.retain: unknown value 'nl'; did you mean 'nll'"),
    ],
)
def test_terms_out_of_range_are_refused(values: tuple, match: str) -> None:
    with pytest.raises(Mistake, match=match):
        check_terms("m", *values)
