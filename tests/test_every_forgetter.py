"""One matrix over all forgetters: families, strength zero, accumulation, kill and resume, LoRA, bf16, classifiers, and what they do to the NLLs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.forget.ceu import CEU
from remanence.forget.dpo import DPO
from remanence.forget.fine_tune import FineTune
from remanence.forget.fisher_forgetting import FisherForgetting
from remanence.forget.fit import FIT
from remanence.forget.gradient_ascent import GradientAscent
from remanence.forget.gradient_difference import GradientDifference
from remanence.forget.iau import IAU
from remanence.forget.influence import InfluenceFunction
from remanence.forget.kl import AscentKL
from remanence.forget.melu import MELU
from remanence.forget.npo import NPO
from remanence.forget.ofmu import OFMU
from remanence.forget.pdu import PDU
from remanence.forget.random_label import RandomLabel
from remanence.forget.refusal import Refusal
from remanence.forget.retrain import Retrain
from remanence.forget.rmu import RMU
from remanence.forget.satimp import SatImp
from remanence.forget.simnpo import SimNPO
from remanence.forget.ssd import SSD
from remanence.forget.task_vector import TaskVector
from remanence.forget.undial import UNDIAL
from remanence.forget.wga import WGA
from remanence.models.adapters import add_lora
from remanence.stream import Forgetter, Request, Task
from remanence.training.batches import IGNORED
from remanence.training.checkpoint import Checkpoints
from remanence.training.losses import nll
from remanence.training.preference import summed_nll
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:request .* is selected"),
    pytest.mark.filterwarnings("ignore:this model cannot be vectorised"),
    pytest.mark.filterwarnings("ignore:request .* that should stay"),
    pytest.mark.filterwarnings("ignore:request .* the weights moved"),
]

TRAINED: dict[str, Callable[[], Any]] = {  # those that take optimizer steps
    "retrain": Retrain,
    "gradient_ascent": GradientAscent,
    "gradient_difference": GradientDifference,
    "kl": AscentKL,
    "npo": NPO,
    "npo_kl": lambda: NPO(retain="kl"),
    "npo_alone": lambda: NPO(retain="none"),
    "rmu": RMU,
    "task_vector": TaskVector,
    "ofmu": lambda: OFMU(inner_steps=2),
    "dpo": DPO,
    "dpo_kl": lambda: DPO(retain="kl"),
    "melu": lambda: MELU(strategy="cyclic"),
    "melu_random": lambda: MELU(GradientDifference(), strategy="one_to_one_random"),
    "fine_tune": FineTune,
    "fit": FIT,
    "fit_rlabel": lambda: FIT(algorithm="rlabel", layers=2),
    "fit_npo_kl": lambda: FIT(algorithm="npo_kl", layers=2),
    "simnpo": SimNPO,
    "wga": WGA,
    "satimp": SatImp,
    "ceu": CEU,
    "undial": UNDIAL,
    "pdu": lambda: PDU(alpha=1.0, eta=0.5, warmup=1.0),
    "refusal": Refusal,
    "random_label": RandomLabel,
}
METHODS = TRAINED | {"ssd": SSD}
METHODS |= {
    "iau": IAU,
    "iau_sgd": lambda: IAU(step="sgd", lr=0.05),
    "influence": lambda: InfluenceFunction(damping=300.0, iterations=5),
    "fisher_forgetting": FisherForgetting,
}
NOTHING: dict[str, Callable[[], Any]] = {
    "gradient_ascent": lambda: GradientAscent(gamma=0),
    "gradient_difference": lambda: GradientDifference(0, 0),
    "kl": lambda: AscentKL(0, 0),
    "npo": lambda: NPO(gamma=0, alpha=0),
    "npo_kl": lambda: NPO(retain="kl", gamma=0, alpha=0),
    "npo_alone": lambda: NPO(retain="none", gamma=0),
    "rmu": lambda: RMU(gamma=0, alpha=0),
    "task_vector": lambda: TaskVector(alpha=0),
    "ofmu": lambda: OFMU(inner_steps=2, eta_in=0, eta_out=0),
    "dpo": lambda: DPO(gamma=0, alpha=0),
    "melu": lambda: MELU(NPO(gamma=0, alpha=0), strategy="cyclic"),
    "simnpo": lambda: SimNPO(gamma=0, alpha=0),
    "wga": lambda: WGA(gamma=0, alpha=0),
    "satimp": lambda: SatImp(gamma=0, alpha=0),
    "ceu": lambda: CEU(gamma=0),
    "undial": lambda: UNDIAL(gamma=0),
    "pdu": lambda: PDU(gamma=0, alpha=0, eta=0),
    "refusal": lambda: Refusal(gamma=0, alpha=0),
    "random_label": lambda: RandomLabel(gamma=0, alpha=0),
    "ssd": lambda: SSD(alpha=math.inf),
    "iau": lambda: IAU(gamma=0, correction=0),
    "iau_sgd": lambda: IAU(step="sgd", gamma=0, correction=0),
    "influence": lambda: InfluenceFunction(damping=300.0, iterations=5, strength=0),
    "fisher_forgetting": lambda: FisherForgetting(alpha=0),
}
IMAGES = ["retrain", "ofmu", "gradient_ascent", "gradient_difference", "kl", "npo", "melu", "ssd", "task_vector"]
IMAGES += ["fine_tune", "iau", "iau_sgd", "influence"]
QUESTIONS = {"refusal", "dpo", "dpo_kl"}  # they need rows of kind qa
IMAGES += ["simnpo", "wga", "satimp", "ceu", "undial", "pdu", "random_label"]
FAMILIES = ["llama", "gpt2", "qwen2"]

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
FORGET = Dataset.from_dict({"question": [f"who is {'ab' * n}" for n in range(1, 9)], "answer": ["xyz"[: n % 3 + 1] for n in range(8)]})
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(12)], "answer": [f"{n * 7}" for n in range(12)]})
REQUEST = Request("gone", FORGET, RETAIN)


def trainer(steps: int = 3, *, processor: Any = TOKENIZER, **options: Any) -> Trainer:
    chosen = {"steps": steps, "batch_size": 4, "lr": 1e-3} | options.pop("settings", {})
    return Trainer(Settings(**chosen), processor=processor, seed=6, progress=False, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_runs_and_leaves_frozen_what_is_frozen(name: str, family: str) -> None:
    model, method = toy_lm(family, vocab=V), METHODS[name]()
    assert isinstance(method, Forgetter)
    still = [weight for weight in model.parameters() if weight.dim() == 1]
    for weight in still:
        weight.requires_grad_(False)
    before, noise = state(model), torch.get_rng_state()
    assert method.forget(model, REQUEST, trainer(owner=method)) is model
    after = state(model)
    frozen = {key for key, weight in model.named_parameters() if not weight.requires_grad}
    assert len(frozen) == len(still) > 0
    assert all(torch.equal(after[key], before[key]) for key in frozen)
    assert not same(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize("name", NOTHING)
def test_strength_zero_leaves_the_model_unchanged(name: str) -> None:
    model = toy_lm("llama", vocab=V)
    before = state(model)
    NOTHING[name]().forget(model, REQUEST, trainer())
    assert same(state(model), before)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "retrain"])
def test_no_steps_leave_the_model_unchanged(name: str) -> None:
    model = toy_lm("llama", vocab=V)
    before = state(model)
    TRAINED[name]().forget(model, REQUEST, trainer(0))
    assert same(state(model), before)


@pytest.mark.parametrize("name", TRAINED)
def test_accumulation_does_not_move_the_trajectory(name: str) -> None:
    ends = []
    for parts in (1, 2, 4):
        model = toy_lm("gpt2", vocab=V, dtype=torch.float64)
        settings = {"batch_size": 8 // parts, "accumulate": parts, "optimizer": "sgd", "lr": 0.05}
        ends.append(state(TRAINED[name]().forget(model, REQUEST, trainer(4, settings=settings))))
    for key, value in ends[0].items():
        for other in ends[1:]:
            torch.testing.assert_close(value, other[key], rtol=1e-8, atol=1e-10)


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("name", "history"), [*((name, False) for name in TRAINED), ("retrain", True)])
def test_killed_and_resumed_equals_uninterrupted(name: str, history: bool, tmp_path: Path) -> None:
    tasks = [Task("one", FORGET.select(range(4, 8)), kind="qa"), Task("two", RETAIN, kind="qa")] if history else []
    request = Request("gone", FORGET.select(range(6)), RETAIN)

    def go(folder: Path | None, dies: int | None) -> dict[str, Tensor]:
        def watch(model: nn.Module, step: int) -> None:
            if step == dies:
                raise Killed

        model, method = toy_lm("llama", vocab=V), TRAINED[name]()
        points = Checkpoints(folder, every=2) if folder else None
        return state(method.forget(model, request, trainer(7, owner=method, checkpoints=points, watch=watch, history=tasks)))

    whole = go(None, None)
    for dies in (5, 12) if history else (1, 5):
        folder = tmp_path / str(dies)
        with pytest.raises(Killed):
            go(folder, dies)
        assert same(go(folder, None), whole)
        assert same(go(folder, None), whole)  # and a finished event stays as it ended


def test_ssd_run_again_from_the_start_gives_the_same_bits() -> None:
    ends = [state(SSD().forget(toy_lm("llama", vocab=V), REQUEST, trainer())) for _ in range(2)]
    assert same(*ends)


@pytest.mark.parametrize("name", ["iau", "influence", "fisher_forgetting"])
def test_a_single_step_run_again_from_the_start_gives_the_same_bits(name: str) -> None:
    ends = [state(METHODS[name]().forget(toy_lm("llama", vocab=V), REQUEST, trainer())) for _ in range(2)]
    assert same(*ends)


@pytest.mark.parametrize("name", METHODS)
def test_under_lora_only_the_adapter_moves(name: str) -> None:
    model = add_lora(toy_lm("llama", vocab=V), rank=2)
    with torch.no_grad():  # an adapter that has learned something before
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05
    before = state(model)
    METHODS[name]().forget(model, REQUEST, trainer())
    after = state(model)
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved
    assert all("lora_" in key for key in moved)


@pytest.mark.parametrize("name", ["kl", "npo_kl"])
def test_the_reference_under_lora_is_the_adapter_as_it_was(name: str) -> None:
    model = add_lora(toy_lm("llama", vocab=V), rank=2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05
    losses: list[dict] = []
    method = AscentKL(gamma=0.0) if name == "kl" else NPO(retain="kl", gamma=0.0)
    method.forget(model, REQUEST, trainer(1, record=lambda table, rows: losses.extend(rows) if table == "steps" else None))
    assert abs(next(row["value"] for row in losses if row["metric"] == "loss")) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_runs_in_bf16_autocast(name: str, family: str) -> None:
    model, losses = toy_lm(family, vocab=V), []
    before = state(model)
    METHODS[name]().forget(model, REQUEST, trainer(2, settings={"precision": "bf16"}, record=lambda table, rows: losses.extend(rows)))
    after = state(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert not same(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert losses


def test_npo_in_bf16_starts_at_its_published_value() -> None:
    losses: list[dict] = []
    event = trainer(1, settings={"precision": "bf16"}, record=lambda table, rows: losses.extend(rows))
    NPO(beta=0.1, retain="none").forget(toy_lm("llama", vocab=V), REQUEST, event)
    assert next(row["value"] for row in losses if row["metric"] == "loss") == pytest.approx(20 * math.log(2), rel=2e-3)


class Eye(nn.Module):
    """A small image classifier with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)


