"""Charts as inline SVG strings, coloured by CSS classes alone so that a page's theme decides; every user string is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup, escape

LETTER = 7.2  # mean width in px of a letter at 11 px in a wide typeface
POINTS = 400  # a curve is thinned to at most this many points; the data beside the page holds all


@dataclass(frozen=True)
class Line:
    """One curve: points (x, mean, half) in data units, `None` where there is no number; `ends` marks the points after an event."""

    name: str
    last: str  # its last score in words, written after the name
    shade: str  # CSS class of its colour
    points: Sequence[tuple[float, float | None, float | None]]
    ends: Sequence[bool]
    values: Sequence[str]  # each point's value in words
    taught: float | None = None  # x of the event that taught it


@dataclass(frozen=True)
class Timeline:
    """Cumulative steps to a share of the axis.

    An event takes its share of the steps, but never less than `floor` of the longest life, so that it is seen.
    """

    steps: tuple[float, ...]  # boundaries in cumulative steps
    places: tuple[float, ...]  # boundaries in shares of the axis, 0 to 1

    def at(self, x: float, event: int) -> float:
        """Return the place of cumulative step `x` inside the event at position `event` (0: the first)."""
        if len(self.steps) < 2:
            return 0.0
        event = min(max(event, 0), len(self.steps) - 2)
        low, high = self.steps[event : event + 2]
        left, right = self.places[event : event + 2]
        return right if high <= low else left + (right - left) * min(max((x - low) / (high - low), 0.0), 1.0)


def timelines(lives: Sequence[Sequence[dict[str, Any]]], floor: float = 0.06) -> list[Timeline]:
    """Return one timeline per life (a list of events with `start` and `end`) on one shared axis."""
    longest = max((events[-1]["end"] for events in lives if events), default=0) or 1
    widths = [[max(event["end"] - event["start"], floor * longest) for event in events] for events in lives]
    whole = max((sum(width) for width in widths), default=1) or 1
    return [
        Timeline((0.0, *(float(event["end"]) for event in events)), tuple(np.cumsum([0.0, *width]) / whole))
        for events, width in zip(lives, widths)
    ]


def ticks(low: float, high: float, share: bool) -> list[float]:
    """Return round numbers that cover [low, high]: quarters for shares of one, else a step of 1, 2 or 5 times a power of ten."""
    if share:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    width = (high - low) or abs(high) or 1.0
    raw = width / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 12) for number in range(first, last + 1)]


def tick_text(value: float, share: bool) -> str:
    """Return a tick's label."""
    return f"{value * 100:.0f}%" if share else f"{value:g}"


