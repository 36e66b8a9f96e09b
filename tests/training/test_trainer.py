"""The loop: exact under accumulation, resumable at any step, silent about the global generator."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from remanence.errors import Mistake
from remanence.training.batches import IGNORED, Batch, Batches, Draws, Zip, uniform
from remanence.training.checkpoint import Checkpoints
from remanence.training.losses import nll
from remanence.training.trainer import Settings, Step, Trainer, make_schedule
from toy import toy_lm, toy_tokenizer

ROWS = Dataset.from_dict(
    {
        "question": [f"who is {letter * length}" for length, letter in enumerate("abcdefghijkl", 1)],
        "answer": [f"{n * 7}" for n in range(12)],
    }
)


def net(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).double()


def points(count: int = 20) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(count, 6, generator=made, dtype=torch.float64),
        "labels": torch.randint(3, (count,), generator=made),
    }


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_fit_equals_a_hand_written_loop() -> None:
    model, by_hand, batches = net(), net(), Batches(points(), 5, seed=3)
    Trainer(Settings(steps=7, lr=0.1, optimizer="sgd", momentum=0.9, clip=0.5)).fit(model, batches)
    descent = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for number in range(7):
        batch = batches[number]
        descent.zero_grad()
        F.cross_entropy(by_hand(batch["pixel_values"]), batch["labels"]).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        descent.step()
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_over_uneven_rows_does_not_move_the_trajectory(parts: int) -> None:
    tokenizer, ends = toy_tokenizer(), []
    for accumulate in (1, parts):
        model = toy_lm("llama", vocab=len(tokenizer), dtype=torch.float64)
        trainer = Trainer(
            Settings(steps=4, batch_size=8 // accumulate, accumulate=accumulate, lr=0.1, optimizer="sgd"), processor=tokenizer, seed=5
        )
        ends.append(trainer.fit(model, trainer.batches(ROWS, "qa")))
    for first, second in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


def test_loss_of_a_batch_is_the_mean_over_its_supervised_tokens() -> None:
    tokenizer = toy_tokenizer()
    model, trainer = toy_lm("gpt2", vocab=len(tokenizer)), Trainer(processor=tokenizer)
    batch = trainer.batches(ROWS, "qa", size=12)[0]
    logits, total, count = model(input_ids=batch["input_ids"]).logits, 0.0, 0
    for row in range(12):
        for place in range(1, batch["labels"].shape[1]):
            if batch["labels"][row, place] != IGNORED:
                total -= torch.log_softmax(logits[row, place - 1], -1)[batch["labels"][row, place]].item()
                count += 1
    assert nll(model, batch).item() == pytest.approx(total / count, rel=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 4, 5, 6, 9, 11, 12])
def test_killed_and_resumed_ends_with_the_same_bits(tmp_path, kill_at: int) -> None:
    def live(place, kill: int | None) -> nn.Module:
        def watch(_: nn.Module, step: int) -> None:
            if step == kill:
                raise Killed

        model = net(dropout=0.5)
        trainer = Trainer(Settings(steps=6, lr=0.05), seed=9, checkpoints=place and Checkpoints(place, 2), watch=watch)
        trainer.fit(model, Batches(points(), 5))
        with torch.no_grad():
            model[0].weight.mul_(0.5)  # what a method does between two stages
        return trainer.fit(model, Batches(points(), 4, seed=2))

    whole = live(None, None)
    with pytest.raises(Killed):
        live(tmp_path, kill_at)
    assert same(live(tmp_path, None), whole)


def test_a_stage_done_over_again_in_another_event_ends_with_the_same_bits() -> None:
    def trained(seed: int, lr: float, before: int) -> nn.Module:
        trainer = Trainer(Settings(steps=1, lr=lr), seed=seed)
        for _ in range(before):  # other stages first
            trainer.fit(net(), Batches(points(), 5))
        model = net(dropout=0.5)
        with trainer.settled(Settings(steps=3, lr=0.05)):
            trainer.fit(model, Batches(points(), 5, seed=2), noise=7)
        assert trainer.settings.lr == lr
        return model

    assert same(trained(1, 0.1, 0), trained(2, 0.2, 2))


def test_fit_leaves_generators_modes_and_flags_as_they_were() -> None:
    model = net(dropout=0.5).eval()
    model[0].bias.requires_grad_(False)
    state = torch.get_rng_state()
    Trainer(Settings(steps=2)).fit(model, Batches(points(), 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not model[0].bias.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_have_no_optimizer_state_and_do_not_move() -> None:
    model, made = net(), []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, weight_decay=0.5))
        return made[0]

    before = copy.deepcopy(model)
    Trainer(Settings(steps=3)).fit(model, Batches(points(), 5), optimizer=optimizer, parameters=["3.weight"])
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[3].weight, before[3].weight)
    assert len(made[0].state) == 1


def test_only_confines_the_fits_inside() -> None:
    model, before = net(), net()
    trainer = Trainer(Settings(steps=2))
    with trainer.only(["0.weight"]):
        trainer.fit(model, Batches(points(), 5))
    assert not torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[3].weight, before[3].weight)
    with trainer.only(["0.weight"]), pytest.raises(Mistake, match="nothing to train"):
        trainer.fit(model, Batches(points(), 5), parameters=["3.weight"])


def test_nan_stops_with_a_sentence_that_names_event_step_and_rate() -> None:
    data = points()
    data["pixel_values"][:] = math.nan
    with pytest.raises(Mistake, match=r"monday, step 1: the loss is nan; lower the learning rate \(now 0.001\)"):
        Trainer(Settings(steps=3), name="monday").fit(net(), Batches(data, 5))


def test_gradient_is_the_batch_gradient_and_leaves_grad_alone() -> None:
    model, batch = net(), Batches(points(), 5)[0]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    found = Trainer().gradient(model, nll, batch)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    wanted = torch.autograd.grad(F.cross_entropy(model(batch["pixel_values"]), batch["labels"]), list(model.parameters()))
    for got, want in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_gradient_of_uneven_batches_is_that_of_all_their_rows() -> None:
    model, data = net(), points(9)
    whole = Batches(data, 9, shuffle=False)[0]
    parts = [Batch({name: value[rows] for name, value in data.items()}) for rows in (slice(0, 2), slice(2, 9))]
    found, wanted = Trainer().gradient(model, nll, *parts), Trainer().gradient(model, nll, whole)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-15)


def test_callbacks_see_gradients_then_weights() -> None:
    model, seen = net(), []

    def after_backward(module: nn.Module, step: Step) -> None:
        seen.append(("grad", step.number, module[0].weight.grad is not None))

    def after_step(module: nn.Module, step: Step) -> None:
        seen.append(("step", step.number, len(step.batches)))

    Trainer(Settings(steps=2, accumulate=3)).fit(model, Batches(points(), 5), after_backward=after_backward, after_step=after_step)
    assert seen == [("grad", 0, True), ("step", 0, 3), ("grad", 1, True), ("step", 1, 3)]


def test_bf16_autocast_trains_in_bf16_and_keeps_weights_in_fp32() -> None:
    tokenizer, types = toy_tokenizer(), []
    model = toy_lm("llama", vocab=len(tokenizer))
    trainer = Trainer(Settings(steps=1, precision="bf16"), processor=tokenizer)

    def loss(module: nn.Module, batch: Batch) -> torch.Tensor:
        types.append(module(input_ids=batch["input_ids"]).logits.dtype)
        return nll(module, batch)

    trainer.fit(model, trainer.batches(ROWS, "qa"), loss)
    assert types == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_schedules_warm_up_and_end_at_zero() -> None:
    linear = make_schedule(Settings(schedule="linear", warmup=0.2), 10)
    assert [linear(n) for n in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    cosine = make_schedule(Settings(schedule="cosine", warmup=4), 12)
    assert [cosine(n) for n in (3, 4, 8)] == pytest.approx([1.0, 1.0, 0.5])
    assert cosine(12) == pytest.approx(0.0)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (7, 7), (5, 9), (1, 4), (64, 63)])
def test_every_epoch_of_the_endless_stream_holds_each_row_once(count: int, size: int) -> None:
    batches = Batches({"x": torch.arange(count)}, size, seed=1)
    line = torch.cat([batches[number]["x"] for number in range(3 * len(batches))])
    for epoch in range(2):
        assert sorted(line[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    again = Batches({"x": torch.arange(count)}, size, seed=1)
    assert torch.equal(again[2]["x"], batches[2]["x"])
    assert torch.cat([batch["x"] for batch in batches]).tolist() == list(range(count))


def test_two_processes_take_what_one_takes_at_twice_the_size() -> None:
    one, two = Batches({"x": torch.arange(11)}, 4, seed=1), Batches({"x": torch.arange(11)}, 2, seed=1)
    for number in range(6):
        assert torch.equal(one[number]["x"], torch.cat([two[2 * number]["x"], two[2 * number + 1]["x"]]))


def test_ragged_rows_are_padded_on_the_right_across_arrow_chunks() -> None:
    from datasets import concatenate_datasets

    parts = [Dataset.from_dict({"input_ids": rows, "labels": rows}) for rows in ([[1, 2, 3]], [[4], [5, 6]], [[7, 8, 9, 10]])]
    rows = concatenate_datasets(parts).select([3, 0, 1, 2])
    (batch,) = Batches(rows, 4, pad=99)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10], [1, 2, 3, 99], [4, 99, 99, 99], [5, 6, 99, 99]]
    assert batch["labels"].tolist()[2] == [4, IGNORED, IGNORED, IGNORED]


def test_uniform_hash_is_uniform_and_addressable() -> None:
    import numpy as np

    values = uniform(np.uint64(7), np.arange(100_000, dtype=np.uint64))
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.999 quantile
    assert uniform(np.uint64(7), np.array([500], dtype=np.uint64))[0] == values[500]


def test_draws_of_accumulated_parts_are_the_draws_of_the_whole() -> None:
    whole, halves = Draws(Batches(points(), 5), 4, seed=2), Draws(Batches(points(), 5), 2, seed=2)
    got = torch.cat([halves[2]["labels"], halves[3]["labels"]])
    assert torch.equal(whole[1]["labels"], got)


def test_zip_leaves_out_a_stream_without_rows() -> None:
    class Empty:
        def __getitem__(self, index: int) -> Batch:
            return Batch()

    zipped = Zip(new=Batches(points(), 5), old=Empty())
    assert list(zipped[0]) == ["new"]


def test_step_rows_reach_the_record_once_and_in_order() -> None:
    rows: list[dict] = []
    trainer = Trainer(Settings(steps=25, log_every=10), record=lambda table, new: rows.extend(new))
    trainer.fit(net(), Batches(points(), 5))
    assert [row["step"] for row in rows if row["metric"] == "loss"] == list(range(25))
    assert all(row["value"] > 0 for row in rows)
