"""An audit to look at: files of it, an HTML fragment with its tables and the relearning curve, and the curve alone as a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from remanence.errors import Mistake
from remanence.forget.audit.report import ARROWS, GROUPS, VERDICTS, AuditReport, shown
from remanence.forget.audit.settings import AuditSettings
from remanence.storage import whole_file, write_text

INK, SOFT, RULE = "#16191d", "#5b636e", "#d9dde3"
SHADES = {"the audited model": "#d55e00", "the oracle": "#009e73"}
OTHER = "#0072b2"
STYLES: dict[str, Any] = {"relearning/shown": "-", "relearning/watched": (0, (4, 1.6))}


FILES = (".json", ".md", ".html", ".png", ".svg")


def check_output(output: Path, settings: AuditSettings) -> None:
    """Refuse a file that `write_report` could not write, before the work.

    Raises:
        Mistake: an unknown ending, a folder that is not there, or a curve that will not be.
    """
    kind = output.suffix.lower()
    if kind not in FILES:
        raise Mistake(output, f"cannot write a '{output.suffix}' file", f"name one that ends in {', '.join(FILES)}")
    if kind in (".png", ".svg") and "relearning" not in settings.parts:
        raise Mistake(output, "there will be no curve to draw", "leave relearning among the parts, or name another file")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise Mistake(output, "cannot be written there", "name a file in a folder that exists")


def write_report(report: AuditReport, output: str | Path) -> Path:
    """Write a report to a .json, .md or .html file, or its relearning curve to a .png or .svg file; return the path.

    Raises:
        Mistake: another ending, no curve, or a disk that cannot be written.
    """
    output = Path(output)
    kind = output.suffix.lower()
    if kind not in FILES:
        raise Mistake(output, f"cannot write a '{output.suffix}' file", f"name one that ends in {', '.join(FILES)}")
    if kind in (".png", ".svg"):
        if not report.curves:
            raise Mistake("audit", "no relearning attack was done", "leave relearning among the parts")
        with whole_file(output) as temporary:
            _save(report, temporary, kind[1:])
        return output
    words = {".json": lambda: json.dumps(report.as_dict(), indent=1) + "\n", ".md": report.markdown, ".html": report.html}[kind]()
    write_text(output, words)
    return output


def fragment(report: AuditReport) -> str:
    """Return the report as a self-contained HTML fragment; every word of the user's is escaped."""
    sets = ", ".join(f"{count} {name}" for name, count in report.rows.items())
    also = f" Also: {', '.join(report.also)}." if report.also else ""
    out = [
        '<section class="audit">',
        f"<h2>Audit of '{escape(report.request)}': {escape(report.verdict)}</h2>",
        f"<p>{escape(VERDICTS[report.verdict] + also)}</p>",
        "<ul>" + "".join(f"<li>{escape(reason)}</li>" for reason in report.reasons) + "</ul>",
        f"<p>Rows: {escape(sets)}. Intervals: {report.level:.0%}, over rows. Seed {report.seed}.</p>",
    ]
    if report.curves:
        out.append(f"<figure>{_svg(report)}<figcaption>Relearning: mean probability of the forgotten rows</figcaption></figure>")
    head = "".join(f"<th>{word}</th>" for word in ("measurement", "value", "interval", "reference", "original", "rows", "direction"))
    for group, title in GROUPS.items():
        chosen = [item for item in report.findings if item.group == group]
        if not chosen:
            continue
        out.append(f"<h3>{title}</h3><table><thead><tr>{head}</tr></thead><tbody>")
        for item in chosen:
            held = f"{shown(item.reference)} ({item.against})" if item.reference is not None else "–"
            span = f"{shown(item.low)} to {shown(item.high)}"
            cells = (item.name, shown(item.value), span, held, shown(item.original), item.rows, ARROWS[item.better])
            out.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        out.append("</tbody></table>")
    if report.skipped:
        items = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report.skipped.items())
        out.append(f"<h3>Not done</h3><ul>{items}</ul>")
    return "\n".join([*out, "</section>"]) + "\n"


def _svg(report: AuditReport) -> Markup:
    file = io.StringIO()
    _save(report, file, "svg")
    return Markup(file.getvalue()[file.getvalue().index("<svg") :])


def _save(report: AuditReport, output: Any, kind: str) -> None:
    import matplotlib

    quiet: Any = {"svg.hashsalt": "remanence", "font.size": 11, "axes.edgecolor": RULE, "text.color": INK, "svg.fonttype": "none"}
    with matplotlib.rc_context(quiet):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        _figure(report).savefig(output, format=kind, dpi=120, facecolor="white", metadata=metadata)


def _figure(report: AuditReport) -> Any:
    """Return the figure, drawn without touching pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in report.curves:
        side = "rows it trains on" if curve.name.endswith("shown") else "rows it never sees"
        label = f"{curve.who}: {side}".replace("$", r"\$")
        axes.plot(curve.steps, curve.values, color=SHADES.get(curve.who, OTHER), linestyle=STYLES[curve.name], linewidth=2, label=label)
    axes.set(ylim=(0, 1), xlabel="optimizer steps of the attack", ylabel="mean probability of the answers")
    axes.set_xlim(0, max(curve.steps[-1] for curve in report.curves) or 1)
    axes.grid(axis="y", color=RULE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure
