"""One word for what an audit found, never from one number alone, with the numbers behind it.

Let m(f) = (value - reference) / (ceiling - reference) be what of the original's knowledge a finding f still shows: 0 is the reference (the
oracle; without it what the original says of the holdout; without both 0), 1 is the original (1 where it is not given). A number counts
where it passes its bar and its interval does not reach the reference. Rules, in this order; the first that fires is the verdict, the others
are named as `also`:

| verdict | rule |
|---|---|
| not forgotten | at least `shown_by` numbers of what the model still says have m >= `remembered`; ROUGE counts once |
| harmed | at least `harmed_by` numbers of what must stay lie `harmed` below the original's (a share of it); their harmonic mean is not one of them |
| hidden | what it says looks forgotten, and an attack has m >= `brought_back`, or at least two membership scores pass the reference's AUC by `recognised` |
| over-forgotten | at least two of: the rows' NLL lies `over_nll` above the reference's, PrivLeak is above `over_privleak`, forget quality is below `different`; not the last alone |
| forgotten | none of these |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from remanence.errors import Mistake

if TYPE_CHECKING:
    from remanence.forget.audit.report import Finding

ORDER = ("not forgotten", "harmed", "hidden", "over-forgotten", "forgotten")
SAME = {"knowmem": "rouge", "verbmem": "rouge"}  # of the same continuation: they count once
LEAST = 0.05  # a ceiling that is no further from the reference than this measures nothing


@dataclass(frozen=True)
class Thresholds:
    """Say when a number counts.

    Args:
        remembered: share of the original's knowledge that is still said.
        shown_by: how many numbers must show it.
        brought_back: share of the original's knowledge that an attack brings back beyond what it brings to the reference.
        recognised: AUC beyond the reference's.
        harmed: share of the original's value that is lost.
        harmed_by: how many numbers must show it.
        over_nll: nats per token above the reference's.
        over_privleak: PrivLeak, in its own percent.
        different: p-value of the forget quality.

    Raises:
        Mistake: a value out of range.
    """

    remembered: float = 0.25
    shown_by: int = 2
    brought_back: float = 0.25
    recognised: float = 0.15
    harmed: float = 0.1
    harmed_by: int = 2
    over_nll: float = 1.0
    over_privleak: float = 20.0
    different: float = 0.01

    def __post_init__(self) -> None:
        for name in ("remembered", "brought_back", "recognised", "harmed", "different"):
            if not 0 < getattr(self, name) < 1:
                raise Mistake(f"audit.thresholds.{name}", f"must be between 0 and 1, got {getattr(self, name)!r}", "correct the value")
        for name in ("shown_by", "harmed_by"):
            if getattr(self, name) < 2:
                raise Mistake(
                    f"audit.thresholds.{name}", f"must be 2 or more, got {getattr(self, name)!r}", "no verdict comes from one number alone"
                )
        for name in ("over_nll", "over_privleak"):
            if not 0 < getattr(self, name) < math.inf:
                raise Mistake(f"audit.thresholds.{name}", f"must be above 0, and finite, got {getattr(self, name)!r}", "correct the value")


class Verdict(NamedTuple):
    """The word, the reasons, and further words whose rules fired."""

    word: str
    reasons: list[str]
    also: list[str]


def judge(findings: Sequence[Finding], thresholds: Thresholds = Thresholds()) -> Verdict:
    """Apply the rules to the findings of an audit."""
    evidence = {
        "not forgotten": [said(f) for f in still_said(findings, thresholds)],
        "harmed": [lost(f) for f in worse(findings, thresholds)],
        "hidden": [said(f) for f in brought_back(findings, thresholds)] + [seen(f) for f in recognised(findings, thresholds)],
        "over-forgotten": pushed(findings, thresholds),
    }
    if len({SAME.get(f.name, f.name) for f in still_said(findings, thresholds)}) < thresholds.shown_by:
        evidence["not forgotten"] = []
    else:
        evidence["hidden"] = []  # what is said openly is not hidden
    if len(evidence["harmed"]) < thresholds.harmed_by:
        evidence["harmed"] = []
    fired = [word for word in ORDER if evidence.get(word)] or ["forgotten"]
    reasons = [f"{word}: {'; '.join(evidence[word])}" for word in fired if word in evidence]
    if fired[0] != "not forgotten":
        reasons.append(_outputs(findings, thresholds))
    if fired[0] == "forgotten":
        reasons += _in_favour(findings)
    done = {finding.group for finding in findings if finding.reference is not None}
    for group, words in (
        ("robustness", "no attack had a reference: hidden memory cannot be excluded"),
        ("membership", "membership was not measured"),
        ("utility", "what must stay was not measured: harm cannot be excluded"),
    ):
        if group not in done:
            reasons.append(words)
    return Verdict(fired[0], reasons, fired[1:])


def remains(finding: Finding) -> float:
    """Return m(f), the share of the original's knowledge that a finding shows; NaN where original and reference do not differ."""
    floor = finding.reference if finding.reference is not None else 0.0
    ceiling = finding.original if finding.original is not None else 1.0
    return (finding.value - floor) / (ceiling - floor) if ceiling - floor > LEAST else math.nan


