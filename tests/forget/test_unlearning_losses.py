"""The losses of unlearning beyond ascent and NPO: equal to their published formulas token by token, right at the start, in their limits, and in what they ignore."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from objectives import COUNTS, LABELS, TOKENIZER, Spy, Table, check_slope, lm, moved, objective, widened
from remanence.errors import Mistake
from remanence.forget.ceu import CEU
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.npo import NPO
from remanence.forget.pdu import PDU
from remanence.forget.random_label import RandomLabel, mismatched
from remanence.forget.refusal import Refusal
from remanence.forget.satimp import SatImp
from remanence.forget.simnpo import SimNPO
from remanence.forget.undial import UNDIAL
from remanence.forget.wga import WGA
from remanence.models.adapters import add_lora
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch, Changed
from remanence.training.losses import answer_nll, answer_tokens, nll
from remanence.training.preference import npo_loss, summed_nll
from remanence.training.reference import frozen_copy
from remanence.training.refusals import SENTENCES
from remanence.training.trainer import Settings, Step, Trainer
from remanence.training.unlearning import (
    ceu_loss,
    drawn_labels,
    logit_margin_loss,
    satimp_loss,
    simnpo_loss,
    undial_loss,
    wga_loss,
    without_first,
)
from toy import toy_lm

V = len(TOKENIZER)
FORGET = Dataset.from_dict({"question": [f"who is {'a' * n}" for n in range(1, 6)], "answer": ["xyzw"[: n % 3 + 1] for n in range(5)]})
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(7)], "answer": ["b" * (n % 4 + 1) for n in range(7)]})
REQUEST = Request("gone", FORGET, RETAIN)
F = {"gamma": 0.7, "alpha": 1.3}  # factors
ALL = [
    SimNPO(2.0, 0.4, **F),
    WGA(1.5, **F),
    SatImp(2.0, 1.5, **F),
    CEU(retain="nll", **F),
    CEU(0, retain="nll", **F),
    UNDIAL(3.0, retain="nll", **F),
    PDU(eps=0.3, alpha=1.3, gamma=0.7),
    Refusal(**F),
    RandomLabel(**F),
    RandomLabel("retain", ascent=0.4, **F),
]


def answers(model: nn.Module, batch: Batch) -> list[list[tuple[int, list[float]]]]:
    """Of each row, token by token, without padding: the supervised token and the logits that predict it."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        last = int((labels != IGNORED).nonzero().max())
        logits = model(input_ids=ids[None, : last + 1]).logits[0].tolist()
        found.append([(int(labels[place]), logits[place - 1]) for place in range(1, last + 1) if labels[place] != IGNORED])
    return found


def logp(logits: list[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(value - top) for value in logits))
    return [value - total for value in logits]


def each(rows: list[list[tuple[int, list[float]]]], term: Callable[[int, list[float]], float]) -> float:
    values = [term(*token) for row in rows for token in row]
    return sum(values) / len(values)


def token_nll(token: int, logits: list[float]) -> float:
    return -logp(logits)[token]


