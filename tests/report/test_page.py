"""The page stands alone, escapes every name, and holds whatever a ledger holds or lacks."""

import csv
import html.parser
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess

import pytest

from remanence.errors import Mistake
from remanence.ledger import END, TABLES, Ledger
from remanence.report import draw, page, text
from remanence.report.page import write_report
from remanence.report.tables import numbers

HOSTILE = "<script>alert(1)</script>\"'&|`*_"
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None)


class Page(html.parser.HTMLParser):
    """Collects tags and what they load."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.loads, self.words, self.open = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")]
        self.loads += re.findall(r"url\(([^)]*)\)", dict(attrs).get("style") or "")
        if tag not in ("meta", "link", "br", "img", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def written(ledger_path, tmp_path_factory):
    return write_report([ledger_path], tmp_path_factory.mktemp("page") / "my report.html")


def hostile(path, *, text_name=HOSTILE):
    with Ledger(path) as ledger:
        ledger.write(
            "runs",
            [
                {
                    "run": text_name,
                    "recipe": f"a: 1\n{text_name}",
                    "life": text_name,
                    "seed": 1,
                    "settings": {text_name: text_name},
                    "versions": {text_name: text_name},
                    "parameters": 3,
                    "at": 1e18,
                }
            ],
        )
        for number, verb in ((1, "learn"), (2, "forget"), (3, text_name)):
            ledger.write(
                "events",
                [
                    {
                        "run": text_name,
                        "event": number,
                        "name": f"{text_name}{number}",
                        "verb": verb,
                        "kind": text_name,
                        "method": text_name,
                        "settings": {text_name: text_name},
                        "rows": 1,
                        "steps": 2,
                        "weights_before": "",
                        "weights_after": "",
                        "seconds": 1.0,
                        "at": 0.0,
                    }
                ],
            )
        subjects = [f"{text_name}1", *(f"{text_name}2/{part}" for part in ("forget", "retain")), text_name]
        ledger.write(
            "scores",
            [
                {"run": text_name, "event": event, "step": END, "probe": probe, "subject": subject, "metric": metric, "value": 0.5}
                for event in range(4)
                for subject in subjects
                for probe, metric in ((text_name, text_name), ("recall", "exact"))
            ],
        )
        ledger.write(
            "steps", [{"run": text_name, "event": 1, "stage": 0, "step": step, "metric": "loss", "value": 1.0 - step} for step in range(2)]
        )
        ledger.write(
            "moved",
            [
                {
                    "run": text_name,
                    "event": 1,
                    "weight": text_name,
                    "role": text_name,
                    "layer": None,
                    "size": 3,
                    "changed": 1,
                    "relative": 0.1,
                }
            ],
        )
    return path


def test_page_loads_nothing_from_anywhere(written):
    source = written.read_text(encoding="utf-8")
    found = Page(source)
    assert found.open == []
    assert set(found.loads) == {f"my%20report-data/{table}.csv" for table in TABLES}
    assert "@import" not in source
    assert "url(" not in source
    assert not {tag for tag, _ in found.tags} & {"link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|WebSocket)\s*\(", source)
    assert re.findall(r"https?://[^\s\"']+", source) == ["http://www.w3.org/2000/svg"]  # a name in the script, never loaded


def test_every_figure_has_words_for_those_who_cannot_see_it(written):
    found = Page(written.read_text(encoding="utf-8"))
    drawings = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert drawings
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 20 for attributes in drawings)
    assert [tag for tag, _ in found.tags].count("h1") == 1


def test_hostile_names_are_words(tmp_path):
    path = write_report([hostile(tmp_path / "l.sqlite")], tmp_path / "page.html")
    source = path.read_text(encoding="utf-8")
    found = Page(source)
    assert found.open == []
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "<script>alert" not in source
    assert "<script>alert(1)</script>" in "".join(found.words)  # and they are readable as they are
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    words = write_report([tmp_path / "l.sqlite"], tmp_path / "page.md", "md").read_text(encoding="utf-8")
    assert "<script>" not in words
    rows = [line for line in words.splitlines() if line.startswith("|")]
    assert rows
    assert all(line.replace("\\|", "").endswith("|") for line in rows)


def test_numbers_on_the_page_are_the_numbers_in_the_json(written, ledger_path):
    report = json.loads(write_report([ledger_path], written.with_suffix(".json"), "json").read_text(encoding="utf-8"))
    words = " ".join(" ".join(Page(written.read_text(encoding="utf-8")).words).split())
    for life in report["lives"]:
        head = life["headline"]
        assert text.shown(head["kept"]["mean"], True).replace(" %", "") in words
        for row in life["matrix"]:
            if row["metric"] == "exact":
                cells = [text.shown(cell["mean"], True).replace(" %", "") for cell in row["cells"]]
                assert " ".join(cells) in words


def test_tables_beside_the_page_hold_every_row(written, ledger_path):
    base = sqlite3.connect(ledger_path)
    for table in TABLES:
        with open(written.parent / "my report-data" / f"{table}.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == base.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
    base.close()
    assert sorted(path.name for path in (written.parent / "my report-data").iterdir()) == sorted(f"{table}.csv" for table in TABLES)


def test_same_ledger_same_page(written, ledger_path, tmp_path):
    again = write_report([ledger_path], tmp_path / "my report.html")
    assert again.read_bytes() == written.read_bytes()


def clear(path, question):
    base = sqlite3.connect(path)
    with base:
        base.execute(question)
    base.close()


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM scores",
        "DELETE FROM steps",
        "DELETE FROM moved",
        "DELETE FROM events",
        "DELETE FROM events WHERE event > 1",
        "UPDATE scores SET value = NULL",
        "UPDATE steps SET value = NULL",
        "UPDATE moved SET relative = NULL",
        "DELETE FROM scores WHERE subject LIKE '%/%'",
        "DELETE FROM runs WHERE life = 'never-saw-it'",
        "DELETE FROM scores WHERE metric = 'exact'",
        "DELETE FROM scores WHERE step <> -1",
        "DELETE FROM scores WHERE step = -1",
        "UPDATE scores SET value = 9e999",
        "UPDATE scores SET value = 50 WHERE metric = 'exact'",
        "DELETE FROM runs WHERE life <> 'never-saw-it'",
        "UPDATE events SET steps = 0",
        "DELETE FROM events WHERE verb = 'forget'",
        "UPDATE runs SET settings = 'broken', versions = '[]'",
        "UPDATE scores SET value = -value",
        "DELETE FROM events WHERE event = 6 AND run LIKE '%-2'",
    ],
)
def test_page_holds_whatever_is_missing(small_ledger_path, tmp_path, loss):
    path = tmp_path / "l.sqlite"
    shutil.copy(small_ledger_path, path)
    clear(path, loss)
    report = numbers([path])
    source = page.as_html(report, "data")
    found = Page(source)
    assert found.open == []
    assert not re.search(r"[\s\">,](nan|inf|None|undefined)[\s<,%\"]", source.replace("none", ""), re.IGNORECASE)
    json.loads(text.as_json(report), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert text.as_markdown(report, "data").startswith("# What was remembered")


def test_mistakes_are_refused_before_anything_is_written(ledger_path, tmp_path):
    with pytest.raises(Mistake, match="did you mean 'html'"):
        write_report([ledger_path], tmp_path / "out", "htm")
    with pytest.raises(Mistake, match="is a folder"):
        write_report([ledger_path], tmp_path)
    with pytest.raises(Mistake, match="is the ledger itself"):
        write_report([ledger_path], ledger_path)
    (tmp_path / "out-data").mkdir()
    (tmp_path / "out-data" / "mine.txt").write_text("precious")
    with pytest.raises(Mistake, match="not a report's"):
        write_report([ledger_path], tmp_path / "out.html")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["out-data", "out-data/mine.txt"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_heat_has_readable_numbers(theme):
    css = (page.Path(page.__file__).parent / "page.css.jinja").read_text()
    block = css[css.index("prefers-color-scheme: dark") :] if theme == "dark" else css
    colour = {name: re.search(rf"--{name}: (#[0-9a-f]{{6}})", block).group(1) for name in ("cold", "hot", "cold-ink", "hot-ink")}

    def light(rgb):  # WCAG 2.2, relative luminance
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    rgb = {name: [int(value[at : at + 2], 16) for at in (1, 3, 5)] for name, value in colour.items()}
    for heat in range(101):
        ground = light([a + (b - a) * heat / 100 for a, b in zip(rgb["cold"], rgb["hot"])])
        ink = light(rgb["hot-ink" if heat >= page.FLIP else "cold-ink"])
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.5


def test_labels_stand_apart_in_order():
    places = draw.spaced([50.0, 51.0, 10.0, 50.5], 14, 0, 60)
    assert places[2] < places[0] < places[3] < places[1]
    ordered = sorted(places)
    assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert 0 <= ordered[0] <= ordered[-1] <= 60
    assert draw.spaced([], 14, 0, 60) == []


def test_short_events_keep_room_and_lives_share_an_axis():
    long = [{"start": 0, "end": 1000}, {"start": 1000, "end": 1000}]
    short = [{"start": 0, "end": 500}]
    one, two = draw.timelines([long, short])
    assert one.places[-1] == pytest.approx(1.0)
    assert one.places[2] - one.places[1] > 0.05  # an event without a step is seen
    assert two.at(250, 0) == pytest.approx(one.at(250, 0))
    assert one.at(1000, 1) == one.places[-1]


@pytest.mark.parametrize(
    ("value", "share", "words"),
    [
        (None, True, "–"),
        (0.845, True, "84 %"),
        (0.994, True, "99.4 %"),
        (1.0, True, "100 %"),
        (0.004, True, "0.4 %"),
        (0.0, True, "0 %"),
        (-0.001, True, "-0.1 %"),
        (2.999, False, "3.00"),
        (123.4, False, "123"),
        (45678.0, False, "45,678"),
    ],
)
def test_numbers_read_as_a_reader_wants(value, share, words):
    assert text.shown(value, share) == words


def test_verdict_names_who_was_best(ledger_path):
    report = numbers([ledger_path])
    words = text.verdict(report)
    kept = {life["life"]: life["headline"]["kept"]["mean"] for life in report["lives"]}
    assert kept["replay"] > kept["plain"]
    assert words.startswith(f"replay kept most ({text.shown(kept['replay'], True)})")
    assert "plain came closest" in words
    assert "never-saw-it" not in words


def chromium(tmp_path, *arguments):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=os.environ | {"HOME": str(tmp_path)}).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to look at the page")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("names", ["plain", "hostile"])
def test_page_fits_its_window(written, tmp_path, width, names):
    source = written.read_text(encoding="utf-8")
    if names == "hostile":
        long = HOSTILE + "a" * 80
        source = write_report([hostile(tmp_path / "l.sqlite", text_name=long)], tmp_path / "hostile.html").read_text(encoding="utf-8")
    # a frame has the exact width that a headless window, which has a least width, may not have
    probe = """<script>addEventListener("load", () => { document.querySelectorAll("details").forEach((one) => one.open = true);
    const wide = [...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll, pre, svg, #tip")
      && one.getBoundingClientRect().right > innerWidth + 1);
    const cut = [...document.querySelectorAll("svg .name")].filter((one) => one.getBoundingClientRect().width
      && one.getBoundingClientRect().right > one.closest("svg").getBoundingClientRect().right + 1);
    parent.postMessage([innerWidth, document.documentElement.scrollWidth, wide.map((one) => one.outerHTML.slice(0, 80)).join(" "),
      cut.map((one) => one.textContent).join(" ")].join("|"), "*"); });</script>"""
    (tmp_path / "inner.html").write_text(source.replace("</body>", probe + "</body>"), encoding="utf-8")
    outer = f"""<!DOCTYPE html><pre id=said></pre><script>addEventListener("message", (e) => said.textContent = e.data);</script>
    <iframe src="inner.html" style="width:{width}px;height:800px;border:0"></iframe>"""
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    dom = chromium(tmp_path, "--virtual-time-budget=8000", "--window-size=1400,900", "--dump-dom", f"file://{tmp_path / 'outer.html'}")
    inner, scroll, wide, cut = re.search(r'id="said">([^<]*\|[^|]*)</pre>', dom).group(1).split("|")[:4]
    assert int(inner) == width
    assert int(scroll) <= width, wide
    assert wide == ""
    assert cut == ""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH to look at the page")
@pytest.mark.parametrize("width", [500, 1280])
def test_page_is_drawn_light_and_dark(written, tmp_path, width):
    import numpy as np
    from matplotlib.image import imread

    grounds = {}
    for theme, number in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{theme}.png"
        chromium(
            tmp_path,
            f"--blink-settings=preferredColorScheme={number}",
            f"--window-size={width},1200",
            f"--screenshot={shot}",
            written.as_uri(),
        )
        pixels = imread(shot)[..., :3]
        assert pixels.std() > 0.05  # something is drawn
        grounds[theme] = float(np.median(pixels))
    assert grounds["light"] > 0.9
    assert grounds["dark"] < 0.2


def test_receipts_stand_on_the_page_and_in_markdown_with_verdict_reasons_and_findings(ledger_path, tmp_path):
    path = tmp_path / "ledger.sqlite"
    shutil.copy(ledger_path, path)
    with Ledger(path) as ledger:
        served = ledger.read("SELECT run, event, name FROM events WHERE verb = 'forget' LIMIT 1")[0]
        audit = {
            "verdict": "hidden",
            "reasons": ["relearning brings back 80 % in 5 steps <the oracle: 20 %>"],
            "findings": [
                {
                    "name": "min_k_auc",
                    "group": "membership",
                    "value": 0.7,
                    "low": 0.6,
                    "high": 0.8,
                    "better": "reference",
                    "reference": 0.5,
                    "rows": 40,
                }
            ],
        }
        place = {"run": served["run"], "event": served["event"]}
        ledger.write("notes", [{**place, "name": "asked", "content": {"kind": "qa", "forget": {"rows": 7, "sha256": "ab" * 32}}}])
        ledger.write("notes", [{**place, "name": "audit", "content": audit}])
    page = write_report([path], tmp_path / "report.html").read_text()
    assert "ab" * 32 in page
    assert "<strong>hidden</strong>" in page
    assert "min k auc" in page
    assert "&lt;the oracle: 20 %&gt;" in page
    words = write_report([path], tmp_path / "report.md", format="md").read_text()
    assert "## Receipts" in words
    assert "relearning brings back 80 %" in words
