"""Every number of a report equals a slow recomputation from the ledger's rows."""

import json
import math
import sqlite3
import statistics

import numpy as np
import pytest
from scipy import stats

from remanence.errors import Mistake
from remanence.ledger import END, Ledger
from remanence.report.lives import Life, Series, group, read_runs
from remanence.report.series import series_curves
from remanence.report.tables import lower_is_better, numbers
from remanence.report.text import as_json


@pytest.fixture(scope="module")
def report(ledger_path):
    return json.loads(as_json(numbers([ledger_path])))  # what a reader of the JSON gets


@pytest.fixture(scope="module")
def base(ledger_path):
    connection = sqlite3.connect(ledger_path)
    yield connection
    connection.close()


def life_of(report, name):
    return next(life for life in report["lives"] if life["life"] == name)


def per_seed(base, life, subject, event, step=END, probe="recall", metric="exact"):
    question = """SELECT value FROM scores JOIN runs USING (run)
                  WHERE life = ? AND subject = ? AND event = ? AND step = ? AND probe = ? AND metric = ? ORDER BY seed"""
    return [value for (value,) in base.execute(question, (life, subject, event, step, probe, metric))]


def half_width(values):
    return stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def test_every_point_of_every_curve_is_the_mean_of_its_rows(report, base):
    seen = 0
    for life in report["lives"]:
        starts = {event["event"]: event["start"] for event in life["events"]} | {0: 0}
        ends = {event["event"]: event["end"] for event in life["events"]} | {0: 0}
        for curve in life["curves"]:
            if curve["metric"] != "exact":
                continue
            for point in curve["points"]:
                values = per_seed(base, life["life"], curve["subject"], point["event"], point["step"])
                assert point["seeds"] == len(values) == len(life["seeds"])
                assert point["mean"] == pytest.approx(statistics.mean(values))
                if len(values) > 1:
                    assert point["half"] == pytest.approx(half_width(values))
                else:
                    assert point["half"] is None
                assert point["x"] == (ends[point["event"]] if point["step"] == END else starts[point["event"]] + point["step"])
                seen += 1
    scored = base.execute(
        "SELECT COUNT(DISTINCT life || event || '.' || step || subject) FROM scores JOIN runs USING (run) WHERE metric = 'exact'"
    )
    assert seen == scored.fetchone()[0]


def test_matrix_holds_the_score_after_every_event(report, base):
    for life in report["lives"]:
        for row in life["matrix"]:
            assert [cell["event"] for cell in row["cells"]] == [0, *(event["event"] for event in life["events"])]
            for cell in row["cells"]:
                values = per_seed(base, life["life"], row["subject"], cell["event"], END, row["probe"], row["metric"])
                assert cell["mean"] == pytest.approx(statistics.mean(values))


def test_matrix_marks_the_event_that_taught_or_was_asked(report):
    rows = {row["subject"]: row["taught"] for row in life_of(report, "replay")["matrix"] if row["metric"] == "exact"}
    assert rows["tuesday-people"] == 4
    assert rows["friday-erasure/forget"] == 3
    assert rows["start-people"] is None
    assert {row["subject"]: row["taught"] for row in life_of(report, "never-saw-it")["matrix"]}["friday-erasure/forget"] is None


def test_headline_equals_brute_force(report, base):
    known = ["start-people", "monday-people", "tuesday-people", "wednesday-people"]
    requests = ["friday-erasure", "ada-lovell"]
    oracle = statistics.mean(per_seed(base, "never-saw-it", f"{name}/forget", 4)[0] for name in requests)
    for name in ("plain", "replay"):
        head = life_of(report, name)["headline"]
        final = {
            subject: per_seed(base, name, subject, 6)
            for subject in known + [f"{r}/{p}" for r in requests for p in ("forget", "retain", "neighbours")]
        }
        kept = [statistics.mean(final[subject][seed] for subject in known) for seed in range(3)]
        left = [statistics.mean(final[f"{request}/forget"][seed] for request in requests) for seed in range(3)]
        cared = known + [f"{request}/{part}" for request in requests for part in ("retain", "neighbours")]
        lost = [
            statistics.mean(
                max(per_seed(base, name, subject, event)[seed] for event in range(7)) - final[subject][seed] for subject in cared
            )
            for seed in range(3)
        ]
        for key, values in (("kept", kept), ("left", left), ("lost", lost)):
            assert head[key]["mean"] == pytest.approx(statistics.mean(values))
            assert head[key]["half"] == pytest.approx(half_width(values))
        assert head["left"]["oracle"] == pytest.approx(oracle)
        assert head["left"]["excess"] == pytest.approx(statistics.mean(left) - oracle)
        assert head["outside"] == ["shakespeare"]
        assert sorted(head["lost"]["subjects"]) == sorted(cared)


