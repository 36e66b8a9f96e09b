"""The torture runs, in miniature: nothing is lost under load, kills, a full disk, damage, odd requests and injection, and what is lost would be told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import serving
from benchmarks import torture_recall as torture

PARTS = {
    "load": lambda folder: torture.load(folder, 4, 0.5),
    "kills": lambda folder: torture.kills(folder, 2),
    "full disk": lambda folder: torture.full_disk(folder, 2**20),
    "damage": lambda folder: torture.damage(folder, 3),
    "odd requests": lambda folder: torture.fuzz(folder, 60),
    "injection": lambda folder: torture.injection(folder, 1),
}


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_lost(part, tmp_path):
    line, wrong = PARTS[part](tmp_path)
    assert wrong == []
    assert part.split()[0] in line or "clients" in line


def test_a_loss_and_a_double_would_be_told():
    book = serving.Book(there={"a": 1, "b": 2}, gone={"c"})
    assert book.wrong(["a", "b"]) == []
    assert book.wrong(["a", "a", "c"]) == ["lost: b", "doubled: a", "came back: c"]


def test_a_hole_in_a_store_would_be_told(tmp_path):
    import sqlite3

    with serving.Recall.open(tmp_path / "memory", embedder="hashing") as recall:
        recall.add("one")
        recall.add("two")
    assert serving.holes(tmp_path) == []
    base = sqlite3.connect(tmp_path / "memory" / "recall.sqlite")
    base.execute("DELETE FROM chunks WHERE id = 1")
    base.commit()
    base.close()
    assert any("has no chunk" in one for one in serving.holes(tmp_path))
