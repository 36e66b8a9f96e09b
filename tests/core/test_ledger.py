"""The ledger: what is written once stays, all of a transaction or nothing, readers beside the writer."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from remanence.errors import Mistake
from remanence.ledger import SCHEMA_VERSION, Ledger


def score(value: float, *, step: int = -1, metric: str = "loss") -> dict:
    return {"run": "r/a/0", "event": 1, "step": step, "probe": "loss", "subject": "one", "metric": metric, "value": value}


def test_a_row_that_is_written_again_stays_as_it_was_first() -> None:
    with Ledger(":memory:") as ledger:
        ledger.write("scores", [score(1.0)])
        ledger.write("scores", [score(2.0), score(3.0, step=4)])
        assert [(row["step"], row["value"]) for row in ledger.rows("scores")] == [(-1, 1.0), (4, 3.0)]


def test_rows_come_in_the_order_of_their_keys_not_of_writing() -> None:
    with Ledger(":memory:") as ledger:
        ledger.write("scores", [score(1.0, step=9), score(2.0, step=3), score(3.0, step=-1)])
        assert [row["step"] for row in ledger.rows("scores")] == [-1, 3, 9]


def test_a_failed_transaction_writes_nothing_and_a_nested_one_joins_the_outer(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(ZeroDivisionError), ledger.transaction():
            ledger.write("scores", [score(1.0)])
            with ledger.transaction():
                ledger.write("scores", [score(1.0, step=2)])
            raise ZeroDivisionError
        assert ledger.rows("scores") == []
        with ledger.transaction():
            ledger.write("scores", [score(1.0)])
            with ledger.transaction():
                ledger.write("scores", [score(1.0, step=2)])
        assert len(ledger.rows("scores")) == 2


def test_a_reader_sees_whole_transactions_while_another_writes(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path) as writer, Ledger(path, create=False) as reader:
        with writer.transaction():
            writer.write("scores", [score(1.0)])
            assert reader.rows("scores") == []
            writer.write("scores", [score(1.0, step=2)])
        assert len(reader.rows("scores")) == 2


def test_two_writers_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path) as one, Ledger(path) as two:
        one.write("scores", [score(1.0)])
        two.write("scores", [score(9.0), score(2.0, step=1)])
        one.write("scores", [score(3.0, step=2)])
        assert [row["value"] for row in one.rows("scores")] == [1.0, 2.0, 3.0] == [row["value"] for row in two.rows("scores")]


def test_a_ledger_opened_to_read_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    Ledger(path).close()
    with Ledger(path, create=False) as ledger, pytest.raises(Mistake, match=r"cannot be written .*readonly"):
        ledger.write("scores", [score(1.0)])


def test_another_schema_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    Ledger(path).close()
    with sqlite3.connect(path) as base:
        base.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    for create in (True, False):
        with pytest.raises(Mistake, match=f"schema version {SCHEMA_VERSION + 1}"):
            Ledger(path, create=create)


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to look like one" * 40])
def test_a_file_that_is_no_ledger_is_refused_to_a_reader(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(content)
    with pytest.raises(Mistake):
        Ledger(path, create=False)
    assert path.read_bytes() == content


def test_a_damaged_page_is_a_mistake_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path) as ledger:
        ledger.write("scores", [score(1.0, step=step) for step in range(2000)])
    whole = bytearray(path.read_bytes())
    whole[8192:] = b"\xff" * (len(whole) - 8192)
    path.write_bytes(bytes(whole))
    with pytest.raises(Mistake, match=r"cannot be read|not a usable ledger"):
        Ledger(path, create=False).rows("scores")


def test_a_reader_does_not_make_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="there is no ledger here"):
        Ledger(tmp_path / "none" / "l.sqlite", create=False)
    assert list(tmp_path.iterdir()) == []


def test_the_clocks_can_be_left_out_and_nothing_else() -> None:
    with Ledger(":memory:") as ledger:
        row = {
            "run": "r",
            "recipe": "r",
            "life": "a",
            "seed": 0,
            "settings": {"b": 1, "a": [1, 2]},
            "versions": {},
            "parameters": 3,
            "at": 5.0,
        }
        ledger.write("runs", [row])
        with_clocks, without = ledger.rows("runs")[0], ledger.rows("runs", clocks=False)[0]
        assert with_clocks.keys() - without.keys() == {"at"}
        assert with_clocks["settings"] == '{"a": [1, 2], "b": 1}'


def test_done_is_the_last_complete_event_of_that_run_alone() -> None:
    event = {
        "name": "x",
        "verb": "learn",
        "kind": "qa",
        "method": "m",
        "settings": {},
        "rows": 1,
        "steps": 1,
        "weights_before": "",
        "weights_after": "",
    }
    with Ledger(":memory:") as ledger:
        assert ledger.done("a") == 0
        for run, number in (("a", 1), ("a", 2), ("b", 7)):
            ledger.write("events", [{"run": run, "event": number, "seconds": 0.0, "at": 0.0} | event])
        assert (ledger.done("a"), ledger.done("b")) == (2, 7)


def test_what_is_not_a_number_is_kept_as_null() -> None:
    with Ledger(":memory:") as ledger:
        ledger.write("scores", [score(float("nan"))])
        assert ledger.rows("scores")[0]["value"] is None
