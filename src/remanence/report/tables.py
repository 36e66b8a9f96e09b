"""The numbers behind every figure of a report, from ledgers alone, as one nested dict that JSON can hold.

| key | what |
|-----|------|
| measures | what was measured, the leading one first: probe, metric, direction, unit, range |
| lives | runs, events, headline, curves, matrix, receipts, moved weights and training losses of each life, and where it served many requests their curves together |
| requests | the sets of each request, before, after and at the end of each life, and in the oracle |

Every number that is a mean over seeds stands as {mean, half, seeds}: half is the half-width of its 95 % t-interval, None with fewer than
two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from remanence.ledger import END
from remanence.report.interval import t_interval
from remanence.report.lives import Life, Series, group, read_runs
from remanence.report.series import series_curves

FORMAT = 1
PARTS = ("forget", "retain", "neighbours", "holdout")
# the last word of a metric's name decides; what is not named here is better when higher
LOWER_IS_BETTER = frozenset(
    {
        "loss",
        "perplexity",
        "log10_perplexity",
        "rank",
        "nll",
        "error",
        "cross_entropy",
        "bits",
        "bits_per_byte",
        "kl",
        "distance",
        "forgetting",
        "ece",
        "brier",
    }
)
# shares of one, shown in percent; the order is the order of preference for the leading measure
SHARES = (
    "exact",
    "accuracy",
    "contains",
    "choice",
    "token_accuracy",
    "rouge",
    "rougeL",
    "f1",
    "probability",
    "truth_ratio",
    "auc",
    "extraction",
    "error",
    "ece",
)


def lower_is_better(metric: str) -> bool:
    """Tell whether a smaller value of `metric` is the better one (`paraphrased/loss` goes by `loss`)."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def numbers(ledgers: Sequence[str | Path]) -> dict[str, Any]:
    """Return every number of the report on `ledgers`.

    Raises:
        Mistake: a file is missing, no ledger, of another version, or holds no run.
    """
    lives = group(read_runs(ledgers))
    tasks = list(dict.fromkeys(event["name"] for life in lives for event in life.events if event["verb"] == "learn" and event["complete"]))
    requests = list(
        dict.fromkeys(event["name"] for life in lives for event in life.events if event["verb"] == "forget" and event["complete"])
    )
    measured = measures(lives)
    own: dict[str, dict[str, Any]] = {}  # subject -> the first measure that has it
    for measure in measured:
        for subject in measure["subjects"]:
            own.setdefault(subject, measure)
    leads = [measure for measure in measured if any(own[subject] is measure for subject in measure["subjects"])]
    for measure in measured:
        measure["lead"] = measure in leads
    roles = {subject: _role(subject, tasks, requests) for subject in own}
    return {
        "format": FORMAT,
        "measures": measured,
        "subjects": [{"subject": subject, **roles[subject]} for subject in _ordered(own, tasks, requests)],
        "lives": [_life(life, measured, own, roles, tasks, requests, lives) for life in lives],
        "requests": [row for measure in measured for name in requests for row in request_bars(lives, measure, name)],
    }


def measures(lives: Iterable[Life]) -> list[dict[str, Any]]:
    """List every (probe, metric) pair with its direction, unit and range; the pair to lead with comes first.

    Shares of one come before other scores, scores before losses, plain questions before paraphrased ones, then what covers more subjects.
    """
    lives = list(lives)
    found = []
    for probe, metric in dict.fromkeys(key for life in lives for key in life.series):
        series = [(subject, one) for life in lives for subject, one in life.series.get((probe, metric), {}).items()]
        values = np.concatenate([one.values.ravel() for _, one in series])
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        base = metric.rpartition("/")[2]
        share = base in SHARES and low >= 0 and high <= 1
        name = metric.replace("/", " ") if probe in (base, metric) else f"{probe} {metric.replace('/', ' ')}"
        subjects = list(dict.fromkeys(subject for subject, _ in series))
        found.append(
            {
                "probe": probe,
                "metric": metric,
                "name": name.replace("_", " "),
                "better": "lower" if lower_is_better(metric) else "higher",
                "share": share,
                "low": low,
                "high": high,
                "subjects": subjects,
                "any": bool(len(values)),
            }
        )

    def preference(measure: dict[str, Any]) -> tuple[Any, ...]:
        base = measure["metric"].rpartition("/")[2]
        rank = SHARES.index(base) if measure["share"] else len(SHARES)
        return (
            not measure["any"],
            measure["better"] == "lower",
            "/" in measure["metric"],
            rank,
            -len(measure["subjects"]),
            measure["probe"],
            measure["metric"],
        )

    return sorted(found, key=preference)


