r"""Random labels: teach the model noise in the place of what must go, tokens drawn uniformly or answers that belong to other questions.

A descent towards something wrong has a floor where an ascent has none. With `answers: retain`, `ascent` and `retain: kl` it is the three-term method of
Yao et al.: away from the answer, towards random answers, and near the model before on normal data.

Papers: random tokens: Jin Yao et al. 2024, "Machine Unlearning of Pre-trained Large Language Models", arXiv 2402.15159; random answers: Yuanshun Yao, Xu and Liu
2023, "Large Language Model Unlearning", arXiv 2310.10683. Objective: L = gamma NLL(q_f, random) - ascent NLL(D_f) + alpha R(D_r).

| papers | here | shape | default |
|---|---|---|---|
| random labels, uniform over the vocabulary | answers: tokens; drawn anew at every visit of a row | (B, T) | tokens |
| Y_rdn, answers unrelated to the question | answers: retain; an answer of the retain rows, one drawn per row | text | |
| e1 (ascent), e2 (random), e3 (KL on normal data) | ascent, gamma, alpha with retain: kl | scalars | 0, 1, 1 |

Differs from the papers: the random answers come from the request's own retain rows, not from another data set, and each row keeps its own. For a classifier the
classes are drawn uniformly. Steps and rate are the trainer's; an epoch is a pass over the forget rows.
Cost: two forward and backward passes per step, one more with `ascent`; no second model (retain: kl holds a copy of the trained parameters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import evaluating, is_language_model, logits_of, vocabulary
from remanence.seeds import derive
from remanence.stream import Request
from remanence.training.batches import Batch, Changed
from remanence.training.losses import nll
from remanence.training.requests import check_numbers, check_terms, retain_batches, retain_of, scalarised
from remanence.training.trainer import Trainer
from remanence.training.unlearning import drawn_labels

if TYPE_CHECKING:
    from datasets import Dataset

ANSWERS = ("tokens", "retain")


@dataclass(frozen=True)
class RandomLabel:
    """Learn random labels on the forget rows, with a retain term.

    Args:
        answers: tokens (every supervised token drawn uniformly) | retain (answers of retain rows; for kind qa).
        ascent: weight of gradient ascent on the true answers beside it; 0 leaves it out.
        gamma: weight of the random labels.
        alpha: weight of the retain term.
        retain: nll | kl | none.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    answers: str = "tokens"
    ascent: float = 0.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: str = "nll"

    def __post_init__(self) -> None:
        check_terms("random_label", self.gamma, self.alpha, self.retain)
        check_numbers("random_label", ascent=self.ascent)
        if self.answers not in ANSWERS:
            raise Mistake("random_label.answers", f"unknown value {self.answers!r}", nearest(self.answers, ANSWERS))

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Minimise gamma NLL(random) - ascent NLL(forget) + alpha R(retain) for the trainer's steps.

        Raises:
            Mistake: no retain set where one is needed, or `answers: retain` for rows that are no questions.
        """
        retain = retain_batches(request, trainer, "random labels", self.retain)
        right = trainer.batches(request.forget, request.kind, stream="forget")
        wrong = right
        if self.answers == "retain":
            wrong = trainer.batches(mismatched(request, trainer.generator("mismatched")), request.kind, stream="forget")
        key, classes = np.uint64(derive(trainer.seed, "random labels")), outputs(model, right[0].to(trainer.accelerator.device))

        def relabelled(number: int, batch: Batch) -> Batch:
            rows = batch["forget"]
            if self.answers == "tokens":
                rows = Batch(rows | {"labels": drawn_labels(rows["labels"], key, number * rows.own_rows(), classes)})
            return Batch(batch | {"forget": rows} | ({"right": right[number]} if self.ascent else {}))

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = noise(model, batch)
            return value - self.ascent * nll(model, batch["right"]) if self.ascent else value

        noise = scalarised(nll, self.retain, self.gamma, self.alpha, model, trainer)
        pairs = Changed(trainer.pairs(wrong, retain), relabelled)
        return trainer.fit(model, pairs, loss, steps=trainer.steps_for(pairs))


def mismatched(request: Request, generator: torch.Generator) -> Dataset:
    """Return the forget questions in their order, each with the answer of a retain row.

    Raises:
        Mistake: the rows are not of kind qa, or there is no retain set.
    """
    if request.kind != "qa":
        raise Mistake(f"request '{request.name}'", f"is of kind '{request.kind}', which has no answers to exchange", "set answers: tokens")
    retain = retain_of(request, "random answers", "add retain rows to the request, or set answers: tokens")
    draw = torch.randint(len(retain), (len(request.forget),), generator=generator)
    return request.forget.select_columns(["question"]).add_column("answer", retain.with_format(None).select(draw.numpy())["answer"][:])


def outputs(model: nn.Module, batch: Batch) -> int:
    """Return the number of tokens or classes that the model chooses from."""
    if is_language_model(model):
        return vocabulary(model)
    with evaluating(model.to(batch["labels"].device)):
        return logits_of(model, batch).shape[-1]
