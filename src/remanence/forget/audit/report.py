"""What an audit found: numbers with their direction, reference, interval and rows, and a verdict with the numbers behind it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

GROUPS = {
    "memory": "What it still says",
    "quality": "Nearness to the oracle",
    "membership": "Can one see that it was trained on the rows",
    "robustness": "What an attack brings back",
    "utility": "What must stay",
}
ARROWS = {"higher": "higher is better", "lower": "lower is better", "reference": "the reference's value is best"}
VERDICTS = {
    "forgotten": "The rows are gone as far as these measurements can tell, and the rest is there.",
    "not forgotten": "The model still says what it was asked to forget.",
    "hidden": "The model does not say it when it is asked, but it is still there.",
    "harmed": "The rows are gone, and so is much of what had to stay.",
    "over-forgotten": "The rows were pushed further away than rows that the model never saw, and that can be seen.",
}


@dataclass(frozen=True)
class Finding:
    """One number about the audited model.

    Args:
        name: of the measurement.
        group: memory | quality | membership | robustness | utility.
        value: of the audited model.
        low: end of its interval.
        high: end of its interval.
        better: higher | lower | reference (the nearer to the reference, the better).
        reference: what the value is held against; `None` where there is nothing of the kind.
        rows: that it was measured on.
        against: whose value the reference is.
        original: the value of the model before it forgot, where it is known.
    """

    name: str
    group: str
    value: float
    low: float
    high: float
    better: str
    reference: float | None
    rows: int
    against: str = ""
    original: float | None = None


@dataclass(frozen=True)
class Curve:
    """How fast an attack brings rows back: mean probability behind so many optimizer steps.

    Args:
        name: `relearning/shown` (rows that the attack trains on) or `relearning/watched` (the others).
        who: the audited model, the oracle, or what stands for it.
        steps: optimizer steps.
        values: of each point.
    """

    name: str
    who: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class AuditReport:
    """The outcome of an audit.

    Args:
        request: its name.
        kind: of its rows.
        verdict: forgotten | hidden | harmed | over-forgotten | not forgotten.
        reasons: each with its numbers; the ones behind the verdict first.
        findings: all numbers.
        curves: of the relearning attack.
        skipped: what was not done -> why.
        also: further verdicts whose rules fired too.
        rows: measured rows of each set.
        seed: of every random choice.
        level: coverage of the intervals.
        settings: how it was done, as plain values.
    """

    request: str
    kind: str
    verdict: str
    reasons: list[str]
    findings: list[Finding]
    curves: list[Curve] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    also: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    level: float = 0.95
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Finding:
        """Return a finding by name.

        Raises:
            KeyError: there is none; says why it was skipped, where that is known.
        """
        found = next((item for item in self.findings if item.name == name), None)
        if found is None:
            raise KeyError(f"{name}: {self.skipped.get(name.partition('/')[0], self.skipped.get(name, 'no such finding'))}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values (numbers that are not finite are `None`)."""
        return _plain(dataclasses.asdict(self))

    def markdown(self) -> str:
        """Return the report as Markdown."""
        sets = ", ".join(f"{count} {name}" for name, count in self.rows.items())
        also = f" Also: {', '.join(self.also)}." if self.also else ""
        lines = [
            f"# Audit of '{self.request}': {self.verdict}",
            "",
            VERDICTS[self.verdict] + also,
            "",
            *(f"- {reason}" for reason in self.reasons),
            "",
            f"Rows: {sets}. Intervals: {self.level:.0%}, over rows. Seed {self.seed}.",
        ]
        for group, title in GROUPS.items():
            chosen = [item for item in self.findings if item.group == group]
            if not chosen:
                continue
            lines += ["", f"## {title}", "", "| measurement | value | interval | reference | original | rows | direction |"]
            lines += ["| --- | ---: | --- | --- | ---: | ---: | --- |", *(_row(item) for item in chosen)]
        if self.curves:
            lines += ["", "## Relearning, step by step", ""]
            lines += [f"| step | {' | '.join(map(str, self.curves[0].steps))} |", "| --- |" + " ---: |" * len(self.curves[0].steps)]
            lines += [f"| {_cell(f'{one.name}, {one.who}')} | {' | '.join(shown(v) for v in one.values)} |" for one in self.curves]
        if self.skipped:
            lines += ["", "## Not done", "", *(f"- {name}: {why}" for name, why in self.skipped.items())]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """Return a self-contained HTML fragment: verdict, tables and the relearning curve as SVG."""
        from remanence.forget.audit.picture import fragment

        return fragment(self)


def _row(item: Finding) -> str:
    held = f"{shown(item.reference)} ({item.against})" if item.reference is not None else "–"
    cells = (
        item.name,
        shown(item.value),
        f"{shown(item.low)} to {shown(item.high)}",
        held,
        shown(item.original),
        str(item.rows),
        ARROWS[item.better],
    )
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")


def shown(value: float | None) -> str:
    """Return a number in three significant digits, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
