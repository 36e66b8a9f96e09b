"""What can be set in a conversation memory, with the defaults of HEMA (arXiv 2504.16754); the baselines and ablation rows by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remanence.errors import Mistake, nearest

SIGNS = ("bonus", "as_printed")
RETRIEVAL = ("dense", "lexical", "hybrid")


@dataclass(frozen=True)
class HemaSettings:
    """Set a conversation memory.

    Args:
        budget: tokens of a composed prompt, hard.
        summary_tokens: of one level of the gist.
        period: turns of a segment, and between two maintenances.
        lam: weight of age in the salience (`recall/salience.py`).
        gamma: its decay per turn.
        beta: bonus for what was retrieved within the recent window.
        recent_window: turns within which a retrieval counts as recent.
        prune_fraction: of the chunks, pruned at each maintenance.
        salience: bonus | as_printed, the sign of beta.
        sos: two levels of gist; off: one summary, rewritten at every turn.
        forgetting: prune at maintenance.
        compact: the gist enters the prompt (and is made).
        vectors: retrieved chunks enter the prompt.
        retrieval: dense | lexical | hybrid.
        pool: candidates that are retrieved.
        top_k: of them, the most that enter a prompt.
        tail: of the last messages enter the prompt; with compact and vectors off as many as fit.
        chunk_tokens: of the pieces of a message.
        max_chunks: prune down to so many at maintenance (ours: the paper's fraction removes very little).
        max_age: prune what is older, in turns (ours).
    """

    budget: int = 3500
    summary_tokens: int = 60
    period: int = 100
    lam: float = 1.0
    gamma: float = 0.002
    beta: float = 0.5
    recent_window: int = 100
    prune_fraction: float = 0.005
    salience: str = "bonus"
    sos: bool = True
    forgetting: bool = True
    compact: bool = True
    vectors: bool = True
    retrieval: str = "dense"
    pool: int = 50
    top_k: int = 10
    tail: int = 2
    chunk_tokens: int = 256
    max_chunks: int | None = None
    max_age: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("salience", SIGNS), ("retrieval", RETRIEVAL)):
            if getattr(self, name) not in known:
                raise Mistake(name, f"there is no '{getattr(self, name)}'", nearest(str(getattr(self, name)), known))
        for name in ("budget", "summary_tokens", "period", "recent_window", "pool", "chunk_tokens", "max_chunks", "max_age"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Mistake(name, f"is {value}", "give at least 1")
        for name in ("top_k", "tail", "lam", "gamma", "beta"):
            if getattr(self, name) < 0:
                raise Mistake(name, f"is {getattr(self, name)}", "give 0 or more")
        if not 0 <= self.prune_fraction <= 1:
            raise Mistake("prune_fraction", f"is {self.prune_fraction}", "give a share between 0 and 1")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> HemaSettings:
        """Return settings from a mapping.

        Raises:
            Mistake: an unknown key or a wrong value.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise Mistake(key, "is no setting of a conversation memory", nearest(key, known))
        return cls(**given)


POLICIES: dict[str, dict[str, Any]] = {
    "A": {"sos": False, "forgetting": False},  # the four ablation rows of the paper
    "B": {"sos": False, "forgetting": True},
    "C": {"sos": True, "forgetting": False},
    "D": {"sos": True, "forgetting": True},
    "recent": {"compact": False, "vectors": False, "budget": 4000},  # the three baselines
    "summary": {"vectors": False},
    "bm25": {"compact": False, "retrieval": "lexical", "top_k": 5},
    "rag": {"compact": False},  # plain streaming retrieval
}


def policy(name: str, **settings: Any) -> HemaSettings:
    """Return the settings of a baseline or an ablation row by its name.

    Raises:
        Mistake: there is none of that name.
    """
    if name not in POLICIES:
        raise Mistake("policy", f"there is no '{name}'", nearest(name, POLICIES))
    return HemaSettings.of(POLICIES[name] | settings)
