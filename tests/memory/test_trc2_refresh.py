"""Slots of TRC2 encoded anew: with the weights of writing nothing changes, with others they are what a forward pass makes of their tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from toy_trc2 import LONG, entry, filled, lines, made, moved, span_of, tokens, trained_step, trainer

from remanence.errors import Mistake
from remanence.learn.replay_controller import ControlledReplay
from remanence.learn.sequential import Sequential
from remanence.memory.hippocampus import SlotMemory
from remanence.memory.spans import Spans
from remanence.stream import Task
from remanence.training.checkpoint import Checkpoints

# Without spans all is as it was, and with them but for the spans.


def test_spans_change_nothing_else() -> None:
    models = [made(), made(slot_span=5)]
    for model in models:
        descent = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            trained_step(model, tokens(step))
            descent.step()
            descent.zero_grad()
            model.after_step()
    off, on = (model.state_dict() for model in models)
    assert on.keys() - off.keys() == {"hippocampus.memory.span_ids", "hippocampus.memory.span_length"}
    assert not any("span" in name for name in off)
    assert all(torch.equal(value, on[name]) for name, value in off.items())
    assert torch.equal(models[0].eval()(tokens(9)).logits, models[1].eval()(tokens(9)).logits)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_stay_causal_with_refreshed_slots(mode: str) -> None:
    ids = tokens(length=23)
    ids[1, 7] = 3
    model = filled(made(slot_span=5, reset_token_id=3), ids)
    assert moved(model).refresh_slots() == int(model.memory.filled.sum())
    model.train(mode == "train")
    with torch.no_grad():
        clean = model(ids).logits
        for place in range(ids.shape[1]):
            changed = ids.clone()
            changed[:, place:] = (changed[:, place:] + 11) % 50
            assert torch.equal(model(changed).logits[:, :place], clean[:, :place])


# The refresh.


@pytest.mark.parametrize("changes", [{}, {"thalamus": False}, {"diffuse_decay": 0.8}, {"inject_layer": 0}, {"inject_layer": 2}])
def test_with_the_weights_of_writing_a_refresh_changes_nothing(changes: dict[str, Any]) -> None:
    model = filled(made(**LONG | changes), tokens())
    before = copy.deepcopy(model.memory)
    assert model.refresh_slots() == 12  # four of each row
    torch.testing.assert_close(model.memory.keys, before.keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.memory.values, before.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("span", [4, 32])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_with_moved_weights_slots_are_what_a_forward_pass_stashes(span: int, batch: int) -> None:
    model = moved(filled(made(**LONG | {"slot_span": span}), tokens()))
    before = copy.deepcopy(model.memory)
    assert model.refresh_slots(batch) == 12
    for slot in model.memory.with_span().tolist():
        key, value = entry(model, span_of(model.memory, slot))
        torch.testing.assert_close(model.memory.keys[slot], key, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.memory.values[slot], value, rtol=0, atol=1e-5)
        assert (before.keys[slot] - key).abs().max() > 0.01


def test_moved_slots_are_found_in_the_stash_of_a_whole_row() -> None:
    ids = tokens()
    model = moved(filled(made(**LONG | {"write_m": 18}), ids))
    model.refresh_slots()
    again = copy.deepcopy(model)
    filled(again, ids)
    fresh = {(*span_of(again.memory, slot),): slot for slot in again.memory.with_span().tolist()}
    for slot in model.memory.with_span().tolist():
        other = fresh[(*span_of(model.memory, slot),)]
        torch.testing.assert_close(model.memory.keys[slot], again.memory.keys[other], rtol=0, atol=1e-5)
        torch.testing.assert_close(model.memory.values[slot], again.memory.values[other], rtol=0, atol=1e-5)


def test_a_refresh_touches_keys_and_values_alone_and_is_deterministic() -> None:
    model = moved(filled(made(dropout=0.3, **LONG), tokens()))
    model.memory.write(F.normalize(torch.ones(1, 32), dim=-1), torch.ones(1, 32), torch.ones(1))  # a slot of no known span
    model.train()
    model.layers[1].eval()
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    modes, noise = [module.training for module in model.modules()], torch.get_rng_state()
    assert model.refresh_slots() == 12
    with twin.bypass():
        assert twin.refresh_slots() == 12  # the loops are at work all the same
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.own_loss() is None
    assert model.hippocampus is not None
    assert not model.hippocampus.waiting
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"hippocampus.memory.keys", "hippocampus.memory.values"}
    unknown = model.memory.filled & (model.memory.span_length == 0)
    assert int(unknown.sum()) == 1
    assert torch.equal(model.memory.values[unknown], torch.ones(1, 32))
    model.flush()
    trained_step(model, tokens(3))  # and training goes on
    model.after_step()


def test_a_merge_keeps_the_slots_span_and_a_refresh_gives_its_value_up() -> None:
    memory = SlotMemory(2, 2, span=3)
    east, one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[5, 6, 0]]), torch.tensor([[7, 8, 9]])
    memory.write(east, torch.tensor([[1.0, 1.0]]), torch.zeros(1), Spans(one, torch.tensor([2])))
    memory.write(east, torch.tensor([[9.0, 9.0]]), torch.ones(1), Spans(two, torch.tensor([3])))
    assert span_of(memory, 0) == [5, 6]
    assert memory.values[0, 0] > 1.5
    memory.write(-east, torch.tensor([[1.0, 1.0]]), torch.ones(1), Spans(two, torch.tensor([3])))
    assert span_of(memory, 1) == [7, 8, 9]

    model = filled(made(**LONG), tokens())
    own = model.memory.values.clone()
    model.memory.merge = 0.9
    model.memory.write(
        model.memory.keys[:3].clone(), 5 + torch.randn(3, 32), torch.ones(3), Spans(torch.ones(3, 32).long(), torch.ones(3).long())
    )
    assert (model.memory.values[:3] - own[:3]).abs().max() > 0.3
    model.refresh_slots()
    torch.testing.assert_close(model.memory.values, own, rtol=0, atol=1e-6)


def test_an_overwritten_slot_keeps_nothing_of_the_old_span() -> None:
    memory = SlotMemory(1, 2, span=3)
    east = torch.tensor([[1.0, 0.0]])
    memory.write(east, east, torch.zeros(1), Spans(torch.tensor([[5, 6, 7]]), torch.tensor([3])))
    memory.write(-east, east, torch.ones(1))
    assert not memory.span_ids.any()
    assert not memory.span_length.any()


@pytest.mark.parametrize("whole", [True, False])
def test_slots_are_refreshed_in_bf16(whole: bool) -> None:
    model = made(**LONG)
    if whole:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        filled(model, tokens())
        before = model.memory.keys.clone()
        assert model.refresh_slots() == 12
    torch.testing.assert_close(model.memory.keys, before, rtol=0, atol=0.05)


def test_a_refresh_at_the_wrong_time_is_refused() -> None:
    ids = tokens()
    with pytest.raises(Mistake, match="slot_span above 0"):
        made().refresh_slots()
    with pytest.raises(Mistake, match="no memory"):
        made(hippocampus=False, slot_span=4).refresh_slots()
    inside = made(slot_span=4)
    inside.layers[2].register_forward_hook(lambda *_: inside.refresh_slots())
    with pytest.raises(Mistake, match="inside a forward pass"):
        inside(ids)
    model = made(slot_span=4)
    model.train()
    loss = model(ids, labels=ids).loss
    with pytest.raises(Mistake, match="before the backward pass"):
        model.refresh_slots()
    assert loss is not None
    loss.backward()
    with pytest.raises(Mistake, match="writes wait"):
        model.refresh_slots()
    model.after_step()
    assert model.refresh_slots() == int((model.memory.span_length > 0).sum()) > 0
    assert made(slot_span=4, alive=False).refresh_slots() == 0  # an empty memory is up to date
    with pytest.raises(Mistake, match="slot_span"):
        made(slot_span=-1)


# At a task's end.


def test_the_learner_refreshes_at_a_tasks_end() -> None:
    notes: list[dict[str, Any]] = []

    def record(table: str, rows: list[dict[str, Any]]) -> None:
        notes.extend(row["content"] for row in rows if table == "notes")

    ends = {}
    for span in (0, 6):
        model, learner = made(vocab_size=99, slot_span=span), ControlledReplay(ring=4, reservoir=8, every=2)
        learner.learn(model, Task("lines", lines("line")), trainer(learner, record=record))
        ends[span] = model
    assert "refreshed" not in notes[0]
    assert notes[1]["refreshed"] == int((ends[6].memory.span_length > 0).sum()) > 0
    assert not torch.equal(ends[0].memory.keys, ends[6].memory.keys)
    assert all(torch.equal(value, ends[6].state_dict()[name]) for name, value in ends[0].named_parameters())
    known = ends[6].memory.with_span()
    before = ends[6].memory.keys.clone()
    ends[6].refresh_slots()
    assert torch.equal(ends[6].memory.keys[known], before[known])  # up to date already
    unrefreshed = made(vocab_size=99, slot_span=6)
    Sequential().learn(unrefreshed, Task("lines", lines("line")), trainer())
    before = unrefreshed.memory.keys.clone()
    unrefreshed.refresh_slots()
    assert not torch.equal(unrefreshed.memory.keys, before)


def test_killed_and_resumed_the_spans_are_the_same(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(model: Any, step: int) -> None:
        if step == 3:
            raise Killed

    ends = []
    for points in ("whole", "cut", "cut"):
        learner, model = ControlledReplay(ring=4, reservoir=8, every=2), made(vocab_size=99, slot_span=6)
        checkpoints = Checkpoints(tmp_path / points, every=2)
        if points == "cut" and len(ends) == 1 and not checkpoints.points():
            with pytest.raises(Killed):
                learner.learn(model, Task("lines", lines("line")), trainer(learner, 5, checkpoints=checkpoints, watch=kill))
            learner, model = ControlledReplay(ring=4, reservoir=8, every=2), made(vocab_size=99, slot_span=6)
        ends.append(learner.learn(model, Task("lines", lines("line")), trainer(learner, 5, checkpoints=checkpoints)).state_dict())
    assert (ends[0]["hippocampus.memory.span_length"] > 0).any()
    for end in ends[1:]:  # killed in the middle; and behind the last step, before the refresh was saved
        assert all(torch.equal(value, end[name]) for name, value in ends[0].items())
