"""Recall of taught answers: does a causal language model still say them, how likely are they, and where do they rank?

The answer's tokens and the end token are fed in after the question. If the argmax at each of these positions is the next answer token,
greedy decoding writes exactly this answer and stops, and else it does not (by induction over the tokens), so one batched forward pass
replaces generation.

| value | meaning |
|---|---|
| `exact` | 1 if greedy decoding gives the answer and stops, else 0 |
| `probability` | exp of the mean log-probability per answer token = exp(-NLL) (TOFU, Maini et al. 2401.06121) |
| `likelihood` | exp of the sum: the probability that sampling writes this answer |
| `loss` | -mean log-probability per answer token, nats |
| `rank`, `reciprocal_rank` | rank of the answer's first token in the whole vocabulary (1 = best, ties share the mean rank), and 1/rank |
| `answer_rank`, `answer_reciprocal_rank` | rank by `probability` among the row's perturbed answers; only rows that have them |
| `paraphrased/...` | the first six, over the row's paraphrased questions (mean per row); only rows that have them |

Means are over rows; the end token counts as an answer token. Neighbouring facts are one more `Recall` on their rows.
Cost: one forward pass over rows x (1 + paraphrases + perturbed answers).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake
from remanence.models.forward import evaluating
from remanence.seeds import numpy_generator
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import Batches
from remanence.training.scoring import check_size, encoded, item_names, per_row, token_scores, walk

if TYPE_CHECKING:
    from datasets import Dataset

DIRECT, PARAPHRASED, PERTURBED = 0, 1, 2


class Questions(NamedTuple):
    """Everything that is asked, flat: direct questions first (one per row), then paraphrases, then perturbed answers."""

    rows: Dataset
    role: np.ndarray  # DIRECT, PARAPHRASED or PERTURBED
    owner: np.ndarray  # number of the row that it belongs to


@dataclass(frozen=True, eq=False)
class Recall:
    """Measure how well the answers are recalled.

    Args:
        rows: of kind qa.
        limit: look at this many rows only, a fixed random choice (the same at every moment and in every run).
        paraphrased: ask the paraphrased questions too, where there are any.
        ranked: weigh the answer against the perturbed ones too, where there are any.
        batch_size: questions per forward pass.
        length: longest question with answer, in tokens.
        template: how question and answer are laid out; the one that was trained with.

    Raises:
        Mistake: wrong columns, no rows, an empty answer or question, a row that is too long, no tokenizer.
    """

    rows: Dataset
    limit: int | None = None
    paraphrased: bool = True
    ranked: bool = True
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)
    _asked: Questions = field(init=False, repr=False)
    _items: list[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("recall", self.rows, "qa")
        check_size("recall", self.batch_size)
        if self.limit is not None and self.limit < 1:
            raise Mistake("recall", f"limit is {self.limit}", "give at least 1, or leave it out")
        count = len(self.rows)
        chosen = np.arange(count)
        if self.limit is not None and self.limit < count:
            chosen = np.sort(numpy_generator("recall", count).permutation(count)[: self.limit])
        names = item_names(self.rows)
        object.__setattr__(self, "_items", [names[number] for number in chosen])
        object.__setattr__(self, "_asked", unroll(self.rows, chosen, self.paraphrased, self.ranked))

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the means over rows and each row's values."""
        rows = encoded(self._kept, at.processor, self._asked.rows, "qa", self.length, self.template)
        found = self._ask(model, rows)
        direct, paraphrased, perturbed = (self._asked.role == role for role in (DIRECT, PARAPHRASED, PERTURBED))
        count = len(self._items)
        columns = {name: values[direct] for name, values in found.items()}
        owner = self._asked.owner
        if perturbed.any():
            rank = answer_ranks(found["loss"][direct], found["loss"][perturbed], owner[perturbed])
            columns |= {"answer_rank": rank, "answer_reciprocal_rank": 1 / rank}
        if paraphrased.any():
            columns |= {f"paraphrased/{name}": owner_mean(values[paraphrased], owner[paraphrased], count) for name, values in found.items()}
        present = {name: counts_for(name, owner[perturbed], owner[paraphrased], count) for name in columns}
        items = [
            {"item": item} | {name: float(values[number]) for name, values in columns.items() if present[name][number]}
            for number, item in enumerate(self._items)
        ]
        return Scores({name: float(values[present[name]].mean()) for name, values in columns.items()}, items)

    def _ask(self, model: nn.Module, rows: Batches) -> dict[str, np.ndarray]:
        """Return the six values of every question, each (questions,)."""
        total, tokens, hits, rank = (np.zeros(rows.count) for _ in range(4))
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                found = token_scores(model, batch, ranks=True)
                total[numbers] = per_row(found.logp, found.row, len(numbers)).numpy()
                tokens[numbers] = torch.bincount(found.row, minlength=len(numbers)).numpy()
                hits[numbers] = per_row(found.top, found.row, len(numbers)).numpy()
                rank[numbers] = found.first_rank.numpy()
        mean = total / tokens
        return {
            "exact": (hits == tokens).astype(np.float64),
            "probability": np.exp(mean),
            "likelihood": np.exp(total),
            "loss": -mean,
            "rank": rank,
            "reciprocal_rank": 1 / rank,
        }


