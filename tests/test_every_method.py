"""One matrix over every method: what each must keep, whatever it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from remanence.learn.agem import AGEM
from remanence.learn.derpp import DERpp
from remanence.learn.ewc import EWC
from remanence.learn.gradient_restriction import GradientRestriction
from remanence.learn.hft import HalfTuning
from remanence.learn.joint import Joint
from remanence.learn.l2sp import L2SP
from remanence.learn.lora import LoRA
from remanence.learn.lwf import LwF
from remanence.learn.replay import Replay
from remanence.learn.replay_controller import ControlledReplay
from remanence.learn.sequential import Sequential
from remanence.models.adapters import add_lora
from remanence.models.load import load_model
from remanence.storage import load_tree, save_tree
from remanence.stream import Learner, Task
from remanence.training.checkpoint import Checkpoints
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier, toy_lm, toy_tokenizer


@dataclass(frozen=True)
class Case:
    """A method at work, and the same at strength zero (`None`: it has none)."""

    name: str
    make: Callable[[], Any]
    zero: Callable[[], Any] | None = None
    adapters: bool = True  # trains a model that PEFT wraps
    plain: bool = True  # trains a plain classifier
    family: str = "llama"  # whose trajectory is compared in fp64


LEARNERS = [
    Case("sequential", Sequential, Sequential),
    Case("joint", Joint),
    Case("replay", lambda: Replay(capacity=6), lambda: Replay(capacity=0)),
    Case("replay balanced", lambda: Replay(capacity=6, memory="balanced", batch_size=3), lambda: Replay(capacity=0, memory="balanced")),
    Case("replay by task", lambda: Replay(capacity=6, update="task"), lambda: Replay(capacity=0, update="task")),
    Case("replay controller", lambda: ControlledReplay(4, 6, every=2, lam_min=0.5), lambda: ControlledReplay(lam_max=0)),
    Case("derpp", lambda: DERpp(alpha=0.5, beta=0.5, capacity=6), lambda: DERpp(alpha=0, beta=0)),
    Case("derpp empty", lambda: DERpp(alpha=0.5, capacity=6, span="row"), lambda: DERpp(capacity=0)),
    Case("derpp top", lambda: DERpp(alpha=0.5, capacity=6, top=3), lambda: DERpp(capacity=0, top=3)),
    Case("agem", lambda: AGEM(capacity=6), lambda: AGEM(capacity=0)),
    Case("ewc online", lambda: EWC(lam=50.0, definition="sampled"), lambda: EWC(lam=0)),
    Case("ewc separate", lambda: EWC(lam=50.0, mode="separate", definition="empirical"), lambda: EWC(lam=0, mode="separate")),
    Case("l2sp", lambda: L2SP(lam=1.0), lambda: L2SP(lam=0)),
    Case("l2sp start", lambda: L2SP(lam=1.0, reference="start"), lambda: L2SP(lam=0, reference="start")),
    Case("lwf", lambda: LwF(alpha=1.0), lambda: LwF(alpha=0)),
    # Llama's norms compute in fp32 whatever the weights are, and double backward rounds that in another order than two passes do.
    Case("gradient restriction", lambda: GradientRestriction(0.05), lambda: GradientRestriction(0), family="gpt2"),
    Case(
        "gradient restriction global", lambda: GradientRestriction(0.05, "global"), lambda: GradientRestriction(0, "global"), family="gpt2"
    ),
    Case("gradient restriction finite", lambda: GradientRestriction(0.05, derivative="finite", eps=0.01)),
    Case("lora", lambda: LoRA(rank=2), adapters=False),
    Case("hft", HalfTuning, lambda: HalfTuning(ratio=1), adapters=False, plain=False),
    Case("hft layers", lambda: HalfTuning(level="layer", train_embeddings=False), adapters=False, plain=False),
    Case("hft with replay", lambda: HalfTuning(inner=Replay(capacity=6)), lambda: HalfTuning(1, inner=Replay(0)), False, False),
    Case("hft with agem", lambda: HalfTuning(inner=AGEM(6)), lambda: HalfTuning(1, inner=AGEM(0)), False, False),
    Case("hft with ewc", lambda: HalfTuning(inner=EWC(lam=50.0)), lambda: HalfTuning(1, inner=EWC(lam=0)), False, False),
]
FAMILIES = ("llama", "gpt2", "qwen2")
TOKENIZER = toy_tokenizer()
VOCABULARY = len(TOKENIZER)


def each(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def questions(first: int, count: int = 10, shift: int = 0) -> Dataset:
    """Return questions about persons; `shift` gives them other answers."""
    names = [f"{chr(97 + n % 26)}{'xyz'[n % 3] * (n % 5)}" for n in range(first, first + count)]
    answers = [f"{(n * 7 + shift) % 31}" for n in range(first, first + count)]
    return Dataset.from_dict({"question": [f"who is {name}" for name in names], "answer": answers})


def pictures(first: int, count: int = 12) -> Dataset:
    made = torch.Generator().manual_seed(first)
    labels = [first + n % 2 for n in range(count)]
    features = torch.randn(count, 8, generator=made) + torch.tensor(labels)[:, None]
    return Dataset.from_dict({"features": features.tolist(), "label": labels})


# Opposite answers to the same questions, so that gradients conflict.
OPPOSED = Dataset.from_dict({"question": ["is it so"] * 11, "answer": ["no no no no"] * 11})
TASKS = (Task("first", questions(0), kind="qa"), Task("second", OPPOSED, kind="qa"))
CLASSES = (Task("first", pictures(0), kind="classes"), Task("second", pictures(2), kind="classes"))


def model(family: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    return toy_lm(family, vocab=VOCABULARY, width=16, dtype=dtype)


def settings(**changes: Any) -> Settings:
    return Settings(**({"steps": 4, "batch_size": 4, "lr": 0.02, "weight_decay": 0.01, "length": 40} | changes))


def live(method: Learner, start: nn.Module, tasks: tuple[Task, ...] = TASKS, **changes: Any) -> nn.Module:
    """Learn the tasks in order and return the model."""
    for number, task in enumerate(tasks):
        trainer = Trainer(settings(**changes), processor=TOKENIZER, seed=number, owner=method, history=tasks[:number], progress=False)
        start = method.learn(start, task, trainer)
    return start


def weights(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in of.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Tiny tensors gain nothing from threads and lose much where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def naive() -> dict[str, torch.Tensor]:
    return weights(live(Sequential(), model()))


@each([case for case in LEARNERS if case.zero])
def test_strength_zero_equals_plain_training_exactly(case: Case, naive: dict[str, torch.Tensor]) -> None:
    assert case.zero is not None
    assert equal(weights(live(case.zero(), model())), naive)


@each([case for case in LEARNERS if case.name != "sequential"])
def test_at_full_strength_it_differs_from_plain_training(case: Case, naive: dict[str, torch.Tensor]) -> None:
    assert not equal(weights(live(case.make(), model())), naive)


@each(LEARNERS)
def test_accumulation_does_not_move_the_trajectory(case: Case) -> None:
    """One micro-batch of 8 rows against two of 4, with optimizers whose step is smooth in the gradient."""
    ends = []
    for parts in (1, 2):
        method = case.make()
        if getattr(method, "batch_size", None):
            method.batch_size = 8 // parts
        plain = {"optimizer": "sgd", "momentum": 0.5, "lr": 0.1}
        ends.append(weights(live(method, model(case.family, torch.float64), batch_size=8 // parts, accumulate=parts, **plain)))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


class Killed(Exception):
    pass


@each(LEARNERS)
def test_killed_and_resumed_equals_uninterrupted(case: Case, tmp_path: Path) -> None:
    """The second task is cut off behind its third step; a new object with the state of the first task's end goes on from the checkpoint of step 2."""
    whole = case.make()
    done = weights(live(whole, model()))

    first = case.make()
    between = live(first, model(), TASKS[:1])
    save_tree(tmp_path / "between.safetensors", first.state_dict())
    start = copy.deepcopy(between)

    def trainer(owner: Learner, watch: Any = None) -> Trainer:
        checkpoints = Checkpoints(tmp_path / "points", every=2)
        return Trainer(
            settings(), processor=TOKENIZER, seed=1, owner=owner, history=TASKS[:1], checkpoints=checkpoints, watch=watch, progress=False
        )

    def kill(model: nn.Module, step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        first.learn(between, TASKS[1], trainer(first, kill))
    again = case.make()
    again.load_state_dict(load_tree(tmp_path / "between.safetensors"))
    assert equal(weights(again.learn(start, TASKS[1], trainer(again))), done)
    save_tree(tmp_path / "one.safetensors", whole.state_dict())
    save_tree(tmp_path / "two.safetensors", again.state_dict())
    assert same_tree(load_tree(tmp_path / "one.safetensors"), load_tree(tmp_path / "two.safetensors"))


def same_tree(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tree(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_tree, one, other))
    return one == other


@pytest.mark.parametrize("family", FAMILIES)
@each(LEARNERS)
def test_it_trains_the_family_in_bf16(case: Case, family: str) -> None:
    start = model(family)
    before = weights(start)
    after = live(case.make(), start, steps=2, precision="bf16")
    assert type(after) is type(start)
    assert all(torch.isfinite(value).all() and value.dtype == before[name].dtype for name, value in weights(after).items())
    assert not equal(weights(after), before)
    assert not after.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in after.parameters())


