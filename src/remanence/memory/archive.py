"""Cached weights that rest on disk: memory-mapped files which grow at their end, and the holds of states on places in them.

A place is the cache of one row of the batch, (H, ...) for every weight. The file of a weight is (places, H, ...): the axis that grows is the first, so that a
closed segment is written behind the last one, and nothing is moved. A state names its places by their numbers (B, S), and repeats, drops or reorders rows by
those alone. Its `Hold` keeps them: what a state holds is never written over, so states are values here as in memory, and two that go on from one share what they
have in common and see nothing of each other. A place that no state holds any more is wiped, and used again. A forgotten one is wiped at once; whoever else
holds it, an older state or another branch, has it in memory from then on.

A read maps the file, copies the caches that it wants, and lets the mapping go, so that neither memory nor open files grow with the number of segments.
Cost: closing a segment writes one cache; a read takes the bytes that it returns; 8 bytes of memory per place.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from remanence.errors import Mistake
from remanence.memory.archive_folder import new_folder, remove
from remanence.memory.recurrence import State
from remanence.storage import raw

PIECE = 1 << 26  # bytes that are in memory at a time, where a cache is not larger
Places = np.ndarray  # of int64


class Form(NamedTuple):
    """What the file of one weight holds."""

    dtype: torch.dtype
    heads: int
    shape: torch.Size  # of one head's weight

    @property
    def bytes(self) -> int:
        """The size of one head's weight."""
        return self.shape.numel() * self.dtype.itemsize


