"""One self-contained page (or Markdown, or JSON) from ledgers alone: no network, no fonts, readable without scripts."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from remanence.errors import Mistake, nearest
from remanence.ledger import TABLES, Ledger
from remanence.report import draw, text
from remanence.report.series import MANY
from remanence.report.tables import PARTS, numbers
from remanence.storage import whole_folder, write_text

FORMATS = ("html", "md", "json")
WIDE, NARROW = 1136, 330  # px of a full row on a desk and on a phone
FIRST = 0.42  # share of the row that the first of three panels takes
PART_SHADES = {"forget": "erase", "retain": "c0", "neighbours": "c2", "holdout": "quiet"}
SERIES_SHADES = {"asked before": "erase", "asked now": "erase dashed", "not yet asked": "c0"}
# heat from which a cell's number takes the other ink: with the colours of page.css.jinja every cell has a contrast of at least 4.5 to 1
FLIP = 65
MOVES = 12  # events whose moved weights are drawn: those that moved any of them farthest
SHADES = 6  # colours of the palette; beyond them the dash changes


def write_report(ledgers: Sequence[str | Path], output: str | Path, format: str = "html") -> Path:
    """Write the report on one or more ledgers and return its path.

    Beside a page or a Markdown file stands `NAME-data/` with one CSV per table of the ledgers, every row of it.

    Args:
        ledgers: the ledger files; their runs are shown side by side.
        output: the file to write.
        format: html, md or json.

    Raises:
        Mistake: an unknown format, an output that is a folder or one of the ledgers, a ledger that cannot be read, or a disk that cannot
            be written.
    """
    output = Path(output)
    if format not in FORMATS:
        raise Mistake("report", f"unknown format '{format}'", nearest(format, FORMATS))
    if output.is_dir():
        raise Mistake(output, "is a folder", f"name a file in it, as {output / f'report.{format}'}")
    if any(output.resolve() == Path(path).resolve() for path in ledgers):
        raise Mistake(output, "is the ledger itself", "name another output")
    report = numbers(ledgers)
    if format == "json":
        write_text(output, text.as_json(report))
        return output
    folder = output.with_name(f"{output.stem}-data")
    page = text.as_markdown(report, folder.name) if format == "md" else as_html(report, folder.name)
    write_csv(ledgers, folder)
    write_text(output, page)
    return output


def write_csv(ledgers: Sequence[str | Path], folder: str | Path) -> Path:
    """Write one CSV per table, with the ledger's path as its first column, NULL as an empty cell; one run's rows are held at a time.

    Raises:
        Mistake: the folder holds something else than such tables, or cannot be written.
    """
    folder = Path(folder)
    names = {f"{table}.csv" for table in TABLES}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - names):
        raise Mistake(folder, "holds files that are not a report's", "name another output or move them away")
    with whole_folder(folder) as place:
        for table in TABLES:
            with open(place / f"{table}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                for number, path in enumerate(dict.fromkeys(Path(path) for path in ledgers)):
                    with Ledger(path, create=False) as ledger:
                        columns = [row["name"] for row in ledger.read(f"PRAGMA table_info({table})")]
                        if number == 0:
                            writer.writerow(["ledger", *columns])
                        for run in ledger.read("SELECT run FROM runs"):
                            writer.writerows([str(path), *row.values()] for row in ledger.rows(table, run["run"]))
    return folder


def as_html(report: dict[str, Any], data: str | None = None) -> str:
    """Return the page.

    Args:
        report: from `tables.numbers`.
        data: name of the folder beside the page with the raw tables, to link to.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # autoescape for every template: names come from users
    engine = Environment(
        loader=PackageLoader("remanence.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.globals |= {
        "shown": text.shown,
        "points": text.points,
        "between": text.between,
        "duration": text.duration,
        "steps_word": text.steps_word,
        "settings_words": text.settings_words,
        "pretty": _pretty,
        "percent": _percent,
        "day": _day,
        "tables": TABLES,
        "flip": FLIP,
    }
    engine.filters["path"] = quote
    many = any(life["series"] for life in report["lives"])  # then only the leading measures have room for every set after every event
    measures = [
        {
            "measure": measure,
            "figures": _figures(report, measure),
            "matrices": _matrices(report, measure) if measure["lead"] or not many else [],
            "bars": _bars(report, measure),
        }
        for measure in report["measures"]
    ]
    return engine.get_template("page.html.jinja").render(
        report=report,
        share=text.unit(report),
        verdict=text.verdict(report),
        rules=text.RULES,
        heads=_heads(report),
        headline_measures=[text.name_of(report, measure) for measure in report["lives"][0]["headline"]["measures"]],
        leads=[found for found in measures if found["measure"]["lead"]],
        others=[found for found in measures if not found["measure"]["lead"] and found["measure"]["any"]],
        moved=[_moved(life) for life in report["lives"] if life["moved"]],
        works=[_work(life) for life in report["lives"]],
        receipts=[(life, receipt) for life in report["lives"] for receipt in life["receipts"]],
        many=MANY,
        data=data,
    )


def _percent(value: float | None, measure: dict[str, Any]) -> float:
    """Place a score on its measure's axis, 0 to 100: shares of one as they are, else from the lesser of 0 and the least to the greatest."""
    if value is None:
        return 0.0
    low, high = (0.0, 1.0) if measure["share"] else (min(0.0, measure["low"]), measure["high"])
    return round(100 * min(max((value - low) / ((high - low) or 1), 0.0), 1.0), 2)


def _pretty(settings: Any) -> str:
    return settings if isinstance(settings, str) else json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)


