"""What must stay: the retain rows and the neighbours, measured as TOFU does, and their harmonic mean.

Of each set: probability exp(-NLL), ROUGE-L recall, exact memorisation, and where there are wrong answers the truth ratio as max(0, 1 - TR);
of classifiers accuracy and probability. `utility` is the harmonic mean of all of them (TOFU: of probability, ROUGE and truth ratio on
retain, real authors and world facts: nine numbers; give such rows as neighbours): one number near 0 pulls it to 0. The reference is the
original; without it the oracle. `fluency` is RWKU's, of what the model writes about the retain rows: it falls where it repeats itself.
Cost: one forward pass over both sets, and their continuations, per model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from remanence.errors import Mistake
from remanence.forget.audit.case import Case, Measure, present
from remanence.forget.audit.classifiers import right
from remanence.forget.audit.extraction import Writings, fluency, memorised
from remanence.forget.audit.report import Finding
from remanence.forget.audit.truth_ratio import TruthRatios
from remanence.seeds import numpy_generator
from remanence.training.memorisation import truth_ratio_keep


def measure_utility(case: Case, writings: Writings, ratios: TruthRatios) -> None:
    """Add every number of what must stay, and the harmonic mean."""
    parts = [part for part in ("retain", "neighbours") if part in case.sets]
    if not parts:
        case.skipped["utility"] = "the request has neither retain rows nor neighbours"
        return
    before = next((who for who in ("original", "oracle") if who in case.models), None)
    first = len(case.findings)
    means: dict[str, list[float]] = {"model": [], **({before: []} if before else {})}
    samples: list[np.ndarray] = []
    for part in parts:
        for name, measure in measures(case, part, writings, ratios).items():
            try:
                values = {who: present(measure(who, part)) for who in means}
            except Mistake as mistake:
                case.skipped[f"{part}/{name}"] = str(mistake)
                continue
            own = values["model"]
            if not len(own):
                continue
            if name == "fluency" and 2 * len(own) < len(case.sets[part]):
                case.skipped[f"{part}/{name}"] = "what the model writes is mostly shorter than three words"
                continue
            reference = float(values[before].mean()) if before else None
            low, high = case.interval(own, share=name != "fluency")
            against = f"the {before}" if before else ""
            value = float(own.mean())
            case.findings.append(Finding(f"{part}/{name}", "utility", value, low, high, "higher", reference, len(own), against))
            if name == "fluency":
                continue  # entropy in bits, no share of one
            samples.append(own)
            for who, each in values.items():
                means[who].append(float(each.mean()))
    low, high = harmonic_interval(samples, case.settings.level, case.settings.resamples, case.seed)
    value, reference = harmonic_mean(means["model"]), harmonic_mean(means[before]) if before else None
    rows, against = sum(f.rows for f in case.findings[first:]), f"the {before}" if before else ""
    case.findings.append(Finding("utility", "utility", value, low, high, "higher", reference, rows, against))


def measures(case: Case, part: str, writings: Writings, ratios: TruthRatios) -> dict[str, Measure]:
    """Return what is measured of a set."""
    if not case.language:
        return {"accuracy": lambda who, part: right(case, who, part), "probability": case.probability}
    found: dict[str, Measure] = {
        "probability": case.probability,
        "exact_memorisation": lambda who, part: memorised(case, who, part),
        "rouge": lambda who, part: writings.rouge(who, part).recall,
    }
    if ratios.there(part):
        found["truth_ratio"] = lambda who, part: truth_ratio_keep(ratios(who, part))
    if part == "retain":
        found["fluency"] = lambda who, part: fluency(writings.texts(who, part))
    return found


def harmonic_mean(values: Sequence[float]) -> float:
    """Return n / sum(1 / x); 0 if any x is 0, NaN without numbers."""
    found = np.asarray(values, np.float64)
    if not len(found):
        return float("nan")
    return 0.0 if (found <= 0).any() else float(len(found) / (1 / found).sum())


def harmonic_interval(samples: Sequence[np.ndarray], level: float, resamples: int, seed: int) -> tuple[float, float]:
    """Return the percentile interval of the harmonic mean of means, each sample drawn again by itself."""
    draws = []
    for number, values in enumerate(samples):
        counts = numpy_generator(seed, "harmonic", number).multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
        draws.append(counts @ values / len(values))
    if not draws:
        return float("nan"), float("nan")
    with np.errstate(divide="ignore"):
        means = len(draws) / (1 / np.stack(draws)).sum(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
