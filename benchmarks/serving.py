"""A recall server in a process of its own: a fork of this one (its imports are done), which may be ended by any signal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from remanence.recall.server import ServerSettings, serve
from remanence.recall.service import Recall


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
    process = context.Process(target=_serve, args=(folder, limit, sender))
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