def test_request_bars_hold_before_after_end_and_oracle(report, base):
    found = [row for row in report["requests"] if row["metric"] == "exact"]
    assert [(row["request"], row["part"]) for row in found] == [
        (request, part) for request in ("friday-erasure", "ada-lovell") for part in ("forget", "retain", "neighbours", "holdout")
    ]
    for row in found:
        subject, event = f"{row['request']}/{row['part']}", {"friday-erasure": 3, "ada-lovell": 5}[row["request"]]
        assert row["oracle"]["mean"] == pytest.approx(per_seed(base, "never-saw-it", subject, 4)[0])
        assert [bar["life"] for bar in row["lives"]] == ["plain", "replay"]
        for bar in row["lives"]:
            for when, at in (("before", event - 1), ("after", event), ("final", 6)):
                assert bar[when]["mean"] == pytest.approx(statistics.mean(per_seed(base, bar["life"], subject, at)))


def test_moved_weights_are_pooled_over_tensors_and_seeds(report, base):
    for cell in life_of(report, "replay")["moved"]:
        rows = base.execute(
            "SELECT size, changed, relative FROM moved JOIN runs USING (run) "
            "WHERE life = 'replay' AND event = ? AND role = ? AND layer IS ?",
            (cell["event"], cell["role"], cell["layer"]),
        ).fetchall()
        assert cell["share"] == pytest.approx(sum(row[1] for row in rows) / sum(row[0] for row in rows))
        assert cell["relative"] == pytest.approx(math.sqrt(sum(row[0] * row[2] ** 2 for row in rows) / sum(row[0] for row in rows)))


def test_losses_are_means_over_seeds(report, base):
    for row in life_of(report, "plain")["losses"]:
        for point in row["points"]:
            question = """SELECT AVG(value) FROM steps JOIN runs USING (run)
                          WHERE life = 'plain' AND event = ? AND stage = ? AND step = ? AND metric = 'loss'"""
            assert point["mean"] == pytest.approx(base.execute(question, (row["event"], point["stage"], point["step"])).fetchone()[0])


def test_every_subject_is_shown_by_a_leading_measure(report):
    leads = [measure for measure in report["measures"] if measure["lead"]]
    assert [measure["name"] for measure in leads] == ["recall exact", "loss"]
    assert {subject for measure in leads for subject in measure["subjects"]} == {row["subject"] for row in report["subjects"]}


@pytest.mark.parametrize(
    ("metric", "lower"), [("loss", True), ("paraphrased/perplexity", True), ("rank", True), ("exact", False), ("neighbour/exact", False)]
)
def test_direction_goes_by_the_last_word(metric, lower):
    assert lower_is_better(metric) is lower


def bare(path, *, life="alone", seed=1, events=1, settings=None, scores=(), method="naive"):
    """Write one run with the least a ledger can hold."""
    run = f"{life}-{seed}"
    with Ledger(path) as ledger:
        ledger.write(
            "runs",
            [
                {
                    "run": run,
                    "recipe": "",
                    "life": life,
                    "seed": seed,
                    "settings": settings or {},
                    "versions": {},
                    "parameters": 10,
                    "at": 0.0,
                }
            ],
        )
        for number in range(1, events + 1):
            row = {
                "run": run,
                "event": number,
                "name": f"task-{number}",
                "verb": "learn",
                "kind": "qa",
                "method": method,
                "settings": {},
                "rows": 1,
            }
            ledger.write("events", [row | {"steps": 0, "weights_before": "", "weights_after": "", "seconds": 0.0, "at": 0.0}])
        names = ("event", "step", "probe", "subject", "metric", "value")
        ledger.write("scores", [{"run": run} | dict(zip(names, row)) for row in scores])
    return path


def test_lower_is_better_falls_upwards(tmp_path):
    scores = [(0, END, "loss", "task-1", "loss", 4.0), (1, END, "loss", "task-1", "loss", 1.0), (2, END, "loss", "task-1", "loss", 2.5)]
    head = numbers([bare(tmp_path / "a.sqlite", events=2, scores=scores)])["lives"][0]["headline"]
    assert head["kept"]["mean"] == 2.5
    assert head["lost"]["mean"] == 1.5


