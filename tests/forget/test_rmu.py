"""RMU equals its formula row by row, computes nothing above the steered block, and moves only what it names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.forget.rmu import RMU, counted, direction, row_distance, steered, updated
from remanence.models.adapters import add_lora
from remanence.stream import Request
from remanence.training.batches import IGNORED, Batch
from remanence.training.trainer import Settings, Trainer
from toy import toy_classifier, toy_lm, toy_tokenizer

TOKENIZER = toy_tokenizer()
V = len(TOKENIZER)
FORGET = Dataset.from_dict({"question": [f"who is {'a' * n}" for n in range(1, 6)], "answer": ["xyz"[: n % 3 + 1] for n in range(5)]})
RETAIN = Dataset.from_dict({"question": [f"what is {n}" for n in range(7)], "answer": ["b" * (n % 4 + 1) for n in range(7)]})
REQUEST = Request("gone", FORGET, RETAIN)
FAMILIES = ["llama", "gpt2", "qwen2"]


class Spy(Trainer):
    """Catches what a method would fit."""

    caught: tuple[Any, Any, Any]

    def fit(self, model: nn.Module, batches: Any, loss: Any = None, **options: Any) -> nn.Module:
        self.caught = (batches, loss, options["parameters"])
        return model


def caught(method: RMU, model: nn.Module, seed: int = 3) -> tuple[Batch, Any, list[str]]:
    spy = Spy(Settings(batch_size=4), processor=TOKENIZER, seed=seed)
    method.forget(model, REQUEST, spy)
    batches, loss, names = spy.caught
    return batches[0], loss, names


def hidden(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """The output of a block, (T, D), of one row without padding. The last block's is read before the final norm."""
    kept: list[Tensor] = []
    name = {"gpt2": f"transformer.h.{layer}"}.get(model.config.model_type, f"model.layers.{layer}")
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, out: kept.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=ids[None])
    hook.remove()
    return kept[0][0]


def by_hand(model: nn.Module, rows: Batch, layer: int, goal: Any, positions: str) -> float:
    """Mean over rows of the mean over counted tokens of the mean square."""
    total = 0.0
    for ids, labels in zip(rows["input_ids"], rows["labels"]):
        places = (labels != IGNORED).nonzero()[:, 0].tolist()
        length = places[-1] + 1
        states = hidden(model, ids[:length], layer)
        target = goal if isinstance(goal, Tensor) else hidden(goal, ids[:length], layer)
        each = (states - target).square().mean(-1)
        chosen = range(length) if positions == "all" else [place - 1 for place in places]
        total += sum(each[place].item() for place in chosen) / len(chosen)
    return total / len(rows["input_ids"])


def moved(model: nn.Module) -> nn.Module:
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=noise, dtype=weight.dtype)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_objective_equals_the_formula_row_by_row(family: str, layer: int, positions: str) -> None:
    model = toy_lm(family, vocab=V, dtype=torch.float64 if family == "gpt2" else torch.float32)
    before = copy.deepcopy(model)
    method = RMU(layer=layer, c=3.0, gamma=0.7, alpha=1.3, positions=positions)
    batch, loss, names = caught(method, model)
    with torch.no_grad():  # a step in what may move
        for name, weight in model.named_parameters():
            if name in names:
                weight += 0.1
    target = 3.0 * direction(32, Trainer(seed=3).generator("rmu", "direction"))
    value = 0.7 * by_hand(model, batch["forget"], layer, target, positions)
    value += 1.3 * by_hand(model, batch["retain"], layer, before, positions)
    assert loss(model, batch).item() == pytest.approx(value, rel=1e-9 if family == "gpt2" else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_retain_term_and_its_gradient_are_zero_at_the_start(family: str) -> None:
    model = toy_lm(family, vocab=V)
    batch, loss, names = caught(RMU(gamma=0.0), model)
    value = loss(model, batch)
    value.backward()
    assert value.item() == 0.0
    assert all(not model.get_parameter(name).grad.any() for name in names)


def test_nothing_above_the_steered_block_is_computed() -> None:
    model, ran = toy_lm("llama", vocab=V, layers=4), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    batch, loss, _ = caught(RMU(layer=1), model)
    ran.clear()
    loss(model, batch)
    assert any(name.startswith("model.layers.1") for name in ran)
    assert not any(name.startswith(("model.layers.2", "model.layers.3", "model.norm", "lm_head")) for name in ran)
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_down_projections_of_the_block_and_the_two_below_move(family: str) -> None:
    model = toy_lm(family, vocab=V, layers=6)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    RMU(layer=4).forget(model, REQUEST, Trainer(Settings(steps=2, batch_size=4), processor=TOKENIZER, progress=False))
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    wanted = "transformer.h.{}.mlp.c_proj.weight" if family == "gpt2" else "model.layers.{}.mlp.down_proj.weight"
    assert changed == {wanted.format(number) for number in (2, 3, 4)}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_forget_states_come_near_the_target_and_retain_states_stay(checkpointed: bool) -> None:
    model = toy_lm("llama", vocab=V)
    before = copy.deepcopy(model)
    settings = Settings(steps=40, batch_size=5, lr=0.02, gradient_checkpointing=checkpointed)
    event = Trainer(settings, processor=TOKENIZER, seed=3, progress=False)
    RMU(layer=1, alpha=10).forget(model, REQUEST, event)
    target = 2.0 * direction(32, Trainer(seed=3).generator("rmu", "direction"))
    forget, retain = (event.batches(rows, "qa", size=7, shuffle=False)[0] for rows in (FORGET, RETAIN))
    start = by_hand(before, forget, 1, target, "all")
    assert by_hand(model, forget, 1, target, "all") < 0.6 * start
    assert by_hand(model, retain, 1, before, "all") < 0.2 * start


def test_gradient_checkpointing_does_not_change_the_end() -> None:
    ends = []
    for checkpointed in (False, True):
        model = toy_lm("llama", vocab=V)
        settings = Settings(steps=3, batch_size=4, gradient_checkpointing=checkpointed)
        ends.append(RMU().forget(model, REQUEST, Trainer(settings, processor=TOKENIZER, progress=False)).state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_padding_and_its_hidden_states_count_nowhere() -> None:
    made = torch.Generator().manual_seed(0)
    states, goal = torch.randn(2, 4, 3, generator=made), torch.randn(3, generator=made)
    labels = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED, IGNORED, 7, 8]])
    inside = counted(labels, "all")
    assert inside.tolist() == [[True, True, True, False], [True, True, True, True]]
    assert counted(labels, "answer").tolist() == [[True, True, False, False], [False, True, True, False]]
    other = states.clone()
    other[0, 3] = 100.0
    assert torch.equal(row_distance(states, goal, inside), row_distance(other, goal, inside))


