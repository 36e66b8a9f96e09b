"""A progress bar on standard error, drawn only where somebody looks (a terminal)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


class bar:
    """Show `name ━━━━ 40/200 loss 1.2 rate 0.001 0:00:12`; `stop` removes it.

    Args:
        name: what is being done.
        total: number of steps.
    """

    def __init__(self, name: str, total: int):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._progress.add_task(name, total=total, note="")
        self._progress.start()

    def show(self, done: int, note: str = "") -> None:
        """Move the bar to `done` steps."""
        self._progress.update(self._task, completed=done, note=note)

    def stop(self) -> None:
        """Take the bar away."""
        self._progress.stop()


def watched(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    """Yield items under a bar."""
    drawn = bar(name, total)
    try:
        for number, item in enumerate(items):
            yield item
            drawn.show(number + 1)
    finally:
        drawn.stop()
