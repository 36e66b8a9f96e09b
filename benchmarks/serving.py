"""A recall server in a process of its own (a fork of this one: its imports are done), and the book of what it acknowledged, to be held against its store."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from remanence.recall.items import Selection
from remanence.recall.server import ServerSettings, serve
from remanence.recall.service import Recall

EVERY = Selection(space=None)


def _serve(folder: Path, limit: int | None, pipe: Any) -> None:
    """Serve as the command line does; what would be printed goes into the pipe, everything else into the file `said`."""
    with open(folder / "said", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    settings = ServerSettings(keys=folder / "access.json", rate=0)
    recall = Recall.open(folder / "memory", embedder="hashing", forgetting=False)  # no pruning: every message keeps its chunks
    serve(recall, "127.0.0.1", 0, settings, say=pipe.send)


@dataclass
class Serving:
    """A running server."""

    process: Any
    address: str
    key: str

    def client(self, **options: Any) -> httpx.Client:
        """Return a client with the key."""
        return httpx.Client(base_url=self.address, headers={"authorization": f"Bearer {self.key}"}, timeout=60, **options)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait, and return the exit code."""
        os.kill(self.process.pid, number)
        self.process.join(60)
        return int(self.process.exitcode)


def start(folder: Path, key: str | None = None, *, limit: int | None = None, ready: bool = True) -> Serving:
    """Return a server of the memory in a folder; its key is the one printed at the first start.

    Args:
        folder: holds the memory, the keys, and what the server says.
        key: of an earlier start.
        limit: bytes that no file may exceed (a full disk).
        ready: wait until it answers.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(folder, limit, sender), daemon=True)  # it ends with this one, whatever happens
    process.start()
    sender.close()
    told = [receiver.recv() for _ in range(3 if key is None else 1)]
    serving = Serving(process, told[0].split()[-1], told[1].split()[-1] if key is None else key)
    end = time.monotonic() + 30
    while ready and time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{serving.address}/health")
            break
        time.sleep(0.01)
    return serving


@dataclass
class Book:
    """What a server acknowledged: texts that must be there, and texts that must not; what it did not answer may be either."""

    there: dict[str, int] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrong(self, texts: Sequence[str]) -> list[str]:
        """Name what a store's texts should be and are not."""
        held = Counter(texts)
        found = [f"lost: {text}" for text in self.there if text not in held]
        found += [f"doubled: {text}" for text, count in held.items() if count > 1]
        return found + [f"came back: {text}" for text in self.gone if text in held]


def holes(folder: Path) -> list[str]:
    """Name what is wrong inside a closed store: damaged pages, turns that are missing or doubled, messages without chunks, chunks without vectors."""
    with contextlib.closing(sqlite3.connect(folder / "memory" / "recall.sqlite")) as base:
        found = [f"integrity: {row[0]}" for row in base.execute("PRAGMA integrity_check") if row[0] != "ok"]
        found += [f"foreign key: {row[0]}" for row in base.execute("PRAGMA foreign_key_check")]
    with Recall.open(folder / "memory") as recall:
        for space in recall.spaces():
            ids = recall.store.chunk_ids(Selection(space=space))
            with_chunks = {chunk.message for chunk in recall.store.chunks(ids.tolist())}
            messages = recall.messages(Selection(space=space))
            found += [f"message {one.id} has no chunk" for one in messages if one.id not in with_chunks]
            vectors = sum(len(block) for block, _ in recall.store.vectors(space))
            found += [f"{space}: {len(ids)} chunks, {vectors} vectors"] if vectors != len(ids) else []
            doubled = [place for place, count in Counter((one.conversation, one.turn) for one in messages).items() if count > 1]
            found += [f"{space}: turn {place} twice" for place in doubled]
    return found


def texts_of(folder: Path) -> list[str]:
    """Return the texts of all messages of a closed store."""
    with Recall.open(folder / "memory") as recall:
        return [one.text for one in recall.messages(EVERY)]
