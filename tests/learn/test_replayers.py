"""Replay, DER++ and A-GEM: what is kept, what is drawn, and the losses and projections by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from torch import nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.learn.agem import AGEM, project_gradients, reference_gradient
from remanence.learn.derpp import DERpp, derpp_loss, logit_distance
from remanence.learn.joint import Joint
from remanence.learn.lora import LoRA
from remanence.learn.replay import Replay, replay_nll
from remanence.models.adapters import add_lora
from remanence.stream import Remembering, Request, Task
from remanence.training.batches import Batch, uniform
from remanence.training.losses import nll
from remanence.training.projection import dot
from remanence.training.trainer import Settings, Step, Trainer
from toy import toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
PEOPLE = Dataset.from_dict({"question": [f"who is {c * 2}" for c in "abcdefghijkl"], "answer": [f"{n * 13}" for n in range(12)]})
TEXTS = Dataset.from_dict({"text": [f"{c * 3} went to {c}{c}{d} and slept there" for c in "abcdef" for d in "xyz"]})


def pictures(classes: tuple[int, int], count: int = 40) -> Dataset:
    made = torch.Generator().manual_seed(classes[0])
    labels = [classes[n % 2] for n in range(count)]
    centre = torch.randn(4, 8, generator=torch.Generator().manual_seed(99))[torch.tensor(labels)] * 2
    return Dataset.from_dict({"features": (0.5 * torch.randn(count, 8, generator=made) + centre).tolist(), "label": labels})


OLD, NEW = Task("old", pictures((0, 1)), kind="classes"), Task("new", pictures((2, 3)), kind="classes")


def trainer(seed: int = 0, record: Any = None, watch: Any = None, **changes: Any) -> Trainer:
    settings = Settings(**({"steps": 60, "batch_size": 8, "lr": 0.01} | changes))
    return Trainer(settings, processor=TOKENIZER, seed=seed, record=record, watch=watch, progress=False)


def batch(rows: int = 5, seed: int = 0) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return Batch(pixel_values=torch.randn(rows, 8, generator=made).double(), labels=torch.randint(4, (rows,), generator=made))


def accuracy(of: nn.Module, task: Task) -> float:
    with torch.no_grad():
        return (of(torch.tensor(task.train["features"])).argmax(-1) == torch.tensor(task.train["label"])).double().mean().item()


def test_replay_adds_the_mean_over_the_old_batch() -> None:
    start, new, old = toy_classifier().double(), batch(5, 1), batch(3, 2)
    one, two = (F.cross_entropy(start(b["pixel_values"]), b["labels"]) for b in (new, old))
    torch.testing.assert_close(replay_nll(start, Batch(new=new, old=old)), one + two)
    torch.testing.assert_close(replay_nll(start, Batch(new=new)), one)


@pytest.mark.parametrize("make", [lambda: Replay(capacity=1000), lambda: DERpp(capacity=1000)])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_row_is_shown_to_the_memory_once_per_task_however_many_epochs(make: Any, accumulate: int) -> None:
    method = make()
    for number in range(2):
        method.learn(toy_classifier(), (OLD, NEW)[number], trainer(number, steps=15, batch_size=7, accumulate=accumulate))
    assert method.kept.seen == len(method.kept) == 80
    kept = {tuple(row) for row in method.kept.rows()["pixel_values"].tolist()}
    wanted = {tuple(row) for task in (OLD, NEW) for row in torch.tensor(task.train["features"]).tolist()}
    assert kept == wanted


def test_the_memory_is_the_reservoir_of_the_order_of_training() -> None:
    """Rows enter in the order in which the first epoch trains on them: a part of an epoch shows a part of the rows."""
    method, loop = Replay(capacity=100), trainer(steps=3)
    method.learn(toy_classifier(), OLD, loop)
    batches = loop.batches(OLD.train, "classes")
    wanted = torch.cat([batches[number]["pixel_values"] for number in range(3)])
    assert torch.equal(method.kept.rows()["pixel_values"], wanted)


def test_a_balanced_memory_shares_its_room_among_classes_or_tasks() -> None:
    method = Replay(capacity=8, memory="balanced")
    for number, task in enumerate((OLD, NEW)):
        method.learn(toy_classifier(), task, trainer(number, steps=5))
    assert method.kept.rows()["labels"].bincount().tolist() == [2, 2, 2, 2]
    texts = AGEM(capacity=6, memory="balanced")
    for number in range(2):
        task = Task(f"part {number}", PEOPLE.select(range(6 * number, 6 * number + 6)), kind="qa")
        texts.learn(toy_lm("llama", vocab=len(TOKENIZER), width=16, layers=1), task, trainer(number, steps=1))
    assert texts.kept.rows()["group"].bincount().tolist() == [3, 3]


@pytest.mark.parametrize("make", [lambda: Replay(capacity=40), lambda: DERpp(capacity=40, alpha=0.5)])
def test_replay_forgets_less_than_plain_training(make: Any) -> None:
    ends = {}
    for name, method in (("naive", Replay(capacity=0)), ("memory", make())):
        start = toy_classifier()
        for number, task in enumerate((OLD, NEW)):
            start = method.learn(start, task, trainer(number))
        ends[name] = accuracy(start, OLD)
    assert ends["memory"] > ends["naive"] + 0.2


def test_derpp_is_the_sum_of_its_three_parts() -> None:
    start, new, dark, old = toy_classifier().double(), batch(5, 1), batch(4, 2), batch(3, 3)
    dark["logits"] = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).double()
    value = derpp_loss(start, Batch(new=new, dark=dark, old=old), 0.3, 0.7)
    square = sum(((start(dark["pixel_values"]) - dark["logits"])[row, k] ** 2).item() for row in range(4) for k in range(4)) / 16
    plain = [F.cross_entropy(start(b["pixel_values"]), b["labels"]).item() for b in (new, old)]
    assert value.item() == pytest.approx(plain[0] + 0.3 * square + 0.7 * plain[1], rel=1e-12)


def test_the_logit_distance_is_the_mean_over_logits_then_positions_that_count() -> None:
    present, stored = torch.tensor([[[1.0, 3.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    assert logit_distance(present, stored, torch.tensor([[True, False]])).tolist() == [2.5]  # (1 + 4) / 2
    assert logit_distance(present, stored, torch.tensor([[True, True]])).tolist() == [13.75]  # (2.5 + 25) / 2
    assert logit_distance(present[0], stored[0], torch.tensor([True, True])).tolist() == [2.5, 25.0]


def test_derpp_draws_logits_and_labels_apart() -> None:
    drawn: list[Batch] = []
    method, loop = DERpp(capacity=40), trainer(steps=12)
    fit = loop.fit

    def spy(model: nn.Module, batches: Any, *given: Any, **named: Any) -> nn.Module:
        model = fit(model, batches, *given, **named)
        drawn.append(batches[11])
        return model

    loop.fit = spy  # type: ignore[method-assign]
    method.learn(toy_classifier(), OLD, loop)
    assert not torch.equal(drawn[0]["dark"]["pixel_values"], drawn[0]["old"]["pixel_values"])


def test_the_stored_logits_are_those_of_the_weights_before_the_step() -> None:
    before, start = [], toy_classifier()
    before.append(copy.deepcopy(start))
    method, loop = DERpp(capacity=100), trainer(steps=3, watch=lambda model, step: before.append(copy.deepcopy(model)))
    method.learn(start, OLD, loop)
    assert method.kept is not None
    kept = method.kept.rows()
    with torch.no_grad():
        wanted = torch.cat([before[number](kept["pixel_values"][8 * number : 8 * number + 8]) for number in range(3)])
    torch.testing.assert_close(kept["logits"], wanted)


@pytest.mark.parametrize(("span", "top"), [("answer", None), ("answer", 5), ("row", None), ("row", 5)])
def test_a_language_model_stores_the_logits_that_were_asked_for(span: str, top: int | None) -> None:
    """After one step on all rows, the stored logits of every position equal those of the start model, in values and places."""
    start = toy_lm("llama", vocab=len(TOKENIZER), width=16, layers=1)
    teacher = copy.deepcopy(start)
    method = DERpp(capacity=12, span=span, top=top)
    method.learn(start, Task("people", PEOPLE, kind="qa"), trainer(steps=1, batch_size=12))
    assert method.kept is not None
    kept = method.kept.rows()
    with torch.no_grad():
        logits = teacher(input_ids=kept["input_ids"]).logits
    for row in range(12):
        supervised = [t - 1 for t in range(1, kept["labels"].shape[1]) if kept["labels"][row, t] != -100]
        places = supervised if span == "answer" else list(range(supervised[-1] + 2))
        wanted = logits[row, places]
        if top is None:
            torch.testing.assert_close(kept["logits"][row, : len(places)], wanted)
        else:
            torch.testing.assert_close(kept["logits_values"][row, : len(places)], wanted.topk(top).values)
    assert method.kept.seen == 12


def test_the_projected_gradient_does_not_conflict_and_others_stay() -> None:
    start, loop = toy_classifier().double(), trainer()
    new, old = batch(6, 1), batch(6, 2)
    old["pixel_values"], old["labels"] = new["pixel_values"], (new["labels"] + 1) % 4  # the opposite of the new rows
    reference = reference_gradient(start, Step(0, [Batch(new=new, old=old)]), loop)
    assert all(parameter.grad is None for parameter in start.parameters())
    nll(start, new).backward()
    own = {name: parameter.grad.clone() for name, parameter in start.named_parameters() if parameter.grad is not None}
    inner, square = dot(own, reference), dot(reference, reference)
    assert inner < 0
    assert project_gradients(start, reference)
    found = {name: parameter.grad for name, parameter in start.named_parameters() if parameter.grad is not None}
    assert dot(found, reference) >= -1e-6
    for name, grad in own.items():
        torch.testing.assert_close(found[name], grad - inner / square * reference[name], rtol=1e-12, atol=1e-15)
    assert not project_gradients(start, {name: -grad for name, grad in reference.items()} if dot(found, reference) < 0 else found)
    assert all(found[name] is dict(start.named_parameters())[name].grad for name in found)


def test_the_reference_gradient_is_the_mean_over_unequal_micro_batches() -> None:
    from remanence.training.trainer import share_denominators

    start, whole = toy_classifier().double(), batch(9, 4)
    parts = [Batch(old=Batch({name: value[rows] for name, value in whole.items()})) for rows in (slice(0, 2), slice(2, 9))]
    share_denominators(parts, 2)
    found = reference_gradient(start, Step(0, parts), trainer())
    wanted = trainer().gradient(start, nll, whole)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-15)


def test_conflicting_steps_of_agem_are_projected_and_counted() -> None:
    """Opposed tasks conflict in some steps; the note says in how many (the projection itself is tested by hand)."""
    notes: list[dict[str, Any]] = []
    method, start = AGEM(capacity=40), toy_classifier()
    start = method.learn(start, OLD, trainer(0))
    assert method.kept.seen == 40
    method.learn(start, NEW, trainer(1, record=lambda table, rows: notes.extend(rows)))
    assert method.kept.seen == 80
    content = next(row["content"] for row in notes if row.get("name") == "memory")
    assert 0 < content["steps projected"] <= 60


@pytest.mark.parametrize("make", [lambda: Replay(capacity=20), lambda: DERpp(capacity=20), lambda: AGEM(capacity=20)])
def test_kept_rows_are_erased_on_request(make: Any) -> None:
    method = make()
    start = toy_lm("llama", vocab=len(TOKENIZER), width=16, layers=1)
    method.learn(start, Task("people", PEOPLE, kind="qa"), trainer(steps=2, batch_size=6))
    assert isinstance(method, Remembering)
    request = Request("gone", PEOPLE.select([0, 3, 11]))
    gone = trainer().encode(request.forget, "qa")["input_ids"]
    assert method.erase(request, trainer()) == 3
    assert len(method.kept) == 9
    kept = [[token for token in row if token] for row in method.kept.state_dict()["columns"]["input_ids"].tolist()]
    assert not any(list(row) in kept for row in gone)
    assert method.erase(request, trainer()) == 0


def test_blocks_that_hold_a_piece_of_a_forgotten_text_are_erased() -> None:
    method = Replay(capacity=200)
    start = toy_lm("llama", vocab=len(TOKENIZER), width=16, layers=1)
    method.learn(start, Task("texts", TEXTS, kind="text"), trainer(steps=10, length=24))
    before = len(method.kept)
    texts = Dataset.from_dict({"text": ["ddd went to ddx"]})
    removed = method.erase(Request("gone", texts, kind="text"), trainer(length=24))
    assert 0 < removed < before
    left = [TOKENIZER.decode(row) for row in method.kept.rows()["input_ids"].tolist()]
    piece = "ddd went to ddx"
    assert not any(piece[first : first + 8] in text for text in left for first in range(len(piece) - 7))


def test_joint_training_sees_the_history_and_alone_it_is_plain() -> None:
    loop = trainer(1, steps=200)
    loop.history = (OLD,)
    start = Joint().learn(toy_classifier(), NEW, loop)
    assert min(accuracy(start, OLD), accuracy(start, NEW)) > 0.9
    odd = trainer()
    odd.history = (Task("people", PEOPLE, kind="qa"),)
    with pytest.raises(Mistake, match="cannot be mixed"):
        Joint().learn(toy_classifier(), NEW, odd)


def test_lora_moves_its_targets_by_a_matrix_of_its_rank() -> None:
    start = toy_lm("qwen2", vocab=len(TOKENIZER), width=16, layers=2)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    after = LoRA(rank=2, targets=["query", "down"]).learn(start, Task("people", PEOPLE, kind="qa"), trainer(steps=5))
    assert after is start
    for name, value in after.state_dict().items():
        change = (value - before[name]).double()
        if "q_proj.weight" in name or "down_proj.weight" in name:
            scale = torch.linalg.svdvals(change)
            assert scale[1] > 0
            assert scale[2] < 1e-4 * scale[0]
        else:
            assert not change.any()
    with pytest.raises(Mistake, match="has an adapter already"):
        LoRA().learn(add_lora(start, rank=1), Task("people", PEOPLE, kind="qa"), trainer())


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Replay(memory="reservoire"), "did you mean 'reservoir'"),
        (lambda: Replay(capacity=-1), r"replay\.capacity"),
        (lambda: Replay(batch_size=0), r"replay\.batch_size"),
        (lambda: DERpp(alpha=-1), r"derpp\.alpha"),
        (lambda: DERpp(top=0), r"derpp\.top"),
        (lambda: DERpp(span="all"), r"derpp\.span"),
        (lambda: AGEM(memory="ring"), r"agem\.memory"),
        (lambda: LoRA(rank=0), r"lora\.rank"),
        (lambda: LoRA(alpha=0), r"lora\.alpha"),
    ],
)
def test_wrong_settings_are_refused_where_they_stand(make: Any, place: str) -> None:
    with pytest.raises(Mistake, match=place):
        make()


def test_updated_by_task_the_memory_holds_earlier_tasks_alone_while_one_is_learned() -> None:
    seen: list[int] = []
    method = Replay(capacity=50, update="task")
    for number, first in enumerate((0, 4)):
        rows = Dataset.from_dict({"features": [[float(first + n % 2)] * 8 for n in range(12)], "label": [first + n % 2 for n in range(12)]})

        def watch(model: nn.Module, step: int) -> None:
            seen.append(len(method.kept))

        trainer = Trainer(Settings(steps=4, batch_size=4), seed=number, owner=method, watch=watch, progress=False)
        method.learn(toy_classifier(classes=6), Task(f"t{number}", rows, kind="classes"), trainer)
        assert len(method.kept) == 12 * (number + 1)
    assert seen == [0] * 4 + [12] * 4
    assert sorted(method.kept.rows()["labels"].tolist()) == [0] * 6 + [1] * 6 + [4] * 6 + [5] * 6


def test_an_unknown_time_of_update_is_refused() -> None:
    with pytest.raises(Mistake, match="replay.update: unknown value 'tusk'; did you mean 'task'"):
        Replay(update="tusk")


def test_a_memory_of_all_data_with_equal_sampling_is_joint_training_in_expectation() -> None:
    method = Replay(capacity=len(OLD.train), update="task")
    method.learn(toy_classifier(), OLD, Trainer(Settings(steps=1, batch_size=4), owner=method, progress=False))
    kept = method.kept.rows()
    everything = Trainer(progress=False).batches(OLD.train, "classes", size=len(OLD.train), shuffle=False)[0]
    assert sorted(map(tuple, kept["pixel_values"].tolist())) == sorted(map(tuple, everything["pixel_values"].tolist()))  # each row once

    count = len(method.kept)
    draws = np.concatenate(
        [(uniform(np.uint64(9), np.arange(n, n + 500, dtype=np.uint64)) * count).astype(int) for n in range(0, 40_000, 500)]
    )
    assert chisquare(np.bincount(draws, minlength=count)).pvalue > 1e-3  # `Draws` takes every row equally often

    model = toy_classifier().double()
    new = Trainer(progress=False).batches(NEW.train, "classes", size=count, shuffle=False)[0]
    old = Batch({name: kept[name] for name in new})
    wide = [Batch({name: value.double() if value.is_floating_point() else value for name, value in part.items()}) for part in (new, old)]
    both = Batch({name: torch.cat([part[name] for part in wide]) for name in new})
    assert len(NEW.train) == count
    expected = torch.autograd.grad(replay_nll(model, Batch(new=wide[0], old=wide[1])), list(model.parameters()))
    for mine, joint in zip(expected, torch.autograd.grad(2 * nll(model, both), list(model.parameters()))):
        torch.testing.assert_close(mine, joint)
