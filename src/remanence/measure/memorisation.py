"""How much of an answer or text a model has by heart: exact memorisation, extraction strength and truth ratio of every row.

| value | meaning | rows |
|---|---|---|
| `exact_memorisation` | share of tokens whose argmax, with the right tokens before it, is right | all |
| `extraction_strength` | share of the tokens in the unbroken run of right argmaxes at the end: what a prefix suffices to extract | all |
| `truth_ratio` | probability of wrong answers over that of the paraphrased true one, min(TR, 1/TR) as of rows that must go | those with wrong answers |

Formulas and their conventions stand in `training/memorisation.py`; audits (`forget/audit/`) use the same. The end token of an answer counts
in the truth ratio alone. Of kind text an item is a block of `length` tokens. Cost: one forward pass over rows x (1 + true and wrong answers
of the truth ratio).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake, nearest
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import Batches
from remanence.training.memorisation import (
    MEANS,
    alternatives,
    exact_memorisation,
    extraction_strength,
    question_rows,
    read_tokens,
    truth_ratio,
    truth_ratio_forget,
)
from remanence.training.scoring import check_size, encoded, item_names

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = ("text", "qa", "chat")


@dataclass(frozen=True, eq=False)
class Memorisation:
    """Measure how much a causal language model has by heart.

    Args:
        rows: what to measure on.
        kind: text | qa | chat.
        batch_size: rows per forward pass.
        length: longest row in tokens.
        template: of kind qa.
        mean: of wrong answers in the truth ratio: probabilities | losses.

    Raises:
        Mistake: another kind, wrong columns, no rows, an unknown mean.
    """

    rows: Dataset
    kind: str = "qa"
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    mean: str = "probabilities"
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)
    _told: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("memorisation", self.rows, self.kind)
        check_size("memorisation", self.batch_size)
        if self.kind not in KINDS:
            raise Mistake("memorisation", f"rows of kind '{self.kind}' are not memorised word by word", "use accuracy")
        if self.mean not in MEANS:
            raise Mistake("memorisation.mean", f"unknown value {self.mean!r}", nearest(self.mean, MEANS))

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the means over rows and each row's values."""
        rows = encoded(self._kept, at.processor, self.rows, self.kind, self.length, self.template)
        end = getattr(at.processor, "eos_token_id", None) if self.kind == "qa" else None
        tokens = read_tokens(model, rows, self.batch_size, end=end).without_end()
        found = {
            "exact_memorisation": exact_memorisation(tokens.top, tokens.row, tokens.rows),
            "extraction_strength": extraction_strength(tokens.top, tokens.row, tokens.rows),
        }
        told = alternatives(self.rows) if self.kind == "qa" else None
        if told is not None:
            true, wrong, owner = told
            questions = list(self.rows.with_format(None)["question"])
            asked = question_rows([*questions, *(questions[number] for number in owner)], [*true, *wrong])
            said = encoded(self._told, at.processor, asked, "qa", self.length, self.template)
            nll = read_tokens(model, said, self.batch_size).nll()
            found["truth_ratio"] = truth_ratio_forget(truth_ratio(nll[: len(true)], nll[len(true) :], owner, self.mean))
        names = item_names(self.rows) if rows.count == len(self.rows) and self.kind != "text" else list(range(rows.count))
        items = [
            {"item": name} | {key: float(column[number]) for key, column in found.items() if not np.isnan(column[number])}
            for number, name in enumerate(names)
        ]
        return Scores({key: float(np.nanmean(column)) for key, column in found.items()}, items)
