"""Rows that must go leave a memory whole, and what comes later takes their room at the odds of a reservoir."""

from __future__ import annotations

import pytest
import torch

from remanence.training.batches import IGNORED
from remanence.training.memory import BalancedMemory, ReservoirMemory, groups, make_memory, shares_window, window_hashes, with_mask


def numbered(first: int, count: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(first, first + count)
    return {"pixel_values": ids[:, None].float() * torch.tensor([1.0, 0.5]), "labels": ids % 3, "group": ids % 3}


def tokens(*rows: list[int], width: int = 0, pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(width, *map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    labels = torch.tensor([[IGNORED] + row[1:] + [IGNORED] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", ["reservoir", "balanced"])
@pytest.mark.parametrize("capacity", [12, 40])
def test_removed_rows_are_gone_and_the_others_stay(kind: str, capacity: int) -> None:
    memory = make_memory(kind, capacity, 3)
    memory.add(numbered(0, 30))
    before = {tuple(row) for row in memory.rows()["pixel_values"].tolist()}
    asked = {tuple(row) for row in numbered(5, 12)["pixel_values"].tolist()}
    assert memory.remove(numbered(5, 12)) == len(before & asked) > 0
    assert {tuple(row) for row in memory.rows()["pixel_values"].tolist()} == before - asked
    stored = {tuple(row) for row in memory.state_dict()["columns"]["pixel_values"].tolist()}
    assert not stored & asked
    assert memory.remove(numbered(5, 12)) == 0
    memory.add(numbered(100, 60))
    assert len(memory) == min(capacity, len(before - asked) + 60)
    assert not {tuple(row) for row in memory.rows()["pixel_values"].tolist()} & asked


def test_the_same_inputs_under_another_label_stay() -> None:
    memory, other = ReservoirMemory(10, 0), numbered(0, 4)
    memory.add(numbered(0, 4))
    other["labels"] = other["labels"] + 1
    assert memory.remove(other) == 0


def test_token_rows_are_equal_whatever_their_padding() -> None:
    memory = ReservoirMemory(10, 0)
    memory.add(tokens([5, 6, 7], [5, 6, 7, 8, 9], [4, 4]))
    assert memory.remove(tokens([5, 6, 7], width=9, pad=1)) == 1
    assert memory.rows()["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 4, 0, 0, 0]]
    assert memory.remove(tokens([5, 6, 7, 8])) == 0
    assert memory.remove(tokens([4, 4], [5, 6, 7, 8, 9])) == 2
    assert len(memory) == 0


def test_later_rows_enter_at_the_odds_of_a_full_reservoir_and_fill_free_slots_first() -> None:
    """100 rows seen, 20 kept, some removed: of 20 more rows each enters with about 20 / 110, over 400 trials (five standard errors)."""
    entered, lost = 0, 0
    for seed in range(400):
        memory = ReservoirMemory(20, seed)
        memory.add(numbered(0, 100))
        memory.remove(numbered(0, 50))
        stayed = len(memory)
        memory.add(numbered(1000, 20))
        fresh = int((memory.rows()["pixel_values"][:, 0] >= 1000).sum())
        entered += fresh
        if fresh <= 20 - stayed:
            lost += stayed + fresh - len(memory)
    wanted = sum(20 / (100 + n + 1) for n in range(20))
    assert lost == 0  # nobody is driven out while there is room
    assert abs(entered / 400 - wanted) < 5 * (wanted / 400) ** 0.5


def test_a_restored_memory_goes_on_alike_after_a_removal() -> None:
    for kind in ("reservoir", "balanced"):
        one, two = make_memory(kind, 12, 1), make_memory(kind, 12, 99)
        one.add(numbered(0, 30))
        one.remove(numbered(0, 15))
        two.load_state_dict(one.state_dict())
        for memory in (one, two):
            memory.add(numbered(200, 25))
        assert torch.equal(one.rows()["pixel_values"], two.rows()["pixel_values"])


def test_windows_are_found_anywhere_in_a_row() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 9, 3, 4, 5, 9], [6, 5, 4, 3, 2, 1]])
    assert shares_window(rows, [[3, 4, 5]], 3).tolist() == [True, True, False]
    assert shares_window(rows, [[7, 7, 4, 3, 2, 7]], 3).tolist() == [False, False, True]
    assert shares_window(rows, [[9, 9]], 3).tolist() == [False, True, False]
    assert shares_window(rows, [[]], 3).tolist() == [False, False, False]
    assert shares_window(rows, [list(range(1, 9))], 8).tolist() == [False, False, False]
    assert window_hashes(rows, 2).shape == (3, 5)


def test_the_mask_ends_at_the_last_label() -> None:
    assert with_mask(tokens([5, 6, 7], [5, 6]))["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in with_mask(numbered(0, 2))


def test_groups_are_classes_or_tasks() -> None:
    assert groups(numbered(0, 4), 7).tolist() == [0, 1, 2, 0]
    assert groups(tokens([1, 2], [3, 4]), 7).tolist() == [7, 7]
    assert isinstance(make_memory("balanced", 1, 0), BalancedMemory)