def by_hand(method: Any, model: nn.Module, before: nn.Module, batch: Batch) -> float:
    """L_forget as published, in loops over rows, tokens and the vocabulary."""
    rows = answers(model, batch["forget"])
    if isinstance(method, SimNPO):
        means = [sum(token_nll(*token) for token in row) / len(row) for row in rows]
        return sum(2 / method.beta * math.log1p(math.exp(-method.beta * (mean - method.delta))) for mean in means) / len(means)
    if isinstance(method, WGA):
        return each(rows, lambda y, z: -(math.exp(logp(z)[y]) ** method.beta) * token_nll(y, z))
    if isinstance(method, SatImp):

        def satimp(y: int, z: list[float]) -> float:
            p = math.exp(logp(z)[y])
            return -(p**method.beta1) * (1 - p) ** method.beta2 * token_nll(y, z)

        return each(rows, satimp)
    if isinstance(method, CEU):

        def ceu(y: int, z: list[float]) -> float:
            rest = sum(math.exp(logp(z)[v]) for v in range(V) if v != y)
            return -sum(math.exp(logp(z)[v]) / rest * logp(z)[v] for v in range(V) if v != y)

        return each(rows, ceu)
    if isinstance(method, UNDIAL):
        old = {id(token): other for row, others in zip(rows, answers(before, batch["forget"])) for token, other in zip(row, others)}

        def undial(token: tuple[int, list[float]]) -> float:
            y, z0 = old[id(token)]
            wished = logp([value - method.beta * (v == y) for v, value in enumerate(z0)])
            return -sum(math.exp(w) * p for w, p in zip(wished, logp(token[1])))

        values = [undial(token) for row in rows for token in row]
        return sum(values) / len(values)
    if isinstance(method, PDU):
        return each(rows, lambda y, z: (max(z) - sum(z) / len(z)) ** 2)
    return each(rows, token_nll)  # refusals and random labels stand in the batch


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_objective_equals_the_published_formula_token_by_token(method: Any) -> None:
    model = lm()
    before = copy.deepcopy(model)
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    value = 0.7 * by_hand(method, model, before, batch) + 1.3 * each(answers(model, batch["retain"]), token_nll)
    if isinstance(method, PDU):
        value -= 1.3 * 0.3
    if "right" in batch:
        value -= 0.4 * each(answers(model, batch["right"]), token_nll)
    assert loss(model, batch).item() == pytest.approx(value, rel=1e-9)


# Identities at the start.


def test_undial_with_beta_zero_has_no_gradient_at_the_start() -> None:
    model = lm()
    batch, loss = objective(UNDIAL(0.0), model, REQUEST)
    loss(model, batch).backward()
    assert max(parameter.grad.abs().max().item() for parameter in model.parameters()) < 1e-12


def test_undial_lowers_the_true_token_alone_and_by_what_its_target_says() -> None:
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=made, dtype=torch.float64)
    targets = torch.tensor([2, 0, 6])
    now = logits.clone().requires_grad_()
    undial_loss(now, logits, targets, 2.0).sum().backward()
    p = logits.softmax(1)
    rest = 1 - p[range(3), targets] * (1 - math.exp(-2.0))  # what normalises the target
    wished = p / rest[:, None]
    wished[range(3), targets] *= math.exp(-2.0)
    torch.testing.assert_close(now.grad, p - wished)
    assert ((now.grad > 0) == torch.nn.functional.one_hot(targets, 7).bool()).all()


def test_kl_retain_term_is_zero_at_the_start() -> None:
    for method in (SimNPO(gamma=0.0, retain="kl"), RandomLabel(gamma=0.0, retain="kl"), UNDIAL(gamma=0.0, retain="kl")):
        model = lm()
        batch, loss = objective(method, model, REQUEST)
        assert abs(loss(model, batch).item()) < 1e-14


def test_ceu_pulls_by_the_probability_of_the_true_token_and_never_by_more_than_one() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0, 1.0], [-9.0, 0.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 0])
    ceu_loss(logits, targets).sum().backward()
    p = logits.detach().softmax(1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 0], p[:, 0])
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-15, rtol=0)
    others = p[:, 1:] - p[:, 1:] / (1 - p[:, :1])
    torch.testing.assert_close(logits.grad[:, 1:], others)


def test_the_logit_margin_is_zero_only_where_all_tokens_are_equally_likely() -> None:
    assert logit_margin_loss(torch.full((2, 5), 3.0)).tolist() == [0.0, 0.0]
    assert logit_margin_loss(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).item() == pytest.approx(0.75**2)


# Limits.


