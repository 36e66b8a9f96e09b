"""One picture for a README: what two lives kept, side by side, with every event marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remanence.errors import Mistake
from remanence.report import draw, text
from remanence.report.series import NAMES
from remanence.report.tables import numbers
from remanence.storage import whole_file

INK, SOFT, RULE, ERASE = "#16191d", "#5b636e", "#d9dde3", "#d55e00"
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#16191d")  # Okabe and Ito, without the colour of the forget sets
SERIES = ("#8c3d00", ERASE, "#f0a36b")  # forget sets that were asked for before, are asked for now, are not yet
SIDES = 2


def write_picture(ledger: str | Path | Sequence[str | Path], output: str | Path, *, lives: Sequence[str] | None = None) -> Path:
    """Draw the retention curves of two lives side by side, 1600 x 900 px, and return the path.

    Solid lines are what was learned and what was known at the start, dashed ones what was to be forgotten; bands are 95 % intervals
    over seeds.

    Args:
        ledger: a ledger file, or several.
        output: a .png or .svg file.
        lives: which one or two lives, by name; `None` takes the first two that are no oracle.

    Raises:
        Mistake: another file name extension, an unknown life, a ledger that cannot be read or holds no scores, or a disk that cannot
            be written.
    """
    output = Path(output)
    kind = output.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise Mistake(output, f"cannot draw a '{output.suffix}' file", "name a .png or .svg file")
    report = numbers([ledger] if isinstance(ledger, str | Path) else list(ledger))
    if not report["measures"]:
        raise Mistake(str(ledger), "no score is recorded here", "run with at least one probe")
    chosen = _chosen(report, lives)

    import matplotlib

    with matplotlib.rc_context(
        {"svg.hashsalt": "remanence", "font.size": 12, "axes.edgecolor": RULE, "text.color": INK, "svg.fonttype": "none"}
    ):
        figure = _figure(report, chosen)
        with whole_file(output) as temporary:
            figure.savefig(
                temporary, format=kind, dpi=100, facecolor="white", metadata={"Date": None} if kind == "svg" else {"Software": None}
            )
    return output


def _chosen(report: dict[str, Any], lives: Sequence[str] | None) -> list[dict[str, Any]]:
    by_name = {life["life"]: life for life in report["lives"]}
    if lives is None:
        return sorted(report["lives"], key=lambda life: life["oracle"])[:SIDES]
    unknown = next((name for name in lives if name not in by_name), None)
    if unknown is not None or not 1 <= len(lives) <= SIDES:
        problem = f"there is no life '{unknown}'" if unknown is not None else f"{len(lives)} lives are named"
        raise Mistake("picture", problem, f"name one or two of {', '.join(by_name)}")
    return [by_name[name] for name in lives]


def _figure(report: dict[str, Any], lives: list[dict[str, Any]]) -> Any:
    """Return the figure, drawn without touching pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = report["measures"][0]
    share = measure["share"]
    roles = {subject["subject"]: subject for subject in report["subjects"]}
    known = [name for name, role in roles.items() if role["role"] != "request"]
    figure = Figure(figsize=(16, 9))
    FigureCanvasAgg(figure)
    figure.text(0.035, 0.945, "What was remembered, and what remains", fontsize=25, fontweight="bold", va="center")
    direction = " (lower is better)" if measure["better"] == "lower" else ""
    how = f"{measure['name']}{direction} over optimizer steps; dashed: what it was asked to forget, in the orange columns"
    figure.text(0.035, 0.9, how, fontsize=14, color=SOFT, va="center")
    width, gap, label = (0.93, 0.0, 0.14) if len(lives) == 1 else (0.455, 0.025, 0.125)
    marks = draw.ticks(measure["low"], measure["high"], share)
    for side, (life, time) in enumerate(zip(lives, draw.timelines([life["events"] for life in lives]))):
        left = 0.035 + side * (width + gap)
        axes = figure.add_axes((left + 0.02, 0.075, width - label - 0.02, 0.655))
        methods = ", ".join(dict.fromkeys(event["method"] for event in life["events"] if event["method"]))
        figure.text(left, 0.838, _plain(life["life"]), fontsize=19, fontweight="bold")
        figure.text(
            left, 0.806, _plain(methods + (f"; {len(life['seeds'])} seeds" if len(life["seeds"]) > 1 else "")), fontsize=13, color=SOFT
        )
        axes.set(xlim=(0, 1), ylim=(marks[0], marks[-1]), yticks=marks, yticklabels=[draw.tick_text(mark, share) for mark in marks])
        axes.set_xticks(*_thinned(time))
        axes.tick_params(length=0, colors=SOFT, labelsize=12)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        for number, event in enumerate(life["events"]):
            low, high = time.places[number], time.places[number + 1]
            forget = event["verb"] == "forget"
            axes.axvspan(low, high, color="#fbe9df" if forget else ("#f6f8fa", "#eef1f5")[number % 2], linewidth=0, zorder=0)
            words = draw.cut(event["name"], max(int((high - low) * 1600 * (width - label - 0.02) / 7.6), 1)) if high - low > 0.13 else ""
            head = f"{event['event']} {'forget' if forget and words else event['verb'] if words else ''}".strip()
            if high - low < 0.04 and number % 10 != 9:  # of a long row of events every tenth is named
                continue
            shade = ERASE if forget else SOFT
            heading: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "color": shade, "fontsize": 9.5}
            axes.text((low + high) / 2, 1.045, head, **heading)
            axes.text((low + high) / 2, 1.015, _plain(words), **heading)
        _lines(axes, life, time, measure, roles, known)
    return figure


