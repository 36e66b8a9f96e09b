"""What a memory did is drawn, coloured and tabulated from the same numbers."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from remanence.errors import Mistake
from remanence.report.watch import Watched, watched, write_watch

TOKENS = ["Who", " is", " <b>", "\n", "$x$"]


def seen() -> Watched:
    found = {name: torch.arange(10, dtype=torch.float32).reshape(1, 2, 5) * scale for name, scale in (("surprise", 1.0), ("write", 0.1))}
    return watched(TOKENS, {1: found}, "a $title$ & more")


def test_values_are_means_over_heads() -> None:
    assert seen().blocks[1]["surprise"].tolist() == [2.5, 3.5, 4.5, 5.5, 6.5]
    np.testing.assert_allclose(seen().blocks[1]["write"], [0.25, 0.35, 0.45, 0.55, 0.65], rtol=1e-6)


def test_tables_hold_every_token_and_number(tmp_path: Path) -> None:
    with write_watch(seen(), tmp_path / "w.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["token"] for row in rows] == TOKENS
    assert [float(row["surprise"]) for row in rows] == [2.5, 3.5, 4.5, 5.5, 6.5]
    tree = json.loads(write_watch(seen(), tmp_path / "w.json").read_text())
    assert tree["blocks"]["1"]["surprise"] == [2.5, 3.5, 4.5, 5.5, 6.5]


def test_page_colours_tokens_by_surprise_and_escapes_them(tmp_path: Path) -> None:
    page = write_watch(seen(), tmp_path / "w.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    shades = [float(part.split(")")[0]) for part in page.split("rgba(213,94,0,")[1:]]
    assert len(shades) == len(TOKENS)
    assert shades == sorted(shades)
    assert shades[-1] > shades[0] + 0.3
    assert not re.search(r"(src|href)=\"http|url\(http", page)  # nothing is fetched


def test_picture_is_the_same_for_the_same_numbers_and_not_blank(tmp_path: Path) -> None:
    from matplotlib.image import imread

    one, two = (write_watch(seen(), tmp_path / f"{name}.png") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert imread(one)[..., :3].std() > 0.05
    assert ">Who<" in write_watch(seen(), tmp_path / "c.svg").read_text(encoding="utf-8")


def test_mistakes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=r"cannot write a '\.gif' file"):
        write_watch(seen(), tmp_path / "w.gif")
    with pytest.raises(Mistake, match="in a folder that exists"):
        write_watch(seen(), tmp_path / "none" / "w.png")
    with pytest.raises(Mistake, match="no block of this model has a memory"):
        watched(TOKENS, {}, "title")
    with pytest.raises(Mistake, match="several texts"):
        watched(TOKENS, {0: {"surprise": torch.zeros(2, 1, 5)}}, "title")
    assert list(tmp_path.iterdir()) == []