def _day(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return text.MISSING


def _heads(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay out the headline: three numbers per life, each with a meter."""
    share = text.unit(report)
    measure = report["measures"][0] if report["measures"] else {"share": True, "low": 0.0, "high": 1.0}
    rows = []
    for life in report["lives"]:
        head, methods = life["headline"], dict.fromkeys(event["method"] for event in life["events"] if event["method"])
        left = head["left"]
        if left["mean"] is None:
            note = "it was asked to forget nothing that was measured"
        elif life["oracle"]:
            note = "on the same sets, which it never saw"
        elif left["oracle"] is None:
            note = "no oracle was run to compare with"
        else:
            side = "above" if left["excess"] >= 0 else "below"
            if report["measures"][0]["better"] == "lower":
                side = "better than" if left["excess"] >= 0 else "worse than"
            note = f"{text.points(abs(left['excess']), share)} {side} the oracle’s {text.shown(left['oracle'], share)}"
        numbers_ = (
            ("kept", head["kept"], f"mean over {_count(head['kept']['subjects'], 'set')} it should know", None),
            ("left", left, note, None if left["oracle"] is None or left["mean"] is None else _percent(left["oracle"], measure)),
            ("lost", head["lost"], f"mean fall from the best score, {_count(head['lost']['subjects'], 'set')}", None),
        )
        rows.append(
            {
                "life": life["life"],
                "oracle": life["oracle"],
                "methods": list(methods),
                "seeds": len(life["seeds"]),
                "outside": head["outside"],
                "numbers": [
                    {
                        "key": key,
                        "rule": rule,
                        "note": note_,
                        "tick": tick,
                        "known": number["mean"] is not None,
                        "half": None if number["half"] is None else text.shown(number["half"], share).replace(" %", ""),
                        "shown": text.shown(number["mean"], share).replace(" %", ""),
                        "unit": ("points" if key == "lost" else "%") if share and number["mean"] is not None else "",
                        "place": _percent(number["mean"], measure),
                    }
                    for (key, number, note_, tick), (rule, _) in zip(numbers_, text.RULES)
                ],
            }
        )
    return rows


def _count(found: Sequence[str], word: str) -> str:
    return f"{len(found)} {word}{'' if len(found) == 1 else 's'}"


def _shade(subjects: Sequence[str], subject: str) -> str:
    number = list(subjects).index(subject)
    return f"c{number % SHADES} d{number // SHADES % 3}"


def _figures(report: dict[str, Any], measure: dict[str, Any]) -> list[dict[str, Any]]:
    """Draw, per life, a panel of what it learned and one per request, each for a desk and for a phone."""
    roles = {subject["subject"]: subject for subject in report["subjects"]}
    known = [subject["subject"] for subject in report["subjects"] if subject["role"] != "request"]
    times = draw.timelines([life["events"] for life in report["lives"]])
    letters: dict[str | None, int] = {}  # one margin per column of panels, so that the lives' axes align
    for life in report["lives"]:
        for curve in [*life["curves"], *life["series"]]:
            if (curve["probe"], curve["metric"]) == (measure["probe"], measure["metric"]):
                role = roles.get(curve["subject"], {"part": None, "request": None})
                length = len(role["part"] or curve["subject"]) + 1 + len(text.shown(_last(curve), measure["share"]))
                letters[role["request"]] = max(letters.get(role["request"], 0), length)
    figures = []
    for life, time in zip(report["lives"], times):
        found = [curve for curve in life["curves"] if (curve["probe"], curve["metric"]) == (measure["probe"], measure["metric"])]
        requests = dict.fromkeys(roles[curve["subject"]]["request"] for curve in found)
        panels: list[tuple[str, str | None, list[dict[str, Any]]]] = []
        together = [curve for curve in life["series"] if (curve["probe"], curve["metric"]) == (measure["probe"], measure["metric"])]
        for request in [name for name in requests if name is None] if together else requests:
            curves = [curve for curve in found if roles[curve["subject"]]["request"] == request]
            title = "What it learned" if request is None else f"Request {request}"
            panels.append((title, request, curves))
        if together:
            panels.append((f"{len(requests) - (None in requests)} requests together", None, together))
        columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
        drawn: list[dict[str, Any]] = []
        for title, request, curves in panels:
            lines, places = [], []
            for curve in curves if request is None else reversed(curves):  # the forget set is drawn last, on top
                subject, points = curve["subject"], curve["points"]
                name = subject if request is None else roles[subject]["part"]
                if curves is together:
                    shade = SERIES_SHADES[subject]
                else:
                    shade = _shade(known, subject) if request is None else f"{PART_SHADES[name]} {'dashed' if name == 'forget' else ''}"
                taught = next((event["end"] for event in life["events"] if event["name"] == subject and event["verb"] == "learn"), None)
                lines.append(
                    draw.Line(
                        name=name,
                        last=text.shown(_last(curve), measure["share"]),
                        shade=shade.strip(),
                        taught=taught,
                        points=[(point["x"], point["mean"], point["half"]) for point in points],
                        ends=[point["step"] == -1 for point in points],
                        values=[text.between(point, measure["share"]) for point in points],
                    )
                )
                places.append(
                    [0.0 if point["event"] == 0 else time.at(point["x"], _position(life["events"], point["event"])) for point in points]
                )
            words = f"{title}, {life['life']}: {measure['name']} over optimizer steps. " + "; ".join(
                f"{line.name} ends at {line.last}" for line in lines
            )
            part = FIRST if columns == 3 else 1.0 / columns  # the first of three is wider: its names are the longest
            share = part if not drawn or columns < 3 else (1 - part) / 2
            full = round((WIDE - 16 * (columns - 1)) * (share if len(panels) <= 4 else 1 / 3))
            drawn.append(
                {
                    "title": title,
                    "wide": draw.curves(lines, life["events"], time, measure, width=full, title=words, at=places, letters=letters[request]),
                    "narrow": draw.curves(
                        lines, life["events"], time, measure, width=NARROW, title=words, at=places, letters=letters[request]
                    ),
                }
            )
        if drawn:
            figures.append(
                {
                    "life": life["life"],
                    "oracle": life["oracle"],
                    "events": listed(life["events"]),
                    "columns": f"{columns}{'' if len(panels) <= 4 else 'e'}",
                    "panels": drawn,
                    "seeds": len(life["seeds"]),
                }
            )
    return figures


def listed(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events for a list, a long run of requests as one entry."""
    found: list[dict[str, Any]] = []
    for _, run in itertools.groupby(events, key=lambda event: (event["verb"] == "forget", event["complete"])):
        same = list(run)
        if same[0]["verb"] != "forget" or len(same) < MANY:
            found += same
            continue
        ends = {"event": f"{same[0]['event']} to {same[-1]['event']}", "name": f"{same[0]['name']} to {same[-1]['name']}"}
        found.append(same[0] | ends | {"steps": sum(event["steps"] for event in same)})
    return found


def _last(curve: dict[str, Any]) -> float | None:
    return next((point["mean"] for point in reversed(curve["points"]) if point["mean"] is not None), None)


def _position(events: Sequence[dict[str, Any]], number: int) -> int:
    return next((place for place, event in enumerate(events) if event["event"] == number), 0)


def _matrices(report: dict[str, Any], measure: dict[str, Any]) -> list[dict[str, Any]]:
    """Lay out the task-by-time matrix of each life; a cell's heat is how good the score is, 0 to 100."""
    low, high = (0.0, 1.0) if measure["share"] else (measure["low"], measure["high"])
    span = (high - low) or 1.0
    found = []
    for life in report["lives"]:
        rows = []
        for row in life["matrix"]:
            if (row["probe"], row["metric"]) != (measure["probe"], measure["metric"]):
                continue
            role = next(subject for subject in report["subjects"] if subject["subject"] == row["subject"])
            cells = []
            for cell in row["cells"]:
                mean = cell["mean"]
                good = None if mean is None else (mean - low) / span if measure["better"] == "higher" else (high - mean) / span
                cells.append(
                    cell
                    | {
                        "heat": None if good is None else round(100 * good),
                        "taught": row["taught"] == cell["event"] and role["part"] in (None, "forget"),
                    }
                )
            rows.append({"subject": row["subject"], "role": role, "cells": cells})
        if rows:
            found.append({"life": life["life"], "events": life["events"], "rows": rows})
    return found


def _bars(report: dict[str, Any], measure: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in report["requests"] if (row["probe"], row["metric"]) == (measure["probe"], measure["metric"])]
    return [
        {"request": name, "parts": sorted((row for row in rows if row["request"] == name), key=lambda row: PARTS.index(row["part"]))}
        for name in dict.fromkeys(row["request"] for row in rows)
    ]


def _moved(life: dict[str, Any]) -> dict[str, Any]:
    """Lay out where weights moved: one small table per event, roles down, layers across; heat on one scale over the life."""
    relatives = [row["relative"] for row in life["moved"] if row["relative"]]
    top = max(relatives, default=1.0)
    layers = sorted({row["layer"] for row in life["moved"] if row["layer"] is not None})
    roles = list(dict.fromkeys(row["role"] for row in life["moved"]))
    bare = any(row["layer"] is None for row in life["moved"])
    columns = [*([None] if bare else []), *layers]
    names = {event["event"]: event for event in life["events"]}
    events = []
    numbers = list(dict.fromkeys(row["event"] for row in life["moved"]))
    far = {number: max((row["relative"] or 0.0 for row in life["moved"] if row["event"] == number), default=0.0) for number in numbers}
    shown = sorted(sorted(numbers, key=lambda number: -far[number])[:MOVES])
    for number in shown:
        cells = {(row["role"], row["layer"]): row for row in life["moved"] if row["event"] == number}
        table = [
            (
                role,
                [
                    None if (cell := cells.get((role, layer))) is None else cell | {"heat": _heat(cell["relative"], top)}
                    for layer in columns
                ],
            )
            for role in roles
        ]
        events.append({"event": names.get(number, {"event": number, "name": "", "verb": ""}), "table": table})
    return {"life": life["life"], "columns": columns, "events": events, "top": top, "left_out": len(numbers) - len(shown)}


def _heat(value: float | None, top: float) -> int:
    return 0 if value is None or not math.isfinite(value) else round(100 * value / (top or 1))


def _work(life: dict[str, Any]) -> dict[str, Any]:
    """Lay out what was done in each event: method, settings, loss, time."""
    losses = {row["event"]: row["points"] for row in life["losses"]}
    rows = []
    for event in life["events"]:
        points = losses.get(event["event"], [])
        known = [point["mean"] for point in points if point["mean"] is not None]
        words = f"training loss of {event['name']}: from {text.shown(known[0], False)} to {text.shown(known[-1], False)}" if known else ""
        rows.append(
            event
            | {
                "first": known[0] if known else None,
                "last": known[-1] if known else None,
                "spark": draw.sparkline(points, words) if known else Markup(""),
            }
        )
    return {
        "life": life["life"],
        "oracle": life["oracle"],
        "runs": life["runs"],
        "rows": rows,
        "seconds": sum(run["seconds"] for run in life["runs"]),
    }