def _role(subject: str, tasks: list[str], requests: list[str]) -> dict[str, Any]:
    if subject in tasks:
        return {"role": "task", "request": None, "part": None}
    request, _, part = subject.rpartition("/")
    if part in PARTS and request in requests:
        return {"role": "request", "request": request, "part": part}
    return {"role": "set", "request": None, "part": None}


def _ordered(subjects: Iterable[str], tasks: list[str], requests: list[str]) -> list[str]:
    """Order subjects: what the model knew at the start, the tasks as they came, the requests as they came with their parts."""

    def place(subject: str) -> tuple[Any, ...]:
        role = _role(subject, tasks, requests)
        if role["role"] == "task":
            return 1, tasks.index(subject), 0
        if role["role"] == "request":
            return 2, requests.index(role["request"]), PARTS.index(role["part"])
        return 0, subject, 0

    return sorted(subjects, key=place)


def spread(values: Float[np.ndarray, "seeds"]) -> dict[str, Any]:
    """Return {mean, half, seeds} of one number per seed."""
    mean, half = t_interval(np.asarray(values, dtype=np.float64))
    return {"mean": _plain(mean), "half": _plain(half), "seeds": int(np.isfinite(values).sum())}


def _plain(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _life(
    life: Life,
    measured: list[dict[str, Any]],
    own: dict[str, dict[str, Any]],
    roles: dict[str, Any],
    tasks: list[str],
    requests: list[str],
    lives: list[Life],
) -> dict[str, Any]:
    runs = [
        {key: getattr(run, key) for key in ("run", "ledger", "recipe", "seed", "parameters", "at", "settings", "versions")}
        | {"seconds": sum(event["seconds"] or 0 for event in run.events), "events": len(run.events)}
        for run in life.runs
    ]
    present = [(measure, life.series.get((measure["probe"], measure["metric"]), {})) for measure in measured]
    order = _ordered(own, tasks, requests)
    return {
        "life": life.name,
        "oracle": life.oracle,
        "runs": runs,
        "seeds": [run.seed for run in life.runs],
        "events": life.events,
        "headline": headline(life, own, roles, lives),
        "curves": [curve(measure, subject, found[subject]) for measure, found in present for subject in order if subject in found],
        "series": [curve for measure in measured for curve in series_curves(life, measure, requests)],
        "matrix": [
            matrix_row(life, measure, subject, found[subject]) for measure, found in present for subject in order if subject in found
        ],
        "receipts": [receipt for run in life.runs for receipt in run.receipts],
        "moved": moved(life),
        "losses": losses(life),
    }


def curve(measure: dict[str, Any], subject: str, series: Series) -> dict[str, Any]:
    """Return the retention curve of one subject: a point per measured step and event end, on cumulative optimizer steps."""
    mean, half = t_interval(series.values)
    seeds = np.isfinite(series.values).sum(-1)
    points = [
        {"event": event, "step": step, "x": x, "mean": _plain(m), "half": _plain(h), "seeds": int(n)}
        for (event, step), x, m, h, n in zip(series.moments, series.x, mean, half, seeds)
    ]
    return {"probe": measure["probe"], "metric": measure["metric"], "subject": subject, "points": points}


def matrix_row(life: Life, measure: dict[str, Any], subject: str, series: Series) -> dict[str, Any]:
    """Return one row of the task-by-time matrix: the score after the start model and after every event, None where none was taken."""
    ends = {event: row for row, (event, step) in enumerate(series.moments) if step == END}
    columns = [0, *(event["event"] for event in life.events)]
    empty = np.full(series.values.shape[1], np.nan)
    cells = [{"event": event} | spread(series.values[ends[event]] if event in ends else empty) for event in columns]
    target = subject.rpartition("/")[0] if subject.rpartition("/")[2] in PARTS else ""
    marked = next((event["event"] for event in life.events if event["name"] in (subject, target) and event["complete"]), None)
    return {"probe": measure["probe"], "metric": measure["metric"], "subject": subject, "taught": marked, "cells": cells}


def headline(life: Life, own: dict[str, dict[str, Any]], roles: dict[str, Any], lives: list[Life]) -> dict[str, Any]:
    """Return the three numbers of a life: what it kept, what it should have lost and did not, what it lost by accident.

    Every subject goes by its own measure (the first in the list of measures that has it). Averages hold only measures of one unit: shares
    of one together, else the leading measure alone. Per seed, then over seeds:

    - kept: mean final score over the tasks that this life learned and the sets that no event taught;
    - left: mean final score on the forget sets of the requests that it served (of all requests, for an oracle), and the oracle's on the
      same sets;
    - lost: mean fall from the best score at an event's end to the last one (never below 0), over the subjects of `kept` and the retain and
      neighbour sets of served requests.
    """
    learned = {event["name"] for event in life.events if event["verb"] == "learn" and event["complete"]}
    served = {event["name"] for event in life.events if event["verb"] == "forget" and event["complete"]}
    first = next(iter(own.values()), None)
    comparable = {
        subject: measure
        for subject, measure in own.items()
        if (measure["share"] and measure["better"] == first["better"] if first and first["share"] else measure is first)
    }

    def series(subject: str, of: Life) -> Series | None:
        measure = comparable.get(subject)
        return of.series.get((measure["probe"], measure["metric"]), {}).get(subject) if measure else None

    keep, left, care = [], [], []
    for subject, role in roles.items():
        if series(subject, life) is None:
            continue
        if role["role"] == "set" or subject in learned:
            keep.append(subject)
        elif role["part"] == "forget" and (life.oracle or role["request"] in served):
            left.append(subject)
        elif role["part"] in ("retain", "neighbours") and role["request"] in served:
            care.append(subject)
    lower = first is not None and first["better"] == "lower"

    def over(subjects: list[str], what: str) -> dict[str, Any]:
        rows = []
        for subject in subjects:
            one = series(subject, life)
            assert one is not None
            final = one.at_end()
            fall = (final - one.peak(lower)) if lower else (one.peak(lower) - final)
            rows.append(final if what == "final" else np.maximum(fall, 0))
        per_seed = _mean_present(np.array(rows)) if rows else np.full(len(life.runs), np.nan)
        return spread(per_seed) | {"subjects": subjects}

    oracle_values = []
    for subject in left:
        finals = [one.at_end() for other in lives if other.oracle and (one := series(subject, other)) is not None]
        oracle_values.append(np.nanmean(np.concatenate(finals)) if finals and np.isfinite(np.concatenate(finals)).any() else np.nan)
    oracle = (
        _plain(np.mean(oracle_values)) if oracle_values else None
    )  # all forget sets or none: a mean over other sets could not be compared
    kept, remaining, lost = over(keep, "final"), over(left, "final"), over([*keep, *care], "fall")
    excess = (
        None
        if oracle is None or remaining["mean"] is None or life.oracle
        else (oracle - remaining["mean"] if lower else remaining["mean"] - oracle)
    )
    return {
        "kept": kept,
        "left": remaining | {"oracle": None if life.oracle else oracle, "excess": excess},
        "lost": lost,
        "measures": [{"probe": measure["probe"], "metric": measure["metric"]} for measure in _unique(comparable.values())],
        "outside": [subject for subject in roles if subject not in comparable],
    }


def _unique(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(measure["probe"], measure["metric"]): measure for measure in found}.values())


