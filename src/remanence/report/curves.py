"""Small panels of curves over a growing size, with bands, one line of a colour and a dash per name: what a benchmark over sizes is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remanence.errors import Mistake
from remanence.report.picture import INK, PALETTE, RULE, SOFT
from remanence.storage import whole_file

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
ACROSS = 4


@dataclass(frozen=True)
class Curve:
    """Points of one name, x growing; `bands` are (low, high) per point."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    bands: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """One small picture; `share`: from 0 to 1, otherwise from 0 on."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    share: bool = False


def draw_curves(title: str, below: str, panels: Sequence[Panel], output: str | Path) -> Path:
    """Draw panels side by side, x on a logarithmic scale, with one legend, and return the path (.png or .svg).

    Raises:
        Mistake: another file name extension, nothing to draw, or a disk that cannot be written.
    """
    output = Path(output)
    kind = output.suffix.lower().lstrip(".")
    if kind not in ("png", "svg"):
        raise Mistake(output, f"cannot draw a '{output.suffix}' file", "name a .png or .svg file")
    if not panels:
        raise Mistake(output, "there is nothing to draw", "give results")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    looks = {name: (PALETTE[n % len(PALETTE)], DASHES[n // len(PALETTE) % len(DASHES)]) for n, name in enumerate(names)}
    down = -(-len(panels) // ACROSS)
    with matplotlib.rc_context(
        {"svg.hashsalt": "remanence", "font.size": 11, "axes.edgecolor": RULE, "text.color": INK, "svg.fonttype": "none"}
    ):
        figure = Figure(figsize=(16, 1.9 + 3.3 * down), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=20, fontweight="bold", x=0.005, ha="left")
        grid = figure.subplots(down, ACROSS, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        lines = {}
        for axes, panel in zip(grid.flat, panels):
            axes.set_title(f"{panel.title} ({panel.unit})", fontsize=12, loc="left", color=INK)
            for curve in panel.curves:
                color, dash = looks[curve.name]
                if curve.bands is not None:
                    axes.fill_between(
                        curve.x, [low for low, _ in curve.bands], [high for _, high in curve.bands], color=color, alpha=0.1, lw=0
                    )
                (lines[curve.name],) = axes.plot(curve.x, curve.y, color=color, linestyle=dash, marker="o", markersize=3.5, linewidth=2)
            axes.set_xscale("log")
            ticks = sorted({x for curve in panel.curves for x in curve.x})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
            axes.minorticks_off()
            axes.set_xlabel(below, fontsize=9.5, color=SOFT)
            axes.set_ylim(*((-0.02, 1.02) if panel.share else (0, None)))
            axes.tick_params(length=0, colors=SOFT, labelsize=9)
            axes.grid(axis="y", color=RULE)
            axes.spines[:].set_visible(False)
        named = [name for name in names if name in lines]
        figure.legend(
            [lines[name] for name in named],
            [name.replace("$", r"\$") for name in named],
            loc="outside lower center",
            ncols=6,
            frameon=False,
        )
        with whole_file(output) as temporary:
            figure.savefig(
                temporary, format=kind, dpi=100, facecolor="white", metadata={"Date": None} if kind == "svg" else {"Software": None}
            )
    return output
