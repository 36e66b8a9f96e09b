"""What a model still says of rows, token by token, and the formulas on it that probes and audits share.

| here | formula | sources and conventions |
|---|---|---|
| `exact_memorisation` | share of tokens whose teacher-forced argmax is right | OpenUnlearning (arXiv 2506.12618) |
| `extraction_strength` | 1 - k/T, k the smallest index from which every argmax to the end is right; 0 where even the last one is wrong | Carlini et al. 2021 (2012.07805); \
OpenUnlearning's code gives 1/T there |
| `truth_ratio` | P(wrong answers) / P(paraphrased true answer), P = exp(-mean NLL per token) | TOFU (2401.06121); its wrong answers' probabilities are averaged \
(`probabilities`), OpenUnlearning averages their losses (`losses`) |
| `truth_ratio_forget`, `truth_ratio_keep` | min(TR, 1/TR) of rows that must go; max(0, 1 - TR) of rows that must stay | TOFU |

The end token of an answer counts in probabilities, as TOFU has it, and not in memorisation and membership scores, as OpenUnlearning has it
(`Tokens.without_end`). Flat arrays hold N tokens, row by row; B is the number of rows. Cost: one forward pass over the rows; sorting apart,
O(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import evaluating
from remanence.training.batches import IGNORED, Batches
from remanence.training.scoring import token_scores, walk

if TYPE_CHECKING:
    from datasets import Dataset

MEANS, TRUE_ANSWERS = ("probabilities", "losses"), ("paraphrased", "plain")


@dataclass(frozen=True)
class Tokens:
    """All supervised tokens of some rows, row by row.

    Args:
        rows: number of rows B.
        row: of each token, ascending.
        logp: natural log of the right token's probability.
        top: the right token is the argmax.
        end: it is the end token, last of its row.
        mean: of log p under p over the vocabulary; empty unless asked for.
        deviation: of the same.
    """

    rows: int
    row: Int[np.ndarray, " N"]
    logp: Float[np.ndarray, " N"]
    top: Bool[np.ndarray, " N"]
    end: Bool[np.ndarray, " N"]
    mean: Float[np.ndarray, " M"]
    deviation: Float[np.ndarray, " M"]

    def nll(self) -> Float[np.ndarray, " B"]:
        """Return each row's mean negative log-likelihood per token, the end token included, in nats."""
        return -row_means(self.logp, self.row, self.rows)

    def without_end(self) -> Tokens:
        """Return the tokens without end tokens; a row of nothing else keeps it."""
        alone = np.bincount(self.row, minlength=self.rows)[self.row] == 1
        kept = ~self.end | alone
        moments = [column[kept] if len(column) else column for column in (self.mean, self.deviation)]
        return Tokens(self.rows, self.row[kept], self.logp[kept], self.top[kept], self.end[kept], *moments)


def read_tokens(model: nn.Module, rows: Batches, size: int, *, end: int | None = None, moments: bool = False) -> Tokens:
    """Score every supervised token of encoded rows, without gradients; the model is left as it was.

    Args:
        model: a causal language model.
        rows: encoded rows.
        size: rows per forward pass.
        end: number of the end token; `None`: no token is one.
        moments: compute mean and deviation too.

    Raises:
        Mistake: the model gives no numbers.
    """
    pieces: list[tuple[np.ndarray, ...]] = []
    with evaluating(model):
        for numbers, batch in walk(rows, size, model):
            found = token_scores(model, batch, moments=moments)
            labels = batch["labels"][:, 1:]
            ended = (labels[labels != IGNORED] == (-1 if end is None else end)).cpu().numpy()
            row = found.row.numpy()
            last = np.append(row[1:] != row[:-1], True) if len(row) else np.zeros(0, bool)
            values = [tensor.double().numpy() for tensor in (found.logp, found.mean, found.deviation)]
            pieces.append((numbers[row], values[0], found.top.numpy(), ended & last, values[1], values[2]))
    row, logp, top, ended, mean, deviation = (np.concatenate(column) for column in zip(*pieces))
    if np.isnan(logp).any():
        problem = f"gives no numbers (NaN) for {len(np.unique(row[np.isnan(logp)]))} of {rows.count} rows"
        raise Mistake("the model", problem, "go back to weights from before it diverged")
    order = np.argsort(row, kind="stable")
    moments_of = [column[order] if len(column) else column for column in (mean, deviation)]
    return Tokens(rows.count, row[order], logp[order], top[order], ended[order], *moments_of)


def row_means(values: Float[np.ndarray, " N"], row: Int[np.ndarray, " N"], rows: int) -> Float[np.ndarray, " B"]:
    """Return the mean of each row's values, in fp64; NaN for a row without any."""
    count = np.bincount(row, minlength=rows)
    return np.bincount(row, values, minlength=rows) / np.where(count, count, np.nan)


