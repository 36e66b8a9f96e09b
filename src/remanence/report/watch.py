"""What a memory did at each token, to look at: curves of surprise, writing and forgetting, and the text itself coloured by how surprising each token was."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remanence.errors import Mistake
from remanence.storage import whole_file, write_text

FILES = (".png", ".svg", ".html", ".csv", ".json")
INK, SOFT, RULE = "#16191d", "#5b636e", "#d9dde3"
ALL = -1  # the number of no block: what all of them did
SHADES = {"surprise": "#d55e00", "write": "#0072b2", "forget": "#009e73", "momentum": "#cc79a7"}
SHADES |= {"surprisal": "#d55e00", "held": "#0072b2", "window": "#009e73"}
WORDS = {
    "surprise": "surprise: norm of the gradient of the memory's loss",
    "write": "write: step size",
    "forget": "forget: share of the memory that decays",
    "momentum": "momentum: share of the last surprise that still writes",
    "surprisal": "surprisal: -log p of the token, nats",
    "held": "held: 1 if its states are held behind the text",
    "window": "window: 1 if attention still sees it behind the text",
}
LABELLED = 72  # tokens that can be named below the axis


@dataclass(frozen=True)
class Watched:
    """What was read and what the memories did.

    Args:
        tokens: the T tokens as text.
        blocks: number of the block (`ALL`: of none) -> name (surprise, write, forget, ...) -> one value per token, the mean over heads, (T,).
        title: above the picture.
    """

    tokens: list[str]
    blocks: dict[int, dict[str, NDArray[np.float64]]]
    title: str

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per block and token."""
        return [
            {"block": block, "position": place, "token": token, **{name: float(values[place]) for name, values in found.items()}}
            for block, found in self.blocks.items()
            for place, token in enumerate(self.tokens)
        ]


def watched(tokens: Sequence[str], found: Mapping[int, Mapping[str, Any]], title: str) -> Watched:
    """Gather what `model.watch` returned for one text, (1, H, T) per block and name, as means over heads.

    Raises:
        Mistake: it is of several texts, or there is no memory in the model.
    """
    if not found:
        raise Mistake("watch", "no block of this model has a memory", "name a model with one (variant lmm, mac, mag, mal or hybrid)")
    blocks: dict[int, dict[str, NDArray[np.float64]]] = {}
    for block, values in found.items():
        if any(len(value) != 1 for value in values.values()):
            raise Mistake("watch", "there are several texts", "watch one at a time")
        blocks[block] = {name: value.double().mean(1)[0].cpu().numpy() for name, value in values.items()}
    return Watched(list(tokens), blocks, title)


def check_output(output: Path) -> None:
    """Refuse a file that `write_watch` could not write, before the work.

    Raises:
        Mistake: an unknown ending, or a folder that is not there.
    """
    if output.suffix.lower() not in FILES:
        raise Mistake(output, f"cannot write a '{output.suffix}' file", f"name one that ends in {', '.join(FILES)}")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise Mistake(output, "cannot be written there", "name a file in a folder that exists")


