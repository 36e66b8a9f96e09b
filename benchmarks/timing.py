"""Time two ways of doing the same work, side by side in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Seconds = tuple[float, float]  # of the processor, on the wall


class PeerMissing(Exception):
    """What a benchmark compares with is not on this machine; the message says what to do."""


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Args:
        name: what was compared.
        sense: overhead (ours over peer, to be small) | speedup (peer over ours, to be large).
        ratio: of processor time, the median of the rounds' ratios: with one thread it is the wall time of an idle machine, and a busy one does not blur it.
        low: the first quartile of the rounds' ratios.
        high: the third quartile.
        wall_ratio: the same median of wall times.
        ours: processor seconds of one run of ours, the median over rounds.
        peer: processor seconds of one run of the peer, the median over rounds.
        rounds: pairs of runs.
        goal: what was asked for, if anything was.
        more: other figures (accuracies, sizes).
    """

    name: str
    sense: str
    ratio: float
    low: float
    high: float
    wall_ratio: float
    ours: float
    peer: float
    rounds: int
    goal: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached."""
        return None if self.goal is None else (self.ratio <= self.goal if self.sense == "overhead" else self.ratio >= self.goal)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        return {**asdict(self), "met": self.met}


def figure(
    name: str, ours: Sequence[Seconds], peer: Sequence[Seconds], sense: str, goal: float | None = None, more: dict[str, Any] | None = None
) -> Figure:
    """Summarise paired seconds: ours[i] and peer[i] are of the same round."""
    pairs = list(zip(ours, peer, strict=True))
    ratios, walls = ([a[clock] / b[clock] if sense == "overhead" else b[clock] / a[clock] for a, b in pairs] for clock in (0, 1))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    middle = statistics.median
    return Figure(
        name,
        sense,
        middle(ratios),
        low,
        high,
        middle(walls),
        middle(one for one, _ in ours),
        middle(one for one, _ in peer),
        len(pairs),
        goal,
        more or {},
    )


def clocked(work: Callable[[], Any]) -> Seconds:
    """Do something, and return the seconds that it took."""
    processor, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - processor, time.perf_counter() - wall


def paired(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> tuple[list[Seconds], list[Seconds]]:
    """Return the seconds of both in each round; the one that goes first alternates, and a round that only warms up comes before."""
    ours(), peer()
    seconds: tuple[list[Seconds], list[Seconds]] = ([], [])
    for number in range(rounds):
        for turn in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[turn].append(clocked((ours, peer)[turn]))
    return seconds


def forget_peak() -> None:
    """Let the process's peak memory begin anew; a new process would begin with its parent's (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the process's peak memory since `forget_peak`."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, threads, versions, load."""
    import torch
    import transformers

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # no such file outside Linux
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def conversation(
    command: Sequence[str | Path], env: Mapping[str, str] | None = None
) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Start a peer that answers each line of JSON by one, and give a function that sends it an order and returns its answer."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as child:
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("the peer has no pipes")

        def ask(order: dict[str, Any]) -> dict[str, Any]:
            child.stdin.write(json.dumps(order) + "\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            answer = child.stdout.readline()  # type: ignore[union-attr]
            if not answer:
                raise RuntimeError(f"the peer stopped; run {' '.join(map(str, command))} and give it {json.dumps(order)}")
            return json.loads(answer)

        try:
            yield ask
        finally:
            child.stdin.close()
