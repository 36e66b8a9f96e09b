"""Where the files of an archive lie: a folder of this process inside the one that was named, gone with its last user.

Any number of layers, models and processes may name the same folder. Each process makes one of its own in it, whose name is free, and locks it; each archive has
a folder in that. It is removed with the last archive in it, at the end of the process at the latest. The kernel takes the lock back from a process that was
killed, and the next one that begins here removes what it left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path

from remanence.errors import Mistake

PREFIX = "remanence-caches-"
LOCK = "lock"
_making = threading.Lock()


class Home:
    """The folder of this process inside `parent`, made and locked.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path):
        import fcntl

        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # for its owner's eyes alone (0700)
        self._lock: int | None = None
        weakref.finalize(self, _leave, self.path, os.getpid())
        unlocked = self.path / f"{LOCK}.new"  # by its name a sweeper knows that the lock is held
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self._lock).atexit = False
        with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps here
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(unlocked, self.path / LOCK)


_homes: weakref.WeakValueDictionary[tuple[int, Path], Home] = weakref.WeakValueDictionary()


def new_folder(parent: str | None) -> tuple[Path, Home]:
    """Return an empty folder inside `parent` (None: where temporary files go), and what it goes with.

    Raises:
        Mistake: it cannot be made.
    """
    place = Path(parent or tempfile.gettempdir()).expanduser().absolute()
    try:
        with _making:
            home = _homes.get((os.getpid(), place))
            if home is None or not home.path.exists():  # someone tidied up
                home = _homes[os.getpid(), place] = Home(place)
        return Path(tempfile.mkdtemp(prefix="archive-", dir=home.path)), home
    except OSError as error:
        raise Mistake(place, f"caches cannot be put there ({error.strerror or error})", "name another folder in `offload`") from error


def remove(folder: Path, owner: int) -> None:
    """Remove a folder, unless this is a fork of the process that owns it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _leave(path: Path, owner: int) -> None:
    remove(path, owner)


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that are no more."""
    import fcntl

    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