class Archive:
    """The files of one text's caches and of all its branches.

    Args:
        parent: a folder to lie in; None: where temporary files go.
        like: weights (B, H, S, ...), by whose shapes and precisions the files are laid out.

    Raises:
        Mistake: the folder cannot be written.
    """

    def __init__(self, parent: str | None, like: Sequence[State]):
        self.forms = {
            name: Form(reduce(torch.promote_types, [one[name].dtype for one in like]), weight.shape[1], weight.shape[3:])
            for name, weight in like[0].items()
        }
        self.folder, self._home = new_folder(parent)
        self._owner, self._lock = os.getpid(), threading.Lock()
        weakref.finalize(self, remove, self.folder, self._owner)
        self._holders = np.zeros(0, np.int64)  # states by place
        self._free: list[int] = []
        self._forgotten: dict[int, dict[str, np.ndarray]] = {}  # (H, bytes), for those who hold a place that is wiped
        self._dropped: deque[Places] = deque()

    @property
    def heads(self) -> int:
        """H."""
        return next(iter(self.forms.values())).heads

    @property
    def bytes(self) -> int:
        """The size of one place."""
        return sum(form.heads * form.bytes for form in self.forms.values())

    def fits(self, weights: State) -> bool:
        """Return whether the files hold such weights without a loss."""
        return all(torch.promote_types(weights[name].dtype, form.dtype) == form.dtype for name, form in self.forms.items())

    def append(self, beside: Int[Tensor, "B S"], parts: Sequence[State]) -> tuple[Int[Tensor, "B S1"], Hold]:
        """Write caches, (B, H, s, ...) in each part, behind those at `beside`, all or none; return the places of all, held.

        Raises:
            Mistake: the disk is full, or the folder is gone.
        """
        rows, sizes = len(beside), [next(iter(part.values())).shape[2] for part in parts]
        with self._mine():
            before = len(self._holders)
            taken = self._take(rows * sum(sizes))
            try:
                for name, form in self.forms.items():
                    at, step = 0, max(PIECE // (rows * form.heads * form.bytes), 1)
                    for piece in (piece for part in parts for piece in part[name].split(step, 2)):
                        data = piece.detach().movedim(2, 0).to("cpu", form.dtype).contiguous()  # (S, B, H, ...)
                        here = taken[at : at + rows * len(data)]
                        self._write(name, here, raw(data).reshape(len(here), -1))
                        at += len(here)
            except BaseException as error:
                self._untake(taken, before)
                if not isinstance(error, OSError):
                    raise
                remedy = "free the disk, or name another folder in `offload`"
                raise Mistake(self.folder, f"caches cannot be written ({error.strerror or error})", remedy) from error
            places = torch.cat([beside.cpu(), torch.from_numpy(taken).view(sum(sizes), rows).T], 1)
            return places, self._hold(places)

    def hold(self, places: Int[Tensor, "B S"]) -> Hold:
        """Return a hold on some places that another one holds now."""
        with self._mine():
            return self._hold(places)

    def forget(self, before: Int[Tensor, "B S"], after: Int[Tensor, "B R"]) -> Hold:
        """Wipe the places that are not left after a deletion, and return a hold on those that are.

        Raises:
            Mistake: they cannot be written.
        """
        with self._mine():
            gone = np.setdiff1d(_listed(before), _listed(after))
            for place in gone[~np.isin(gone, list(self._forgotten))]:
                rows = place * self.heads + np.arange(self.heads)
                self._forgotten[int(place)] = {name: self._read(name, rows) for name in self.forms}
            try:
                self._wipe(gone)
            except OSError as error:
                remedy = f"mend the disk; until then the segment lies in {self.folder}"
                raise Mistake("cache.forget", f"the file cannot be written ({error.strerror or error})", remedy) from error
            return self._hold(after)

    def read(self, places: Int[Tensor, "N"], heads: Int[Tensor, "N"], device: torch.device, only: str | None = None) -> State:
        """Return single heads' weights, (N, ...), all or only one of them; the place -1 reads as zeros.

        Raises:
            Mistake: the files are gone.
        """
        place, head = places.cpu().numpy(), heads.cpu().numpy()
        found: State = {}
        with self._mine():
            wiped = [row for row, one in enumerate(place) if int(one) in self._forgotten] if self._forgotten else []
            for name, form in self.forms.items() if only is None else [(only, self.forms[only])]:
                data = self._read(name, np.maximum(place, 0) * form.heads + head)
                data[place < 0] = 0
                for row in wiped:
                    data[row] = self._forgotten[int(place[row])][name][head[row]]
                found[name] = torch.from_numpy(data).view(-1).view(form.dtype).view(len(place), *form.shape).to(device)
        return found

    def _read(self, name: str, rows: Places) -> np.ndarray:
        """Copy rows (place, head) out of the mapped file."""
        form = self.forms[name]
        if not len(rows):
            return np.empty((0, form.bytes), np.uint8)
        try:
            mapped = np.memmap(self.folder / name, np.uint8, "r", shape=(len(self._holders) * form.heads, form.bytes))
        except (OSError, ValueError) as error:  # ValueError: the file is shorter
            raise Mistake(self.folder, "caches were removed while a state holds them", "go on from a saved state, or read again") from error
        return np.asarray(mapped)[rows]

    def _write(self, name: str, places: Places, data: np.ndarray) -> None:
        """Write (places, bytes), neighbours in one go."""
        runs = np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1)
        handle = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(handle, "wb", buffering=0) as file:
            for run in runs:
                file.seek(int(places[run[0]]) * data.shape[1])
                left = data[run[0] : run[-1] + 1].reshape(-1).data
                while left:
                    left = left[file.write(left) or 0 :]

    def _wipe(self, places: Places) -> None:
        if len(places):
            for name, form in self.forms.items():
                for part in np.array_split(places, -(-len(places) * form.heads * form.bytes // PIECE)):
                    self._write(name, part, np.zeros((len(part), form.heads * form.bytes), np.uint8))

    def _cut(self, places: int) -> None:
        """Keep so many places of each file."""
        for name, form in self.forms.items():
            with contextlib.suppress(FileNotFoundError):
                os.truncate(self.folder / name, places * form.heads * form.bytes)

    def _take(self, number: int) -> Places:
        """Return free places, first those that were used before, then new ones."""
        reused, self._free = self._free[:number], self._free[number:]
        end = len(self._holders)
        fresh = np.arange(end, end + number - len(reused))
        self._holders = np.concatenate([self._holders, np.zeros(len(fresh), np.int64)])
        return np.concatenate([np.array(reused, np.int64), fresh])

    def _untake(self, taken: Places, before: int) -> None:
        """Leave the files as they were `before`, as far as a disk that fails lets us."""
        reused = taken[taken < before]
        self._holders, self._free = self._holders[:before], [*reused.tolist(), *self._free]
        with contextlib.suppress(OSError):
            self._cut(before)
            self._wipe(reused)

    def _hold(self, places: Int[Tensor, "B S"]) -> Hold:
        held = _listed(places)
        self._holders[held] += 1
        return Hold(self, held)

    def _let_go(self, places: Places) -> None:
        """Take a hold back; it may come in the middle of anything."""
        if os.getpid() == self._owner:
            self._dropped.append(places)
            self._settle()

    def _settle(self) -> None:
        """Wipe and free what nobody holds any more, unless someone is at work here, who will do it when he is done."""
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                places = self._dropped.popleft()
                self._holders[places] -= 1
                free = places[self._holders[places] == 0]
                for place in free.tolist():
                    self._forgotten.pop(place, None)
                with contextlib.suppress(OSError):
                    if self._holders.any():
                        self._free = sorted([*self._free, *free.tolist()])
                        self._wipe(free)
                    else:
                        self._holders, self._free = self._holders[:0], []
                        self._cut(0)
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _mine(self) -> Iterator[None]:
        if os.getpid() != self._owner:
            raise Mistake("state", "its caches rest on the disk of another process", "save the state there, and load it here")
        try:
            with self._lock:
                yield
        finally:
            self._settle()


class Hold:
    """What keeps the places of a state from being used again, for as long as the state lives."""

    def __init__(self, archive: Archive, places: Places):
        self.archive = archive
        weakref.finalize(self, archive._let_go, places).atexit = False  # at the end of the process the folder goes

    def __deepcopy__(self, memo: object) -> Hold:
        return self  # nothing in it changes

    def __reduce__(self) -> str:
        raise Mistake("state", "has caches on disk, which a pickle does not take along", "write it with its `save`")


def _listed(places: Int[Tensor, "B S"]) -> Places:
    """Return the places that a state has, each once."""
    found = np.unique(places.cpu().numpy())
    return found[found >= 0]
