"""Truth ratio and forget quality, as TOFU (arXiv 2401.06121) defines them: is the true answer still likelier than wrong ones of its form?

Forget quality is the p-value of the two-sample Kolmogorov-Smirnov test between the truth ratios on the forget rows of the audited model and
of the oracle: 1 = no difference can be seen. A p-value grows when rows are few, so values of requests of unlike size cannot be compared.
Without an oracle it is refused, never substituted. Formulas: `training/memorisation.py`. Cost: one forward pass over rows x (true and wrong
answers) per model.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from remanence.forget.audit.case import Case
from remanence.forget.audit.report import Finding
from remanence.training.batches import Batches
from remanence.training.memorisation import alternatives, question_rows, truth_ratio, truth_ratio_forget


class TruthRatios:
    """The truth ratios of a case's models on its sets, each read once."""

    def __init__(self, case: Case):
        self.case = case
        self._asked: dict[str, tuple[Batches, np.ndarray] | None] = {}
        self._found: dict[tuple[str, str], np.ndarray] = {}

    def there(self, part: str) -> bool:
        """Whether the set has wrong answers."""
        if part not in self._asked:
            rows = self.case.sets.get(part)
            told = alternatives(rows, self.case.settings.true_answer) if rows is not None and self.case.kind == "qa" else None
            if rows is None or told is None:
                self._asked[part] = None
            else:
                true, wrong, owner = told
                questions = list(rows.with_format(None)["question"])
                asked = question_rows([*questions, *(questions[number] for number in owner)], [*true, *wrong])
                self._asked[part] = self.case.encode(asked), owner
        return self._asked[part] is not None

    def __call__(self, who: str, part: str) -> Float[np.ndarray, " N"]:
        """Return each row's truth ratio; NaN for a row without wrong answers, all NaN for a set without any."""
        if (who, part) not in self._found:
            count = len(self.case.sets[part])
            if not self.there(part):
                return np.full(count, np.nan)
            self.case.show(f"wrong answers of {part}, {who}")
            batches, owner = self._asked[part]  # type: ignore[misc]
            nll = self.case.nll(self.case.models[who], batches)
            self._found[who, part] = truth_ratio(nll[:count], nll[count:], owner, self.case.settings.truth_ratio)
        return self._found[who, part]


def measure_forget_quality(case: Case, ratios: TruthRatios) -> None:
    """Add the forget score of the truth ratio and the forget quality."""
    if not ratios.there("forget"):
        why = "the forget rows have no perturbed_answers" if case.kind == "qa" else f"rows of kind {case.kind} have no wrong answers"
        case.skipped["truth_ratio"] = case.skipped["forget_quality"] = why
        return
    case.compare("truth_ratio", "quality", lambda who, part: truth_ratio_forget(ratios(who, part)), alone="higher")
    if "oracle" not in case.models:
        case.skipped["forget_quality"] = "there is no oracle, and nothing else can stand for it"
        return
    ours, theirs = (kept(ratios(who, "forget")) for who in ("model", "oracle"))
    p = forget_quality(ours, theirs)
    before = forget_quality(kept(ratios("original", "forget")), theirs) if "original" in case.models else None
    case.findings.append(Finding("forget_quality", "quality", p, p, p, "higher", 1.0, len(ours), "the oracle", before))


def kept(ratios: Float[np.ndarray, " N"]) -> Float[np.ndarray, " M"]:
    """Return the ratios of the rows that have one."""
    return ratios[~np.isnan(ratios)]


def forget_quality(ratios: Float[np.ndarray, " N"], oracle: Float[np.ndarray, " N"]) -> float:
    """Return the p-value of the two-sided two-sample KS test between the truth ratios of a model and of the oracle."""
    from scipy.stats import ks_2samp

    return float(ks_2samp(ratios, oracle).pvalue)
