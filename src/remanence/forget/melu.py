r"""Modular entity-level unlearning (MELU): let each forget row meet retain rows of its own entity, under whatever loss forgets.

Losses that forget take a forget and a retain row at a time, and which two meet is usually an accident. Here it is a choice: this forgetter wraps another
one, whose loss and settings stay, and decides by the pairing strategies of `training/pairing.py` what its pairs are; `cyclic`, `one_to_one_random` and the
others are the paper's baselines.

Paper: Bushipaka, Passaro and Cucinotta 2025, "Standard vs. Modular Sampling: Best Practices for Reliable LLM Unlearning", arXiv 2509.05316.
Objective: the inner one's. With GradDiff, NPO or IdkDPO inside, the paper's three.

| paper | here | shape | default |
|---|---|---|---|
| target entity of a row | column `entity_key` of forget and retain rows | text | title |
| direct, indirect, general retain rows | column `type_key` of retain rows: entity, domain, general | text | type |
| MELU, cyclic, 1:1, ... | strategy | name | melu |
| seed of the general rows' partners, and of balanced | seed | int | 42 |
| GradDiff, NPO, IdkDPO | inner: any forgetter that asks the trainer for pairs | forgetter | NPO |

An epoch is a pass over the pairs: max(n, m) or more of them under cyclic and melu, n one-to-one. At equal epochs these are other numbers of updates, so compare at
equal `steps` too; the note `pairs` says how many updates there were, and how often each side, type and entity was met.
Differs from the paper's code: entities with rows on one side only are refused rather than skipped (`allow_missing` skips them); order by_entity is ours.
Cost: the inner forgetter's; choosing rows is O(n + m) per epoch. Entities with many retain rows have their forget rows met more often: see the note.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from remanence.errors import Mistake
from remanence.forget.npo import NPO
from remanence.seeds import derive
from remanence.stream import Forgetter, Request
from remanence.training.batches import Batches
from remanence.training.pairing import LABELLED, PairedBatches, Pairing, check_names, pair, refuse_shared_questions
from remanence.training.processes import world_size
from remanence.training.requests import retain_of
from remanence.training.trainer import Stateful, Trainer


@dataclass(frozen=True)
class MELU:
    """Pair the rows of any pairwise forgetter entity by entity, or by another strategy.

    Args:
        inner: the forgetter at work inside; one with a retain term.
        strategy: melu | cyclic | one_to_one_seq | one_to_one_random | direct | indirect | balanced.
        entity_key: column with the entity of a forget or retain row.
        type_key: column with the type of a retain row: entity (direct) | domain (indirect) | general.
        order: shuffled | by_entity.
        seed: of what is drawn once and for all runs.
        allow_missing: leave out entities that have rows on one side only (melu), or too few indirect ones (balanced), instead of refusing them.

    Raises:
        Mistake: an unknown strategy or order.
    """

    inner: Forgetter = field(default_factory=NPO)
    strategy: str = "melu"
    entity_key: str = "title"
    type_key: str = "type"
    order: str = "shuffled"
    seed: int = 42
    allow_missing: bool = False

    def __post_init__(self) -> None:
        check_names("melu", self.strategy, self.order)

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Let the inner forgetter work on these pairs.

        Raises:
            Mistake: rows that cannot be paired so (see `pair`), held-out rows that are retained, or an inner forgetter that takes no pairs.
        """
        pairing, made, before = self._pairing(request), [], trainer.steps_done

        def make(forget: Batches, retain: Batches | None) -> PairedBatches:
            if retain is None:
                raise Mistake(
                    "melu.inner", f"{type(self.inner).__name__} has no retain term here, so nothing can be paired", "set its `retain`"
                )
            plan = pairing or self._of_counts(forget.count, retain.count)
            made.append(plan.batches(forget, retain, derive(trainer.seed, "pairs")))
            return made[-1]

        with trainer.paired(make):
            model = self.inner.forget(model, request, trainer)
        if not made:
            raise Mistake("melu.inner", f"{type(self.inner).__name__} takes no pairs of rows", "choose npo, gradient-difference, kl or dpo")
        updates = trainer.steps_done - before
        trainer.note("pairs", {"updates": updates} | met(made[0], updates * trainer.settings.accumulate * world_size()))
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return the inner forgetter's state."""
        return self.inner.state_dict() if isinstance(self.inner, Stateful) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        if isinstance(self.inner, Stateful):
            self.inner.load_state_dict(state)

    def _pairing(self, request: Request) -> Pairing | None:
        """Return the pairing of a request's rows; `None` for texts, whose blocks are counted when they are made."""
        retain = retain_of(request, "MELU")
        if request.holdout is not None:
            refuse_shared_questions(f"request '{request.name}'", ("holdout", request.holdout), ("retain", retain))
        if request.kind == "text":
            if self.strategy in LABELLED or self.order == "by_entity":
                problem = f"texts are cut into blocks that belong to no entity, and '{self.strategy}', {self.order}, needs entities"
                raise Mistake(f"request '{request.name}'", problem, "use kind qa or chat, or pair cyclic and shuffled")
            return None
        options = {"order": self.order, "seed": self.seed, "allow_missing": self.allow_missing}
        return pair(request.forget, retain, self.strategy, entity_key=self.entity_key, type_key=self.type_key, **options)  # type: ignore[arg-type]

    def _of_counts(self, forget: int, retain: int) -> Pairing:
        return Pairing(self.strategy, forget, retain, None, self.order, self.seed)


def met(batches: PairedBatches, taken: int) -> dict[str, Any]:
    """Return the exposures of the first `taken` batches (of an inner forgetter with several stages: as if it went on in the first one)."""
    return batches.pairing.report(taken * batches.size, batches.seed)
