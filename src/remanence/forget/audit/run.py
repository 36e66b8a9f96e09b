"""Do an audit: read every model on every set once, attack copies, and judge.

Nothing is written, and the models are left as they were. Cost: about (3 + wrong answers + paraphrases + prefixes + numbers of bits) forward
passes over the forget rows, two over what must stay, the continuations, all of it per model, and two relearning attacks; see each file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from remanence.errors import Mistake
from remanence.forget.audit.case import Case
from remanence.forget.audit.classifiers import measure_classes
from remanence.forget.audit.extraction import Writings, measure_memory
from remanence.forget.audit.membership import measure_membership
from remanence.forget.audit.prefixes import attack_with_paraphrases, attack_with_prefixes
from remanence.forget.audit.quality import measure_distance
from remanence.forget.audit.quantization import attack_with_quantization
from remanence.forget.audit.relearning import attack_by_relearning
from remanence.forget.audit.report import AuditReport
from remanence.forget.audit.settings import AuditSettings
from remanence.forget.audit.truth_ratio import TruthRatios, measure_forget_quality
from remanence.forget.audit.utility import measure_utility
from remanence.forget.audit.verdict import judge
from remanence.models.forward import is_language_model, positions, vocabulary
from remanence.stream import Request, keys_of


def audit(
    model: nn.Module,
    request: Request,
    *,
    processor: Any,
    original: nn.Module | None = None,
    oracle: nn.Module | None = None,
    settings: AuditSettings = AuditSettings(),  # noqa: B008
    seed: int = 0,
    progress: bool = True,
) -> AuditReport:
    """Find out what a model still holds of rows that it was asked to forget.

    Args:
        model: that served the request.
        request: the rows to forget, and those that must stay, neighbours and hold-out rows where there are any.
        processor: tokenizer or image processor of all models.
        original: the model before it forgot.
        oracle: a model that was trained without the rows.
        settings: how to audit.
        seed: of every random choice.
        progress: draw a bar.

    Raises:
        Mistake: models that do not fit the rows or each other, hold-out rows that were trained on, or a model that gives no numbers.
    """
    models = {"model": model} | {name: one for name, one in (("original", original), ("oracle", oracle)) if one is not None}
    check(request, models, processor)
    work: list[tuple[str, Callable[[], None]]] = []
    if request.kind in ("text", "qa", "chat"):  # a longer row would go past the positions that a model has
        settings = dataclasses.replace(settings, length=min(settings.length, *(positions(one) for one in models.values())))
    case = Case(request, models, processor, settings, seed, progress)
    writings, ratios = Writings(case), TruthRatios(case)
    if case.language:
        work += [("memory", lambda: measure_memory(case, writings)), ("quality", lambda: measure_forget_quality(case, ratios))]
    else:
        work.append(("memory", lambda: measure_classes(case)))
    work += [
        ("quality", lambda: measure_distance(case)),
        ("membership", lambda: measure_membership(case)),
        ("utility", lambda: measure_utility(case, writings, ratios)),
        ("paraphrase", lambda: attack_with_paraphrases(case)),
        ("prefix", lambda: attack_with_prefixes(case)),
        ("quantization", lambda: attack_with_quantization(case)),
        ("relearning", lambda: attack_by_relearning(case)),
    ]
    chosen = [(name, do) for name, do in work if name in settings.parts]
    case.announce(len(chosen) + len(settings.bits) + 2 * settings.relearn_steps)
    try:
        for name, do in chosen:
            do()
            case.tick(name)
    finally:
        case.close()
    for name, _ in work:
        if name not in settings.parts:
            case.skipped[name] = "not asked for"
    verdict = judge(case.findings, settings.thresholds)
    return AuditReport(
        request.name,
        request.kind,
        verdict.word,
        verdict.reasons,
        case.findings,
        case.curves,
        case.skipped,
        verdict.also,
        {part: len(rows) for part, rows in case.sets.items()},
        seed,
        settings.level,
        dataclasses.asdict(settings),
    )


def check(request: Request, models: dict[str, nn.Module], processor: Any) -> None:
    """Refuse what would give wrong numbers.

    Raises:
        Mistake: see `audit`.
    """
    language = request.kind in ("text", "qa", "chat")
    for name, model in models.items():
        if is_language_model(model) != language:
            what = "a language model" if is_language_model(model) else "a classifier"
            raise Mistake(f"audit, {name}", f"is {what}, the rows are of kind '{request.kind}'", "give rows and models that fit")
    sizes = {name: vocabulary(model) for name, model in models.items()} if language else {}
    for name, size in sizes.items():
        if size != sizes["model"]:
            raise Mistake(f"audit, {name}", f"knows {size} tokens, the audited model {sizes['model']}", "compare models of one tokenizer")
    if language and processor is None:
        raise Mistake("audit", "there is no tokenizer", "give the models' tokenizer as `processor`")
    if request.holdout is not None:
        unseen = keys_of(request.holdout, request.kind)
        for part in ("forget", "retain"):
            rows = getattr(request, part)
            trained = set(keys_of(rows, request.kind)) if rows is not None else set()
            shared = [number for number, key in enumerate(unseen) if key in trained]
            if shared:
                problem = f"{len(shared)} rows of the holdout stand in the {part} set too (the first is row {shared[0]})"
                raise Mistake(f"request '{request.name}'", problem, "hold out rows that no model was trained on")
