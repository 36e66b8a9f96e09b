"""The report as words: numbers with units, the sentence at its top, Markdown, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

MISSING = "–"
RULES = (
    ("Kept", "the mean last score over the tasks that this life learned and the sets that no event taught."),
    (
        "Should be gone, is there",
        "the mean last score on the forget sets of the requests served; beside it the oracle's: a life that never saw those rows. "
        "What exceeds the oracle stayed behind.",
    ),
    (
        "Lost by accident",
        "the mean fall from the best score after any event to the last one, over the same sets as Kept and the retain and neighbour sets "
        "of the requests served. "
        "A task that shares rows with a forget set counts their loss here too.",
    ),
)


def shown(value: float | None, share: bool, *, sign: bool = False) -> str:
    """Return a number as a reader wants it: percent for a share of one, else three digits; a dash where there is none."""
    if value is None:
        return MISSING
    plus = "+" if sign else ""
    if share:
        percent = value * 100
        digits = 1 if 0 < abs(percent) < 1 or 99 < percent < 100 else 0
        return f"{round(percent, digits) + 0.0:{plus}.{digits}f} %"
    return f"{value:{plus}#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:{plus},.0f}"


def points(value: float | None, share: bool) -> str:
    """Return a difference: percentage points for shares of one."""
    if value is None:
        return MISSING
    return shown(value, share).replace(" %", " points")


def between(number: dict[str, Any], share: bool) -> str:
    """Return `mean ± half-width`, the half-width only where there are seeds for it."""
    half = number["half"]
    if half is None:
        return shown(number["mean"], share)
    return f"{shown(number['mean'], share)} ± {shown(half, share).replace(' %', '')}"


def unit(report: dict[str, Any]) -> bool:
    """Tell whether the headline's numbers are shares of one."""
    return bool(report["measures"]) and report["measures"][0]["share"]


def verdict(report: dict[str, Any]) -> str:
    """Return the report's first sentence: which life kept most, which came closest to the oracle, which harmed least."""
    share = unit(report)
    lower = bool(report["measures"]) and report["measures"][0]["better"] == "lower"
    lives = [life for life in report["lives"] if not life["oracle"]]
    if not lives:
        lives = report["lives"]
    heads = [(life["life"], life["headline"]) for life in lives]
    kept = [(head["kept"]["mean"], name) for name, head in heads if head["kept"]["mean"] is not None]
    over = [(head["left"]["excess"], name) for name, head in heads if head["left"]["excess"] is not None]
    left = [(head["left"]["mean"], name) for name, head in heads if head["left"]["mean"] is not None]
    lost = [(head["lost"]["mean"], name) for name, head in heads if head["lost"]["mean"] is not None]
    if not kept:
        return "No score was recorded that could be summed up."
    if len(lives) == 1:
        said = [
            f"kept {shown(kept[0][0], share)} of what it should know"
            if share
            else f"ends at a mean of {shown(kept[0][0], share)} on what it should know"
        ]
        if over:
            said.append(_excess(over[0][0], share))
        elif left:
            said.append(f"still has {shown(left[0][0], share)} on what it should have lost")
        if lost:
            said.append(f"lost {points(lost[0][0], share)} by accident")
        return f"{kept[0][1]} " + _listed(said) + "."
    said_of: dict[str, list[str]] = {}
    best = min(kept) if lower else max(kept)
    said_of.setdefault(best[1], []).append(f"kept most ({shown(best[0], share)})")
    if lost:
        mild = min(lost)
        said_of.setdefault(mild[1], []).append(f"lost least by accident ({points(mild[0], share)})")
    if over:
        near = min(over, key=lambda pair: abs(pair[0]))
        said_of.setdefault(near[1], []).append(f"came closest to never having seen the forgotten rows ({_distance(near[0], share)})")
    elif left:
        near = max(left) if lower else min(left)
        said_of.setdefault(near[1], []).append(f"has least left of what it should have lost ({shown(near[0], share)})")
    return "; ".join(f"{name} {_listed(said)}" for name, said in said_of.items()) + "."


def _excess(value: float, share: bool) -> str:
    if value >= 0:
        return f"has {points(value, share)} more left of the forgotten rows than an oracle"
    return f"has {points(-value, share)} less left of the forgotten rows than an oracle"


def _distance(value: float, share: bool) -> str:
    return f"{points(abs(value), share)} {'above' if value >= 0 else 'below'} the oracle"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}{',' if len(parts) > 2 else ''} and {parts[-1]}"


def steps_word(count: int | None) -> str:
    """Return `1 step`, `40 steps`."""
    return MISSING if count is None else f"{count:,} step{'' if count == 1 else 's'}"


def duration(seconds: float | None) -> str:
    """Return seconds as a reader says them."""
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def settings_words(settings: Any) -> str:
    """Return settings as `name=value` words."""
    if isinstance(settings, dict):
        return ", ".join(f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items())
    return str(settings)


def as_json(report: dict[str, Any]) -> str:
    """Return the numbers behind every figure; keys are stable under one `format` number."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _cell(text: Any) -> str:
    """Escape a user's words for a Markdown table."""
    plain = " ".join(str(text).split())
    for letter in "\\`*_[]<>|#~":
        plain = plain.replace(letter, f"\\{letter}" if letter not in "<>" else {"<": "&lt;", ">": "&gt;"}[letter])
    return plain


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(_cell, head)) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows), ""]


