"""Answers of ConvoMem runs, and their table: accuracy with n and a 95 % Wilson interval, latency, tokens and cost per (category, k, policy, model, size).

Categories are judged by different rules and packings give different histories, so no row of the table mixes any of them.

Cost: one pass over the answers.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from remanence.errors import Mistake
from remanence.report.interval import wilson_interval
from remanence.storage import write_text

BY = ("category", "k", "packing", "policy", "model", "helper", "judge", "size")


@dataclass(frozen=True)
class Row:
    """One answer; `right` is `None` where the judge gave no verdict, tokens, seconds and cost are those of `Answer`."""

    policy: str
    model: str
    helper: str
    judge: str
    packing: str
    size: int
    case: str
    item: str
    category: str
    k: int
    text: str
    right: bool | None
    calls: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    final_tokens: int
    seconds: float
    cost: float
    judge_calls: int
    judge_cost: float
    evidence_used: int

    def judged(self, right: bool | None, judge: str, calls: int, cost: float) -> Row:
        """Return the row with another verdict."""
        return replace(self, right=right, judge=judge, judge_calls=calls, judge_cost=cost)


@dataclass(frozen=True)
class Results:
    """Answers, and whether a budget ended the run."""

    rows: tuple[Row, ...]
    stopped: bool = False

    def __add__(self, other: Results) -> Results:
        return Results(self.rows + other.rows, self.stopped or other.stopped)

    def table(self, by: Sequence[str] = BY) -> list[dict[str, object]]:
        """Return one row per group, in the order of its keys.

        Args:
            by: what makes a group; the packing and the policy are always part of it.
        """
        stray = next((name for name in by if name not in BY), None)
        if stray is not None:
            raise Mistake("by", f"answers cannot be grouped by '{stray}'", f"choose among {', '.join(BY)}")
        keys = tuple(dict.fromkeys((*by, "packing", "policy")))
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(tuple(getattr(row, name) for name in keys), []).append(row)
        found = sorted(groups.items(), key=lambda pair: tuple((str(type(part)), part) for part in pair[0]))
        return [dict(zip(keys, key)) | summary(rows) for key, rows in found]

    def accuracy(self, **conditions: object) -> float:
        """Return the share of right answers among those judged that meet conditions (`size=20, category="user_facts"`)."""
        chosen = [row.right for row in self.rows if all(getattr(row, name) == value for name, value in conditions.items())]
        judged = [right for right in chosen if right is not None]
        return sum(judged) / len(judged) if judged else float("nan")

    def csv(self) -> str:
        """Return the table as CSV."""
        return as_csv(self.table())

    def write(self, folder: str | Path) -> None:
        """Write `results.csv` (the table) and `answers.jsonl` (every answer)."""
        write_text(Path(folder) / "results.csv", self.csv())
        write_text(Path(folder) / "answers.jsonl", "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows))


def read_results(paths: Iterable[str | Path]) -> Results:
    """Read `answers.jsonl` files."""
    names = {field.name for field in fields(Row)}
    return Results(tuple(row for path in paths for row in _read(Path(path), names)))


def _read(path: Path, names: set[str]) -> Iterator[Row]:
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            row = json.loads(line)
            if not isinstance(row, dict) or set(row) != names:
                raise Mistake(f"{path}, line {number}", "is no answer of this benchmark", "name an answers.jsonl that it wrote")
            yield Row(**row)
    except OSError as error:
        raise Mistake(path, f"cannot be read ({error.strerror or error})", "check the path") from error
    except ValueError as error:
        raise Mistake(path, f"is no JSON lines ({error})", "name an answers.jsonl that the benchmark wrote") from error


def summary(rows: Sequence[Row]) -> dict[str, object]:
    """Return the figures of a group: n counts judged answers, `dropped` those without a verdict; tokens, seconds and cost are of all of them."""
    judged = [row for row in rows if row.right is not None]
    right = sum(bool(row.right) for row in judged)
    low, high = wilson_interval(right, len(judged))
    seconds = np.array([row.seconds for row in rows])
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99))
    return {
        "accuracy": right / len(judged) if judged else float("nan"),
        "low": low,
        "high": high,
        "n": len(judged),
        "right": right,
        "dropped": len(rows) - len(judged),
        "mean_s": float(seconds.mean()),
        "p50_s": float(p50),
        "p90_s": float(p90),
        "p99_s": float(p99),
        "input_tokens": float(np.mean([row.input_tokens for row in rows])),
        "output_tokens": float(np.mean([row.output_tokens for row in rows])),
        "cached_tokens": float(np.mean([row.cached_tokens for row in rows])),
        "final_tokens": float(np.mean([row.final_tokens for row in rows])),
        "cost": float(np.mean([row.cost for row in rows])),
    }


def as_csv(rows: Sequence[dict[str, object]]) -> str:
    """Return dictionaries with the same keys as CSV, numbers to six places."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return out.getvalue()
