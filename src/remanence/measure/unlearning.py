r"""How much a model still knows of some rows, and two symmetric scores that hold it against a model that never saw what was deleted.

| value | meaning |
|---|---|
| `probability` | exp of the mean log-probability per answer token |
| `rouge` | ROUGE-L F1 of the greedy answer, prompt left out, against the true one |
| `token_accuracy` | share of the answer's tokens that are the argmax after the true ones before them |
| `knowledge` | F or R: the cube root of the product of the three means |

F.D. = max(0, 1 - |F / F_Q - 1|) on what was deleted, R.U. the same with R on what must stay; F_Q and R_Q are those of the reference (a model trained without
the deleted rows). Both are 1 where the model behaves as the reference; forgetting too much costs as much as too little (FIT, arXiv 2601.21682).
Cost of the probe: one forward pass over the rows, and the generation of `most` tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake
from remanence.models.forward import evaluating
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import Batches
from remanence.training.rouge import rouge_l
from remanence.training.scoring import check_size, encoded, item_names, per_row, token_scores, walk
from remanence.training.writing import continuations

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Measure what a model still knows of question-answer rows: probability, ROUGE-L and token accuracy, and their geometric mean.

    Args:
        rows: of kind qa.
        most: tokens of a greedy answer.
        batch_size: questions at a time.
        length: longest question with answer, in tokens.
        template: how question and answer are laid out; the one that was trained with.

    Raises:
        Mistake: wrong columns, no rows, fewer than one token to generate.
    """

    rows: Dataset
    most: int = 48
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("knowledge", self.rows, "qa")
        check_size("knowledge", self.batch_size)
        if self.most < 1:
            raise Mistake("knowledge.most", f"is {self.most}", "give at least 1")

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the four values over all rows, and the first three of each row."""
        rows = encoded(self._kept, at.processor, self.rows, "qa", self.length, self.template)
        total, tokens, hits = np.zeros(rows.count), np.zeros(rows.count), np.zeros(rows.count)
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                found = token_scores(model, batch)
                total[numbers] = per_row(found.logp, found.row, len(numbers)).numpy()
                tokens[numbers] = torch.bincount(found.row, minlength=len(numbers)).numpy()
                hits[numbers] = per_row(found.top, found.row, len(numbers)).numpy()
        plain = self.rows.with_format(None)
        prompts = [self.template.replace("{answer}", "").replace("{question}", question).rstrip() for question in plain["question"]]
        said = greedy_answers(model, at.processor, prompts, self.most, self.batch_size)
        values = {
            "probability": np.exp(total / tokens),
            "rouge": rouge_l(list(plain["answer"]), said).f1,
            "token_accuracy": hits / tokens,
        }
        items = [
            {"item": name} | {key: float(value[number]) for key, value in values.items()}
            for number, name in enumerate(item_names(self.rows))
        ]
        means = {"probability": values["probability"].mean(), "rouge": values["rouge"].mean(), "token_accuracy": hits.sum() / tokens.sum()}
        return Scores({key: float(value) for key, value in means.items()} | {"knowledge": knowledge(*map(float, means.values()))}, items)


def greedy_answers(model: nn.Module, tokenizer: Any, prompts: Sequence[str], most: int, size: int = 64) -> list[str]:
    """Return what greedy decoding writes after each prompt, without the prompt, up to the end token or `most` tokens."""
    ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    ids = [row[:-1] if row[-1:] == [tokenizer.eos_token_id] and len(row) > 1 else row for row in ids]  # some tokenizers end every text
    said = continuations(model, ids, most, size=size, processor=tokenizer)
    return [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]


def knowledge(probability: float, rouge: float, accuracy: float) -> float:
    """Return (Prob * ROUGE * Acc)^(1/3)."""
    return (probability * rouge * accuracy) ** (1 / 3)


def symmetric(value: float, reference: float) -> float:
    """Return max(0, 1 - |value / reference - 1|): 1 at the reference, 0 from twice it on, at 0, and where the reference is 0."""
    return max(0.0, 1 - abs(value / reference - 1)) if reference > 0 else 0.0


def forget_degree(*, forget: float, forget_reference: float) -> float:
    """Return F.D. from the knowledge of the deleted rows, of the model and of the reference."""
    return symmetric(forget, forget_reference)


def retain_utility(*, retain: float, retain_reference: float) -> float:
    """Return R.U. from the knowledge of the rows that must stay, of the model and of the reference."""
    return symmetric(retain, retain_reference)


def interpolated(start: Any, end: Any, served: int, requests: int) -> Any:
    """Return the paper's reference after `served` of all requests: on the straight line from the tuned model (0) to the retrained one (all)."""
    if not 0 <= served <= requests or requests < 1:
        raise Mistake("interpolated", f"{served} of {requests} requests", "count them from 0 to all")
    return start + (end - start) * served / requests