def spaced(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours stand at least `gap` from each other inside [low, high], as far as they fit; O(n log n).

    Their order stays.
    """
    order = np.argsort(np.asarray(places, dtype=np.float64), kind="stable")
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    moved = np.asarray(places, dtype=np.float64)[order]
    steps = gap * np.arange(len(moved))
    moved = np.maximum.accumulate(moved - steps) + steps  # push down
    moved = np.minimum(moved, high - steps[::-1])  # then back up from the bottom, still `gap` apart
    result = np.empty(len(moved))
    result[order] = np.maximum(moved, low + steps) if len(moved) else moved
    return [float(place) for place in result]


def cut(text: str, letters: int) -> str:
    """Shorten `text` to so many letters."""
    return text if len(text) <= letters else text[: max(letters - 1, 1)].rstrip(" -/_") + "…"


def curves(
    lines: Sequence[Line],
    events: Sequence[dict[str, Any]],
    timeline: Timeline,
    scale: dict[str, Any],
    *,
    width: int,
    title: str,
    at: Sequence[Sequence[float]],
    letters: int,
) -> Markup:
    """Draw retention curves with a band per event; names and last values stand at the lines' ends.

    Args:
        lines: the curves.
        events: the life's events, with `event`, `name`, `verb`.
        timeline: of this life.
        scale: the measure (`share`, `low`, `high`).
        width: of the drawing, in px; the height follows from the number of labels.
        title: what a screen reader says.
        at: per line, the place (0 to 1) of each of its points on the shared axis.
        letters: length of the longest label in all charts that share this axis.
    """
    marks = ticks(scale["low"], scale["high"], scale["share"])
    low, high = marks[0], marks[-1]
    limit = int(width * 0.4 / LETTER)
    right = min(letters, limit) * LETTER + 24
    left, top, bottom = 36, 22, 20
    height = max(210, 15 * len(lines) + top + bottom + 10)
    inner_w, inner_h = width - left - right, height - top - bottom

    def px(place: float) -> float:
        return left + inner_w * place

    def py(value: float) -> float:
        return top + inner_h * (1 - (min(max(value, low), high) - low) / ((high - low) or 1))

    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}">']
    for number, event in enumerate(events):
        x0, x1 = px(timeline.places[number]), px(timeline.places[number + 1])
        verb = event["verb"] if event["verb"] in ("learn", "forget") else "other"
        shade = "even" if number % 2 else "odd"
        out.append(
            f"<g><title>{event['event']}: {escape(event['verb'])} {escape(event['name'])}, {event['end'] - event['start']:g} steps</title>"
        )
        out.append(f'<rect class="band {verb} {shade}" x="{x0:.1f}" y="{top}" width="{x1 - x0:.1f}" height="{inner_h}"/>')
        out.append(f'<rect class="cap {verb}" x="{x0 + 1:.1f}" y="{top - 18}" width="{max(x1 - x0 - 2, 1):.1f}" height="15" rx="3"/>')
        room = int((x1 - x0 - 8) / LETTER)
        words = f"{event['event']} {event['name']}"
        words = words if len(words) <= room else (cut(words, room) if room >= 11 else str(event["event"]))
        if len(words) * LETTER <= x1 - x0:  # among many events there is no room for numbers
            out.append(f'<text class="cap {verb}" x="{(x0 + x1) / 2:.1f}" y="{top - 7}" text-anchor="middle">{escape(words)}</text>')
        out.append("</g>")
    for mark in marks:
        out.append(f'<line class="grid" x1="{left}" x2="{left + inner_w:.1f}" y1="{py(mark):.1f}" y2="{py(mark):.1f}"/>')
        out.append(f'<text class="tick" x="{left - 5}" y="{py(mark) + 3.5:.1f}" text-anchor="end">{tick_text(mark, scale["share"])}</text>')
    last = -math.inf
    for step, place in zip(timeline.steps, timeline.places):
        if px(place) - last > 34:
            out.append(f'<text class="tick" x="{px(place):.1f}" y="{height - 6}" text-anchor="middle">{step:g}</text>')
            last = px(place)
    ends: list[tuple[float, float, Line]] = []
    for line, places in zip(lines, at):
        keep = _thin(len(line.points), line.ends)
        drawn = [(px(places[i]), line.points[i], line.ends[i], line.values[i]) for i in keep]
        for run in _runs(drawn):
            if any(point[2] is not None for _, point, _, _ in run):
                upper = [f"{x:.1f},{py(m + (h or 0)):.1f}" for x, (_, m, h), _, _ in run]
                under = [f"{x:.1f},{py(m - (h or 0)):.1f}" for x, (_, m, h), _, _ in reversed(run)]
                out.append(f'<polygon class="spread {line.shade}" points="{" ".join(upper + under)}"/>')
            path = " ".join(f"{x:.1f},{py(m):.1f}" for x, (_, m, _), _, _ in run)
            words = escape("|".join(value for _, _, _, value in run))
            out.append(f'<polyline class="curve {line.shade}" points="{path}" data-name="{escape(line.name)}" data-values="{words}"/>')
        for x, (step, mean, _), end, value in drawn:
            if end and mean is not None:
                ring = "taught" if line.taught is not None and step == line.taught else "end"
                radius = 4.2 if ring == "taught" else 2.4
                tip = f"{escape(line.name)}: {escape(value)} at step {step:g}"
                out.append(
                    f'<circle class="{ring} {line.shade}" cx="{x:.1f}" cy="{py(mean):.1f}" r="{radius}"><title>{tip}</title></circle>'
                )
        known = [(x, mean) for x, (_, mean, _), _, _ in drawn if mean is not None]
        if known:
            ends.append((known[-1][0], py(known[-1][1]), line))
    edge = left + inner_w
    for (x, y, line), place in zip(ends, spaced([y for _, y, _ in ends], 14, top + 4, height - bottom)):
        out.append(
            f'<path class="leader {line.shade}" d="M{x:.1f} {y:.1f} L{max(x, edge) + 4:.1f} {y:.1f} '
            f'L{edge + 14:.1f} {place:.1f} L{edge + 18:.1f} {place:.1f}"/>'
        )
        words = f"{cut(line.name, limit - len(line.last) - 1)} {line.last}"
        out.append(f'<text class="name" x="{edge + 21:.1f}" y="{place + 3.8:.1f}">{escape(words)}<title>{escape(line.name)}</title></text>')
    out.append("</svg>")
    return Markup("".join(out))


def _thin(count: int, ends: Sequence[bool]) -> list[int]:
    if count <= POINTS:
        return list(range(count))
    even = set(np.linspace(0, count - 1, POINTS).astype(int).tolist())
    return sorted(even | {number for number, end in enumerate(ends) if end})


def _runs(drawn: list[Any]) -> list[list[Any]]:
    """Split a curve where a number is missing."""
    runs: list[list[Any]] = [[]]
    for point in drawn:
        if point[1][1] is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def sparkline(points: Sequence[dict[str, Any]], title: str, width: int = 150, height: int = 30) -> Markup:
    """Draw a training loss as a small line from its own least to its greatest value; a thin rule stands where a new stage begins."""
    values = np.array([math.nan if point["mean"] is None else point["mean"] for point in points], dtype=np.float64)
    known = np.isfinite(values)
    if not known.any():
        return Markup("")
    bins = np.array_split(np.arange(len(values)), min(len(values), 120))  # the mean of each bin
    means = np.array([np.nanmean(values[part]) if known[part].any() else math.nan for part in bins])
    low, high = float(np.nanmin(means)), float(np.nanmax(means))
    x = np.linspace(2, width - 4, len(means)) if len(means) > 1 else np.array([width / 2])
    y = height - 4 - (means - low) / ((high - low) or 1) * (height - 8)
    fine = np.isfinite(y)
    out = [
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>"
    ]
    for before, (number, point) in pairwise(enumerate(points)):
        if before[1]["stage"] != point["stage"]:
            place = 2 + (width - 6) * number / max(len(points) - 1, 1)
            out.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{height}"/>')
    out.append(f'<polyline class="curve c0" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[fine], y[fine]))}"/>')
    out.append(f'<circle class="end c0" cx="{x[fine][-1]:.1f}" cy="{y[fine][-1]:.1f}" r="2.2"/></svg>')
    return Markup("".join(out))