def _mean_present(rows: Float[np.ndarray, "subjects seeds"]) -> Float[np.ndarray, "seeds"]:
    present = np.isfinite(rows)
    count = present.sum(0)
    return np.where(count > 0, np.where(present, rows, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def request_bars(lives: list[Life], measure: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return each life's score before a request, after it and at the end, and the oracle's at its end, for each part that `measure` has."""
    rows = []
    for part in PARTS:
        subject, bars, finals = f"{name}/{part}", [], []
        for life in lives:
            one = life.series.get((measure["probe"], measure["metric"]), {}).get(subject)
            if one is None:
                continue
            if life.oracle:
                finals.append(one.at_end())
                continue
            event = next((event["event"] for event in life.events if event["name"] == name and event["verb"] == "forget"), None)
            if event is not None:
                moments = {"before": one.at_end(before=event), "after": one.at_end(of=event), "final": one.at_end()}
                bars.append({"life": life.name, "event": event} | {when: spread(values) for when, values in moments.items()})
        if bars:
            oracle = spread(np.concatenate(finals)) if finals else None
            rows.append(
                {"request": name, "probe": measure["probe"], "metric": measure["metric"], "part": part, "lives": bars, "oracle": oracle}
            )
    return rows


def moved(life: Life) -> list[dict[str, Any]]:
    """Return, per event, role and layer, how many weights an event changed and by how much, over all tensors and seeds.

    `relative` is the root mean square of the tensors' relative changes, weighted by their sizes: where all tensors have one root mean
    square, that is the relative change of the whole.
    """
    cells: dict[tuple[int, str, int | None], list[tuple[int, int, float]]] = {}
    for run in life.runs:
        for row in run.moved:
            relative = row["relative"] if row["relative"] is not None and math.isfinite(row["relative"]) else math.nan
            cells.setdefault((row["event"], row["role"], row["layer"]), []).append((row["size"], row["changed"], relative))
    rows = []
    for (event, role, layer), tensors in sorted(
        cells.items(), key=lambda item: (item[0][0], item[0][1], -1 if item[0][2] is None else item[0][2])
    ):
        table = np.array(tensors, dtype=np.float64)
        size, changed, relative = table[:, 0], table[:, 1], table[:, 2]
        known = np.isfinite(relative) & (size > 0)
        weight = size[known].sum()
        rows.append(
            {
                "event": event,
                "role": role,
                "layer": layer,
                "size": int(size.sum() / len(life.runs)),
                "share": _plain(changed.sum() / max(size.sum(), 1)),
                "relative": _plain(math.sqrt((size[known] * relative[known] ** 2).sum() / weight)) if weight else None,
            }
        )
    return rows


def losses(life: Life) -> list[dict[str, Any]]:
    """Return the training loss of each event, a mean over seeds per (stage, step)."""
    table: dict[int, dict[tuple[int, int], list[float]]] = {}
    for run in life.runs:
        for row in run.losses:
            value = row["value"] if row["value"] is not None and math.isfinite(row["value"]) else math.nan
            table.setdefault(row["event"], {}).setdefault((row["stage"], row["step"]), []).append(value)
    rows = []
    for event, steps in sorted(table.items()):
        keys = sorted(steps)
        means = [[value for value in steps[key] if value == value] for key in keys]
        points = [
            {"stage": stage, "step": step, "mean": sum(found) / len(found) if found else None} for (stage, step), found in zip(keys, means)
        ]
        rows.append({"event": event, "points": points})
    return rows
