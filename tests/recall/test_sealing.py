"""Sealed spaces: noise on disk, and destroying the key destroys every copy."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from recall.store_cases import DIM, everything, say, unit
from remanence.errors import Mistake
from remanence.recall.items import Gist, Selection
from remanence.recall.sealing import Sealer
from remanence.recall.sqlite_store import SqliteStore

SECRETS = ["otters sleep", "Lovelace", "talk with Babbage", "engine", "client7781", "Analytical", "Byron"]


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("REMANENCE_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture
def sealed(tmp_path):
    with SqliteStore(tmp_path / "store", embedder="stub", dim=DIM) as store:
        store.make_space("s", encrypt=True)
        say(store, SECRETS[0], "s", SECRETS[2], 1, person=SECRETS[1], meta={"m": SECRETS[3]}, key=SECRETS[4])
        store.put_gists("s", SECRETS[2], [Gist(SECRETS[2], "running", 1, 1, 1, SECRETS[5])])
        store.add_fact("s", SECRETS[6], conversation=SECRETS[2], sources=[1])
        assert store.lexical("otters", 5, Selection("s"))
        yield store


def test_nothing_of_a_sealed_space_lies_on_disk_in_the_clear(sealed):
    held = everything(sealed.path)
    for secret in SECRETS:
        assert not [word for word in secret.split() if word.encode() in held or word.encode("utf-16-le") in held]
    for precision in (np.float16, np.float32):
        assert unit(1).astype(precision).tobytes()[:8] not in held


def test_destroying_the_key_makes_a_copied_backup_unreadable(sealed, tmp_path, keys):
    shutil.copytree(sealed.path, tmp_path / "backup")
    with SqliteStore(tmp_path / "backup", write=False) as backup:
        assert backup.messages(Selection("s"))[0].text == SECRETS[0]
    assert sealed.drop_space("s") == 1
    assert not [path for path in keys.rglob("*") if path.is_file()]
    with SqliteStore(tmp_path / "backup", write=False) as backup:
        for read in (lambda: backup.messages(Selection("s")), lambda: backup.facts("s"), lambda: list(backup.vectors("s"))):
            with pytest.raises(Mistake, match="its key is gone"):
                read()


def test_a_dropped_space_whose_key_outlived_a_kill_loses_it_at_the_next_opening(sealed, keys, monkeypatch):
    monkeypatch.setattr("remanence.recall.spaces.destroy_key", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sealed.drop_space("s")
    assert len([path for path in keys.rglob("*") if path.is_file()]) == 1
    sealed.close()
    monkeypatch.undo()
    monkeypatch.setenv("REMANENCE_KEYS", str(keys))
    with SqliteStore(sealed.path) as again:
        assert again.spaces() == []
    assert not [path for path in keys.rglob("*") if path.is_file()]


def test_keys_are_for_their_owner_alone(keys, sealed):
    (key,) = [path for path in keys.rglob("*") if path.is_file()]
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.name == sealed.id


def test_a_changed_record_and_one_of_another_kind_are_refused():
    sealer = Sealer(bytes(32))
    record = sealer.seal("message", b"text")
    assert sealer.open("message", record) == b"text"
    assert sealer.seal("message", b"text") != record
    for kind, wrong in (("fact", record), ("message", record[:-1] + bytes([record[-1] ^ 1])), ("message", b"")):
        with pytest.raises(Mistake, match="does not fit its key"):
            sealer.open(kind, wrong)
    with pytest.raises(Mistake, match="does not fit its key"):
        Sealer(bytes([1] * 32)).open("message", record)


def test_a_plain_space_cannot_be_sealed_afterwards(sealed):
    say(sealed, "x", "plain")
    with pytest.raises(Mistake, match="not encrypted"):
        sealed.make_space("plain", encrypt=True)
