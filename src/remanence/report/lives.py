"""Read ledgers and put their runs together into lives: the same life under several seeds is one life with a band."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from remanence.errors import Mistake
from remanence.ledger import END, Ledger
from remanence.receipts import receipts_of

Moment = tuple[int, int]  # (event, step), step END after the event


@dataclass(frozen=True)
class Run:
    """One run of one ledger: its row of `runs`, and its other tables as they were written."""

    ledger: str
    run: str
    recipe: str
    life: str
    seed: int
    oracle: bool
    settings: Any
    versions: Any
    parameters: int
    at: float
    events: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    losses: list[dict[str, Any]]
    moved: list[dict[str, Any]]
    receipts: list[dict[str, Any]]


@dataclass(frozen=True)
class Series:
    """What one probe found on one subject over a life: `values` is NaN where a run has no number."""

    moments: list[Moment]
    x: list[float]  # cumulative optimizer step
    values: Float[np.ndarray, "moments seeds"]

    def at_end(self, *, before: int | None = None, of: int | None = None) -> Float[np.ndarray, "seeds"]:
        """Return the last score at the end of an event (before event `before`; of event `of`), NaN where there is none."""
        picked = [
            row
            for row, (event, step) in enumerate(self.moments)
            if step == END and (before is None or event < before) and (of is None or event == of)
        ]
        if not picked and before is None and of is None and self.moments:
            picked = [len(self.moments) - 1]  # a life that was cut off inside its first event
        return self.values[picked[-1]] if picked else np.full(self.values.shape[1], np.nan)

    def peak(self, lower: bool) -> Float[np.ndarray, "seeds"]:
        """Return the best score at the end of any event, per seed."""
        ends = self.values[[row for row, (_, step) in enumerate(self.moments) if step == END]]
        if not len(ends):
            return np.full(self.values.shape[1], np.nan)
        worst = np.inf if lower else -np.inf
        best = np.where(np.isfinite(ends), ends, worst)
        best = best.min(0) if lower else best.max(0)
        return np.where(np.isfinite(best), best, np.nan)


@dataclass(frozen=True)
class Life:
    """Runs that differ in nothing but the seed."""

    name: str
    oracle: bool
    runs: list[Run]
    events: list[dict[str, Any]]  # of the longest run, with `start` and `end` in cumulative steps and `complete`
    series: dict[tuple[str, str], dict[str, Series]]  # (probe, metric) -> subject -> series


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Return every run of the ledgers, in the order given.

    Raises:
        Mistake: no ledger is named, a file is no ledger, or no run is recorded in any.
    """
    if not paths:
        raise Mistake("report", "no ledger is named", "name the ledger.sqlite that `remanence run` wrote")
    found = []
    for path in dict.fromkeys(Path(path) for path in paths):
        with Ledger(path, create=False) as ledger:
            for row in ledger.read("SELECT * FROM runs ORDER BY at, run"):
                run, settings = row["run"], _loads(row["settings"])
                found.append(
                    Run(
                        ledger=str(path),
                        run=run,
                        recipe=row["recipe"],
                        life=row["life"],
                        seed=row["seed"],
                        settings=settings,
                        oracle=isinstance(settings, dict) and settings.get("oracle") is True,
                        versions=_loads(row["versions"]),
                        parameters=row["parameters"],
                        at=row["at"],
                        events=[{**event, "settings": _loads(event["settings"])} for event in ledger.rows("events", run)],
                        scores=ledger.rows("scores", run),
                        losses=ledger.read("SELECT event, stage, step, value FROM steps WHERE run = ? AND metric = 'loss'", run),
                        moved=ledger.rows("moved", run),
                        receipts=receipts_of(ledger, run),
                    )
                )
    if not found:
        raise Mistake(", ".join(str(path) for path in paths), "no run is recorded here", "run a recipe first with `remanence run`")
    return found


def group(runs: Iterable[Run]) -> list[Life]:
    """Put runs of the same life together; lives that learned otherwise, or share a seed, stay apart. The oracle comes last."""
    groups: list[list[Run]] = []
    for run in runs:
        home = next((other for other in groups if all(_same_life(run, member) for member in other)), None)
        if home is None:
            groups.append([run])
        else:
            home.append(run)
    names = [members[0].life for members in groups]
    lives = []
    for number, members in enumerate(groups):
        name = names[number]
        if names.count(name) > 1:  # two lives of one name: say which is which by what differs
            name = f"{name} ({_telling(members[0], [other[0] for other in groups if other[0].life == name])})"
        lives.append(_life(name, members))
    taken: set[str] = set()
    for number, life in enumerate(lives):
        if life.name in taken:
            lives[number] = Life(f"{life.name} #{number + 1}", life.oracle, life.runs, life.events, life.series)
        taken.add(lives[number].name)
    return sorted(lives, key=lambda life: life.oracle)


