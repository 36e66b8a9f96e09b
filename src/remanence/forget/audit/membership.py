"""Membership inference: can one tell the forget rows from hold-out rows of the same kind, which the model never saw?

| attack | score of a row, higher = more like a member | source |
|---|---|---|
| loss | -NLL per token | Yeom et al. 2018 |
| zlib | -NLL / bytes of the compressed answer | Carlini et al. 2021 (2012.07805) |
| min_k | mean of the lowest share k of the token log-probabilities, floor(k T) and at least one | Shi et al. 2023 (2310.16789) |
| min_k_plus_plus | the same of (log p - mu) / sigma, moments of log p under p over the vocabulary | Zhang et al. 2024 (2404.02936) |
| reference | NLL of a model that never saw the rows - NLL | Carlini et al. 2021; only with an oracle |
| entropy | -entropy of the prediction; classifiers only | Song and Mittal 2021 |

AUC: 1 = the forget rows are clearly recognisable as members, 0.5 = not at all, below: they stand out as too unlikely. The end token of an
answer does not count. PrivLeak (MUSE, 2407.06460) = 100 (A - A_ref) / A_ref with A = 1 - AUC on min_k, A_ref the oracle's (0.5 without
one): 0 ideal, near -100 not forgotten, positive over-forgotten. Cost: none beyond reading both sets once per model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from remanence.forget.audit.case import Case
from remanence.forget.audit.intervals import auc, auc_interval
from remanence.forget.audit.report import Finding
from remanence.training.memorisation import Tokens, ids_of, row_means

Score = Callable[[str, str], Float[np.ndarray, " N"]]
CHANCE = "chance"
TINY = 1e-10  # of sigma and A_ref, as OpenUnlearning has it


def measure_membership(case: Case) -> None:
    """Add the AUC of every attack, and PrivLeak."""
    if "holdout" not in case.sets:
        case.skipped["membership"] = "the request has no holdout: rows like the forgotten ones that the model never saw"
        return
    scores = language_scores(case) if case.language else class_scores(case)
    for name, score in scores.items():
        value, low, high = auc_interval(score("model", "forget"), score("model", "holdout"), case.settings.level)
        original = auc(score("original", "forget"), score("original", "holdout")) if "original" in case.models else None
        reference, against = 0.5, CHANCE
        if "oracle" in case.models and name != "reference":  # the oracle beside itself is 0.5 anyway
            reference, against = auc(score("oracle", "forget"), score("oracle", "holdout")), "the oracle"
        rows = len(score("model", "forget")) + len(score("model", "holdout"))
        case.findings.append(Finding(f"auc/{name}", "membership", value, low, high, "reference", reference, rows, against, original))
        if name == ("min_k" if case.language else "loss"):
            leak, bottom, top = (priv_leak(one, reference) for one in (value, high, low))  # a higher AUC is a lower PrivLeak
            before = priv_leak(original, reference) if original is not None else None
            whose = "the oracle's AUC" if against == "the oracle" else "an AUC of 0.5"
            case.findings.append(Finding("privleak", "membership", leak, bottom, top, "reference", 0.0, rows, whose, before))
    if case.language and "oracle" not in case.models:
        case.skipped["auc/reference"] = "there is no oracle, and the attack needs a model that never saw the rows"


def language_scores(case: Case) -> dict[str, Score]:
    """Return the attacks on a language model."""
    k, sizes = case.settings.min_k, {part: compressed_sizes(case, part) for part in ("forget", "holdout")}

    def on(formula: Callable[[Tokens], np.ndarray]) -> Score:
        return lambda who, part: formula(case.tokens(who, part).without_end())

    def loss(who: str, part: str) -> np.ndarray:
        return -case.tokens(who, part).without_end().nll()

    found: dict[str, Score] = {
        "loss": loss,
        "zlib": lambda who, part: zlib_score(-loss(who, part), sizes[part]),
        "min_k": on(lambda t: min_k(t.logp, t.row, t.rows, k)),
        "min_k_plus_plus": on(lambda t: min_k_plus_plus(t.logp, t.mean, t.deviation, t.row, t.rows, k)),
    }
    if "oracle" in case.models:
        found["reference"] = lambda who, part: loss(who, part) - loss("oracle", part)
    return found


def class_scores(case: Case) -> dict[str, Score]:
    """Return the attacks on a classifier."""

    def entropy(who: str, part: str) -> np.ndarray:
        logp = case.logits(who, part).log_softmax(1)
        return (logp.exp() * logp).nan_to_num().sum(1).numpy()

    found: dict[str, Score] = {"loss": lambda who, part: np.log(np.maximum(case.probability(who, part), 1e-300)), "entropy": entropy}
    if "oracle" in case.models:
        found["reference"] = lambda who, part: found["loss"](who, part) - found["loss"]("oracle", part)
    return found


def compressed_sizes(case: Case, part: str) -> Int[np.ndarray, " N"]:
    """Return the compressed bytes of each row's supervised text."""
    texts = case.processor.batch_decode(ids_of(case.rows(part)), skip_special_tokens=True)
    return zlib_sizes(texts)


def zlib_sizes(texts: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Return the bytes that zlib needs for each text in UTF-8."""
    return np.array([len(zlib.compress(text.encode())) for text in texts])


def zlib_score(nll: Float[np.ndarray, " B"], sizes: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """Return -NLL / compressed bytes."""
    return -nll / sizes


def min_k(logp: Float[np.ndarray, " N"], row: Int[np.ndarray, " N"], rows: int, k: float) -> Float[np.ndarray, " B"]:
    """Return each row's mean over its floor(k T) lowest values, at least one."""
    order = np.lexsort((logp, row))  # by row, then from the lowest
    count = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - (np.cumsum(count) - count)[row]
    kept = order[place < np.maximum(1, np.floor(k * count))[row]]
    return row_means(logp[kept], row[kept], rows)


def min_k_plus_plus(
    logp: Float[np.ndarray, " N"],
    mean: Float[np.ndarray, " N"],
    deviation: Float[np.ndarray, " N"],
    row: Int[np.ndarray, " N"],
    rows: int,
    k: float,
) -> Float[np.ndarray, " B"]:
    """Return min_k of the log-probabilities standardised by the vocabulary's."""
    return min_k((logp - mean) / np.maximum(deviation, TINY), row, rows, k)


def priv_leak(auc_value: float, auc_reference: float = 0.5) -> float:
    """Return 100 (A - A_ref) / A_ref with A = 1 - AUC, in percent."""
    return 100 * ((1 - auc_value) - (1 - auc_reference)) / (1 - auc_reference + TINY)
