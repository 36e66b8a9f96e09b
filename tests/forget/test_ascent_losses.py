"""The objectives of the fine-tuning forgetters: equal to their published formulas row by row, and blind to prompts and padding."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from objectives import COUNTS, LABELS, TOKENIZER, Table, check_slope, lm, moved, objective, widened
from remanence.errors import Mistake
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.gradient_difference import GradientDifference
from remanence.forget.kl import AscentKL
from remanence.forget.npo import NPO
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.losses import nll
from remanence.training.preference import npo_loss, summed_nll
from remanence.training.reference import frozen_copy, mean_kl, summed_kl
from remanence.training.trainer import Settings, Trainer

FORGET = Dataset.from_dict({"question": [f"who is {'a' * n}" for n in range(1, 6)], "answer": ["xyz"[: n % 3 + 1] for n in range(5)]})
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(7)], "answer": ["b" * (n % 4 + 1) for n in range(7)]})
REQUEST = Request("gone", FORGET, RETAIN)
FACTORS = {"gamma": 0.7, "alpha": 1.3}
BOTH = [GradientDifference(**FACTORS), AscentKL(**FACTORS), NPO(beta=0.5, **FACTORS), NPO(beta=0.5, retain="kl", **FACTORS)]
ALL = [GradientAscent(0.7), *BOTH, NPO(beta=0.5, retain="none", gamma=0.7)]


def row_terms(model: nn.Module, reference: nn.Module, batch: Batch) -> list[tuple[list[float], list[float]]]:
    """For each row, token by token, without padding: the NLLs, and KL(p_0 || p)."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        last = int((labels != IGNORED).nonzero().max())
        now = model(input_ids=ids[None, : last + 1]).logits[0].log_softmax(-1)
        before = reference(input_ids=ids[None, : last + 1]).logits[0].log_softmax(-1)
        places = [place for place in range(1, last + 1) if labels[place] != IGNORED]
        losses = [-now[place - 1, labels[place]].item() for place in places]
        kls = [sum(math.exp(a) * (a - b) for a, b in zip(before[place - 1].tolist(), now[place - 1].tolist())) for place in places]
        found.append((losses, kls))
    return found


def token_mean(rows: list[tuple[list[float], list[float]]], column: int) -> float:
    values = [value for row in rows for value in row[column]]
    return sum(values) / len(values)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_objective_equals_the_published_formula_row_by_row(method: Any) -> None:
    model = lm()
    reference = copy.deepcopy(model)
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    forget = row_terms(model, reference, batch.get("forget", batch))
    retain = row_terms(model, reference, batch["retain"]) if "retain" in batch else []
    value = -0.7 * token_mean(forget, 0)
    if isinstance(method, NPO):
        before = row_terms(reference, reference, batch["forget"])
        ratios = [sum(old[0]) - sum(new[0]) for new, old in zip(forget, before)]  # log pi_theta / pi_ref
        value = 0.7 * sum(2 / 0.5 * math.log(1 + math.exp(0.5 * ratio)) for ratio in ratios) / len(ratios)
    if retain:
        kl = isinstance(method, AscentKL) or (isinstance(method, NPO) and method.retain == "kl")
        value += 1.3 * token_mean(retain, int(kl))
    assert loss(model, batch).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_npo_is_two_over_beta_log_two_at_the_reference(beta: float) -> None:
    model = lm()
    batch, loss = objective(NPO(beta=beta, retain="none"), model, REQUEST)
    assert loss(model, batch).item() == pytest.approx(2 / beta * math.log(2), rel=1e-12)


def test_kl_and_its_gradient_are_zero_at_the_reference() -> None:
    model = lm()
    batch, loss = objective(AscentKL(gamma=0.0), model, REQUEST)
    value = loss(model, batch)
    value.backward()
    assert abs(value.item()) < 1e-14
    assert max(parameter.grad.abs().max().item() for parameter in model.parameters()) < 1e-12