def _signature(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["name"], event["verb"], event["kind"], event["method"], event["rows"], json.dumps(event["settings"], sort_keys=True)


def _same_life(one: Run, other: Run) -> bool:
    if (one.life, one.oracle, one.parameters) != (other.life, other.oracle, other.parameters) or one.seed == other.seed:
        return False
    theirs = {event["event"]: _signature(event) for event in other.events}
    return all(theirs.get(event["event"], _signature(event)) == _signature(event) for event in one.events)


def _telling(run: Run, rivals: list[Run]) -> str:
    methods = ", ".join(dict.fromkeys(event["method"] for event in run.events))
    for words in (
        lambda r: ", ".join(dict.fromkeys(event["method"] for event in r.events)),
        lambda r: Path(r.recipe.splitlines()[0]).stem if r.recipe else "",
        lambda r: Path(r.ledger).parent.name,
        lambda r: f"seed {r.seed}",
        lambda r: r.run,
    ):
        if len({words(rival) for rival in rivals}) == len(rivals):
            return words(run) or "no name"
    return methods or run.run


def _life(name: str, runs: list[Run]) -> Life:
    events = _events(runs)
    starts = {event["event"]: event["start"] for event in events}
    ends = {event["event"]: event["end"] for event in events}
    grid: dict[tuple[str, str], dict[str, dict[Moment, list[float]]]] = {}
    for column, run in enumerate(runs):
        for row in run.scores:
            subjects = grid.setdefault((row["probe"], row["metric"]), {})
            cell = subjects.setdefault(row["subject"], {}).setdefault((row["event"], row["step"]), [math.nan] * len(runs))
            value = row["value"]
            cell[column] = value if isinstance(value, int | float) and math.isfinite(value) else math.nan
    series: dict[tuple[str, str], dict[str, Series]] = {}
    for measure, subjects in grid.items():
        series[measure] = {}
        for subject, cells in subjects.items():
            moments = sorted(cells, key=lambda at: (at[0], math.inf if at[1] == END else at[1]))
            x = [float(ends.get(e, 0) if s == END else min(starts.get(e, 0) + s, ends.get(e, s))) for e, s in moments]
            series[measure][subject] = Series(moments, x, np.array([cells[moment] for moment in moments], dtype=np.float64))
    return Life(name, runs[0].oracle, runs, events, series)


def _events(runs: list[Run]) -> list[dict[str, Any]]:
    """Merge the events of several seeds: steps are the longest run's, seconds the mean; an event that was cut off has no name yet."""
    merged: list[dict[str, Any]] = []
    rows: dict[int, list[dict[str, Any]]] = {}
    inside: dict[int, int] = {}
    for run in runs:
        for event in run.events:
            rows.setdefault(event["event"], []).append(event)
        stages: dict[int, set[tuple[int, int]]] = {}
        for loss in run.losses:
            stages.setdefault(loss["event"], set()).add((loss["stage"], loss["step"]))
        for number, seen in stages.items():
            inside[number] = max(inside.get(number, 0), len(seen))
        for score in run.scores:
            inside[score["event"]] = max(inside.get(score["event"], 0), score["step"], 0)
    at = 0
    for number in sorted((set(rows) | set(inside)) - {0}):
        found = rows.get(number, [])
        if found:
            event = {
                key: found[0][key]
                for key in ("event", "name", "verb", "kind", "method", "rows", "settings", "weights_before", "weights_after")
            }
            steps = max(row["steps"] for row in found)
            seconds = [row["seconds"] for row in found if row["seconds"] is not None and math.isfinite(row["seconds"])]
            event |= {"steps": steps, "seconds": sum(seconds) / len(seconds) if seconds else None, "complete": True}
        else:
            steps = inside[number]
            event = {
                "event": number,
                "name": f"event {number}, cut off",
                "verb": "",
                "kind": "",
                "method": "",
                "rows": None,
                "settings": {},
            }
            event |= {"weights_before": "", "weights_after": "", "steps": steps, "seconds": None, "complete": False}
        merged.append(event | {"start": at, "end": at + steps})
        at += steps
    return merged