@each([case for case in LEARNERS if case.adapters])
def test_under_an_adapter_it_moves_the_adapter_alone(case: Case) -> None:
    start = add_lora(model(), rank=2, seed=3)
    before = weights(start)
    after = weights(live(case.make(), start, steps=2))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".lora_" in name for name in moved)


@each(LEARNERS)
def test_frozen_weights_stay_frozen(case: Case) -> None:
    start = model()
    still = [name for name, _ in start.named_parameters() if ".layers.0.mlp" in name or "embed" in name]
    for name, parameter in start.named_parameters():
        parameter.requires_grad_(name not in still)
    before = weights(start)
    after = live(case.make(), start, steps=2)
    if case.name != "lora":  # it moves the weights that it adapts by its merge
        assert all(torch.equal(weights(after)[name], before[name]) for name in still)
    assert [name for name, parameter in after.named_parameters() if not parameter.requires_grad] == still


@each([case for case in LEARNERS if case.plain])
def test_it_trains_a_plain_classifier(case: Case) -> None:
    start = toy_classifier()
    before = weights(start)
    after = weights(live(case.make(), start, CLASSES, steps=3))
    assert not equal(after, before)
    assert all(torch.isfinite(value).all() for value in after.values())


@each(LEARNERS)
def test_it_trains_a_real_model(case: Case, real_data: Path) -> None:
    loaded = load_model(real_data / "stories260k")
    before = weights(loaded.model)
    method = case.make()
    task = Task("facts", questions(0, 4), kind="qa")
    trainer = Trainer(settings(steps=2), processor=loaded.processor, owner=method, progress=False)
    after = weights(method.learn(loaded.model, task, trainer))
    assert not equal(after, before)
    assert all(torch.isfinite(value).all() for value in after.values())


@each(LEARNERS)
def test_it_is_a_learner_whose_global_generator_is_left_alone(case: Case) -> None:
    method = case.make()
    assert isinstance(method, Learner)
    state = torch.get_rng_state()
    live(method, model(), TASKS[:1], steps=1)
    assert torch.equal(torch.get_rng_state(), state)
