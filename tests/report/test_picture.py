"""The picture for a README is drawn from a ledger alone, at its size, without touching pyplot."""

import subprocess
import sys

import pytest

from remanence.errors import Mistake
from remanence.report.picture import write_picture
from remanence.report.series import NAMES
from remanence.report.tables import numbers
from remanence.report.text import shown


def test_picture_has_its_size_and_is_not_blank(ledger_path, tmp_path):
    from matplotlib.image import imread

    pixels = imread(write_picture(ledger_path, tmp_path / "a.png"))
    assert pixels.shape[:2] == (900, 1600)
    assert pixels[..., :3].std() > 0.05
    for half in (pixels[:, :800, :3], pixels[:, 800:, :3]):  # both lives
        assert half.std() > 0.05


def test_same_ledger_same_picture(small_ledger_path, tmp_path):
    for name in ("png", "svg"):
        one, two = (write_picture(small_ledger_path, tmp_path / f"{copy}.{name}") for copy in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_forget_sets_are_dashed_and_named(ledger_path, tmp_path):
    source = write_picture(ledger_path, tmp_path / "a.svg", lives=["replay"]).read_text(encoding="utf-8")
    assert "stroke-dasharray" in source
    final = next(row for row in numbers([ledger_path])["requests"] if row["part"] == "forget")["lives"][1]["final"]
    assert f"friday-erasure {shown(final['mean'], True)}" in source
    assert ">plain<" not in source


def test_many_forget_sets_are_drawn_together(ledger_path, tmp_path, monkeypatch):
    report = numbers([ledger_path])
    life = next(life for life in report["lives"] if life["life"] == "replay")
    forget = next(curve for curve in life["curves"] if curve["subject"] == "friday-erasure/forget")
    monkeypatch.setattr("remanence.report.picture.numbers", lambda _: report)
    life["series"] = [{**forget, "subject": name} for name in NAMES]
    source = write_picture(ledger_path, tmp_path / "a.svg", lives=["replay"]).read_text(encoding="utf-8")
    assert all(f">{name} " in source for name in NAMES)
    assert "friday-erasure 0" not in source
    assert f"friday-erasure {shown(forget['points'][-1]['mean'], True)}" not in source


def test_mistakes_are_refused(ledger_path, tmp_path):
    with pytest.raises(Mistake, match=r"\.png or \.svg"):
        write_picture(ledger_path, tmp_path / "a.gif")
    with pytest.raises(Mistake, match="no life 'reply'"):
        write_picture(ledger_path, tmp_path / "a.png", lives=["reply"])
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_not_imported_before_it_is_needed():
    code = """import sys, remanence.report.picture, remanence.report.page
print(sorted({"matplotlib", "torch", "scipy", "jinja2"} & set(sys.modules)))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
