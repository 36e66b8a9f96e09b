"""The store under faults: kills, a full disk, many threads, damaged and foreign files, a second writer."""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recall.store_cases import DIM, say
from remanence.errors import Mistake
from remanence.recall.items import Selection
from remanence.recall.sqlite_store import FILE, SqliteStore

WRITER = """
import sys
from recall.store_cases import DIM, say
from remanence.recall.sqlite_store import SqliteStore
store = SqliteStore(sys.argv[1], embedder="stub", dim=DIM)
print("open", flush=True)
number = 0
while True:
    number += 1
    message, _ = say(store, f"message {number} " + "x" * (number % 50) * 100, key=str(number))
    if number % 5 == 0:
        store.delete([message.id])
    if number % 40 == 0:
        store.scrub()
    print(message.id, "deleted" if number % 5 == 0 else "there", flush=True)
"""

FILLER = """
import sys
from recall.store_cases import DIM, say
from remanence.errors import Mistake
from remanence.recall.sqlite_store import SqliteStore
store = SqliteStore(sys.argv[1], embedder="stub", dim=DIM)
try:
    while True:
        print(say(store, "x" * 5000)[0].id, "there", flush=True)
except Mistake as error:
    print("refused", error)
"""


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))


@pytest.fixture
def store(tmp_path):
    with SqliteStore(tmp_path / "store", embedder="stub", dim=DIM) as store:
        yield store


