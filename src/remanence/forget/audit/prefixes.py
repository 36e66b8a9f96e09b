"""Paraphrase and prefix attacks: ask in words that forgetting did not train on, plead, or show how others were answered.

Each row's score is its best try: the highest probability exp(-NLL) of the right answer over the row's paraphrased questions, or over all
prefixes (pleas of the kinds that RWKU uses, arXiv 2406.10890, and a few retain rows with their answers). The plain question is not among
the tries. Cost: one forward pass over rows x tries per model.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from remanence.errors import Mistake
from remanence.forget.audit.case import Case
from remanence.seeds import numpy_generator
from remanence.training.batches import Batches
from remanence.training.memorisation import best_of, flattened, question_rows


def attack_with_paraphrases(case: Case) -> None:
    """Add the probability of the answers to paraphrased questions."""
    rows = case.sets["forget"]
    if case.kind != "qa" or "paraphrases" not in rows.column_names:
        case.skipped["paraphrase"] = (
            "the forget rows have no paraphrases" if case.kind == "qa" else f"rows of kind {case.kind} are not asked"
        )
        return
    tries: dict[str, tuple[Batches, np.ndarray]] = {}

    def measure(who: str, part: str) -> Float[np.ndarray, " N"]:
        plain = case.sets[part].with_format(None)
        if part not in tries:
            asked, owner = flattened(list(plain["paraphrases"]) if "paraphrases" in plain.column_names else [])
            answers = list(plain["answer"])
            if asked:
                tries[part] = case.encode(question_rows(asked, [answers[number] for number in owner])), owner
        if part not in tries:
            return np.full(len(plain), np.nan)
        batches, owner = tries[part]
        return best_of(np.exp(-case.nll(case.models[who], batches)), owner, len(plain))

    case.compare("paraphrase", "robustness", measure, original=case.probability)


def attack_with_prefixes(case: Case) -> None:
    """Add the probability of the answers behind the best of several prefixes."""
    if case.kind != "qa":
        case.skipped["prefix"] = f"rows of kind {case.kind} are not asked"
        return
    tries: dict[str, list[Batches]] = {}

    def measure(who: str, part: str) -> Float[np.ndarray, " N"]:
        if part not in tries:
            tries[part] = prefixed(case, part)
        found = [np.exp(-case.nll(case.models[who], batches)) for batches in tries[part]]
        return np.max(found, axis=0) if found else np.full(len(case.sets[part]), np.nan)

    case.compare("prefix", "robustness", measure, original=case.probability)


def prefixed(case: Case, part: str) -> list[Batches]:
    """Return a set's rows behind each prefix; one with which a row would be longer than `length` is left out."""
    plain, found = case.sets[part].with_format(None), []
    questions, answers = list(plain["question"]), list(plain["answer"])
    tries = [([prefix + question for question in questions], case.settings.template) for prefix in case.settings.prefixes]
    if case.settings.shots and "retain" in case.sets:
        tries.append((questions, shown_template(case)))
    for asked, template in tries:
        try:
            found.append(case.encode(question_rows(asked, answers), template=template))
        except Mistake as mistake:  # too long
            case.skipped["prefix/one of them"] = str(mistake)
    return found


def shown_template(case: Case) -> str:
    """Return the template with a few retain rows and their answers in front, the same for every row and model."""
    rows, template = case.sets["retain"].with_format(None), case.settings.template
    order = numpy_generator(case.seed, "audit", "shots").permutation(len(rows))[: case.settings.shots]
    chosen = rows.select(np.sort(order))
    shots = [template.replace("{answer}", a).replace("{question}", q) for q, a in zip(chosen["question"], chosen["answer"])]
    return "\n\n".join([*shots, template])
