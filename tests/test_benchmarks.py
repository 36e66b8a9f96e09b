"""The benchmarks run, at toy sizes; no figure is asserted but that it is one."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks.timing import figure  # noqa: E402


@pytest.fixture
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_same_threads")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("loop", 4),
        ("fisher", 3),
        ("influence", 10),
        ("request_cost", 9),
        ("titans_memory", 8),
        ("memory_cache", 9),
        ("sparsey", 3),
        ("recall_speed", 5),
        ("recall_million", 3),
    ],
)
def test_a_benchmark_prints_and_saves_its_figures(name: str, count: int, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "benchmarks.md").write_text(f"# Speed\n{command.BEGIN}\nold\n{command.END}\nafter\n")
    monkeypatch.setattr(command, "save", lambda records, save=command.save: save(records, tmp_path))
    command.main([name, "--tiny", "--save"])
    record = json.loads((tmp_path / "benchmarks.json").read_text())[name]
    assert len(record["figures"]) == count
    assert record["machine"]["threads"] == 1
    for one in record["figures"]:
        assert one["low"] <= one["ratio"] <= one["high"]
        assert all(math.isfinite(one[key]) and one[key] > 0 for key in ("ratio", "wall_ratio", "ours", "peer"))
        assert one["name"] in capsys.readouterr().out or one["name"] in (tmp_path / "benchmarks.md").read_text()
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("# Speed\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page


def test_saving_one_benchmark_keeps_the_others(tmp_path) -> None:
    (tmp_path / "benchmarks.md").write_text(f"{command.BEGIN}{command.END}")
    about = {"processor": "P", "cores": 2, "load": 0.0, "threads": 1, "torch": "2"}
    for name in ("replay", "loop"):
        command.save({name: {"machine": about, "date": "2026-01-01", "figures": []}}, tmp_path)
    assert list(json.loads((tmp_path / "benchmarks.json").read_text())) == ["loop", "replay"]


def test_ratios_are_paired_by_round() -> None:
    ours, peer = [(1.0, 2.0), (2.0, 2.0), (4.0, 4.0)], [(2.0, 2.0), (4.0, 6.0), (2.0, 2.0)]
    slower, faster = figure("x", ours, peer, "overhead", 1.0), figure("x", ours, peer, "speedup", 3.0)
    assert (slower.ratio, slower.wall_ratio, slower.met) == (0.5, 1.0, True)  # 1/2, 2/4, 4/2 and 2/2, 2/6, 4/2
    assert (faster.ratio, faster.wall_ratio, faster.met) == (2.0, 1.0, False)


def test_an_unknown_benchmark_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["lop"])
    assert error.value.code == 2
    assert "no benchmark 'lop'" in capsys.readouterr().err


@pytest.mark.usefixtures("_same_threads")
def test_a_benchmark_whose_peer_is_missing_says_what_to_do_and_is_left_out_of_all(monkeypatch, capsys) -> None:
    monkeypatch.delenv("OPEN_UNLEARNING", raising=False)
    says = "OPEN_UNLEARNING is not set; set it to a checkout of https://github.com/locuslab/open-unlearning"
    with pytest.raises(SystemExit) as error:
        command.main(["npo_openunlearning", "--tiny"])
    assert error.value.code == 2
    assert says in capsys.readouterr().err
    monkeypatch.setattr(command, "NAMES", ("npo_openunlearning",))
    command.main(["--tiny"])
    assert f"left out: npo_openunlearning: {says}" in capsys.readouterr().out