def as_markdown(report: dict[str, Any], data: str | None = None) -> str:
    """Return the report as Markdown tables.

    Args:
        report: from `tables.numbers`.
        data: name of the folder with the raw tables, to link to.
    """
    share = unit(report)
    lines = ["# What was remembered, and what remains", "", _cell(verdict(report)), ""]
    rows = []
    for life in report["lives"]:
        head = life["headline"]
        oracle = MISSING if head["left"]["oracle"] is None else shown(head["left"]["oracle"], share)
        name = life["life"] + (" (oracle)" if life["oracle"] else "")
        rows.append(
            (
                name,
                between(head["kept"], share),
                between(head["left"], share),
                oracle,
                points(head["lost"]["mean"], share),
                len(life["seeds"]),
            )
        )
    lines += _table(("life", RULES[0][0], RULES[1][0], "oracle", RULES[2][0], "seeds"), rows)
    lines += [f"- {_cell(name)}: {_cell(rule)}" for name, rule in RULES]
    names = ", ".join(name_of(report, measure) for measure in report["lives"][0]["headline"]["measures"])
    lines += [f"- Measured as: {_cell(names) or MISSING}. ± is the half-width of the 95 % t-interval over seeds.", ""]
    for measure in report["measures"]:
        lines += [f"## {_cell(measure['name'])} ({measure['better']} is better)", ""]
        for life in report["lives"]:
            found = [row for row in life["matrix"] if (row["probe"], row["metric"]) == (measure["probe"], measure["metric"])]
            if found:
                lines += [f"### {_cell(life['life'])}", ""]
                columns = ["start", *(f"{event['event']} {event['verb']} {event['name']}" for event in life["events"])]
                lines += _table(
                    ["set", *columns], ([row["subject"], *(between(cell, measure["share"]) for cell in row["cells"])] for row in found)
                )
        bars = [row for row in report["requests"] if (row["probe"], row["metric"]) == (measure["probe"], measure["metric"])]
        if bars:
            lines += ["### Requests", ""]
            table = []
            for row in bars:
                oracle = MISSING if row["oracle"] is None else between(row["oracle"], measure["share"])
                for bar in row["lives"]:
                    moments = (between(bar[when], measure["share"]) for when in ("before", "after", "final"))
                    table.append((row["request"], row["part"], bar["life"], *moments, oracle))
            lines += _table(("request", "set", "life", "before", "after", "at the end", "oracle"), table)
    lines += ["## Events", ""]
    for life in report["lives"]:
        lines += [f"### {_cell(life['life'])}", ""]
        ends = {row["event"]: _last(row["points"]) for row in life["losses"]}
        lines += _table(
            ("event", "verb", "name", "kind", "method", "settings", "rows", "steps", "last loss", "time"),
            (
                (
                    event["event"],
                    event["verb"],
                    event["name"],
                    event["kind"],
                    event["method"],
                    settings_words(event["settings"]),
                    MISSING if event["rows"] is None else event["rows"],
                    event["steps"],
                    shown(ends.get(event["event"]), False),
                    duration(event["seconds"]),
                )
                for event in life["events"]
            ),
        )
    receipts = [(life["life"], receipt) for life in report["lives"] for receipt in life["receipts"]]
    if receipts:
        lines += ["## Receipts", ""]
        lines += _table(
            ("life", "run", "event", "request", "rows", "hash of the rows", "method", "weights before", "weights after", "audit"),
            (
                (
                    name,
                    one["run"],
                    one["event"],
                    one["request"],
                    (one["asked"] or {}).get("forget", {}).get("rows", MISSING),
                    (one["asked"] or {}).get("forget", {}).get("sha256", MISSING)[:16],
                    one["method"],
                    one["weights"]["before"][:16],
                    one["weights"]["after"][:16],
                    (one["audit"] or {}).get("verdict", MISSING),
                )
                for name, one in receipts
            ),
        )
        for name, one in receipts:
            for reason in (one["audit"] or {}).get("reasons", ()):
                lines.append(f"- {_cell(name)}, {_cell(one['request'])}: {_cell(reason)}")
        lines.append("")
    lines += ["## Runs", ""]
    lines += _table(
        ("life", "run", "seed", "parameters", "events", "versions", "recipe"),
        (
            (life["life"], run["run"], run["seed"], f"{run['parameters']:,}", run["events"], settings_words(run["versions"]), run["recipe"])
            for life in report["lives"]
            for run in life["runs"]
        ),
    )
    if data:
        lines += [f"Raw tables: [{_cell(data)}](<{data}/>)", ""]
    return "\n".join(lines)


def name_of(report: dict[str, Any], key: dict[str, Any]) -> str:
    """Return the name of the measure that `key` (with `probe` and `metric`) points to."""
    return next(measure["name"] for measure in report["measures"] if (measure["probe"], measure["metric"]) == (key["probe"], key["metric"]))


def _last(found: list[dict[str, Any]]) -> float | None:
    return next((point["mean"] for point in reversed(found) if point["mean"] is not None), None)