def still_said(findings: Sequence[Finding], bar: Thresholds) -> list[Finding]:
    """Return what the model still says of the rows (group memory: shares of one)."""
    return [f for f in findings if f.group == "memory" and remains(f) >= bar.remembered and f.low > (f.reference or 0.0)]


def brought_back(findings: Sequence[Finding], bar: Thresholds) -> list[Finding]:
    """Return the attacks that bring the rows back; one without a reference proves nothing."""
    attacks = [f for f in findings if f.group == "robustness" and f.reference is not None]
    return [f for f in attacks if remains(f) >= bar.brought_back and f.reference is not None and f.low > f.reference]


def recognised(findings: Sequence[Finding], bar: Thresholds) -> list[Finding]:
    """Return the membership scores that recognise the rows, if there are at least two."""
    scores = [f for f in findings if f.name.startswith("auc/") and f.reference is not None]
    found = [f for f in scores if f.reference is not None and f.value - f.reference >= bar.recognised and f.low > f.reference]
    return found if len(found) >= 2 else []


def worse(findings: Sequence[Finding], bar: Thresholds) -> list[Finding]:
    """Return the numbers of what must stay that fell."""
    parts = [f for f in findings if f.group == "utility" and f.name != "utility"]  # which is made of the others
    kept = [f for f in parts if f.reference is not None and f.reference > LEAST]
    return [f for f in kept if f.reference is not None and f.value <= (1 - bar.harmed) * f.reference and f.high < f.reference]


def pushed(findings: Sequence[Finding], bar: Thresholds) -> list[str]:
    """Return what shows that the rows were pushed too far: two numbers or more, else nothing."""
    named = {finding.name: finding for finding in findings}
    nll, leak, quality = named.get("nll"), named.get("privleak"), named.get("forget_quality")
    found = []
    if nll is not None and nll.reference is not None and nll.value - nll.reference >= bar.over_nll and nll.low > nll.reference:
        found.append(f"NLL {nll.value:.3g} nats per token against {nll.reference:.3g} ({nll.against})")
    if leak is not None and leak.value >= bar.over_privleak and leak.low > 0:
        found.append(f"PrivLeak {leak.value:+.3g} (0 is the reference)")
    if found and quality is not None and quality.value < bar.different:
        found.append(f"forget quality p = {quality.value:.2g}")
    return found if len(found) >= 2 else []


def said(finding: Finding) -> str:
    """Return an attack's or output's number in words."""
    against = f"{finding.reference:.3g} ({finding.against})" if finding.reference is not None else "nothing to compare with"
    return f"{finding.name} {finding.value:.3g} against {against}, {remains(finding):.0%} of the way to the original"


def seen(finding: Finding) -> str:
    """Return a membership score in words."""
    return (
        f"{finding.name} {finding.value:.3g} ({finding.low:.3g} to {finding.high:.3g}) against {finding.reference:.3g} ({finding.against})"
    )


def lost(finding: Finding) -> str:
    """Return a loss in words."""
    return f"{finding.name} {finding.value:.3g} against {finding.reference:.3g} ({finding.against})"


def _outputs(findings: Sequence[Finding], bar: Thresholds) -> str:
    chosen = [f for f in findings if f.group == "memory" and not math.isnan(remains(f))]
    if not chosen:
        return "what it says: the original says no more of these rows than the reference"
    return "what it says: " + "; ".join(said(finding) for finding in chosen) + f" (bar {bar.remembered:.0%} in {bar.shown_by} numbers)"


def _in_favour(findings: Sequence[Finding]) -> list[str]:
    """Return the numbers that speak for forgotten."""
    attacks = [f for f in findings if f.group == "robustness" and f.reference is not None and not math.isnan(remains(f))]
    scores = [f for f in findings if f.name.startswith("auc/") and f.reference is not None]
    kept = [f for f in findings if f.group == "utility" and f.reference is not None]
    quality = next((f for f in findings if f.name == "forget_quality"), None)
    lines = []
    if attacks:
        lines.append("attacked: " + "; ".join(said(finding) for finding in attacks))
    if scores:
        lines.append("membership: " + "; ".join(seen(finding) for finding in scores))
    if kept:
        lines.append("what stays: " + "; ".join(lost(finding) for finding in kept))
    if quality is not None:
        lines.append(f"forget quality p = {quality.value:.2g} (KS test against the oracle; small n makes p large)")
    return lines
