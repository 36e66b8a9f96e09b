"""Retraining equals training from the start without the rows, bit for bit."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from remanence.errors import Mistake
from remanence.forget.retrain import Retrain, draw_anew
from remanence.models.adapters import add_lora
from remanence.models.forward import fresh_weights
from remanence.models.load import save_model
from remanence.stream import Request, Task
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier, toy_config, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)


def rows(first: int, last: int, letter: str = "a") -> Dataset:
    numbers = range(first, last)
    return Dataset.from_dict({"question": [f"what is {letter}{n}" for n in numbers], "answer": [f"{n * 37 % 100}" for n in numbers]})


def trainer(history: list[Task] = (), **options: object) -> Trainer:  # type: ignore[assignment]
    settings = Settings(steps=options.pop("steps", 4), batch_size=4)  # type: ignore[arg-type]
    return Trainer(settings, processor=TOKENIZER, seed=8, history=history, progress=False, **options)  # type: ignore[arg-type]


def fresh(seed: int, family: str = "llama") -> nn.Module:
    with fresh_weights(seed):
        return AutoModelForCausalLM.from_config(toy_config(family, vocab=V), dtype=torch.float32)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_retrain_equals_training_from_the_start_without_the_rows(family: str) -> None:
    tasks = [Task("one", rows(0, 10), kind="qa"), Task("two", rows(0, 8, "b"), kind="qa")]
    request = Request("gone", rows(3, 6), rows(0, 3))
    model = toy_lm(family, seed=5, vocab=V)
    noted: list = []
    event = trainer(tasks, record=lambda table, rows: noted.extend(rows) if table == "notes" else None)
    assert Retrain(seed=2).forget(model, request, event) is model
    kept = Dataset.from_dict({name: [*rows(0, 3)[name], *rows(6, 10)[name]] for name in ("question", "answer")})
    other, plain = fresh(2, family), trainer()
    plain.fit(other, plain.batches(kept, "qa", stream="one"))
    plain.fit(other, plain.batches(rows(0, 8, "b"), "qa", stream="two"))
    assert same(model, other)
    assert noted[0]["content"] == {"rows": 15, "removed": 3, "start": "fresh", "order": "sequence"}


def test_every_row_equal_to_a_forget_row_goes_from_every_task() -> None:
    twice = Dataset.from_dict({"question": ["q", "q", "r"], "answer": ["1", "1", "2"]})
    tasks = [Task("one", twice, kind="qa"), Task("two", twice.select([0]), kind="qa")]
    noted: list = []
    event = trainer(tasks, record=lambda table, rows: noted.extend(rows) if table == "notes" else None)
    Retrain().forget(toy_lm("llama", vocab=V), Request("gone", twice.select([0])), event)
    assert noted[0]["content"]["rows"] == 1
    assert noted[0]["content"]["removed"] == 3


def test_without_history_the_retain_set_is_the_data() -> None:
    model, request = toy_lm("llama", seed=5, vocab=V), Request("gone", rows(0, 2), rows(2, 9))
    Retrain(seed=1).forget(model, request, trainer())
    other, plain = fresh(1), trainer()
    plain.fit(other, plain.batches(rows(2, 9), "qa", stream="retain"))
    assert same(model, other)


def test_start_from_a_saved_model(tmp_path) -> None:
    begun = toy_lm("llama", seed=3, vocab=V)
    save_model(begun, TOKENIZER, tmp_path / "start")
    model = toy_lm("llama", seed=9, vocab=V)
    Retrain(start=str(tmp_path / "start")).forget(model, Request("gone", rows(0, 2), rows(2, 9)), trainer(steps=0))
    assert same(model, begun)


def test_a_start_of_another_shape_is_a_mistake(tmp_path) -> None:
    save_model(toy_lm("llama", vocab=V, width=16), TOKENIZER, tmp_path / "start")
    with pytest.raises(Mistake, match=r"retrain.start.*does not fit"):
        Retrain(start=str(tmp_path / "start")).forget(toy_lm("llama", vocab=V), Request("gone", rows(0, 2), rows(2, 9)), trainer())


def test_joint_order_shuffles_all_tasks_together() -> None:
    tasks = [Task("one", rows(0, 4), kind="qa"), Task("two", rows(0, 4, "b"), kind="qa")]
    stages: list = []

    class Spy(Trainer):
        def fit(self, model, batches, *args, **options):
            stages.append(batches)
            return model

    Retrain(order="joint").forget(
        toy_lm("llama", vocab=V), Request("gone", rows(0, 1)), Spy(Settings(batch_size=4), processor=TOKENIZER, history=tasks)
    )
    assert [batches.count for batches in stages] == [7]


def test_fresh_weights_depend_on_the_seed_alone_and_are_new() -> None:
    one, two, three = (toy_lm("gpt2", seed=seed, vocab=V) for seed in (1, 2, 1))
    state = torch.get_rng_state()
    draw_anew(one, 4)
    draw_anew(two, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, two)
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters()) if a.dim() > 1)


def test_fresh_classifier_redraws_layers_and_running_statistics() -> None:
    model = nn.Sequential(toy_classifier(1), nn.BatchNorm1d(4))
    model(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    old = model[0][1].weight.detach().clone()
    draw_anew(model, 4)
    assert not torch.equal(model[0][1].weight, old)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert model[1].num_batches_tracked == 0


def test_fresh_lora_starts_at_the_base() -> None:
    model = add_lora(toy_lm("llama", vocab=V), rank=2)
    base = {name: weight.detach().clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.fill_(1.0)
    draw_anew(model, 4)
    for name, weight in model.named_parameters():
        if name in base:
            assert torch.equal(weight, base[name])
        elif "lora_B" in name:
            assert not weight.any()
        else:
            assert not torch.equal(weight, torch.ones_like(weight))


def test_a_parameter_that_no_layer_draws_is_a_mistake_and_nothing_changes() -> None:
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(1)), nn.Linear(2, 2)

    model = Scaled()
    old = model.layer.weight.detach().clone()
    with pytest.raises(Mistake, match=r"'scale'.*cannot be drawn anew"):
        draw_anew(model, 0)
    assert torch.equal(model.layer.weight, old)


def test_nothing_to_train_on_is_a_mistake() -> None:
    with pytest.raises(Mistake, match="no retain set"):
        Retrain().forget(toy_lm("llama", vocab=V), Request("gone", rows(0, 2)), trainer())
    with pytest.raises(Mistake, match="every row"):
        Retrain().forget(toy_lm("llama", vocab=V), Request("gone", rows(0, 2)), trainer([Task("one", rows(0, 2), kind="qa")]))
    with pytest.raises(Mistake, match=r"retrain.order"):
        Retrain(order="jiont")


def test_a_request_that_matches_no_trained_row_warns() -> None:
    with pytest.warns(UserWarning, match="no row"):
        Retrain().forget(toy_lm("llama", vocab=V), Request("gone", rows(50, 52)), trainer([Task("one", rows(0, 2), kind="qa")], steps=1))
