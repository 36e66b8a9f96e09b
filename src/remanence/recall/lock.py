"""One writer per folder: a lock that the kernel takes back when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from remanence.errors import Mistake


class Lock:
    """Hold `path` for this process.

    Raises:
        Mistake: another store holds it (its process is named), or the file cannot be written.
    """

    def __init__(self, path: Path):
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Mistake(path, f"cannot be opened ({error.strerror})", "name a folder that can be written") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._handle)
            raise Mistake(
                path.parent, f"is being written by process {holder}", "stop that process, talk to its server, or open the store for reading"
            ) from None
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)
        except OSError:  # a full disk: the lock holds without the number
            pass

    def release(self) -> None:
        """Let the next writer in."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