def test_row_distance_by_hand() -> None:
    states = torch.tensor([[[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]]])
    inside = torch.tensor([[True, True, False]])
    # token 1: (1 + 0) / 2 = 0.5; token 2: (9 + 0) / 2 = 4.5
    assert row_distance(states, torch.tensor([0.0, 1.0]), inside).tolist() == [2.5]


def test_gradient_agrees_with_finite_differences() -> None:
    made = torch.Generator().manual_seed(0)
    states = torch.randn(2, 4, 3, generator=made, dtype=torch.float64, requires_grad=True)
    goal, inside = torch.randn(3, generator=made, dtype=torch.float64), torch.rand(2, 4, generator=made) > 0.3
    assert torch.autograd.gradcheck(lambda states: row_distance(states, goal, inside), (states,))


def test_the_direction_is_a_unit_vector_of_the_event_and_the_same_again() -> None:
    one, two, other = (direction(64, Trainer(seed=seed).generator("rmu", "direction")) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.norm().item() == pytest.approx(1.0)
    assert bool((one >= 0).all())


def test_the_paper_s_block_is_seven_of_thirty_two() -> None:
    assert steered(toy_lm("llama", vocab=V, width=8, layers=32), None) == ("model.layers.7", "model.layers.8")
    assert steered(toy_lm("llama", vocab=V, layers=2), None)[0] == "model.layers.0"
    assert steered(toy_lm("gpt2", vocab=V, layers=2), 1) == ("transformer.h.1", None)


def test_a_pattern_or_other_roles_choose_what_moves() -> None:
    model = toy_lm("llama", vocab=V)
    assert updated(model, "model.layers.1", 1, ("up", "gate"), None) == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")]
    names = updated(model, "model.layers.0", 3, ("down",), r"layers\.0\.self_attn")
    assert len(names) == 4
    assert caught(RMU(layer="model.layers.0.mlp", parameters="down_proj"), model)[2] == [
        f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)
    ]


def test_under_lora_the_reference_shares_all_but_the_adapters_it_moves() -> None:
    model = moved(add_lora(toy_lm("llama", vocab=V), rank=2))
    batch, loss, names = caught(RMU(layer=1, layers=1, gamma=0.0), model)
    assert len(names) == 2
    assert all("layers.1.mlp.down_proj.lora_" in name for name in names)
    assert loss(model, batch).item() == 0.0
    assert sum(weight.requires_grad for weight in model.parameters()) > 2  # the other adapters kept their flags


def test_without_retain_weight_no_retain_rows_are_needed() -> None:
    event = Trainer(Settings(steps=1, batch_size=4), processor=TOKENIZER, progress=False)
    RMU(alpha=0).forget(toy_lm("llama", vocab=V), Request("alone", FORGET), event)
    with pytest.raises(Mistake, match=r"request 'alone'.*no retain set.*RMU"):
        RMU().forget(toy_lm("llama", vocab=V), Request("alone", FORGET), event)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"c": -1.0}, "rmu.c"),
        ({"gamma": -1.0}, "rmu.gamma"),
        ({"layers": 0}, "rmu.layers"),
        ({"positions": "every"}, "rmu.positions"),
        ({"update": ("dwon",)}, "rmu.update.*did you mean 'down'"),
        ({"parameters": "("}, "rmu.parameters"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], place: str) -> None:
    with pytest.raises(Mistake, match=place):
        RMU(**options)


def test_models_and_places_that_do_not_fit_are_refused() -> None:
    event = Trainer(Settings(steps=1), processor=TOKENIZER, progress=False)
    with pytest.raises(Mistake, match="no layer 2.*layers 0 to 1"):
        RMU(layer=2).forget(toy_lm("llama", vocab=V), REQUEST, event)
    with pytest.raises(Mistake, match="no module 'model.layer.0'"):
        RMU(layer="model.layer.0", parameters="down").forget(toy_lm("llama", vocab=V), REQUEST, event)
    with pytest.raises(Mistake, match="is no block"):
        RMU(layer="model.layers.0.mlp").forget(toy_lm("llama", vocab=V), REQUEST, event)
    with pytest.raises(Mistake, match="no parameter that requires a gradient"):
        RMU().forget(toy_lm("llama", vocab=V).requires_grad_(False), REQUEST, event)
    with pytest.raises(Mistake, match="not a language model"):
        RMU().forget(toy_classifier(), REQUEST, event)