def _lines(axes: Any, life: dict[str, Any], time: draw.Timeline, measure: dict[str, Any], roles: dict[str, Any], known: list[str]) -> None:
    """Draw a life's curves and write each one's name at its end, no two on top of each other."""
    events = [event["event"] for event in life["events"]]
    labels = []
    many = [curve for curve in life["series"] if (curve["probe"], curve["metric"]) == (measure["probe"], measure["metric"])]
    for curve in [*life["curves"], *many]:
        role = roles.get(curve["subject"], {"part": "forget", "request": curve["subject"]})
        if (curve["probe"], curve["metric"]) != (measure["probe"], measure["metric"]) or role["part"] not in (None, "forget"):
            continue
        found = [point for point in curve["points"] if point["mean"] is not None]
        forget = role["part"] == "forget"
        if not found or (many and forget and curve not in many):  # many forget sets are drawn together, or no one sees any
            continue
        number = 0 if forget else known.index(curve["subject"])
        shade = (SERIES[NAMES.index(curve["subject"])] if many else ERASE) if forget else PALETTE[number % len(PALETTE)]
        x = [0.0 if point["event"] == 0 else time.at(point["x"], events.index(point["event"])) for point in found]
        y = [point["mean"] for point in found]
        half = [point["half"] or 0.0 for point in found]
        axes.fill_between(x, [a - b for a, b in zip(y, half)], [a + b for a, b in zip(y, half)], color=shade, alpha=0.14, linewidth=0)
        axes.plot(
            x, y, color=shade, linewidth=2.6, linestyle=(0, (4, 1.6)) if forget else "-", solid_capstyle="round", zorder=4 if forget else 3
        )
        name = role["request"] if forget else curve["subject"]
        labels.append((y[-1], x[-1], shade, f"{draw.cut(name, 16)} {text.shown(y[-1], measure['share'])}"))
    low, high = axes.get_ylim()
    places = draw.spaced([high - label[0] for label in labels], (high - low) * 0.036, 0.0, high - low)
    for (y_end, x_end, shade, words), place in zip(labels, places):
        axes.plot([x_end, 1.01, 1.03], [y_end, y_end, high - place], color=shade, linewidth=1.3, clip_on=False)
        axes.text(1.036, high - place, _plain(words), fontsize=11, va="center", color=INK)


def _thinned(time: draw.Timeline, gap: float = 0.06) -> tuple[list[float], list[str]]:
    """Return places and words of the boundaries that have room for a number."""
    places: list[float] = []
    words: list[str] = []
    for step, place in zip(time.steps, time.places):
        if not places or place - places[-1] >= gap:
            places.append(place)
            words.append(f"{step:g}")
    return places, words


def _plain(words: str) -> str:
    """Keep a user's dollar signs from being read as mathematics."""
    return words.replace("$", r"\$")