def test_a_missing_last_score_is_missing_and_not_the_one_before(tmp_path):
    scores = [
        (1, END, "recall", "task-1", "exact", 0.9),
        (2, END, "recall", "task-1", "exact", None),
        (2, END, "recall", "task-2", "exact", float("inf")),
    ]
    report = numbers([bare(tmp_path / "a.sqlite", events=2, scores=scores)])
    head = report["lives"][0]["headline"]
    assert head["kept"]["mean"] is None
    assert head["lost"]["mean"] is None
    assert json.loads(as_json(report))["lives"][0]["matrix"][1]["cells"][2]["mean"] is None


def test_seeds_of_one_life_share_a_band_and_other_methods_do_not(tmp_path):
    one, two = bare(tmp_path / "one" / "l.sqlite", seed=1), bare(tmp_path / "two" / "l.sqlite", seed=2)
    other = bare(tmp_path / "three" / "l.sqlite", seed=3, method="replay")
    twin = bare(tmp_path / "four" / "l.sqlite", seed=1)
    lives = group(read_runs([one, two, other, twin, one]))
    assert [[run.seed for run in life.runs] for life in lives] == [[1, 2], [3], [1]]
    assert len({life.name for life in lives}) == 3
    assert all(life.name.startswith("alone") for life in lives)


def test_an_event_that_was_cut_off_is_shown_as_such(tmp_path):
    scores = [(1, END, "recall", "task-1", "exact", 0.9), (2, 8, "recall", "task-1", "exact", 0.5)]
    life = numbers([bare(tmp_path / "a.sqlite", scores=scores)])["lives"][0]
    assert [(event["event"], event["complete"], event["steps"]) for event in life["events"]] == [(1, True, 0), (2, False, 8)]
    assert life["headline"]["kept"]["mean"] == 0.9  # the last score after an event, not the one inside it


def test_no_ledger_and_no_run_are_refused(tmp_path):
    with pytest.raises(Mistake, match="no ledger"):
        numbers([])
    with pytest.raises(Mistake, match="there is no ledger here"):
        numbers([tmp_path / "absent.sqlite"])
    Ledger(tmp_path / "empty.sqlite").close()
    with pytest.raises(Mistake, match="no run"):
        numbers([tmp_path / "empty.sqlite"])


def many_requests(count: int) -> Life:
    """A life of `count` requests after one task, two seeds: request i scores i / 10 before it is served, 0.01 i when it is, 0.001 i afterwards."""
    events = [{"event": 1, "name": "task", "verb": "learn", "complete": True, "start": 0, "end": 5}]
    events += [{"event": 2 + n, "name": f"r{n}", "verb": "forget", "complete": True, "start": 5 + n, "end": 6 + n} for n in range(count)]
    numbers = range(count + 2)
    found = {}
    for n in range(count):
        scores = [0.1 * n if at < 2 + n else 0.01 * n if at == 2 + n else 0.001 * n for at in numbers]
        found[f"r{n}/forget"] = Series([(at, END) for at in numbers], [float(at) for at in numbers], np.array([[s, s + 1] for s in scores]))
    return Life("life", False, [], events, {("recall", "exact"): found})


def test_many_requests_are_averaged_before_at_and_after_they_are_served() -> None:
    measure = {"probe": "recall", "metric": "exact"}
    before, now, later = series_curves(many_requests(6), measure, [f"r{n}" for n in range(6)])
    assert [curve["subject"] for curve in (before, now, later)] == ["asked before", "asked now", "not yet asked"]
    means = {curve["subject"]: [point["mean"] for point in curve["points"]] for curve in (before, now, later)}
    assert means["asked now"][:2] == [None, None]
    assert means["asked now"][2:] == pytest.approx([0.01 * n + 0.5 for n in range(6)])
    assert means["asked before"][4] == pytest.approx(0.001 * 0.5 + 0.5)  # of r0 and r1, when r2 is served
    assert means["not yet asked"][:2] == pytest.approx([0.1 * 2.5 + 0.5] * 2)
    assert means["not yet asked"][4] == pytest.approx(0.1 * 4 + 0.5)  # of r3, r4, r5
    assert means["not yet asked"][7] is None
    assert before["points"][4]["seeds"] == 2
    assert before["points"][4]["x"] == 8.0


def test_few_requests_are_not_averaged() -> None:
    assert series_curves(many_requests(5), {"probe": "recall", "metric": "exact"}, [f"r{n}" for n in range(5)]) == []
    assert series_curves(many_requests(6), {"probe": "loss", "metric": "loss"}, [f"r{n}" for n in range(6)]) == []
