"""From which size on which policy pays: where a challenger's accuracy, cost and latency cross those of full context, with bootstrap intervals.

For each category apart (pooled over k, or one k): at every size both policies answered the same questions, so the difference is paired. The crossover in
accuracy is the first measured size from which on the challenger is at least as good (within `tolerance`) at every larger one; in cost and latency the first
from which on it stays below. Questions are drawn again 1,000 times and the crossover found anew: its interval is the middle 95 %. A size beyond the largest
measured one is written `> largest`.

Cost: 1,000 x questions x sizes, as one matrix product per pair of policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from remanence.errors import Mistake, nearest
from remanence.measure.convomem_results import Results, Row, as_csv
from remanence.report.curves import Curve, Panel, draw_curves
from remanence.seeds import numpy_generator
from remanence.storage import write_text

DRAWS = 1000
MEASURES = ("accuracy", "cost", "latency")


@dataclass(frozen=True)
class Crossover:
    """Where a challenger overtakes: `size` with its 95 % interval (`inf`: not within the sizes measured), and both policies at the smallest and largest size.

    Args:
        n: questions that both policies answered at every size that counts.
    """

    category: str
    baseline: str
    challenger: str
    measure: str
    size: float
    low: float
    high: float
    largest: int
    n: int
    baseline_small: float
    challenger_small: float
    baseline_large: float
    challenger_large: float


def crossovers(
    results: Results, *, baseline: str = "full-context", tolerance: float = 0.0, k: int | None = None, seed: int = 0
) -> list[Crossover]:
    """Return the crossovers of every other policy with `baseline`, per category.

    Args:
        results: of all policies, one packing, one model, one judge.
        tolerance: how much accuracy a challenger may lack and still count as good.
        k: items with so many evidence messages only.

    Raises:
        Mistake: results of different packings, models or judges, or without the baseline.
    """
    rows = [row for row in results.rows if k is None or row.k == k]
    for name in ("packing", "model", "judge"):
        values = sorted({str(getattr(row, name)) for row in rows})
        if len(values) > 1:
            raise Mistake("crossover", f"the results have several {name}s ({', '.join(values)})", "compare one at a time")
    policies = list(dict.fromkeys(row.policy for row in rows))
    if baseline not in policies:
        raise Mistake("crossover", f"there are no results of '{baseline}'", nearest(baseline, policies) if policies else "run it first")
    found = []
    for category in sorted({row.category for row in rows}):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.category == category:
                groups.setdefault(row.policy, []).append(row)
        if baseline not in groups:
            continue
        for challenger in (name for name in policies if name != baseline and name in groups):
            for measure in MEASURES:
                made = _crossing(groups[baseline], groups[challenger], measure, tolerance, seed)
                if made is not None:
                    found.append(Crossover(category, baseline, challenger, measure, *made))
    return found


def _crossing(
    ours: Sequence[Row], theirs: Sequence[Row], measure: str, tolerance: float, seed: int
) -> tuple[float, float, float, int, int, float, float, float, float] | None:
    """Return (size, low, high, largest, n, four means), `None` where no question is common."""
    sizes = sorted({row.size for row in ours} & {row.size for row in theirs})
    if not sizes:
        return None
    first, second = _matrix(ours, sizes, measure), _matrix(theirs, sizes, measure)
    items = sorted(set(first) & set(second))
    if not items:
        return None
    a, b = np.array([first[item] for item in items]), np.array([second[item] for item in items])  # (N, sizes), NaN where not answered
    there = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(there, a, 0.0), np.where(there, b, 0.0)
    draw = numpy_generator(seed, "crossover", measure)
    weights = np.vstack([np.ones(len(items)), draw.multinomial(len(items), np.full(len(items), 1 / len(items)), size=DRAWS)])
    counts = weights @ there  # (1 + draws, sizes)
    with np.errstate(invalid="ignore", divide="ignore"):
        one, two = weights @ a / counts, weights @ b / counts
    good = two >= one - tolerance - 1e-9 if measure == "accuracy" else two <= one
    known = counts > 0
    stays = np.flip(np.logical_and.accumulate(np.flip(good | ~known, axis=1), axis=1), axis=1) & known
    places = np.where(stays.any(axis=1), stays.argmax(axis=1), len(sizes))
    where = np.array([*sizes, math.inf])[places]
    low, high = np.quantile(where[1:], (0.025, 0.975), method="nearest")
    ends = np.flatnonzero(known[0])[[0, -1]]
    small, large = ((float(one[0, end]), float(two[0, end])) for end in ends)
    return float(where[0]), float(low), float(high), sizes[-1], len(items), *small, *large


def _matrix(rows: Sequence[Row], sizes: Sequence[int], measure: str) -> dict[str, np.ndarray]:
    """Return item -> mean over its histories at each size, NaN where there is none."""
    place = {size: number for number, size in enumerate(sizes)}
    sums: dict[str, np.ndarray] = {}
    for row in rows:
        value = row.right if measure == "accuracy" else row.cost if measure == "cost" else row.seconds
        if value is not None and row.size in place:
            cell = sums.setdefault(row.item, np.zeros((2, len(sizes))))
            cell[:, place[row.size]] += (float(value), 1.0)
    with np.errstate(invalid="ignore"):
        return {item: cell[0] / cell[1] for item, cell in sums.items()}


def advice(found: Sequence[Crossover]) -> str:
    """Return what the crossovers say, one paragraph per category and challenger."""
    lines = []
    for category, challenger in dict.fromkeys((one.category, one.challenger) for one in found):
        by = {one.measure: one for one in found if (one.category, one.challenger) == (category, challenger)}
        base = next(iter(by.values())).baseline
        lines.append(f"{category}: {challenger} instead of {base} (n = {min(one.n for one in by.values())} questions)")
        if "accuracy" in by:
            one = by["accuracy"]
            ends = f"{one.challenger_small:.0%} against {one.baseline_small:.0%} at first, {one.challenger_large:.0%} against {one.baseline_large:.0%}"
            lines.append(f"  as accurate {_from(one)}; {ends} at {one.largest}")
        for measure, word in (("cost", "cheaper"), ("latency", "faster")):
            if measure in by:
                one = by[measure]
                ratio = one.baseline_large / one.challenger_large if one.challenger_large else math.inf
                lines.append(f"  {word} {_from(one)}; by a factor of {ratio:.3g} at {one.largest}")
        lines.append(f"  {_pays(by)}")
    return "\n".join(lines) + "\n"


def _from(one: Crossover) -> str:
    if math.isinf(one.size):
        return f"at no size up to {one.largest} (95 % interval {_shown(one.low, one)} to {_shown(one.high, one)})"
    return f"from {one.size:g} conversations on (95 % interval {_shown(one.low, one)} to {_shown(one.high, one)})"


def _shown(size: float, one: Crossover) -> str:
    return f"> {one.largest}" if math.isinf(size) else f"{size:g}"


def _pays(by: dict[str, Crossover]) -> str:
    """Say from where on the challenger is as accurate and cheaper, and what it costs in accuracy where it is only cheaper."""
    accuracy, cost = by.get("accuracy"), by.get("cost")
    if accuracy is None or cost is None:
        return "not enough answers to say"
    if math.isinf(cost.size):
        return "it does not pay: never cheaper"
    if not math.isinf(accuracy.size):
        return f"it pays from {max(accuracy.size, cost.size):g} conversations on"
    lost = accuracy.baseline_large - accuracy.challenger_large
    return f"it pays only where {lost:.0%} of accuracy may go: it is cheaper from {cost.size:g} conversations on, and less accurate up to {cost.largest}"


def write_crossover(results: Results, folder: str | Path, *, baseline: str = "full-context", tolerance: float = 0.0) -> str:
    """Write `crossover.txt`, `crossover.csv` and `crossover.png` into a folder and return the text."""
    found = crossovers(results, baseline=baseline, tolerance=tolerance)
    text = advice(found)
    write_text(Path(folder) / "crossover.txt", text)
    write_text(Path(folder) / "crossover.csv", as_csv([asdict(one) for one in found]))
    draw_crossover(results, Path(folder) / "crossover.png")
    return text


def draw_crossover(results: Results, path: str | Path) -> Path:
    """Draw accuracy by size for every category, with Wilson bands, and cost and latency per question: one line per policy."""
    policies = list(dict.fromkeys(row.policy for row in results.rows))
    table = results.table(by=("category", "size"))
    panels = []
    for category in sorted({row.category for row in results.rows}):
        curves = [
            _curve(name, [row for row in table if row["policy"] == name and row["category"] == category], "accuracy") for name in policies
        ]
        panels.append(Panel(category.replace("_", " "), "accuracy", tuple(curves), share=True))
    whole = results.table(by=("size",))
    for measure, title, unit in (("cost", "cost of a question", "dollars"), ("p50_s", "latency of a question, median", "seconds")):
        curves = [_curve(name, [row for row in whole if row["policy"] == name], measure) for name in policies]
        panels.append(Panel(title, unit, tuple(curves)))
    return draw_curves("Which memory pays at which size", "conversations in the history", panels, path)


def _curve(name: str, rows: Sequence[dict[str, object]], measure: str) -> Curve:
    bands = [(float(str(row["low"])), float(str(row["high"]))) for row in rows] if measure == "accuracy" else None
    return Curve(name, [float(str(row["size"])) for row in rows], [float(str(row[measure])) for row in rows], bands)
