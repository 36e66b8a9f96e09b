"""IdkDPO: equal to its formula by hand, one prompt for both answers, one end token each, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from remanence.errors import Mistake
from remanence.forget.dpo import DPO, REFUSAL, refusals, won_nll
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.losses import nll
from remanence.training.preference import summed_nll
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
FORGET = Dataset.from_dict(
    {
        "question": [f"who is {'a' * n}" for n in range(1, 6)],
        "answer": ["xyz"[: n % 3 + 1] for n in range(5)],
        "idk": ["no idea", None, " ", "ask me not", "no"],
    }
)
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(7)], "answer": ["b" * (n % 4 + 1) for n in range(7)]})
REQUEST = Request("gone", FORGET, RETAIN)


class Spy(Trainer):
    """Catches what a method would fit."""

    caught: tuple[Any, Any]

    def fit(self, model: nn.Module, batches: Any, loss: Any = nll, **_: Any) -> nn.Module:
        self.caught = (batches, loss)
        return model


def lm() -> nn.Module:
    return toy_lm("gpt2", vocab=len(TOKENIZER), dtype=torch.float64)


def objective(method: DPO, model: nn.Module, request: Request = REQUEST, size: int = 4) -> tuple[Batch, Any]:
    spy = Spy(Settings(batch_size=size), processor=TOKENIZER, seed=3)
    assert method.forget(model, request, spy) is model
    batches, loss = spy.caught
    return batches[0], loss


def moved(model: nn.Module) -> nn.Module:
    noise, other = torch.Generator().manual_seed(9), copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype))
    return other


def test_dpo_at_the_reference_is_log_2_plus_the_retain_nll() -> None:
    model = lm()
    batch, loss = objective(DPO(), model)
    assert loss(model, batch).item() == pytest.approx(math.log(2) + nll(model, batch["retain"]).item(), rel=1e-12)
    batch, loss = objective(DPO(factor="two_over_beta", retain="none"), model)
    assert loss(model, batch).item() == pytest.approx(20 * math.log(2), rel=1e-12)


def test_dpo_is_its_formula_row_by_row() -> None:
    model = lm()
    batch, loss = objective(DPO(beta=0.5, gamma=0.7, alpha=1.3), model)
    now, rows = moved(model), batch["forget"]

    def s(of: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
        found = []
        for row, wanted in zip(ids, labels):
            logp = of(input_ids=row[None]).logits[0].log_softmax(-1)
            found.append(-sum(logp[t - 1, wanted[t]].item() for t in range(1, len(row)) if wanted[t] != IGNORED))
        return found

    won, won_0 = (s(of, rows["won_input_ids"], rows["won_labels"]) for of in (now, model))
    lost, lost_0 = (s(of, rows["input_ids"], rows["labels"]) for of in (now, model))
    each = [math.log1p(math.exp(-0.5 * ((w0 - w) - (l0 - l)))) for w, w0, l, l0 in zip(won, won_0, lost, lost_0)]
    expected = 0.7 * sum(each) / 4 + 1.3 * nll(now, batch["retain"]).item()
    assert loss(now, batch).item() == pytest.approx(expected, rel=1e-10)


def test_both_answers_share_the_prompt_and_end_once() -> None:
    batch, _ = objective(DPO(), lm(), size=5)
    rows = batch["forget"]
    for lost, lost_labels, won, won_labels in zip(rows["input_ids"], rows["labels"], rows["won_input_ids"], rows["won_labels"]):
        lost_start, won_start = (int((labels != IGNORED).nonzero()[0]) for labels in (lost_labels, won_labels))
        assert lost_start == won_start > 0
        assert torch.equal(lost[:lost_start], won[:won_start])
        for labels in (lost_labels, won_labels):
            said = labels[labels != IGNORED].tolist()
            assert said.count(TOKENIZER.eos_token_id) == 1
            assert said[-1] == TOKENIZER.eos_token_id
            assert TOKENIZER.pad_token_id not in said
            assert (labels != IGNORED).nonzero().flatten().diff().eq(1).all()  # the answer alone, without a hole


def test_loss_does_not_depend_on_prompt_or_pad_targets() -> None:
    model = lm()
    batch, _ = objective(DPO(), model)
    rows, own = batch["forget"], won_nll(model, batch["forget"])
    padded = Batch(
        rows
        | {
            "won_input_ids": nn.functional.pad(rows["won_input_ids"], (0, 3)),
            "won_labels": nn.functional.pad(rows["won_labels"], (0, 3), value=IGNORED),
        }
    )
    torch.testing.assert_close(won_nll(model, padded), own)
    shown = nn.functional.log_softmax(model(input_ids=rows["won_input_ids"]).logits, -1)
    first = (rows["won_labels"] != IGNORED).int().argmax(1)
    count = (rows["won_labels"] != IGNORED).sum(1)
    by_hand = [-sum(shown[b, t - 1, rows["won_input_ids"][b, t]] for t in range(int(first[b]), int(first[b] + count[b]))) for b in range(4)]
    torch.testing.assert_close(own, torch.stack([torch.as_tensor(value) for value in by_hand]))


def test_rows_bring_their_own_refusal_and_holes_are_filled() -> None:
    assert refusals(FORGET["idk"], REFUSAL, "x") == ["no idea", REFUSAL, REFUSAL, "ask me not", "no"]
    assert refusals([float("nan"), "a"], "b", "x") == ["b", "a"]
    with pytest.raises(Mistake, match="row 1: has no refusal .2 of 5 rows"):
        DPO(refusal=None).forget(lm(), REQUEST, Trainer(processor=TOKENIZER, progress=False))


def test_without_a_column_all_rows_get_the_sentence() -> None:
    request = Request("gone", FORGET.remove_columns("idk"), RETAIN)
    batch, _ = objective(DPO(refusal="never"), lm(), request)
    labels = batch["forget"]["won_labels"]
    assert {
        TOKENIZER.decode([token for token in row if token != IGNORED], skip_special_tokens=True).strip() for row in labels.tolist()
    } == {"never"}
    with pytest.raises(Mistake, match="row 0: has no refusal"):
        objective(DPO(refusal=None), lm(), request)


def test_the_refusal_gains_and_the_answer_loses() -> None:
    model = toy_lm("llama", vocab=len(TOKENIZER))
    trainer = Trainer(Settings(steps=30, batch_size=5, lr=1e-3), processor=TOKENIZER, progress=False)
    batch, _ = objective(DPO(), model, size=5)
    before = won_nll(model, batch["forget"]) - summed_nll(model, batch["forget"])
    DPO(beta=0.5).forget(model, REQUEST, trainer)
    after = won_nll(model, batch["forget"]) - summed_nll(model, batch["forget"])
    assert (after < before - 1).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "dpo.beta"),
        ({"gamma": -1.0}, "dpo.gamma"),
        ({"factor": "two"}, "known are one, two_over_beta"),
        ({"retain": "nil"}, "did you mean 'nll'"),
        ({"refusal": "  "}, "dpo.refusal: is empty"),
    ],
)
def test_wrong_values_are_refused(options: dict, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        DPO(**options)


def test_rows_without_questions_are_refused() -> None:
    rows = Dataset.from_dict({"text": ["abc"]})
    with pytest.raises(Mistake, match="rows of kind 'text' have none"):
        DPO(retain="none").forget(lm(), Request("t", rows, kind="text"), Trainer(processor=TOKENIZER, progress=False))


def test_dpo_runs_on_a_real_pretrained_model(real_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(real_data / "stories260k") for kind in (AutoModelForCausalLM, AutoTokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(Settings(steps=2, batch_size=2, lr=1e-4, length=64), processor=tokenizer, progress=False)
    DPO().forget(model, REQUEST, trainer)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