def write_watch(seen: Watched, output: str | Path) -> Path:
    """Write curves (.png, .svg), a page with the coloured text (.html), or the numbers (.csv, .json); return the path.

    Raises:
        Mistake: another ending, or a disk that cannot be written.
    """
    output = Path(output)
    check_output(output)
    kind = output.suffix.lower()
    if kind in (".png", ".svg"):
        with whole_file(output) as temporary:
            temporary.write_bytes(picture(seen, kind[1:]))
    elif kind == ".csv":
        text = io.StringIO(newline="")
        rows = seen.rows()
        table = csv.DictWriter(text, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
        write_text(output, text.getvalue())
    elif kind == ".json":
        blocks = {str(block): {name: values.tolist() for name, values in found.items()} for block, found in seen.blocks.items()}
        write_text(output, json.dumps({"title": seen.title, "tokens": seen.tokens, "blocks": blocks}, indent=1, ensure_ascii=False) + "\n")
    else:
        write_text(output, page(seen))
    return output


def picture(seen: Watched, kind: str) -> bytes:
    """Return a picture: one panel per block and quantity over the tokens, which are named where there are few."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(next(iter(seen.blocks.values())))
    count = len(seen.tokens)
    with matplotlib.rc_context(
        {"svg.hashsalt": "remanence", "font.size": 10, "text.color": INK, "axes.edgecolor": RULE, "svg.fonttype": "none"}
    ):
        figure = Figure(
            figsize=(14, 0.9 + 1.35 * len(names) * len(seen.blocks) + (0.9 if count <= LABELLED else 0.4)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        figure.suptitle(_plain(seen.title), fontsize=14, fontweight="bold", x=0.01, ha="left")
        panels = figure.subplots(len(names) * len(seen.blocks), 1, sharex=True, squeeze=False)[:, 0]
        for number, axes in enumerate(panels):
            block, name = list(seen.blocks)[number // len(names)], names[number % len(names)]
            values, shade = seen.blocks[block][name], SHADES.get(name, INK)
            axes.fill_between(range(count), values, step="mid", color=shade, alpha=0.25, linewidth=0)
            axes.step(range(count), values, where="mid", color=shade, linewidth=1.2)
            axes.set(xlim=(-0.5, count - 0.5), ylim=(0, max(float(np.nanmax(values)) * 1.08, 1e-9)))
            if name == "surprise" and np.nanmin(values) > 0 and np.nanmax(values) > 20 * np.nanmedian(values):
                axes.set(yscale="log", ylim=(float(np.nanmin(values)) / 1.2, float(np.nanmax(values)) * 1.2))
            axes.set_title(f"{called(block)}, {WORDS.get(name, name)}", fontsize=10, color=SOFT, loc="left")
            axes.tick_params(length=0, colors=SOFT, labelsize=9)
            axes.spines[["top", "right"]].set_visible(False)
        if count <= LABELLED:
            panels[-1].set_xticks(range(count), [_plain(_visible(token)) for token in seen.tokens], rotation=90, fontsize=8)
        else:
            panels[-1].set_xlabel("token", color=SOFT)
        held = io.BytesIO()
        figure.savefig(held, format=kind, dpi=110, facecolor="white", metadata={"Date": None} if kind == "svg" else {"Software": None})
    return held.getvalue()


def page(seen: Watched) -> str:
    """Return an HTML page: per block the curves, and the text with every token coloured by its surprise (numbers in the tooltip)."""
    parts = []
    for block, found in seen.blocks.items():
        shade, held = found.get("surprise", next(iter(found.values()))), found.get("held")
        depth = (shade[None] < shade[:, None]).mean(
            1
        )  # share of tokens that surprised it less: a memory's first writes dwarf all later ones
        words = []
        for place, token in enumerate(seen.tokens):
            tip = html.escape(", ".join(f"{name} {values[place]:.3g}" for name, values in found.items()), quote=True)
            shown = html.escape(token).replace("\n", "↵<br>")
            mark = ";border-bottom:3px solid #0072b2" if held is not None and held[place] else ""
            words.append(f'<span title="{tip}" style="background:rgba(213,94,0,{0.75 * depth[place] ** 2:.3f}){mark}">{shown}</span>')
        parts.append(f"<h2>{called(block).capitalize()}</h2>\n<p class=text>{''.join(words)}</p>")
    curves = picture(seen, "svg").decode().partition("<svg")
    underlined = " Underlined tokens are held behind the text." if any("held" in found for found in seen.blocks.values()) else ""
    style = (
        f"body{{font:16px/1.6 system-ui,sans-serif;color:{INK};max-width:1100px;margin:2rem auto;padding:0 1rem}}svg{{width:100%;height:auto}}"
        ".text{white-space:pre-wrap;font-family:ui-monospace,monospace;line-height:1.9}span{border-radius:2px}h2{margin-top:2rem}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(seen.title)}</title>'
        f"<style>{style}</style>\n<h1>{html.escape(seen.title)}</h1>\n<p>The deeper the colour, the more a token surprised the memory, compared with the others; "
        f"hold the pointer over one for its numbers.{underlined}</p>\n{''.join(parts)}\n<h2>Over the text</h2>\n<svg{curves[2]}\n</html>\n"
    )


def called(block: int) -> str:
    """Return a block's name."""
    return "all blocks" if block == ALL else f"block {block}"


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→").replace(" ", "·") or "∅"


def _plain(words: str) -> str:
    """Keep dollar signs from being read as mathematics."""
    return words.replace("$", r"\$")
