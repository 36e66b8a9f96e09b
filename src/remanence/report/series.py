"""Many requests in one life: how the forget sets fare together, when they are asked for, afterwards, and before."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from remanence.ledger import END
from remanence.report.interval import t_interval
from remanence.report.lives import Life

MANY = 6  # requests from which on they are drawn together
NAMES = ("asked before", "asked now", "not yet asked")


def series_curves(life: Life, measure: dict[str, Any], requests: list[str]) -> list[dict[str, Any]]:
    """Return three curves over the events' ends: the mean score of the forget sets served earlier, served by this event, and not served yet.

    Args:
        life: with its series.
        measure: with `probe` and `metric`.
        requests: names of the requests; fewer than `MANY` give no curves.
    """
    served = {
        event["name"]: event["event"]
        for event in life.events
        if event["verb"] == "forget" and event["complete"] and event["name"] in requests
    }
    found = life.series.get((measure["probe"], measure["metric"]), {})
    sets = [(number, found[f"{name}/forget"]) for name, number in served.items() if f"{name}/forget" in found]
    if len(sets) < MANY:
        return []
    ends = {event["event"]: float(event["end"]) for event in life.events}
    numbers = [0, *ends]
    shape = (len(sets), len(numbers), sets[0][1].values.shape[1])
    values = np.full(shape, np.nan)
    for row, (_, series) in enumerate(sets):
        for (event, step), scores in zip(series.moments, series.values):
            if step == END:
                values[row, numbers.index(event)] = scores
    asked = np.array([number for number, _ in sets])[:, None]  # (requests, 1)
    now = np.array(numbers)[None]
    curves = []
    for name, chosen in zip(NAMES, (asked < now, asked == now, asked > now)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of empty means
            mean = np.nanmean(np.where(chosen[..., None], values, np.nan), axis=0)  # (events, seeds)
        centre, half = t_interval(mean)
        points = [
            {
                "event": event,
                "step": END,
                "x": ends.get(event, 0.0),
                "mean": _plain(m),
                "half": _plain(h),
                "seeds": int(np.isfinite(one).sum()),
            }
            for event, m, h, one in zip(numbers, centre, half, mean)
        ]
        curves.append({"probe": measure["probe"], "metric": measure["metric"], "subject": name, "points": points})
    return curves


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