def unroll(rows: Dataset, chosen: np.ndarray, paraphrased: bool, ranked: bool) -> Questions:
    """Lay out the chosen rows' questions, paraphrases and perturbed answers as one flat set of kind qa.

    Raises:
        Mistake: an answer or question is empty, naming its row.
    """
    from datasets import Dataset

    plain = rows.with_format(None).select(chosen)
    question, answer = list(plain["question"]), list(plain["answer"])
    direct = [(DIRECT, n, question[n], answer[n]) for n in range(len(chosen))]
    flat = list(direct)
    if paraphrased and "paraphrases" in plain.column_names:
        flat += [(PARAPHRASED, n, other, answer[n]) for n, others in enumerate(plain["paraphrases"]) for other in others or ()]
    if ranked and "perturbed_answers" in plain.column_names:
        flat += [(PERTURBED, n, question[n], other) for n, others in enumerate(plain["perturbed_answers"]) for other in others or ()]
    for role, n, asked, said in flat:
        part = "question" if not (asked or "").strip() else "answer" if not (said or "").strip() else None
        if part is not None:
            kind = ("", "paraphrased ", "perturbed ")[role]
            raise Mistake("recall", f"row {chosen[n]} has an empty {kind}{part}", "fill it in or leave the row out")
    roles, owners, questions, answers = zip(*flat)
    return Questions(Dataset.from_dict({"question": questions, "answer": answers}), np.array(roles), np.array(owners))


def answer_ranks(own: np.ndarray, other: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the rank of each row's loss (N,) among it and the losses (M,) that `owner` gives it: 1 is lowest, ties share the mean rank."""
    count = len(own)
    better = np.bincount(owner, other < own[owner], minlength=count)
    equal = np.bincount(owner, other == own[owner], minlength=count)
    broken = np.isnan(own) | (np.bincount(owner, np.isnan(other), minlength=count) > 0)
    return np.where(broken, np.nan, 1 + better + equal / 2)


def owner_mean(values: np.ndarray, owner: np.ndarray, count: int) -> np.ndarray:
    """Return the mean of the values (M,) that belong to each of `count` rows; 0 for a row that has none."""
    return np.bincount(owner, values, minlength=count) / np.maximum(1, np.bincount(owner, minlength=count))


def counts_for(name: str, perturbed: np.ndarray, paraphrased: np.ndarray, count: int) -> np.ndarray:
    """Say which rows have a value of this name."""
    if name.startswith("paraphrased/"):
        return np.bincount(paraphrased, minlength=count) > 0
    if name.startswith("answer_"):
        return np.bincount(perturbed, minlength=count) > 0
    return np.ones(count, dtype=bool)
