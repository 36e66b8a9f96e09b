"""TRC2: what its sheet calls faithful, line by line; causality first."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from toy_trc2 import made, tokens, trained_step

from remanence.errors import Mistake
from remanence.learn.replay_controller import ControlledReplay
from remanence.learn.sequential import Sequential
from remanence.memory.hippocampus import SlotMemory
from remanence.memory.thalamus import past_average, past_mean, trn
from remanence.memory.trc2 import TRC2Cache
from remanence.memory.trc2_parts import moe_grouped, moe_reference
from remanence.models.load import load_model, save_model
from remanence.stream import Task
from remanence.training.batches import Batch
from remanence.training.checkpoint import Checkpoints
from remanence.training.losses import nll
from remanence.training.replay_control import ForgettingController, ReplayStore, replaying
from remanence.training.trainer import Settings, Trainer
from toy import toy_lm, toy_tokenizer


def test_a_loss_asked_for_with_labels_holds_the_models_own() -> None:
    model, ids = made(), tokens()
    model.train()
    logits = model(ids).logits
    own = model.own_loss()
    assert own is not None
    assert float(own.detach()) > 0
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + own)
    assert model.own_loss() is None


# 1


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("diffuse", [None, 0.8])
def test_logits_before_a_perturbed_token_are_bit_identical(mode: str, diffuse: float | None) -> None:
    model = made(diffuse_decay=diffuse, reset_token_id=3)
    model.train(mode == "train")
    ids = tokens(length=23)
    ids[1, 7] = 3
    with torch.no_grad():
        clean = model(ids).logits
        for place in range(ids.shape[1]):
            changed = ids.clone()
            changed[:, place:] = (changed[:, place:] + 11) % 50
            logits = model(changed).logits
            assert torch.equal(logits[:, :place], clean[:, :place])
            assert not torch.equal(logits[:, place:], clean[:, place:])


def test_the_perturbation_would_show_in_the_side_loops() -> None:
    model, ids = made(), tokens()
    with torch.no_grad(), model.bypass():
        plain = model(ids).logits
    with torch.no_grad():
        both = model(ids).logits
    filled = copy.deepcopy(model)
    filled.memory.clear()
    assert (both - plain).abs().max() > 1e-3
    assert (filled(ids).logits - both).abs().max() > 1e-4  # what stands in the slots matters


# 2


def test_slots_change_in_flush_alone() -> None:
    model, ids = made(), tokens()
    before = copy.deepcopy(model.memory.state_dict())
    trained_step(model, ids)
    assert all(torch.equal(value, before[name]) for name, value in model.memory.state_dict().items())
    model.flush()
    assert not torch.equal(model.memory.keys, before["keys"])


def test_a_batch_cannot_retrieve_its_own_content() -> None:
    model, ids = made(alive=False), tokens()
    model.train()
    first = model(ids).logits
    again = model(ids).logits  # still nothing was written
    assert torch.equal(first, again)
    assert not model.memory.filled.any()


def test_flush_before_backward_is_refused() -> None:
    model, ids = made(), tokens()
    model.train()
    loss = model(ids, labels=ids).loss
    with pytest.raises(Mistake, match="before the backward pass"):
        model.flush()
    assert loss is not None
    loss.backward()
    model.flush()


def test_flush_inside_forward_is_refused() -> None:
    model = made()
    model.layers[2].register_forward_hook(lambda *_: model.flush())
    with pytest.raises(Mistake, match="inside a forward pass"):
        model(tokens())


def test_nothing_is_written_in_evaluation_unless_online() -> None:
    ids = tokens()
    model = made()
    before = model.memory.keys.clone()
    model(ids, labels=ids)
    model.flush()
    assert torch.equal(model.memory.keys, before)
    online = made(online=True)
    with pytest.raises(Mistake, match="labels"):
        online(ids)
    online(ids, labels=ids)
    assert torch.equal(online.memory.keys, before)
    online.flush()
    assert not torch.equal(online.memory.keys, before)


# 3


def test_without_modulation_it_is_the_plain_decoder() -> None:
    model, plain, ids = made(), made(thalamus=False, hippocampus=False), tokens()
    shared = {name: value for name, value in model.state_dict().items() if name in plain.state_dict()}
    assert shared.keys() == plain.state_dict().keys()
    plain.load_state_dict(shared)
    with torch.no_grad():
        for layer in model.layers:
            if layer.self_attn.modulate is not None:
                layer.self_attn.modulate.weight.zero_()
        assert model.hippocampus is not None
        model.hippocampus.openness.fill_(-torch.inf)
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_fresh_model_is_the_plain_decoder() -> None:
    model = made(alive=False)
    with torch.no_grad():
        loud = model(tokens()).logits
        with model.bypass():
            assert torch.equal(model(tokens()).logits, loud)


# 4


@pytest.mark.parametrize(("thalamus", "hippocampus"), itertools.product([False, True], repeat=2))
def test_four_configurations_with_and_without_replay(thalamus: bool, hippocampus: bool) -> None:
    model = made(thalamus=thalamus, hippocampus=hippocampus, vocab_size=99)
    assert (len(model.thalami) > 0, model.hippocampus is not None) == (thalamus, hippocampus)
    texts = Dataset.from_dict({"text": [f"line {number} of the text and what follows it" for number in range(12)]})
    tests = Dataset.from_dict({"text": [f"a test of the same kind, {number}" for number in range(4)]})
    for learner in (Sequential(), ControlledReplay(ring=4, reservoir=8, every=2)):
        before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        trainer = Trainer(Settings(steps=3, batch_size=4, length=24), processor=toy_tokenizer(99), progress=False)
        learner.learn(model, Task("lines", texts, tests), trainer)
        moved = {name for name, value in model.named_parameters() if name in before and not torch.equal(value, before[name])}
        assert {"layers.0.mlp.gate_up", "embed_tokens.weight"} <= moved
        assert (any(name.startswith("thalami") for name in moved), "hippocampus.fast.weight" in moved) == (thalamus, hippocampus)
        assert isinstance(learner, Sequential) or len(learner.store) > 0
    if hippocampus:
        assert int(model.memory.time) == 7  # the slots were written behind each of six steps, once in `made`


# 5


def brute_read(memory: SlotMemory, query: Tensor, k: int, sharpness: float) -> Tensor:
    out = torch.zeros_like(query)
    filled = memory.filled.nonzero()[:, 0].tolist()
    for b, t in itertools.product(range(query.shape[0]), range(query.shape[1])):
        scored = sorted((-float(query[b, t] @ memory.keys[slot]), slot) for slot in filled)[:k]
        if scored:
            weight = torch.softmax(torch.tensor([-sharpness * score for score, _ in scored], dtype=query.dtype), 0)
            out[b, t] = sum(w * memory.values[slot] for w, (_, slot) in zip(weight, scored, strict=True))
    return out


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("held", [0, 2, 5, 7])
def test_topk_read_is_brute_force(k: int, held: int) -> None:
    draw = torch.Generator().manual_seed(held)
    memory = SlotMemory(7, 6).double()
    if held:
        key, value = (torch.randn(held, 6, generator=draw, dtype=torch.float64) for _ in range(2))
        memory.write(F.normalize(key, dim=-1), value, torch.rand(held, generator=draw, dtype=torch.float64))
        assert int(memory.filled.sum()) == held
    query = F.normalize(torch.randn(2, 3, 6, generator=draw, dtype=torch.float64), dim=-1)
    got = memory.read(query, k, 8.0)
    torch.testing.assert_close(got, brute_read(memory, query, k, 8.0), rtol=1e-12, atol=1e-12)
    if held == 7 and k == 7:
        full = torch.softmax(8.0 * query @ memory.keys.mT, -1) @ memory.values
        torch.testing.assert_close(got, full, rtol=1e-12, atol=1e-12)
    if held == 0:
        assert torch.equal(got, torch.zeros_like(got))


def test_ties_are_read_by_index() -> None:
    memory = SlotMemory(6, 2)
    memory.keys[:] = torch.tensor([1.0, 0.0])
    memory.values[:, 0] = torch.arange(6.0)
    memory.filled[:] = True
    read = memory.read(torch.tensor([[[1.0, 0.0]]]), 2, 8.0)
    assert float(read[0, 0, 0]) == 0.5  # slots 0 and 1


def test_an_empty_memory_adds_exactly_nothing() -> None:
    model, ids = made(), tokens()
    model.memory.clear()
    assert model.hippocampus is not None
    with torch.no_grad():
        h, surprise = torch.randn(2, 5, 32), torch.full((2, 5), 100.0)
        assert torch.equal(model.hippocampus(h, surprise, torch.ones(2, 5, dtype=torch.bool)), torch.zeros(2, 5, 8))
        silent = made(hippocampus=False)
        silent.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("hippocampus")})
        bare = copy.deepcopy(model)
        for thalamus in (*bare.thalami, *silent.thalami):
            thalamus.gates.weight[:, -1] = 0  # surprise, which the model without critics does not have
        torch.testing.assert_close(bare(ids).logits, silent(ids).logits, rtol=0, atol=0)


# 6


def test_the_gate_sends_no_gradient_into_the_stream() -> None:
    hippocampus = made().hippocampus
    assert hippocampus is not None
    hippocampus.train()
    with torch.no_grad():
        hippocampus.query.weight.zero_()  # then the gate's branch is the only one left
    h = torch.randn(2, 5, 32, requires_grad=True)
    out = hippocampus(h, torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool))
    out.square().sum().backward()
    assert h.grad is not None
    assert torch.equal(h.grad, torch.zeros_like(h.grad))
    assert hippocampus.gate.weight.grad is not None
    assert hippocampus.gate.weight.grad[:, :32].abs().max() > 0


def test_slots_carry_no_gradient_and_critics_send_none() -> None:
    model, ids = made(), tokens()
    trained_step(model, ids)
    assert not any(buffer.requires_grad for buffer in model.memory.buffers())
    assert model.hippocampus is not None
    assert model.hippocampus.to_key.weight.grad is None
    model.zero_grad()
    model.flush()
    value, *_ = model.hippocampus.judge(h := torch.randn(2, 5, 32, requires_grad=True), torch.ones(2, 5, dtype=torch.bool), None)
    value.sum().backward()
    assert h.grad is None
    assert not model.memory.keys.requires_grad


# 7


def test_replayed_rows_go_around_both_loops() -> None:
    model, ids = made(), tokens()
    plain = made(thalamus=False, hippocampus=False)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    model.train()
    with replaying(model):
        replayed = model(ids).logits
    assert torch.equal(replayed, plain(ids).logits)
    assert model.hippocampus is not None
    assert not model.hippocampus.waiting
    with replaying(toy_lm("llama")) as nothing:
        assert nothing is None


def test_replay_never_samples_the_current_rows() -> None:
    shown: list[tuple[set[int], set[int]]] = []
    texts = Dataset.from_dict({"text": [f"{chr(97 + number)}" * 23 for number in range(24)]})
    model = toy_lm("llama")

    class Watched(Trainer):
        def fit(self, model: Any, batches: Any, loss: Any = nll, **rest: Any) -> Any:
            def seen(model: Any, batch: Batch) -> Tensor:
                shown.append(
                    ({*batch["new"]["input_ids"][:, 1].tolist()}, {*batch["old"]["input_ids"][:, 1].tolist()} if "old" in batch else set())
                )
                return loss(model, batch)

            return super().fit(model, batches, seen, **rest)

    trainer = Watched(Settings(steps=6, batch_size=4, length=24), processor=toy_tokenizer(), progress=False)
    ControlledReplay(share=2.0).learn(model, Task("letters", texts), trainer)
    past: set[int] = set()
    for new, old in shown:
        assert not new & old
        assert old <= past
        past |= new
    assert sum(len(old) for _, old in shown) > 0


def test_the_reservoir_is_uniform() -> None:
    counts = torch.zeros(60)
    for seed in range(400):
        store = ReplayStore(4, 10, seed)
        for first in range(0, 60, 6):
            store.push({"input_ids": torch.arange(first, first + 6)[:, None].repeat(1, 3)})
        counts[store.reservoir.rows()["input_ids"][:, 0]] += 1
        assert store.ring.rows()["input_ids"][:, 0].sort().values.tolist() == [56, 57, 58, 59]
    expected = 400 * 10 / 60
    chi_square = float(((counts - expected) ** 2 / (expected * (1 - 10 / 60))).sum())
    assert chi_square < 98.3  # 59 degrees of freedom, p = 0.001


def test_a_store_takes_no_rows_without_ids() -> None:
    with pytest.raises(Mistake, match="no ids"):
        ReplayStore(2, 2, 0).push({"labels": torch.zeros(2, 3)})


# 8


def test_controller_is_monotone_bounded_and_does_not_wind_up() -> None:
    strengths = [ForgettingController().follow(forgetting) for forgetting in np.linspace(0, 3, 50)]
    assert strengths == sorted(strengths)
    assert strengths[0] == 0.05
    assert strengths[-1] == 1.0
    controller = ForgettingController()
    for _ in range(100):
        controller.follow(5.0)
        assert 0.05 <= controller.lam <= 1.0
        assert controller.integral <= 2.0
    steps = 0
    while controller.follow(0.0) > 0.05:
        steps += 1
    assert 0 < steps <= 101  # 2.0 / 0.02 at most, however long the error stood
    for _ in range(1000):
        controller.follow(0.0)
    assert controller.integral == 0.0
    assert controller.lam == 0.05
    assert controller.follow(0.22) == pytest.approx(0.05 + 2 * 0.2 + 0.5 * 0.2)


def test_controller_measures_the_earlier_tasks() -> None:
    controller = ForgettingController()
    controller.update({"a": 2.0}, "a")
    assert controller.forgetting == 0.0
    controller.update({"a": 2.5, "b": 9.0}, "b")
    assert controller.forgetting == pytest.approx(0.5)
    controller.update({"a": 2.1, "b": 9.5, "c": 1.0}, "c")
    assert controller.forgetting == pytest.approx((0.1 + 0.5) / 2)
    again = ForgettingController()
    again.load_state_dict(controller.state_dict())
    assert again.update({"a": 3.0}) == controller.update({"a": 3.0})


def test_no_range_of_strength_is_refused() -> None:
    with pytest.raises(Mistake, match="no range"):
        ForgettingController(lam_min=0.5, lam_max=0.1)


# 10 (9 is in tests/measure/test_retention_curve.py)


@pytest.mark.parametrize("pieces", [[1] * 19, [5, 1, 9, 4], [18, 1]])
@pytest.mark.parametrize("diffuse", [None, 0.8])
def test_parallel_forward_is_incremental_decoding(pieces: list[int], diffuse: float | None) -> None:
    model, ids = made(diffuse_decay=diffuse, reset_token_id=3), tokens()
    ids[0, 6] = ids[2, 17] = 3
    cache = TRC2Cache()
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(part, cache=cache, use_cache=True).logits for part in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = made(), tokens(rows=1, length=9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = (padded != 0).long()
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits, rtol=0, atol=1e-4)
        mixed = torch.cat([padded, tokens(4, 1, 13)])
        got = model.generate(
            mixed, attention_mask=torch.cat([mask, torch.ones_like(mask)]), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert got[0, 13:].tolist() == alone[0, 9:].tolist()


def test_generation_and_beams_equal_rereading() -> None:
    model, ids = made(), tokens(length=6)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    for beams in (1, 3):
        assert torch.equal(
            model.generate(ids, num_beams=beams, **options), model.generate(ids, num_beams=beams, use_cache=False, **options)
        )


def test_a_cache_takes_no_tokens_back() -> None:
    cache = TRC2Cache()
    assert not cache.is_croppable
    with pytest.raises(Mistake, match="take tokens back"):
        cache.crop(3)


def test_memory_is_read_at_events_alone() -> None:
    hippocampus = made().hippocampus
    assert hippocampus is not None
    hippocampus.threshold.fill_(0.5)
    h, known = torch.randn(1, 4, 32), torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        out = hippocampus(h, torch.tensor([[0.4, 0.6, 0.5, 9.0]]), known)
    assert [bool(row.any()) for row in out[0]] == [False, True, False, False]


def test_killed_and_resumed_the_slots_are_the_same(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": [f"line {number} of the text and what follows it" for number in range(12)]})
    task = Task("lines", texts)

    def trainer(owner: Any, points: str, watch: Any = None) -> Trainer:
        checkpoints = Checkpoints(tmp_path / points, every=2)
        chosen = Settings(steps=5, batch_size=4, length=24)
        return Trainer(chosen, processor=toy_tokenizer(99), owner=owner, checkpoints=checkpoints, watch=watch, progress=False)

    class Killed(Exception):
        pass

    def kill(model: Any, step: int) -> None:
        if step == 3:
            raise Killed

    ends = []
    for points in ("whole", "cut"):
        learner, model = ControlledReplay(ring=4, reservoir=8, every=2), made(vocab_size=99)
        if points == "cut":
            with pytest.raises(Killed):
                learner.learn(model, task, trainer(learner, points, kill))
            learner, model = ControlledReplay(ring=4, reservoir=8, every=2), made(vocab_size=99)
        ends.append(learner.learn(model, task, trainer(learner, points)).state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# The pieces, by brute force.


def test_grouped_experts_equal_all_experts_on_all_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    for rows, experts, k in ((1, 3, 1), (13, 4, 2), (40, 8, 3), (7, 5, 5)):
        x, gate_up, down = (
            torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)
            for shape in ((rows, 6), (experts, 10, 6), (experts, 6, 5))
        )
        index = torch.rand(rows, experts, generator=draw).topk(k).indices
        weight = torch.rand(rows, k, generator=draw, dtype=torch.float64, requires_grad=True)
        inputs = (x, weight, gate_up, down)
        results = [form(x, index, weight, gate_up, down) for form in (moe_grouped, moe_reference)]
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
        for one, other in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in results), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_diffuse_paths_equal_loops() -> None:
    draw = torch.Generator().manual_seed(3)
    for length in (1, 2, 7, 63):
        c = torch.randn(2, length, 3, generator=draw, dtype=torch.float64)
        real = torch.rand(2, length, generator=draw) > 0.2
        first = torch.rand(2, length, generator=draw) > 0.85
        c = c * real[..., None]
        total, count, average = c.new_zeros(2, 3) + 0.5, c.new_ones(2) * 2, c.new_zeros(2, 3) + 0.3
        mean, total_behind, count_behind = past_mean(c, real, first, total, count)
        smooth, behind = past_average(c, real, first, average, 0.7)
        for b in range(2):
            held, number, state = total[b].clone(), float(count[b]), average[b].clone()
            for t in range(length):
                if first[b, t]:
                    held, number, state = torch.zeros_like(held), 0.0, torch.zeros_like(state)
                torch.testing.assert_close(mean[b, t], held / max(number, 1), rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(smooth[b, t], state, rtol=1e-10, atol=1e-12)
                if real[b, t]:
                    held, number, state = held + c[b, t], number + 1, 0.7 * state + 0.3 * c[b, t]
            torch.testing.assert_close(total_behind[b], held, rtol=1e-10, atol=1e-12)
            assert float(count_behind[b]) == number
            torch.testing.assert_close(behind[b], state, rtol=1e-10, atol=1e-12)


def test_trn_by_hand() -> None:
    # Groups (3, 4) and (0, 0): RMS 3.5355 and 0, mean 1.7678, so the first is doubled and the second stays 0.
    torch.testing.assert_close(trn(torch.tensor([[[3.0, 4.0, 0.0, 0.0]]]), 2), torch.tensor([[[6.0, 8.0, 0.0, 0.0]]]))


def test_surprise_needs_no_reward() -> None:
    # delta_fast - delta_slow with any reward in both is gamma D(t+1) - D(t).
    model = made()
    assert model.hippocampus is not None
    h = torch.randn(1, 6, 32)
    value, ahead, surprise, known, _ = model.hippocampus.judge(h, torch.ones(1, 6, dtype=torch.bool), None)
    reward = torch.randn(1, 5)
    fast = 0.1 * reward + 0.9 * ahead[:, 1:] - value[:, :-1]
    slow = 0.1 * reward  # V_slow is zero in a fresh model
    torch.testing.assert_close(surprise[:, 1:], fast - slow)
    assert known.tolist() == [[False, True, True, True, True, True]]
    assert float(surprise[0, 0]) == 0.0


def test_writes_merge_the_near_and_overwrite_the_weakest() -> None:
    memory = SlotMemory(2, 2, age_decay=0.5)
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    memory.write(east, torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
    memory.write(east, torch.tensor([[2.0, 1.0]]), torch.tensor([0.0]))
    torch.testing.assert_close(memory.values[0], torch.tensor([1.1, 1.0]))
    assert memory.filled.tolist() == [True, False]
    memory.write(north, torch.tensor([[5.0, 5.0]]), torch.tensor([-1.0]))
    assert memory.filled.tolist() == [True, True]
    memory.write(-east, torch.tensor([[7.0, 7.0]]), torch.tensor([1.0]))  # sigmoid(2)/4 = 0.22 against sigmoid(-1)/2 = 0.13
    assert memory.values[1].tolist() == [7.0, 7.0]
    memory.write(
        torch.cat([north, north]), torch.tensor([[3.0, 3.0], [4.0, 4.0]]), torch.tensor([0.0, 1.0])
    )  # a near copy: the stronger one
    assert sorted(memory.values[:, 0].tolist()) == [4.0, 7.0]


def test_slots_are_saved_loaded_cleared_and_forgotten(tmp_path: Path) -> None:
    model = made()
    model.memory.save(tmp_path / "slots.safetensors")
    other = made(seed=9, alive=False)
    other.memory.load(tmp_path / "slots.safetensors")
    assert torch.equal(other.memory.values, model.memory.values)
    mask = torch.zeros(16, dtype=torch.bool)
    mask[2:5] = True
    assert other.memory.forget(mask) == 3
    assert int(other.memory.filled.sum()) == 9
    assert not other.memory.values[2:5].any()
    assert not other.memory.keys[2:5].any()
    other.memory.clear()
    assert not other.memory.filled.any()
    assert not other.memory.values.any()
    with pytest.raises(Mistake, match="booleans"):
        other.memory.forget(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(Mistake, match="slots"):
        made(slots=8, alive=False).memory.load(tmp_path / "slots.safetensors")
    with pytest.raises(Mistake, match="no memory"):
        made(hippocampus=False).memory.clear()


def test_the_model_is_saved_with_its_slots(tmp_path: Path) -> None:
    model = made(vocab_size=64)
    save_model(model, toy_tokenizer(64), tmp_path / "model")
    loaded = load_model(str(tmp_path / "model")).model
    ids = tokens()
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("whole", [True, False])
def test_it_reads_and_writes_in_bf16(whole: bool) -> None:
    model, ids = made(alive=False), tokens()
    if whole:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        trained_step(model, ids)
        model.after_step()
        assert model.memory.filled.any()
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 9}, "equal groups"),
        ({"read_k": 17}, "16 slots"),
        ({"experts_per_token": 5}, "of 4"),
        ({"inject_layer": 3}, "later column"),
        ({"num_attention_heads": 5}, "heads"),
    ],
)
def test_settings_that_fit_no_model_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Mistake, match=message):
        made(alive=False, **changes)


def test_a_probe_inside_the_training_rows_is_refused() -> None:
    texts = Dataset.from_dict({"text": ["one line of text", "another line"]})
    trainer = Trainer(Settings(steps=1, length=8), processor=toy_tokenizer(), progress=False)
    with pytest.raises(Mistake, match="probe"):
        ControlledReplay().learn(toy_lm("llama"), Task("lines", texts, texts.select([1])), trainer)


def test_experts_are_used_alike_under_the_balance_loss() -> None:
    model, ids = made(balance_weight=1.0, thalamus=False, hippocampus=False), tokens(rows=8)
    descent = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    found = []
    for _ in range(30):
        model(ids)
        own = model.own_loss()
        assert own is not None
        own.backward()
        descent.step()
        descent.zero_grad()
        found.append(float(own.detach()))
    assert found[-1] < found[0]
    assert found[-1] < 1.05