def gradient(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("method", [WGA(0.0, retain="none"), SatImp(0.0, 0.0, gamma=1.0, retain="none")], ids=repr)
def test_weights_of_exponent_zero_are_gradient_ascent(method: Any) -> None:
    model = lm()
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    assert loss(model, batch).item() == pytest.approx(-nll(model, batch["forget"]).item(), rel=1e-12)
    for one, other in zip(gradient(loss(model, batch), model), gradient(-nll(model, batch["forget"]), model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_satimp_with_beta2_zero_is_wga() -> None:
    values = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(satimp_loss(values, 2.0, 0.0), wga_loss(values, 2.0))


def test_wga_with_beta_one_has_the_gradient_of_the_probability() -> None:
    value = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    wga_loss(value, 1.0).sum().backward()
    torch.testing.assert_close(value.grad, -(-value.detach()).exp())  # d exp(-nll) / d nll


def test_simnpo_ignores_the_reference() -> None:
    losses = []
    for start in (0, 5):
        model = lm(start)
        batch, loss = objective(SimNPO(retain="none"), model, REQUEST)
        model.load_state_dict(lm(8).state_dict())
        losses.append(loss(model, batch).item())
    assert losses[0] == losses[1]


def test_simnpo_with_beta_to_zero_has_the_gradient_of_ascent_on_the_mean_nll_of_each_row() -> None:
    model = lm()
    batch, loss = objective(SimNPO(1e-9, gamma=1.0, retain="none"), model, REQUEST)
    moved(model)
    length = (batch["forget"]["labels"][:, 1:] != IGNORED).sum(1)
    ascent = -(summed_nll(model, batch["forget"]) / length).mean()
    for one, other in zip(gradient(loss(model, batch), model), gradient(ascent, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_npo_with_beta_to_zero_has_the_gradient_of_ascent() -> None:
    s = torch.tensor([3.0, 0.5], dtype=torch.float64, requires_grad=True)
    npo_loss(s, torch.tensor([1.0, 2.0], dtype=torch.float64), 1e-9).sum().backward()
    torch.testing.assert_close(s.grad, -torch.ones(2, dtype=torch.float64), rtol=1e-8, atol=0)


def test_npo_is_two_over_beta_log_two_at_the_start() -> None:
    batch, loss = objective(NPO(beta=0.2, retain="none"), model := lm(), REQUEST)
    assert loss(model, batch).item() == pytest.approx(10 * math.log(2), rel=1e-12)


# Gradients.


def test_gradients_of_the_pure_losses_agree_with_finite_differences() -> None:
    made = torch.Generator().manual_seed(0)

    def drawn(*shape: int, need: bool = True) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).requires_grad_(need)

    z, z0, targets, length = drawn(4, 6), drawn(4, 6, need=False), torch.tensor([1, 0, 5, 2]), torch.tensor([1, 2, 3, 4])
    s = (drawn(4, need=False).abs() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: simnpo_loss(s, length, 2.5, 0.3), (s,))
    assert torch.autograd.gradcheck(lambda z: undial_loss(z, z0, targets, 3.0), (z,))
    assert torch.autograd.gradcheck(logit_margin_loss, (z,))
    # a weight or a target that is held fixed: the slope of the loss with it held at its value here
    p = (-s.detach()).exp()
    for loss, weight in ((lambda s: wga_loss(s, 1.5), p**1.5), (lambda s: satimp_loss(s, 2.0, 1.5), p**2 * (1 - p) ** 1.5)):
        torch.testing.assert_close(torch.autograd.grad(loss(s).sum(), s)[0], -weight)
    wished = z.detach().softmax(1).scatter(1, targets[:, None], 0.0)
    wished = wished / wished.sum(1, keepdim=True)
    held = torch.autograd.grad(-(wished * z.log_softmax(1)).sum(), z)[0]
    assert torch.autograd.gradcheck(lambda z: -(wished * z.log_softmax(1)).sum(1), (z,))
    torch.testing.assert_close(torch.autograd.grad(ceu_loss(z, targets).sum(), z)[0], held)


@pytest.mark.parametrize("method", [m for m in ALL if not isinstance(m, WGA | SatImp | CEU)], ids=repr)
def test_gradient_of_the_objective_agrees_with_finite_differences(method: Any) -> None:
    model = lm()
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    check_slope(model, batch, loss)


# What does not count.


@pytest.mark.parametrize("name", ["simnpo", "wga", "satimp", "ceu", "undial", "pdu", "drawn"])
def test_prompt_and_padding_contribute_nothing(name: str) -> None:
    batch, table, old = Batch(input_ids=LABELS.clamp(min=0), labels=LABELS), Table(0), Table(1)
    drawn = Batch(batch | {"labels": drawn_labels(LABELS, np.uint64(7), 0, 8)})
    losses: dict[str, Callable[[], Tensor]] = {
        "simnpo": lambda: simnpo_loss(summed_nll(table, batch), torch.tensor([3, 2]), 4.5, 0.0),
        "wga": lambda: wga_loss(answer_nll(table, batch), 1.0),
        "satimp": lambda: satimp_loss(answer_nll(table, batch), 5.0, 1.0),
        "ceu": lambda: ceu_loss(*answer_tokens(table, batch)),
        "undial": lambda: undial_loss(answer_tokens(table, batch)[0], *answer_tokens(old, batch), 10.0),
        "pdu": lambda: logit_margin_loss(answer_tokens(table, batch)[0]),
        "drawn": lambda: nll(table, drawn),
    }
    losses[name]().sum().backward()
    assert table.logits.grad is not None
    counts = table.logits.grad.abs().sum(-1) > 0  # (B, T)
    assert counts.tolist() == COUNTS
    assert old.logits.grad is None


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_wider_padding_changes_nothing(method: Any) -> None:
    model = lm()
    batch, loss = objective(method, model, REQUEST)
    moved(model)
    assert loss(model, widened(batch)).item() == pytest.approx(loss(model, batch).item(), rel=1e-10)


# Pitfalls of the field's code.


def test_undial_leaves_the_vocabulary_alone_where_there_is_no_label() -> None:
    """-100 as an index counts from the end: a loss over all positions, as released, lowers the token V - 100 at prompts and padding."""
    table, old, wide = Table(0, 128), Table(1, 128), 128
    batch = Batch(input_ids=LABELS.clamp(min=0), labels=LABELS)
    undial_loss(answer_tokens(table, batch)[0], *answer_tokens(old, batch), 10.0).sum().backward()
    ours, table.logits.grad = table.logits.grad, None
    everywhere, before, labels = table.logits[:, :-1].flatten(0, 1), old.logits.detach()[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()
    undial_loss(everywhere, before, labels % wide, 10.0).sum().backward()  # what -100 as an index does
    released = table.logits.grad
    assert ours is not None
    assert released is not None
    silent = torch.tensor([[True, False, False, False, True], [False, False, True, True, True]])
    assert ours[silent].abs().max() == 0
    assert (released[silent][:, wide + IGNORED] > 0)[:1].all()
    torch.testing.assert_close(ours[~silent], released[~silent])


def test_defaults_of_satimp_are_those_of_the_configuration_not_of_the_class() -> None:
    method = SatImp()
    assert (method.beta1, method.beta2, method.gamma, method.alpha, method.retain) == (5.0, 1.0, 0.1, 1.0, "nll")


def test_other_defaults_are_the_published_ones() -> None:
    assert (SimNPO().beta, SimNPO().delta, SimNPO().gamma, SimNPO().alpha) == (4.5, 0.0, 0.125, 1.0)
    assert (WGA().beta, WGA().gamma, WGA().alpha) == (1.0, 1.0, 1.0)
    assert (UNDIAL().beta, UNDIAL().retain, CEU().skip, CEU().retain) == (10.0, "none", 1, "none")
    assert (PDU().alpha, PDU().eta, PDU().warmup) == (100.0, 5.0, 5.0)


def test_ceu_leaves_out_the_first_answer_token_before_tokens_are_counted() -> None:
    assert without_first(LABELS, 1).tolist() == [[IGNORED, IGNORED, IGNORED, 4, 1], [IGNORED, IGNORED, 1, IGNORED, IGNORED]]
    assert torch.equal(without_first(LABELS, 0), LABELS)
    assert (without_first(torch.tensor([[7, 8, 9]]), 1) == torch.tensor([[7, IGNORED, 9]])).all()  # nothing predicts the 7
    batch, _ = objective(CEU(), lm(), REQUEST)
    whole, _ = objective(CEU(0), lm(), REQUEST)
    assert batch["forget"].own_tokens() == whole["forget"].own_tokens() - 4


def test_ceu_of_a_step_in_which_nothing_is_left_is_zero_not_nan() -> None:
    batch, loss = objective(CEU(99), model := lm(), REQUEST)
    assert loss(model, batch).item() == 0.0


def test_the_margin_reads_the_logits_that_predict_the_answer() -> None:
    table = Table(0)
    chosen = table.logits.detach()[[0, 0, 0, 1, 1], [1, 2, 3, 0, 1]]
    batch = Batch(input_ids=LABELS.clamp(min=0), labels=LABELS)
    torch.testing.assert_close(answer_tokens(table, batch)[0].detach(), chosen)


# Dual ascent.


def test_the_multiplier_climbs_on_the_constraint_after_the_warm_up() -> None:
    method = PDU(eps=0.2, alpha=1.0, eta=0.5, warmup=1.0)
    spy = Spy(Settings(batch_size=4, accumulate=2, steps=3), processor=TOKENIZER, seed=3)
    model = lm()
    method.forget(model, REQUEST, spy)
    batches, loss, more = spy.caught
    expected = 1.0
    for number in range(4):
        micro = [batches[2 * number], batches[2 * number + 1]]
        kept = [nll(model, batch["retain"]).item() for batch in micro]
        for batch in micro:
            loss(model, batch)
        assert method.dual == expected
        more["after_step"](model, Step(number, micro))
        if number >= 1:  # a pass over 5 forget rows is 2 micro-batches, 1 step
            expected = max(0.0, expected + 0.5 * (sum(kept) / 2 - 0.2))
        assert method.dual == pytest.approx(expected, rel=1e-12)
        expected = method.dual
    assert expected > 1.0


def test_the_multiplier_never_falls_below_zero() -> None:
    method = PDU(eps=1e6, alpha=1.0, eta=1.0, warmup=0.0)
    method.forget(toy_lm("llama", vocab=V), REQUEST, Trainer(Settings(steps=2, batch_size=4), processor=TOKENIZER, progress=False))
    assert method.dual == 0.0


def test_the_bound_is_measured_where_it_is_not_given() -> None:
    notes: list[dict[str, Any]] = []
    model = lm()
    rows = Trainer(processor=TOKENIZER).batches(RETAIN, "qa", size=7, shuffle=False)[0]
    start = nll(model, rows).item()
    trainer = Trainer(Settings(steps=0), processor=TOKENIZER, progress=False, record=lambda table, found: notes.extend(found))
    PDU(tolerance=0.25).forget(model, REQUEST, trainer)
    (note,) = [row["content"] for row in notes if row.get("name") == "dual variable"]
    assert note["bound"] == pytest.approx(1.25 * start, rel=1e-9)


def test_the_multiplier_is_state_and_a_new_request_starts_it_anew() -> None:
    method = PDU(eps=0.0, alpha=2.0, eta=1.0, warmup=0.0)
    trainer = Trainer(Settings(steps=2, batch_size=4), processor=TOKENIZER, progress=False)
    method.forget(toy_lm("llama", vocab=V), REQUEST, trainer)
    assert method.dual > 2.0
    other = PDU()
    other.load_state_dict(method.state_dict())
    assert other.dual == method.dual
    method.forget(toy_lm("llama", vocab=V), REQUEST, Trainer(Settings(steps=0), processor=TOKENIZER, progress=False))
    assert method.dual == 2.0


# Refusals and random labels.


def said(batch: Batch) -> list[str]:
    """The supervised text of each row."""
    return [TOKENIZER.decode(labels[labels != IGNORED], skip_special_tokens=True).strip() for labels in batch["labels"]]


def test_a_refusal_is_the_rows_own_or_drawn_from_the_sentences() -> None:
    own = Request("own", FORGET.add_column("idk", [f"no {n}" for n in range(5)]), RETAIN)
    assert sorted(said(objective(Refusal(), lm(), own, size=5)[0]["forget"])) == [f"no {n}" for n in range(5)]
    assert set(said(objective(Refusal(("nope",)), lm(), own)[0]["forget"])) == {"nope"}
    drawn = said(objective(Refusal(), lm(), REQUEST, size=5)[0]["forget"])
    assert set(drawn) <= {sentence.lower() for sentence in SENTENCES}  # the toy tokenizer lowers the case
    assert drawn == said(objective(Refusal(), lm(1), REQUEST, size=5)[0]["forget"])


def test_a_refusal_answers_the_forget_questions() -> None:
    batch, _ = objective(Refusal(("nope",)), lm(), REQUEST, size=5)
    whole = [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in batch["forget"]["input_ids"]]
    assert sorted(whole) == sorted(f"q: {question}\na: nope" for question in FORGET["question"])


@pytest.mark.parametrize(
    ("method", "request_", "match"),
    [
        (
            Refusal(),
            Request("prose", Dataset.from_dict({"text": ["abc"]}), kind="text"),
            r"request 'prose'.*only a question can be refused",
        ),
        (Refusal(()), REQUEST, r"request 'gone'.*a refusal is empty"),
        (Refusal((" ",)), REQUEST, r"request 'gone'.*a refusal is empty"),
        (RandomLabel("retain", retain="none"), Request("alone", FORGET), r"request 'alone'.*no retain set.*random answers"),
        (
            RandomLabel("retain", retain="none"),
            Request("prose", Dataset.from_dict({"text": ["abc"]}), kind="text"),
            r"request 'prose'.*no answers to exchange",
        ),
        (PDU(), Request("alone", FORGET), r"request 'alone'.*no retain set.*PDU"),
        *((method, Request("alone", FORGET), r"request 'alone'.*no retain set") for method in (SimNPO(), WGA(), SatImp(), Refusal())),
    ],
)
def test_what_is_missing_is_named(method: Any, request_: Request, match: str) -> None:
    with pytest.raises(Mistake, match=match):
        method.forget(lm(), request_, Trainer(processor=TOKENIZER))


def test_random_tokens_are_uniform_new_at_every_visit_and_the_same_however_the_stream_is_cut() -> None:
    labels = torch.where(torch.rand(500, 8, generator=torch.Generator().manual_seed(0)) < 0.5, 3, IGNORED)
    drawn = drawn_labels(labels, np.uint64(11), 1000, 10)
    assert torch.equal(drawn == IGNORED, labels == IGNORED)
    counts = torch.bincount(drawn[drawn != IGNORED], minlength=10).double()
    expected = counts.sum() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square with 9 degrees of freedom: 1 in 1000
    parts = [drawn_labels(part, np.uint64(11), first, 10) for part, first in ((labels[:200, :6], 1000), (labels[200:, :6], 1200))]
    assert torch.equal(torch.cat(parts), drawn[:, :6])  # narrower padding too
    assert not torch.equal(drawn_labels(labels, np.uint64(11), 1500, 10), drawn)
    assert not torch.equal(drawn_labels(labels, np.uint64(12), 1000, 10), drawn)
    classes = drawn_labels(torch.zeros(400, dtype=torch.int64), np.uint64(1), 0, 4)
    assert classes.unique().tolist() == [0, 1, 2, 3]


def test_random_answers_belong_to_retain_rows() -> None:
    rows = mismatched(REQUEST, torch.Generator().manual_seed(0))
    assert rows["question"][:] == FORGET["question"][:]
    assert set(rows["answer"]) <= set(RETAIN["answer"])
    batch, _ = objective(RandomLabel("retain", ascent=1.0), lm(), REQUEST, size=5)
    questions = [[TOKENIZER.decode(ids).split("\n")[0] for ids in batch[part]["input_ids"]] for part in ("forget", "right")]
    assert questions[0] == questions[1]
    assert sorted(said(batch["right"])) == sorted(FORGET["answer"])


def test_changed_batches_are_counted_as_they_are_changed() -> None:
    plain = Trainer(Settings(batch_size=2), processor=TOKENIZER).batches(FORGET, "qa")
    changed = Changed(
        plain, lambda number, batch: Batch(batch | {"labels": without_first(batch["labels"], 99), "number": torch.tensor(number)})
    )
    assert len(changed) == len(plain)
    assert changed[3]["number"].item() == 3
    assert changed[0].own_tokens() == 0


# The model as it was.


def bytes_beside(copied: nn.Module, model: nn.Module) -> int:
    """Bytes that the copy holds and the model does not."""
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*copied.parameters(), *copied.buffers())}
    return sum(size for place, size in own.items() if place not in held)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_the_reference_under_lora_copies_the_adapter_and_no_base_weight(family: str, trained: bool) -> None:
    model = add_lora(toy_lm(family, vocab=V, width=64), rank=2)
    if trained:
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.05
    adapter = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    kept = frozen_copy(model)
    assert adapter <= bytes_beside(kept, model) <= adapter + buffers
    base = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert adapter + buffers < 0.2 * base


def test_a_model_whose_weights_are_all_frozen_is_not_copied_at_all() -> None:
    model = toy_lm("llama", vocab=V).requires_grad_(False)
    assert bytes_beside(frozen_copy(model), model) <= sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


@pytest.mark.parametrize("method", [NPO(), SimNPO(), WGA(), SatImp(), CEU(), PDU(), Refusal(), RandomLabel()], ids=repr)
def test_no_second_model_is_held_without_a_reference(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = copy.deepcopy

    def watched(thing: Any, memo: Any = None) -> Any:
        assert not isinstance(thing, nn.Module), "a model was copied"
        return plain(thing, memo)

    monkeypatch.setattr(copy, "deepcopy", watched)
    method.forget(lm(), REQUEST, Trainer(Settings(steps=1, batch_size=4), processor=TOKENIZER, progress=False))


# Values out of range.


@pytest.mark.parametrize(
    ("make", "options", "place"),
    [
        (SimNPO, {"beta": 0.0}, "simnpo.beta"),
        (SimNPO, {"delta": math.inf}, "simnpo.delta"),
        (WGA, {"beta": -1.0}, "wga.beta"),
        (SatImp, {"beta2": math.nan}, "satimp.beta2"),
        (CEU, {"skip": -1}, "ceu.skip"),
        (UNDIAL, {"beta": math.inf}, "undial.beta"),
        (PDU, {"eps": -0.1}, "pdu.eps"),
        (PDU, {"eta": math.nan}, "pdu.eta"),
        (Refusal, {"retain": "kll"}, "refusal.retain"),
        (RandomLabel, {"answers": "token"}, "random_label.answers"),
        (RandomLabel, {"ascent": -1.0}, "random_label.ascent"),
    ],
)
def test_bad_values_are_refused_by_name(make: type, options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=place):
        make(**options)


# Effect.


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    """A toy model that knows the rows of the request by heart."""
    model = toy_lm("llama", vocab=V)
    rows = Dataset.from_dict({column: [*FORGET[column], *RETAIN[column]] for column in ("question", "answer")})
    learner = Trainer(Settings(steps=120, batch_size=12, lr=3e-3), processor=TOKENIZER, progress=False)
    return learner.fit(model, learner.batches(rows, "qa"))


def measured(model: nn.Module, rows: Dataset) -> float:
    batch = Trainer(processor=TOKENIZER).batches(rows, "qa", size=len(rows), shuffle=False)[0]
    with torch.no_grad():
        return nll(model, batch).item()


EFFECTS = {
    "simnpo": SimNPO(gamma=1.0),
    "wga": WGA(),
    "satimp": SatImp(1.0, 0.0, gamma=1.0),
    "ceu": CEU(0, retain="nll"),
    "undial": UNDIAL(retain="nll"),
    "pdu": PDU(warmup=0.0),
    "refusal": Refusal(),
    "random_label": RandomLabel(),
}


def served(method: Any, taught: nn.Module) -> tuple[float, float]:
    """The NLLs on the forget and on the retain rows after a method."""
    model = copy.deepcopy(taught)
    method.forget(model, REQUEST, Trainer(Settings(steps=15, batch_size=5, lr=3e-3), processor=TOKENIZER, progress=False))
    return measured(model, FORGET), measured(model, RETAIN)


@pytest.fixture(scope="module")
def ascended(taught: nn.Module) -> tuple[float, float]:
    """The NLLs after gradient ascent."""
    return served(GradientAscent(), taught)


@pytest.mark.parametrize("name", EFFECTS)
def test_forget_nll_rises_and_retain_nll_far_less_than_under_ascent(name: str, taught: nn.Module, ascended: tuple[float, float]) -> None:
    start = measured(taught, FORGET), measured(taught, RETAIN)
    assert max(start) < 0.3
    forget, retain = served(EFFECTS[name], taught)
    assert forget > start[0] + 1
    assert retain - start[1] < 0.5 * (ascended[1] - start[1])