def test_npo_with_beta_to_zero_has_the_gradient_of_ascent_on_the_summed_nll() -> None:
    model = lm()
    batch, loss = objective(NPO(beta=1e-9, retain="none"), model, REQUEST)
    moved(model)
    parameters = list(model.parameters())
    npo = torch.autograd.grad(loss(model, batch), parameters)
    ascent = torch.autograd.grad(-summed_nll(model, batch["forget"]).mean(), parameters)
    for one, other in zip(npo, ascent, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def test_npo_slows_on_rows_that_are_far_below_the_reference() -> None:
    s = torch.tensor([1.0, 41.0], dtype=torch.float64, requires_grad=True)
    npo_loss(s, torch.tensor([1.0, 1.0], dtype=torch.float64), 0.1).sum().backward()
    assert s.grad[0].item() == pytest.approx(-1.0)  # 2 sigmoid(0)
    assert s.grad[1].item() == pytest.approx(-2 / (1 + math.exp(4.0)))


def test_gradients_of_the_pure_losses_agree_with_finite_differences() -> None:
    made = torch.Generator().manual_seed(0)
    s, s_0 = (torch.rand(5, generator=made, dtype=torch.float64, requires_grad=need) for need in (True, False))
    assert torch.autograd.gradcheck(lambda s: npo_loss(s, s_0, 0.3), (s,))
    now, before = (torch.randn(4, 6, generator=made, dtype=torch.float64, requires_grad=need) for need in (True, False))
    assert torch.autograd.gradcheck(lambda now: summed_kl(before, now), (now,))


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_gradient_of_the_objective_agrees_with_finite_differences(method: Any) -> None:
    model = lm()
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    check_slope(model, batch, loss)


@pytest.mark.parametrize("name", ["nll", "npo", "kl"])
def test_prompt_and_padding_contribute_nothing(name: str) -> None:
    batch, table, reference = Batch(input_ids=LABELS.clamp(min=0), labels=LABELS), Table(0), Table(1)
    losses = {
        "nll": lambda: nll(table, batch),
        "npo": lambda: npo_loss(summed_nll(table, batch), summed_nll(reference, batch).detach(), 0.1).sum() / batch.rows,
        "kl": lambda: mean_kl(table, reference, batch),
    }
    losses[name]().backward()
    counts = table.logits.grad.abs().sum(-1) > 0  # (B, T)
    assert counts.tolist() == COUNTS
    assert reference.logits.grad is None


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_wider_padding_changes_nothing(method: Any) -> None:
    model = lm()
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    assert loss(model, widened(batch)).item() == pytest.approx(loss(model, batch).item(), rel=1e-10)


def test_kl_of_a_classifier_is_the_mean_over_rows() -> None:
    made = torch.Generator().manual_seed(0)
    before, now = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()
    batch = Batch(pixel_values=torch.randn(5, 3, generator=made, dtype=torch.float64), labels=torch.zeros(5, dtype=torch.int64))
    p, q = before(batch["pixel_values"]).softmax(-1), now(batch["pixel_values"]).softmax(-1)
    assert mean_kl(now, before, batch).item() == pytest.approx((p * (p / q).log()).sum().item() / 5)


def test_frozen_copy_shares_what_is_frozen_and_keeps_what_is_trained() -> None:
    model = lm()
    model.transformer.wpe.weight.requires_grad_(False)
    kept = frozen_copy(model)
    assert kept.transformer.wpe.weight is model.transformer.wpe.weight
    old = model.lm_head.weight.detach().clone()
    moved(model.lm_head)
    assert torch.equal(kept.lm_head.weight, old)
    assert not any(parameter.requires_grad for parameter in kept.parameters())
    assert model.lm_head.weight.requires_grad


def test_frozen_copy_of_a_few_parameters_shares_the_others_and_leaves_their_flags() -> None:
    model = lm()
    kept = frozen_copy(model, ["transformer.wpe.weight"])
    assert kept.transformer.wpe.weight is not model.transformer.wpe.weight
    assert not kept.transformer.wpe.weight.requires_grad
    assert all(one is other for (name, one), other in zip(kept.named_parameters(), model.parameters()) if name != "transformer.wpe.weight")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_ascent_ends_after_the_step_that_passes_the_bound() -> None:
    seen: list[int] = []
    model = lm()
    trainer = Trainer(
        Settings(steps=60, batch_size=5, lr=0.01, accumulate=2),
        processor=TOKENIZER,
        watch=lambda _, step: seen.append(step),
        progress=False,
    )
    rows = trainer.batches(FORGET, "qa", size=5, shuffle=False)
    with torch.no_grad():
        start = nll(model, rows[0]).item()
    GradientAscent(max_nll=start + 1.0).forget(model, REQUEST, trainer)
    with torch.no_grad():
        end = nll(model, rows[0]).item()
    assert 1 < len(seen) < 60
    assert end > start + 1.0
    again = lm()
    trainer = Trainer(Settings(steps=len(seen) - 1, batch_size=5, lr=0.01, accumulate=2), processor=TOKENIZER, progress=False)
    GradientAscent().forget(again, REQUEST, trainer)
    with torch.no_grad():
        assert nll(again, rows[0]).item() > start + 1.0  # the last step measured it before moving
    trainer = Trainer(Settings(steps=len(seen) - 2, batch_size=5, lr=0.01, accumulate=2), processor=TOKENIZER, progress=False)
    again = lm()
    GradientAscent().forget(again, REQUEST, trainer)
    with torch.no_grad():
        assert nll(again, rows[0]).item() <= start + 1.0


@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_missing_retain_set_is_a_mistake_that_names_the_request(method: Any) -> None:
    with pytest.raises(Mistake, match=r"request 'alone'.*no retain set.*retain"):
        method.forget(lm(), Request("alone", FORGET), Trainer(processor=TOKENIZER))


@pytest.mark.parametrize(
    ("make", "options", "place"),
    [
        (NPO, {"beta": 0.0}, "npo.beta"),
        (NPO, {"retain": "kll"}, "npo.retain"),
        (NPO, {"gamma": -1.0}, "npo.gamma"),
        (AscentKL, {"alpha": math.inf}, "kl.alpha"),
        (GradientDifference, {"gamma": math.nan}, "gradient_difference.gamma"),
        (GradientAscent, {"gamma": -0.1}, "gradient_ascent.gamma"),
        (GradientAscent, {"max_nll": 0.0}, "gradient_ascent.max_nll"),
    ],
)
def test_bad_values_are_refused_by_name(make: type, options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=place):
        make(**options)
