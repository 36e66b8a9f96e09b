"""Replay memories: who stays, in how many bytes, and that a restored memory goes on bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from remanence.errors import Mistake
from remanence.seeds import generator
from remanence.storage import load_tree, save_tree
from remanence.training.memory import BalancedMemory, ReservoirMemory, RingMemory, balanced_choice, pack_logits, stored_logits

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def numbered(start, size, groups=3):
    ids = torch.arange(start, start + size)
    return {"pixel_values": ids[:, None].float() * torch.ones(2), "labels": ids % groups, "id": ids}


def fill(memory, sizes, groups=3):
    start = 0
    for size in sizes:
        memory.add(numbered(start, size, groups))
        start += size
    return memory


def tokens(lengths, seed=0, fill_to=None):
    width = fill_to or max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 50, mask.shape, generator=generator("tokens", seed)) * mask
    labels = torch.where(mask == 1, ids, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_every_row_stays_with_the_same_probability():
    """Over independent trials each row is kept with the mean M/n; the chi-square of draws without replacement has n - 1 degrees."""
    capacity, rows, trials = 10, 40, 1_500
    counts = torch.zeros(rows, dtype=torch.float64)
    for trial in range(trials):
        counts[fill(ReservoirMemory(capacity, trial), [7, 13, 20]).rows()["id"]] += 1
    odds = capacity / rows
    statistic = ((counts - trials * odds).square() / (trials * odds * (1 - odds))).sum().item() * (rows - 1) / rows
    assert chi2.ppf(0.0005, rows - 1) < statistic < chi2.ppf(0.9995, rows - 1)


@given(sizes=SIZES, capacity=st.integers(0, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_vectorised_reservoir_equals_the_loop(sizes, capacity, seed):
    memory = fill(ReservoirMemory(capacity, seed), sizes)
    draw = generator(seed, "ReservoirMemory")
    slots = []
    for number in range(sum(sizes)):
        uniform = torch.rand(1, dtype=torch.float64, generator=draw).item()
        if number < capacity:
            slots.append(number)
        elif (place := int(uniform * (number + 1))) < capacity:
            slots[place] = number
    assert len(memory) == min(capacity, sum(sizes))
    assert memory.seen == sum(sizes)
    if capacity:
        assert memory.rows()["id"].tolist() == slots
        assert (memory.rows()["pixel_values"] == memory.rows()["id"][:, None]).all()


@given(sizes=SIZES, capacity=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_balanced_memory_is_the_choice_from_all_rows_at_once(sizes, capacity, seed):
    memory, rows = fill(BalancedMemory(capacity, seed), sizes), sum(sizes)
    priority = torch.rand(rows, dtype=torch.float64, generator=generator(seed, "BalancedMemory"))
    ranked = []
    for label in range(3):
        members = sorted((number for number in range(rows) if number % 3 == label), key=lambda number: priority[number].item())
        ranked += [(rank, priority[number].item(), number) for rank, number in enumerate(members)]
    assert sorted(memory.rows()["id"].tolist()) == sorted(number for _, _, number in sorted(ranked)[:capacity])
    assert (memory.rows()["labels"] == memory.rows()["id"] % 3).all()


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=200), capacity=st.integers(1, 60), cut=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_groups_that_lost_rows_differ_by_one_at_most(labels, capacity, cut):
    memory = BalancedMemory(capacity, 0)
    for part in torch.tensor(labels).split(cut):
        memory.add({"labels": part})
    kept = torch.bincount(memory.rows()["labels"], minlength=6)
    seen = torch.bincount(torch.tensor(labels), minlength=6)
    lost = kept < seen
    assert len(memory) == min(capacity, len(labels))
    if lost.any():
        assert kept[lost].max() - kept[lost].min() <= 1
        assert (kept[~lost] <= kept[lost].min() + 1).all()


def test_inside_a_group_every_row_stays_with_the_same_probability():
    trials, small, large = 800, 10, 30
    counts = torch.zeros(small + large, dtype=torch.float64)
    labels = (torch.arange(small + large) >= small).long()
    order = torch.randperm(small + large, generator=generator("order"))
    for trial in range(trials):
        memory = BalancedMemory(8, trial)
        for part in order.split(9):
            memory.add({"labels": labels[part], "id": part})
        counts[memory.rows()["id"]] += 1
    for members, size in ((counts[:small], small), (counts[small:], large)):
        odds = 4 / size
        statistic = ((members - trials * odds).square() / (trials * odds * (1 - odds))).sum().item() * (size - 1) / size
        assert chi2.ppf(0.0005, size - 1) < statistic < chi2.ppf(0.9995, size - 1)


def test_language_rows_are_balanced_by_a_group_column():
    memory = BalancedMemory(4, 0, by="task")
    memory.add(tokens([3] * 10), task=torch.zeros(10, dtype=torch.int64))
    memory.add(tokens([5] * 6), task=torch.ones(6, dtype=torch.int64))
    assert memory.rows()["task"].sort().values.tolist() == [0, 0, 1, 1]
    with pytest.raises(Mistake, match="'labels'"):
        BalancedMemory(4, 0).add(tokens([3, 2]))


@pytest.mark.parametrize("kind", [ReservoirMemory, BalancedMemory])
def test_a_restored_memory_goes_on_bit_for_bit(kind, tmp_path):
    memory = fill(kind(9, 4), [7, 11])
    save_tree(tmp_path / "memory.safetensors", memory.state_dict())
    other = kind(9, 99)
    other.load_state_dict(load_tree(tmp_path / "memory.safetensors"))
    for one in (memory, other):
        one.add(numbered(18, 30))
    assert memory.seen == other.seen == 48
    assert memory.bytes == other.bytes
    for name, value in memory.rows().items():
        assert torch.equal(value, other.rows()[name])
    draws = [one.draw(5, generator("draw")) for one in (memory, other)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


def test_a_saved_state_is_not_changed_by_going_on():
    memory = fill(ReservoirMemory(5, 0), [5])
    state = memory.state_dict()
    memory.add(numbered(5, 100))
    assert state["columns"]["id"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", [ReservoirMemory, BalancedMemory])
def test_a_state_of_another_memory_is_refused(kind):
    with pytest.raises(Mistake, match="capacity"):
        kind(5, 0).load_state_dict(kind(6, 0).state_dict())
    with pytest.raises(Mistake, match="kind"):
        kind(5, 0).load_state_dict((BalancedMemory if kind is ReservoirMemory else ReservoirMemory)(5, 0).state_dict())


@given(lengths=st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=5), extra=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_token_rows_of_any_length_come_back_as_they_were(lengths, extra):
    memory, rows = ReservoirMemory(40, 0), []
    for number, part in enumerate(lengths):
        batch = tokens(part, number, max(part) + extra)
        memory.add(batch)
        rows += [{name: value[row, :length] for name, value in batch.items()} for row, length in enumerate(part)]
    back = memory.rows()
    assert back["input_ids"].shape[1] == max(max(part) for part in lengths)
    for number, row in enumerate(rows):
        for name, value in row.items():
            assert torch.equal(back[name][number, : len(value)], value)
            assert (back[name][number, len(value) :] == (-100 if name == "labels" else 0)).all()


def test_a_short_row_leaves_nothing_of_the_long_one_it_replaces():
    memory = ReservoirMemory(1, 0)
    memory.add(tokens([9]))
    for number in range(60):
        memory.add(tokens([3], number))
    assert memory.rows()["input_ids"].shape == (1, 3)
    state = memory.state_dict()["columns"]
    assert (state["input_ids"][:, 3:] == 0).all()
    assert (state["labels"][:, 3:] == -100).all()


def test_drawing_is_without_replacement_while_it_can_be():
    memory = fill(ReservoirMemory(12, 0), [12])
    for size in (1, 5, 12):
        assert len(set(memory.draw(size, generator("draw", size))["id"].tolist())) == size
    assert memory.draw(30, generator("draw"))["id"].shape == (30,)
    assert torch.equal(memory.draw(5, generator(1))["id"], memory.draw(5, generator(1))["id"])


def test_bytes_are_those_of_the_tensors():
    memory = fill(ReservoirMemory(10, 0), [3])
    assert memory.bytes == 10 * (2 * 4 + 8 + 8)
    assert fill(BalancedMemory(10, 0), [3]).bytes == 10 * (2 * 4 + 8 + 8) + 10 * 16
    top = ReservoirMemory(10, 0, keep_logits=3)
    top.add({"labels": torch.zeros(4, dtype=torch.int64)}, logits=torch.zeros(4, 50))
    assert top.bytes == 10 * (8 + 3 * 4 + 3 * 4)


@pytest.mark.parametrize("span", ["row", "answer"])
@pytest.mark.parametrize("keep", ["full", 3])
def test_stored_logits_stand_beside_the_models_at_the_same_places(keep, span):
    memory = ReservoirMemory(10, 0, keep_logits=keep, logits_span=span)
    said = {}
    for number, lengths in enumerate([[4, 3], [6, 2]]):
        batch = tokens(lengths, number)
        batch["labels"][:, :2] = -100
        batch["labels"][batch["attention_mask"] == 0] = -100
        logits = torch.randn(2, max(lengths), 8, generator=generator("logits", number))
        said |= {2 * number + row: logits[row] for row in range(2)}
        memory.add(batch, logits=logits, id=torch.tensor([2 * number, 2 * number + 1]))
    drawn = memory.draw(4, generator("draw"))
    now = torch.zeros(4, drawn["input_ids"].shape[1], 8)
    for row, name in enumerate(drawn["id"].tolist()):
        now[row, : min(now.shape[1], len(said[name]))] = said[name][: now.shape[1]]
    present, stored, mask = stored_logits(now, drawn)
    assert present.shape[-1] == (8 if keep == "full" else 3)
    assert torch.equal(present[mask], stored[mask])
    expected = drawn["attention_mask"].sum() if span == "row" else (drawn["labels"][:, 1:] != -100).sum()
    assert mask.sum() == expected


def test_classes_keep_their_logits_too():
    memory = ReservoirMemory(6, 0, keep_logits=2)
    logits = torch.randn(6, 5, generator=generator("classes"))
    memory.add(numbered(0, 6), logits=logits)
    drawn = memory.draw(6, generator(0))
    present, stored, mask = stored_logits(logits[drawn["id"]], drawn)
    assert torch.equal(present, stored)
    assert torch.equal(stored, logits[drawn["id"]].topk(2).values)
    assert mask.all()


def test_answer_logits_by_hand():
    logits = torch.arange(12.0).view(1, 4, 3)
    packed = pack_logits(logits, torch.tensor([[-100, -100, 7, 8]]), 1, "answer")
    assert packed["logits_at"].tolist() == [[1, 2]]
    assert packed["logits_values"].tolist() == [[[5.0], [8.0]]]
    assert packed["logits_indices"].tolist() == [[[2], [2]]]


def test_nothing_is_kept_with_no_room():
    memory = fill(ReservoirMemory(0, 0), [5])
    assert (len(memory), memory.bytes, memory.seen) == (0, 0, 5)
    balanced = fill(BalancedMemory(0, 0), [5])
    assert (len(balanced), balanced.bytes, balanced.seen) == (0, 0, 5)


def test_gradients_are_not_kept():
    memory = ReservoirMemory(3, 0)
    memory.add(numbered(0, 3), logits=torch.randn(3, 2, generator=generator(0)).requires_grad_())
    assert not memory.rows()["logits"].requires_grad


def test_the_choice_by_hand():
    group = torch.tensor([0, 0, 0, 1])
    priority = torch.tensor([0.3, 0.1, 0.2, 0.9], dtype=torch.float64)
    assert balanced_choice(group, priority, 2).tolist() == [False, True, False, True]
    assert balanced_choice(group, priority, 3).tolist() == [False, True, True, True]


def test_mistakes_are_named():
    with pytest.raises(Mistake, match="empty"):
        ReservoirMemory(3, 0).draw(1, generator(0))
    with pytest.raises(Mistake, match="capacity"):
        ReservoirMemory(-1, 0)
    with pytest.raises(Mistake, match="keep_logits"):
        ReservoirMemory(3, 0, keep_logits="some")
    with pytest.raises(Mistake, match="logits_span"):
        ReservoirMemory(3, 0, logits_span="token")
    with pytest.raises(Mistake, match="differ in length"):
        ReservoirMemory(3, 0).add({"labels": torch.zeros(3)}, logits=torch.zeros(2, 4))
    memory = fill(ReservoirMemory(30, 0), [3])
    before = memory.state_dict()
    with pytest.raises(Mistake, match="columns"):
        memory.add({"labels": torch.zeros(3)})
    with pytest.raises(Mistake, match="shape"):
        memory.add({**numbered(0, 3), "pixel_values": torch.zeros(3, 5)})
    assert memory.seen == before["seen"]
    assert torch.equal(memory.state_dict()["generator"], before["generator"])
    with pytest.raises(Mistake, match="holds no logits"):
        stored_logits(torch.zeros(3, 2), memory.draw(3, generator(0)))


def test_ring_keeps_the_newest_rows_however_they_are_cut() -> None:
    for cuts in ([1] * 11, [11], [4, 7], [3, 0, 8]):
        ring = RingMemory(4, 0)
        for rows in torch.arange(11).split(cuts):
            ring.add({"x": rows[:, None]})
        assert sorted(ring.rows()["x"][:, 0].tolist()) == [7, 8, 9, 10]
        assert ring.rows()["x"][:, 0].tolist() == [8, 9, 10, 7]  # row n in slot n mod 4


def test_ring_goes_on_after_rows_were_removed_and_after_a_resume() -> None:
    ring = RingMemory(4, 0)
    ring.add({"input_ids": torch.arange(6)[:, None]})
    assert ring.remove({"input_ids": torch.tensor([[3], [4]])}) == 2
    again = RingMemory(4, 0)
    again.load_state_dict(ring.state_dict())
    for one in (ring, again):
        one.add({"input_ids": torch.tensor([[8], [9], [10]])})
        kept = one.rows()["input_ids"][:, 0].tolist()
        assert len(kept) == 4
        assert {8, 9, 10} < set(kept)
        assert not {3, 4} & set(kept)


def test_ring_of_no_rows_keeps_nothing() -> None:
    ring = RingMemory(0, 0)
    ring.add({"x": torch.zeros(3, 1)})
    assert len(ring) == 0