def pictures(count: int, seed: int, label: int | None = None) -> Dataset:
    made = np.random.default_rng(seed)
    labels = np.full(count, label) if label is not None else made.integers(0, 2, count)
    return Dataset.from_dict(
        {"features": (made.normal(size=(count, 1, 6, 6)) + labels[:, None, None, None]).tolist(), "label": labels.tolist()}
    )


@pytest.mark.parametrize("name", IMAGES)
def test_runs_on_an_image_classifier_with_batch_norm(name: str) -> None:
    request = Request("two", pictures(8, 1, 2), pictures(16, 2), kind="classes")
    model = Eye()
    learner = trainer(30, processor=None, settings={"lr": 0.01, "batch_size": 8})
    both = Dataset.from_dict({column: [*request.forget[column], *request.retain[column]] for column in ("features", "label")})  # type: ignore[index]
    learner.fit(model, learner.batches(both, "classes"))
    rows = learner.batches(request.forget, "classes", size=8)
    before = summed_nll(copy.deepcopy(model).eval(), rows[0]).mean().item()
    METHODS[name]().forget(model, request, trainer(10, processor=None, settings={"lr": 0.01, "batch_size": 8}))
    assert all(bool(value.isfinite().all()) for value in state(model).values())
    assert summed_nll(copy.deepcopy(model).eval(), rows[0]).mean().item() > before