def exact_memorisation(top: Bool[np.ndarray, " N"], row: Int[np.ndarray, " N"], rows: int) -> Float[np.ndarray, " B"]:
    """Return each row's share of tokens whose argmax is right."""
    return row_means(top.astype(np.float64), row, rows)


def extraction_strength(top: Bool[np.ndarray, " N"], row: Int[np.ndarray, " N"], rows: int) -> Float[np.ndarray, " B"]:
    """Return each row's 1 - k/T: the share of its tokens in the unbroken run of right argmaxes at its end."""
    count = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - (np.cumsum(count) - count)[row] + 1  # from 1 inside its row
    k = np.zeros(rows)
    np.maximum.at(k, row, np.where(top, 0, place))
    return 1 - k / np.where(count, count, np.nan)


def truth_ratio(
    true: Float[np.ndarray, " B"], wrong: Float[np.ndarray, " M"], owner: Int[np.ndarray, " M"], mean: str = "probabilities"
) -> Float[np.ndarray, " B"]:
    """Return each row's truth ratio from mean NLLs per token; NaN for a row without wrong answers.

    Args:
        true: of the paraphrased true answers.
        wrong: of the wrong answers.
        owner: which row a wrong answer belongs to.
        mean: of the wrong answers' `probabilities` (arithmetic, TOFU) or `losses` (geometric, OpenUnlearning).
    """
    if mean not in MEANS:
        raise Mistake("truth_ratio", f"unknown mean {mean!r}", nearest(mean, MEANS))
    with np.errstate(over="ignore"):  # inf: the true answer is impossible beside the wrong ones
        if mean == "losses":
            return np.exp(true - row_means(wrong, owner, len(true)))
        return row_means(np.exp(true[owner] - wrong), owner, len(true))


def truth_ratio_forget(ratio: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """Return min(TR, 1/TR): 1 where true and wrong answers are as likely, 0 where either is certain."""
    with np.errstate(divide="ignore"):
        return np.minimum(ratio, 1 / ratio)


def truth_ratio_keep(ratio: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """Return max(0, 1 - TR): 1 where wrong answers are impossible."""
    return np.maximum(0.0, 1 - ratio)


def alternatives(rows: Dataset, true: str = "paraphrased") -> tuple[list[str], list[str], Int[np.ndarray, " M"]] | None:
    """Return the true answers (B,), the wrong answers (M,) of the same form, and which row each belongs to; `None` where there are none.

    `paraphrased`: `paraphrased_answer` and `perturbed_paraphrases`, without the latter `perturbed_answers`, without the former `answer`;
    `plain`: `answer` and `perturbed_answers`.
    """
    rows, plain = rows.with_format(None), true == "plain"
    paired = not plain and {"paraphrased_answer", "perturbed_paraphrases"} <= set(rows.column_names)
    column = "perturbed_paraphrases" if paired else "perturbed_answers"
    if column not in rows.column_names:
        return None
    wrong, owner = flattened(list(rows[column]))
    answers = list(rows["answer"])
    other = answers if plain or "paraphrased_answer" not in rows.column_names else list(rows["paraphrased_answer"])
    return ([said or answer for said, answer in zip(other, answers)], wrong, owner) if wrong else None


def flattened(lists: Sequence[Sequence[str] | None]) -> tuple[list[str], Int[np.ndarray, " M"]]:
    """Return the texts of all rows one after the other, and which row each belongs to; blank ones are left out."""
    pairs = [(text, number) for number, texts in enumerate(lists) for text in texts or () if text and text.strip()]
    return [text for text, _ in pairs], np.array([number for _, number in pairs], np.int64)


def question_rows(questions: Sequence[str], answers: Sequence[str]) -> Dataset:
    """Return rows of kind qa."""
    from datasets import Dataset

    return Dataset.from_dict({"question": list(questions), "answer": list(answers)})


def best_of(values: Float[np.ndarray, " M"], owner: Int[np.ndarray, " M"], rows: int) -> Float[np.ndarray, " B"]:
    """Return the largest of each row's values (the attacker's best try); NaN for a row without any."""
    best = np.full(rows, -np.inf)
    np.maximum.at(best, owner, values)
    return np.where(np.isneginf(best), np.nan, best)


def ids_of(rows: Batches) -> list[list[int]]:
    """Return each row's supervised token numbers."""
    labels = rows.columns["labels"].padded(np.arange(rows.count), IGNORED)[:, 1:]  # type: ignore[union-attr]
    kept = labels != IGNORED
    flat, ends = labels[kept].tolist(), torch.cumsum(kept.sum(1), 0).tolist()
    return [flat[first:last] for first, last in zip([0, *ends], ends)]
