"""The part of an audit that is of classifiers alone: how often the forgotten rows are still named right.

Cost: none beyond reading the rows once per model.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from remanence.forget.audit.case import Case


def measure_classes(case: Case) -> None:
    """Add accuracy, probability and NLL on the forget rows."""
    for name in ("truth_ratio", "forget_quality"):
        case.skipped[name] = f"rows of kind {case.kind} have no wrong answers beside the true one"
    case.compare("accuracy", "memory", lambda who, part: right(case, who, part))
    case.compare("probability", "memory", case.probability)
    case.compare("nll", "quality", lambda who, part: -np.log(np.maximum(case.probability(who, part), 1e-300)), alone="higher", share=False)


def right(case: Case, who: str, part: str) -> Float[np.ndarray, " N"]:
    """Return 1 for each row whose class is right, else 0."""
    labels = case.rows(part).columns["labels"][:]  # type: ignore[index]
    return (case.logits(who, part).argmax(1) == labels).double().numpy()