@pytest.mark.parametrize("name", METHODS)
def test_runs_on_a_real_pretrained_model(name: str, real_data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name in QUESTIONS:
        pytest.skip("kind text has no questions")
    model = AutoModelForCausalLM.from_pretrained(real_data / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(real_data / "stories260k")
    stories = [
        f"Once upon a time, there was a little {animal} who liked to {deed}." for animal in ("dog", "cat") for deed in ("run", "eat")
    ]
    rows = [Dataset.from_dict({"text": part}) for part in (stories[:2], stories[2:])]
    before = state(model)
    event = trainer(2, processor=tokenizer, settings={"length": 16, "batch_size": 2, "lr": 1e-4})
    METHODS[name]().forget(model, Request("dog", rows[0], rows[1], kind="text"), event)
    after = state(model)
    assert not same(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())


@pytest.fixture(scope="module")
def taught() -> nn.Module:
    """A toy model that knows the rows of the request by heart."""
    model = toy_lm("llama", vocab=V)
    rows = Dataset.from_dict({column: [*FORGET[column], *RETAIN[column]] for column in ("question", "answer")})
    learner = trainer(150, settings={"batch_size": 20, "lr": 3e-3})
    return learner.fit(model, learner.batches(rows, "qa"))


def measured(model: nn.Module, rows: Dataset) -> float:
    batch = trainer().batches(rows, "qa", size=len(rows), shuffle=False)[0]
    assert (batch["labels"] != IGNORED).any()
    with torch.no_grad():
        return nll(model, batch).item()


@pytest.mark.parametrize("name", ["gradient_difference", "kl", "npo", "npo_kl"])
def test_forget_nll_rises_and_retain_nll_far_less_than_under_ascent(name: str, taught: nn.Module) -> None:
    assert max(measured(taught, FORGET), measured(taught, RETAIN)) < 0.3
    nlls = {}
    for each in ("gradient_ascent", name):
        model = copy.deepcopy(taught)
        TRAINED[each]().forget(model, REQUEST, trainer(30, settings={"batch_size": 8, "lr": 1e-3}))
        nlls[each] = {"forget": measured(model, FORGET), "retain": measured(model, RETAIN)}
    start = measured(taught, FORGET)
    assert nlls[name]["forget"] > start + 1
    assert nlls["gradient_ascent"]["forget"] > start + 1
    assert nlls[name]["retain"] - measured(taught, RETAIN) < 0.5 * (nlls["gradient_ascent"]["retain"] - measured(taught, RETAIN))
