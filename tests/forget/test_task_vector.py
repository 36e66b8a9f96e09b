"""Task vectors: the weights are theta_0 - alpha (theta_ft - theta_0), alpha 0 is the identity, and new answers can be learned behind it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.forget.task_vector import TaskVector, negated
from remanence.models.adapters import add_lora
from remanence.stream import Request
from remanence.training.checkpoint import Checkpoints
from remanence.training.losses import nll
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
FORGET = Dataset.from_dict(
    {
        "question": [f"who is {'ab' * n}" for n in range(1, 7)],
        "answer": ["xyz"[: n % 3 + 1] for n in range(6)],
        "new_answer": [f"{n}{n}" for n in range(6)],
    }
)
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(8)], "answer": [f"{n * 7}" for n in range(8)]})
REQUEST = Request("gone", FORGET, RETAIN)


def trainer(steps: int = 3, **options: object) -> Trainer:
    return Trainer(Settings(steps=steps, batch_size=4, lr=1e-3), processor=TOKENIZER, seed=6, progress=False, **options)  # type: ignore[arg-type]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def answers(column: str) -> Dataset:
    return Dataset.from_dict({"question": FORGET["question"], "answer": FORGET[column]})


def measured(model: nn.Module, rows: Dataset) -> float:
    with torch.no_grad():
        return nll(model, trainer().batches(rows, "qa", size=len(rows), shuffle=False)[0]).item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_weights_are_the_formula_of_those_before_and_those_tuned(family: str, alpha: float) -> None:
    model = toy_lm(family, vocab=V)
    before, tuned = state(model), copy.deepcopy(model)
    plain = trainer()
    plain.fit(tuned, plain.batches(FORGET, "qa", stream="forget"), steps=3)
    assert TaskVector(alpha).forget(model, REQUEST, trainer()) is model
    for name, weight in model.named_parameters():
        wanted = before[name] - alpha * (tuned.get_parameter(name).detach() - before[name])
        assert torch.equal(weight, wanted)
    assert not same(state(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_alpha_zero_is_the_identity_bit_for_bit(family: str) -> None:
    model = toy_lm(family, vocab=V)
    with torch.no_grad():
        next(model.parameters())[0, 0] = -0.0
    before = state(model)
    TaskVector(0.0).forget(model, REQUEST, trainer())
    assert all(torch.equal(value.view(torch.int32), before[name].view(torch.int32)) for name, value in state(model).items())


def test_negated_by_hand() -> None:
    theta, tuned = torch.tensor([1.0, 2.0, -0.0]), torch.tensor([1.5, 2.0, -0.0])
    found = negated(theta, tuned, 2.0)
    assert found.tolist() == [0.0, 2.0, -0.0]
    assert torch.equal(found.view(torch.int32)[1:], theta.view(torch.int32)[1:])


def test_frozen_parameters_are_shared_with_the_copy_and_stay() -> None:
    model = add_lora(toy_lm("llama", vocab=V), rank=2)
    before = state(model)
    TaskVector().forget(model, REQUEST, trainer())
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_a_taught_model_forgets_the_rows() -> None:
    model = toy_lm("llama", vocab=V)
    teacher = Trainer(Settings(steps=120, batch_size=14, lr=3e-3), processor=TOKENIZER, seed=1, progress=False)
    both = Dataset.from_dict({name: [*FORGET[name], *RETAIN[name]] for name in ("question", "answer")})
    teacher.fit(model, teacher.batches(both, "qa"))
    start, kept = measured(model, FORGET), measured(model, RETAIN)
    TaskVector(alpha=8.0).forget(model, REQUEST, trainer(10))
    assert measured(model, FORGET) > start + 1
    assert measured(model, RETAIN) - kept < measured(model, FORGET) - start


def test_f_learning_subtracts_and_then_learns_the_new_answers() -> None:
    model, alone = toy_lm("llama", vocab=V), toy_lm("llama", vocab=V)
    TaskVector().forget(alone, REQUEST, trainer(20))
    TaskVector(then="new").forget(model, REQUEST, trainer(20))
    assert measured(model, answers("new_answer")) < measured(alone, answers("new_answer")) - 0.5
    other = copy.deepcopy(alone)
    plain = trainer(20)
    plain.fit(other, plain.batches(answers("new_answer"), "qa", stream="then"))
    assert same(state(model), state(other))


def test_with_retain_the_model_is_repaired_afterwards() -> None:
    repaired, alone = toy_lm("llama", vocab=V), toy_lm("llama", vocab=V)
    TaskVector().forget(alone, REQUEST, trainer(20))
    TaskVector(then="retain").forget(repaired, REQUEST, trainer(20))
    assert measured(repaired, RETAIN) < measured(alone, RETAIN) - 0.3


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("dies", [2, 5])
def test_killed_in_either_training_and_resumed_equals_uninterrupted(dies: int, tmp_path: Path) -> None:
    def go(folder: Path | None, at: int | None) -> dict[str, Tensor]:
        def watch(model: nn.Module, step: int) -> None:
            if step == at:
                raise Killed

        points = Checkpoints(folder, every=1) if folder else None
        return state(TaskVector(then="new").forget(toy_lm("llama", vocab=V), REQUEST, trainer(3, checkpoints=points, watch=watch)))

    with pytest.raises(Killed):
        go(tmp_path, dies)
    assert same(go(tmp_path, None), go(None, None))


def test_classifiers_too() -> None:
    rows = Dataset.from_dict({"features": torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).tolist(), "label": [0] * 6})
    model = toy_classifier()
    before = state(model)
    TaskVector().forget(model, Request("zero", rows, kind="classes"), trainer())
    assert not same(state(model), before)


def test_mistakes() -> None:
    with pytest.raises(Mistake, match="task_vector.alpha"):
        TaskVector(-1.0)
    with pytest.raises(Mistake, match="task_vector.then.*did you mean 'new'"):
        TaskVector(then="news")
    with pytest.raises(Mistake, match="new_answer"):
        TaskVector(then="new").forget(toy_lm("llama", vocab=V), Request("gone", RETAIN), trainer())
    with pytest.raises(Mistake, match="retain"):
        TaskVector(then="retain").forget(toy_lm("llama", vocab=V), Request("gone", RETAIN), trainer())
