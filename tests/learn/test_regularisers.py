"""EWC, L2-SP and LwF: their gradients by hand and by brute force."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.learn.ewc import EWC, decayed, quadratic
from remanence.learn.l2sp import L2SP, distance
from remanence.learn.lwf import LwF, lwf_loss
from remanence.stream import Task
from remanence.training.batches import IGNORED, Batch
from remanence.training.losses import nll
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()


def pictures(classes: tuple[int, int], count: int = 24) -> Dataset:
    made = torch.Generator().manual_seed(classes[0])
    labels = [classes[n % 2] for n in range(count)]
    centre = torch.tensor(labels)[:, None] * torch.tensor([1.0, -1.0] * 4)
    return Dataset.from_dict({"features": (0.5 * torch.randn(count, 8, generator=made) + centre).tolist(), "label": labels})


OLD, NEW = Task("old", pictures((0, 1)), kind="classes"), Task("new", pictures((2, 3)), kind="classes")


def trainer(seed: int = 0, record: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        Settings(**({"steps": 30, "batch_size": 8, "lr": 0.02} | changes)), processor=TOKENIZER, seed=seed, record=record, progress=False
    )


def live(method: Any, **changes: Any) -> nn.Module:
    start = toy_classifier()
    for number, task in enumerate((OLD, NEW)):
        start = method.learn(start, task, trainer(number, **changes))
    return start


def moved(one: nn.Module, other: nn.Module) -> float:
    return sum((a - b).square().sum().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


# EWC


def test_the_gradient_of_ewc_is_lam_fisher_times_the_distance() -> None:
    lam, start = 7.0, nn.Linear(2, 1, bias=False).double()
    fisher, anchor = {"weight": torch.tensor([[2.0, 3.0]]).double()}, {"weight": torch.tensor([[1.0, -1.0]]).double()}
    with torch.no_grad():
        start.weight.copy_(torch.tensor([[1.5, 1.0]]))
    (lam / 2 * quadratic(start, fisher, anchor)).backward()
    torch.testing.assert_close(start.weight.grad, torch.tensor([[7.0 * 2 * 0.5, 7.0 * 3 * 2.0]]).double())  # lam F (theta - theta*)


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_gradient_inside_training_adds_every_old_task(mode: str) -> None:
    """One step of SGD from the recorded weights against the gradient put together by hand."""
    method = EWC(lam=3.0, mode=mode, gamma=0.5, definition="empirical")
    start = live(method).double()
    assert len(method.past) == (1 if mode == "online" else 2)
    third = Task("third", pictures((1, 3)), kind="classes")
    loop = trainer(9, steps=1, optimizer="sgd", lr=0.1, clip=None)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(0.1)
    batch = loop.batches(third.train, "classes")[0]
    batch["pixel_values"] = batch["pixel_values"].double()
    by_hand = copy.deepcopy(start)
    F.cross_entropy(by_hand(batch["pixel_values"]), batch["labels"]).backward()
    wanted = {
        name: parameter
        - 0.1 * (parameter.grad + sum(3.0 * old["fisher"][name].double() * (parameter - old["anchor"][name]) for old in method.past))
        for name, parameter in by_hand.named_parameters()
    }
    original = loop.batches
    loop.batches = lambda *given, **named: Doubled(original(*given, **named))  # type: ignore[method-assign]
    method.learn(start, third, loop)
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-9, atol=1e-9)


class Doubled:
    """Batches in double precision."""

    def __init__(self, batches: Any):
        self.batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __getitem__(self, index: int) -> Batch:
        batch = self.batches[index]
        return Batch({name: value.double() if value.is_floating_point() else value for name, value in batch.items()})

    def __iter__(self) -> Any:
        for batch in self.batches:
            yield Batch({name: value.double() if value.is_floating_point() else value for name, value in batch.items()})


def test_the_online_fisher_fades_by_gamma() -> None:
    old, new = {"a": torch.tensor([4.0]), "gone": torch.tensor([2.0])}, {"a": torch.tensor([1.0]), "fresh": torch.tensor([3.0])}
    found = decayed(old, new, 0.5)
    assert {name: value.item() for name, value in found.items()} == {"a": 3.0, "gone": 1.0, "fresh": 3.0}


def test_ewc_notes_lam_beside_the_trace_of_its_fisher() -> None:
    notes: list[dict[str, Any]] = []
    method = EWC(lam=5.0)
    method.learn(toy_classifier(), OLD, trainer(record=lambda table, rows: notes.extend(rows)))
    content = next(row["content"] for row in notes if row.get("name") == "fisher")
    trace = sum(value.double().sum().item() for value in method.past[0]["fisher"].values())
    assert content["trace"] == pytest.approx(trace)
    assert content["lam_trace"] == pytest.approx(5.0 * trace)
    assert content["definition"] == "sampled"


def test_ewc_keeps_what_mattered_and_a_great_lam_nails_it() -> None:
    start, method = toy_classifier(), EWC(lam=1e4)
    start = method.learn(start, OLD, trainer(0))
    fisher = method.past[0]["fisher"]
    before = {name: value.detach().clone() for name, value in start.named_parameters()}
    plain = trainer(1).fit(copy.deepcopy(start), trainer(1).batches(NEW.train, "classes"))
    after = method.learn(start, NEW, trainer(1))

    def weighted(of: nn.Module) -> float:
        return sum((fisher[name] * (value - before[name]).square()).sum().item() for name, value in of.named_parameters())

    assert weighted(after) < 0.2 * weighted(plain)


# L2-SP


def test_the_gradient_of_l2sp_is_lam_times_the_distance() -> None:
    start = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        start.weight.copy_(torch.tensor([[1.5, 1.0]]))
    (4.0 / 2 * distance(start, {"weight": torch.tensor([[1.0, -1.0]])})).backward()
    torch.testing.assert_close(start.weight.grad, torch.tensor([[2.0, 8.0]]))


def test_l2sp_stays_nearer_to_the_task_or_to_the_start() -> None:
    start = toy_classifier()
    free, near = live(L2SP(lam=0)), live(L2SP(lam=5.0, reference="start"))
    assert moved(near, start) < 0.5 * moved(free, start)
    method = L2SP(lam=1.0, reference="task")
    live(method)
    assert not torch.equal(method.anchor["1.weight"], dict(start.named_parameters())["1.weight"])


# LwF


def test_the_distillation_gradient_is_zero_at_the_old_weights() -> None:
    start = toy_lm("llama", vocab=len(TOKENIZER), dtype=torch.float64)
    batch = Batch(input_ids=torch.randint(3, 40, (3, 7)), labels=torch.randint(3, 40, (3, 7)))
    batch["labels"][0, :4] = IGNORED
    teacher = copy.deepcopy(start).requires_grad_(False)
    gradients = [torch.autograd.grad(lwf_loss(start, teacher, batch, alpha, 2.0), list(start.parameters())) for alpha in (0.0, 5.0)]
    plain = torch.autograd.grad(nll(start, batch), list(start.parameters()))
    for one, other, own in zip(*gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(one, own, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
def test_the_teacher_stands_first_and_tau_squared_multiplies(tau: float) -> None:
    """The loss by a loop over positions, and its gradient by finite differences."""
    made = torch.Generator().manual_seed(2)
    student, teacher = (nn.Linear(5, 4).double() for _ in range(2))
    batch = Batch(pixel_values=torch.randn(6, 5, generator=made).double(), labels=torch.arange(6) % 4)
    value = lwf_loss(student, teacher, batch, 0.7, tau, [0, 2, 3])
    total = 0.0
    for row in range(6):
        new, old = student(batch["pixel_values"][row]), teacher(batch["pixel_values"][row])
        total += -new.log_softmax(-1)[row % 4].item() / 6
        p, q = (logits[[0, 2, 3]].div(tau).softmax(-1) for logits in (old, new))
        total += 0.7 * tau**2 * sum((p[k] * (p[k].log() - q[k].log())).item() for k in range(3)) / 6
    assert value.item() == pytest.approx(total, rel=1e-10)
    value.backward()
    assert teacher.weight.grad is None
    for place in ((0, 0), (1, 2), (3, 4)):
        ends = []
        for move in (1e-5, -1e-5):
            with torch.no_grad():
                student.weight[place] += move
                ends.append(lwf_loss(student, teacher, batch, 0.7, tau, [0, 2, 3]).item())
                student.weight[place] -= move
        assert student.weight.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_a_language_model_distils_where_a_label_stands() -> None:
    student, teacher = (toy_lm("gpt2", seed=seed, vocab=len(TOKENIZER), dtype=torch.float64) for seed in (0, 1))
    batch = Batch(input_ids=torch.randint(3, 40, (2, 6)), labels=torch.full((2, 6), IGNORED))
    batch["labels"][0, 3:5] = 7
    batch["labels"][1, 5] = 9
    with torch.no_grad():
        value = lwf_loss(student, teacher, batch, 1.0, 2.0) - nll(student, batch)
        old, new = (m(input_ids=batch["input_ids"]).logits.div(2).log_softmax(-1) for m in (teacher, student))
    each = [(old[row, t].exp() * (old[row, t] - new[row, t])).sum() for row, t in ((0, 2), (0, 3), (1, 4))]
    torch.testing.assert_close(value, 4 * torch.stack(each).mean())
    empty = Batch(input_ids=batch["input_ids"], labels=torch.full((2, 6), IGNORED))
    assert lwf_loss(student, teacher, empty, 1.0, 2.0).item() == 0.0


def test_a_classifier_distils_old_classes_only_and_its_first_task_is_plain() -> None:
    method = LwF(alpha=5.0)
    first = method.learn(toy_classifier(), OLD, trainer(0))
    plain = trainer(0).fit(toy_classifier(), trainer(0).batches(OLD.train, "classes"))
    assert moved(first, plain) == 0.0
    assert method.seen == [0, 1]
    inputs = torch.tensor(NEW.train["features"])
    before = copy.deepcopy(first)
    naive = trainer(1).fit(copy.deepcopy(first), trainer(1).batches(NEW.train, "classes"))
    after = method.learn(first, NEW, trainer(1))
    assert method.seen == [0, 1, 2, 3]
    with torch.no_grad():
        drift = [((m(inputs)[:, :2].softmax(-1) - before(inputs)[:, :2].softmax(-1)).abs().mean()).item() for m in (after, naive)]
    assert drift[0] < drift[1]


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: EWC(lam=-1), r"ewc\.lam"),
        (lambda: EWC(gamma=2), r"ewc\.gamma"),
        (lambda: EWC(mode="onlin"), "did you mean 'online'"),
        (lambda: EWC(definition="sample"), "did you mean 'sampled'"),
        (lambda: EWC(rows=0), r"ewc\.rows"),
        (lambda: L2SP(lam=float("nan")), r"l2sp\.lam"),
        (lambda: L2SP(reference="x"), r"l2sp\.reference"),
        (lambda: LwF(alpha=-1), r"lwf\.alpha"),
        (lambda: LwF(tau=0), r"lwf\.tau"),
    ],
)
def test_wrong_settings_are_refused_by_name(make: Any, place: str) -> None:
    with pytest.raises(Mistake, match=place):
        make()
