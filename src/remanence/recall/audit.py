"""The audit log of a store: what was done, never what was said; every entry carries the hash of the one before it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from remanence.recall.database import Database

NAMES = ("id", "at", "action", "detail", "previous", "hash")


def append_entry(database: Database, action: str, detail: Mapping[str, Any]) -> None:
    """Append an entry to the chain."""
    with database.transaction():
        last = database.all("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1")
        id, previous = (last[0][0] + 1, last[0][1]) if last else (1, "")
        told = json.dumps(dict(detail), sort_keys=True, ensure_ascii=False)
        row = (id, time.time(), action, told, previous)
        database.do("INSERT INTO audit(id, at, action, detail, previous, hash) VALUES(?, ?, ?, ?, ?, ?)", *row, _hash(*row))


def read_entries(database: Database, after: int = 0) -> list[dict[str, Any]]:
    """Return the entries with a number above `after`."""
    rows = database.all("SELECT id, at, action, detail, previous, hash FROM audit WHERE id > ? ORDER BY id", after)
    return [dict(zip(NAMES, row)) | {"detail": json.loads(row[3])} for row in rows]


def broken_at(database: Database) -> int | None:
    """Return the number of the first entry that was changed, or before which one is missing; `None` where the chain holds.

    Entries cut off at the end are found only by whoever noted the last hash elsewhere: a deletion receipt does.
    """
    previous = ""
    for number, row in enumerate(database.all("SELECT id, at, action, detail, previous, hash FROM audit ORDER BY id"), start=1):
        if row[0] != number or row[4] != previous or row[5] != _hash(*row[:5]):
            return number
        previous = row[5]
    return None


def _hash(id: int, at: float, action: str, detail: str, previous: str) -> str:
    return hashlib.sha256(json.dumps([id, at, action, detail, previous], ensure_ascii=False).encode()).hexdigest()
