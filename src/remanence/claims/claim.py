"""What a claim is, and how it is run, judged and recorded.

A claim file holds one `CLAIM`: arms (the method, its ablations, its baselines), a function that runs one arm with one seed and returns numbers, and a
judgement of all numbers. `remanence reproduce SLUG` runs arms x seeds in separate processes; finished ones are kept, so a claim that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from remanence.arms import run_arms
from remanence.errors import Mistake, nearest
from remanence.report.interval import t_interval
from remanence.storage import write_text

VERDICTS = ("holds", "does not hold", "mixed")


class Results:
    """Numbers of all arms and seeds: `results["hft", "op"]` is an array over seeds.

    Args:
        numbers: arm -> seed -> metric -> value.
        seeds: in the order of the arrays.
    """

    def __init__(self, numbers: Mapping[str, Mapping[int, Mapping[str, float]]], seeds: Sequence[int]):
        self.numbers, self.seeds = numbers, tuple(seeds)

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        arm, metric = key
        return np.array([self.numbers[arm][seed].get(metric, np.nan) for seed in self.seeds], dtype=np.float64)

    def mean(self, arm: str, metric: str) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self[arm, metric]))

    def interval(self, arm: str, metric: str) -> tuple[float, float]:
        """Return the mean and the half-width of its 95 % t-interval."""
        mean, half = t_interval(self[arm, metric])
        return float(mean), float(half)

    def gain(self, arm: str, over: str, metric: str) -> tuple[float, float]:
        """Return the mean of the paired differences (same seed) and the half-width of its 95 % t-interval."""
        mean, half = t_interval(self[arm, metric] - self[over, metric])
        return float(mean), float(half)

    @property
    def arms(self) -> list[str]:
        """The arms, in order."""
        return list(self.numbers)

    @property
    def metrics(self) -> list[str]:
        """All metrics, in the order in which arms report them."""
        return list(dict.fromkeys(metric for seeds in self.numbers.values() for values in seeds.values() for metric in values))


@dataclass(frozen=True)
class Verdict:
    """The judgement: one of `VERDICTS`, and the reasons, each with its numbers."""

    word: str
    reasons: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.word not in VERDICTS:
            raise ValueError(f"a verdict is one of {VERDICTS}, got {self.word!r}")


@dataclass(frozen=True)
class Claim:
    """A desk experiment.

    Args:
        slug: of the paper's sheet.
        title: of the paper.
        sentence: what is claimed, in one sentence, with the threshold that falsifies it (fixed before the first run).
        arms: names of what is compared.
        run: (arm, seed) -> numbers by metric.
        judge: all numbers -> verdict.
        seeds: at least three.
        paper: the paper's own figures, as sentences.
        show: metrics of the table; by default all.
        minutes: how long all arms and seeds take on two cores, about.
        long: whether that is more than five minutes.
    """

    slug: str
    title: str
    sentence: str
    arms: tuple[str, ...]
    run: Callable[[str, int], dict[str, float]]
    judge: Callable[[Results], Verdict]
    seeds: tuple[int, ...] = (0, 1, 2)
    paper: tuple[str, ...] = ()
    show: tuple[str, ...] = ()
    minutes: float = 5.0
    long: bool = False
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 3:
            raise ValueError(f"claim {self.slug} needs at least 3 seeds")


def known_claims() -> list[str]:
    """Return the slugs of all claims, from the file names."""
    own = {"claim", "__init__"}
    return sorted(
        path.stem.replace("_", "-") for path in Path(__file__).parent.glob("*.py") if path.stem not in own and not path.stem.startswith("_")
    )


def load_claim(slug: str) -> Claim:
    """Return a claim.

    Raises:
        Mistake: there is none of that slug.
    """
    if slug not in known_claims():
        raise Mistake("reproduce", f"there is no claim '{slug}'", nearest(slug, known_claims()))
    return importlib.import_module(f"remanence.claims.{slug.replace('-', '_')}").CLAIM


def run_one(slug: str, arm: str, seed: int, output: Path) -> None:
    """Run one arm with one seed and write its numbers (`remanence reproduce SLUG --arm A --seed S` in its own process)."""
    claim = load_claim(slug)
    if arm not in claim.arms:
        raise Mistake("--arm", f"claim '{slug}' has no arm '{arm}'", nearest(arm, claim.arms))
    begun = time.monotonic()
    values = {name: float(value) for name, value in claim.run(arm, seed).items()}
    write_text(output, json.dumps({"values": values, "seconds": time.monotonic() - begun}, indent=1))


def reproduce(
    slug: str, *, folder: Path, seeds: Sequence[int] = (), arms: Sequence[str] = (), workers: int | None = None, fresh: bool = False
) -> dict[str, Any]:
    """Run a claim's arms x seeds (what is not there yet), judge, and return the record.

    Args:
        slug: of the claim.
        folder: where single results are kept; its name carries the hash of the claim's source, so an edited claim starts anew.
        seeds: instead of the claim's.
        arms: a part of the claim's (then there is no verdict).
        workers: processes at a time.
        fresh: run again what is there.
    """
    claim = load_claim(slug)
    seeds = tuple(seeds) or claim.seeds
    chosen = tuple(arms) or claim.arms
    source = Path(importlib.import_module(f"remanence.claims.{slug.replace('-', '_')}").__file__ or "")
    place = folder / f"{slug}-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}"
    wanted = [(arm, seed, place / f"{arm.replace('/', '-')}-{seed}.json") for seed in seeds for arm in chosen]
    todo = [item for item in wanted if fresh or not item[2].is_file()]
    prepare = getattr(importlib.import_module(f"remanence.claims.{slug.replace('-', '_')}"), "prepare", None)
    if todo and prepare is not None:
        prepare()  # what all arms share (a desk model) is built once, before they start side by side
    commands = [["reproduce", slug, "--arm", arm, "--seed", str(seed), "--into", str(path)] for arm, seed, path in todo]
    run_arms(commands, [f"{slug} {arm}, seed {seed}" for arm, seed, _ in todo], workers=workers)
    numbers: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in chosen}
    seconds = 0.0
    for arm, seed, path in wanted:
        single = json.loads(path.read_text(encoding="utf-8"))
        numbers[arm][seed] = single["values"]
        seconds += single["seconds"]
    results = Results(numbers, seeds)
    complete = set(chosen) == set(claim.arms)
    verdict = claim.judge(results) if complete else None
    return _record(claim, results, verdict, seconds)


def _record(claim: Claim, results: Results, verdict: Verdict | None, seconds: float) -> dict[str, Any]:
    from remanence.life import versions

    table = {
        arm: {
            metric: dict(zip(("mean", "half"), map(_plain, results.interval(arm, metric))))
            for metric in results.metrics
            if not np.isnan(results[arm, metric]).all()
        }
        for arm in results.arms
    }
    return {
        "slug": claim.slug,
        "title": claim.title,
        "claim": claim.sentence,
        "verdict": verdict.word if verdict else "not judged: not all arms were run",
        "reasons": list(verdict.reasons) if verdict else [],
        "paper": list(claim.paper),
        "notes": list(claim.notes),
        "seeds": list(results.seeds),
        "table": table,
        "numbers": {arm: {str(seed): values for seed, values in seeds.items()} for arm, seeds in results.numbers.items()},
        "show": list(claim.show) or results.metrics,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
    }


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def save_record(record: Mapping[str, Any], folder: Path) -> Path:
    """Write a record as `SLUG.json` and return the path."""
    path = folder / f"{record['slug']}.json"
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