def start(folder, code=WRITER, **more):
    tests = Path(__file__).parents[1]
    environment = {"PYTHONPATH": f"{tests.parent / 'src'}:{tests}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=environment, **more)


def test_what_was_acknowledged_is_there_after_a_kill_and_the_store_opens_clean(tmp_path):
    rng = random.Random(0)
    state: dict[int, str] = {}
    for _ in range(3):
        process = start(tmp_path / "store")
        assert process.stdout.readline() == "open\n"
        with pytest.raises(Mistake, match=f"being written by process {process.pid}"):
            SqliteStore(tmp_path / "store")
        time.sleep(rng.uniform(0.2, 0.8))
        process.send_signal(signal.SIGKILL)
        told = [line.split() for line in process.communicate()[0].splitlines() if line.endswith(("deleted", "there"))]
        assert told
        state |= {int(id): word for id, word in told}
        with SqliteStore(tmp_path / "store") as store:  # the lock died with its process
            assert not store.scrub_due()
            there = set(store.ids(Selection()).tolist())
            assert {id for id, word in state.items() if word == "there"} <= there
            assert not there & {id for id, word in state.items() if word == "deleted"}
            assert {chunk.message for chunk in store.chunks(store.chunk_ids(Selection()).tolist())} == there
            assert {id for id, _ in store.lexical("message", 10**6, Selection())} == set(store.chunk_ids(Selection()).tolist())
            store.drop_space("default")
            state = {}


def test_a_scrub_that_a_kill_cut_short_is_done_at_the_next_opening(store):
    message, _ = say(store, "quetzal " * 50)
    say(store, "otter")
    store.delete([message.id])
    assert store.scrub_due()
    store.close()
    with SqliteStore(store.path) as again:
        assert not again.scrub_due()
        assert b"quetzal" not in b"".join(path.read_bytes() for path in again.files())


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(store):
    first, _ = say(store, "one")
    pages = store._database.one("PRAGMA page_count")
    store._sqlite.do(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(Mistake, match="full.*nothing of this write was stored"):
        say(store, "x" * 50_000, "new", "new")
    with pytest.raises(Mistake, match="full"), store.transaction():
        say(store, "small")
        say(store, "x" * 50_000)
    assert (store.spaces(), store.messages(Selection())) == (["default"], [first])
    store._sqlite.do("PRAGMA max_page_count=1000000")
    assert say(store, "x" * 50_000)[0].turn == 2
    store._sqlite.check()


def test_a_log_that_cannot_grow_is_one_sentence_too(tmp_path):
    limit = 600_000

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(tmp_path / "store", FILLER, preexec_fn=small)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert lines[-1].startswith("refused")
    assert "cannot be written" in lines[-1]
    with SqliteStore(tmp_path / "store") as store:
        there = set(store.ids(Selection()).tolist())
        assert {int(line.split()[0]) for line in lines if line.endswith("there")} == there
        say(store, "it goes on")


def test_many_threads_lose_nothing_and_double_nothing(store):
    failures: list[BaseException] = []

    def work(number):
        try:
            for step in range(15):
                key = f"{number}-{step}"
                for _ in range(2):  # a client that tries again
                    say(store, f"thread {number} step {step}", conversation=f"c{number % 4}", key=key)
                assert store.lexical(f"thread {number}", 5, Selection())
                list(store.vectors("default"))
        except BaseException as error:  # reported below: a thread cannot fail a test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(message.text for message in store.messages(Selection())) == sorted(
        f"thread {number} step {step}" for number in range(12) for step in range(15)
    )
    for number in range(4):
        assert [message.turn for message in store.messages(Selection("default", f"c{number}"))] == list(range(1, 46))


def test_a_transaction_is_seen_by_other_threads_only_when_it_stands(store):
    seen = []
    with store.transaction():
        say(store, "one")
        other = threading.Thread(target=lambda: seen.append(store.spaces()))
        other.start()
        other.join()
    assert seen == [[]]
    assert store.spaces() == ["default"]


def test_a_second_writer_is_refused_and_a_reader_let_in(store):
    say(store, "one")
    with pytest.raises(Mistake, match="being written by process"):
        SqliteStore(store.path)
    with SqliteStore(store.path, write=False) as reader:
        assert reader.messages(Selection())[0].text == "one"
        for write in (lambda: say(reader, "two"), lambda: reader.delete([1]), reader.scrub, lambda: reader.drop_space("default")):
            with pytest.raises(Mistake, match="open for reading"):
                write()
        say(store, "two")
        assert len(reader.messages(Selection())) == 2


def test_a_store_made_with_another_embedder_is_refused(store):
    store.close()
    for other in ({"embedder": "another", "dim": DIM}, {"embedder": "stub", "dim": DIM + 1}):
        with pytest.raises(Mistake, match="was made with the embedder 'stub'"):
            SqliteStore(store.path, **other)
    with SqliteStore(store.path) as again:
        assert (again.embedder, again.dim) == ("stub", DIM)


def test_a_store_of_a_newer_format_is_refused(store):
    store.close()
    base = sqlite3.connect(store.path / FILE)
    base.execute("PRAGMA user_version=99")
    base.close()
    with pytest.raises(Mistake, match="has format 99, this program reads 1"):
        SqliteStore(store.path)


def test_a_file_of_another_program_is_refused_and_left_as_it_is(tmp_path):
    base = sqlite3.connect(tmp_path / FILE)
    base.execute("CREATE TABLE x(y)")
    base.close()
    with pytest.raises(Mistake, match="another program's database"):
        SqliteStore(tmp_path, embedder="stub", dim=DIM)
    (tmp_path / FILE).write_bytes(b"no database at all" * 300)
    with pytest.raises(Mistake, match="is damaged"):
        SqliteStore(tmp_path, embedder="stub", dim=DIM)
    assert (tmp_path / FILE).read_bytes() == b"no database at all" * 300


def test_where_there_is_no_store_nothing_is_made(tmp_path):
    for more in ({}, {"write": False}, {"write": False, "embedder": "stub", "dim": DIM}):
        with pytest.raises(Mistake, match="there is no store here"):
            SqliteStore(tmp_path / "nowhere", **more)
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_database_is_refused_with_a_sentence(store):
    for number in range(60):
        say(store, f"message {number} " * 20, conversation=f"c{number}")
    store.close()
    whole = (store.path / FILE).read_bytes()
    rng, refused = random.Random(1), 0
    for _ in range(25):
        start = rng.randrange(len(whole) // 4096) * 4096
        damaged = bytearray(whole)
        damaged[start : start + 100] = rng.randbytes(100)  # the head of a page
        (store.path / FILE).write_bytes(damaged)
        try:
            with SqliteStore(store.path) as again:
                for space in again.spaces():
                    again.messages(Selection(space))
        except Mistake as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= 20
    (store.path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Mistake, match="is damaged"):
        SqliteStore(store.path)


@pytest.mark.parametrize(("column", "text"), [("text", "I owe you 900"), ("person", "eve"), ("meta", '{"a": 2}')])
def test_an_altered_letter_is_refused_and_never_read_as_said(store, column, text):
    import sqlite3

    said = say(store, "I owe you 100", person="eva")[0]
    store.close()
    with sqlite3.connect(store.path / FILE) as base:
        base.execute(f"UPDATE messages SET {column} = ?", (text,))
    base.close()
    with SqliteStore(store.path) as again, pytest.raises(Mistake, match=f"message {said.id}: is damaged"):
        again.messages(Selection(said.space))


def test_a_closed_store_says_so(store):
    store.close()
    for use in (store.spaces, lambda: say(store, "x")):
        with pytest.raises(Mistake, match="is closed"):
            use()
    store.close()


def test_a_store_is_for_its_owner_alone(store):
    say(store, "x")
    assert store.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in store.path.iterdir()} == {0o600}


def test_a_folder_that_cannot_be_made_or_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Mistake, match="cannot be made"):
        SqliteStore(tmp_path / "file" / "store", embedder="stub", dim=DIM)
    (tmp_path / "store" / FILE).mkdir(parents=True)
    with pytest.raises(Mistake, match="cannot be"):
        SqliteStore(tmp_path / "store", embedder="stub", dim=DIM)
