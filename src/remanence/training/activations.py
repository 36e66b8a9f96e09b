"""Hidden states at chosen places of prompts, and linear probes that tell two groups of them apart.

A prompt is a question in the trainer's template without its answer. Two places are read: `entity`, the last token of the name that the question is about,
and `prompt`, the last token before the answer. All blocks are read in one pass, on any family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.roles import blocks
from remanence.models.taps import output_of, tap
from remanence.seeds import derive
from remanence.training.batches import IGNORED, Batch, Batches
from remanence.training.processes import exchanged, world_size

if TYPE_CHECKING:
    from remanence.training.trainer import Trainer

PLACES = ("entity", "prompt")
STRENGTH = 0.01  # inverse of the probe's ridge, on standardised states: few prompts stand against many dimensions


@dataclass(frozen=True)
class Prompts:
    """Prompts ready for the model.

    Args:
        columns: a `datasets.Dataset` with input_ids, entity and prompt (the places, as token numbers).
        names: of each prompt's entity.
    """

    columns: Any
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def of(self, names: Sequence[str]) -> Prompts:
        """Return the prompts of some entities, in their order."""
        return self.rows(np.flatnonzero(np.isin(self.names, list(names))))

    def rows(self, numbers: np.ndarray) -> Prompts:
        """Return the prompts of some numbers."""
        return Prompts(self.columns.select(numbers), self.names[numbers])

    def at_most(self, count: int) -> Prompts:
        """Return at most that many prompts, evenly spaced."""
        return self if count >= len(self) else self.rows(np.arange(count) * len(self) // count)

    def batches(self, trainer: Trainer, stream: str = "prompts") -> Batches:
        """Return shuffled batches of them, of the settings' size."""
        pad = getattr(trainer.processor, "pad_token_id", None) or 0
        return Batches(self.columns, trainer.settings.batch_size, seed=derive(trainer.seed, stream), pad=pad)


def encode_prompts(questions: Sequence[str], names: Sequence[str], trainer: Trainer) -> tuple[Prompts, np.ndarray]:
    """Return the prompts whose question holds the name, and the numbers of those that do not. O(tokens).

    Raises:
        Mistake: a prompt longer than the settings' length, or no tokenizer.
    """
    from datasets import Dataset

    tokenizer, front = trainer.processor, trainer.settings.template.removesuffix("{answer}")
    if tokenizer is None or not callable(getattr(tokenizer, "encode", None)):
        raise Mistake("data", "prompts need a tokenizer and the model has none", "add the tokenizer's files to the model's folder")
    held = [name in question for name, question in zip(names, questions, strict=True)]
    kept = [(question, name) for question, name, good in zip(questions, names, held) if good]
    texts = [front.replace("{question}", question).rstrip() for question, _ in kept]
    start = front.index("{question}")
    ends = [start + question.rindex(name) + len(name) for question, name in kept]
    found: dict[str, list] = {"input_ids": [], "entity": [], "prompt": []}
    whole = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    if not texts:
        places = []
    elif tokenizer.is_fast:
        spans = tokenizer(texts, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        places = [max(n for n, (a, b) in enumerate(row) if a < end and b > a) for row, end in zip(spans, ends)]
    else:
        heads = tokenizer([text[:end] for text, end in zip(texts, ends)], verbose=False)["input_ids"]
        places = [len(_open(ids, tokenizer)) - 1 for ids in heads]
    for ids, place in zip(whole, places):
        ids = _open(ids, tokenizer)
        if len(ids) > trainer.settings.length:
            raise Mistake("data", f"a prompt has {len(ids)} tokens, more than {trainer.settings.length}", "raise `length`")
        for column, value in zip(found, (ids, place, len(ids) - 1)):
            found[column].append(value)
    return Prompts(Dataset.from_dict(found), np.array([name for _, name in kept], dtype=object)), np.flatnonzero(~np.array(held, bool))


def _open(ids: list[int], tokenizer: Any) -> list[int]:
    """Return the tokens without an end token that the tokenizer adds."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def at_places(hidden: Float[Tensor, "B T D"], places: Tensor) -> Float[Tensor, "B D"]:
    """Return the hidden state of each row at its place (B,)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), places]


def collect(model: nn.Module, prompts: Prompts, numbers: Sequence[int], trainer: Trainer) -> Float[Tensor, "N L 2 D"]:
    """Return the hidden states behind some blocks, by number, at both `PLACES` of every prompt, on the CPU, without gradients; processes share the work.

    Cost: one forward pass over the prompts up to the highest of the blocks; memory: N x L x 2 x D numbers of at least 32 bits.
    """
    known = blocks(model)
    names, above = [known[number] for number in numbers], known[max(numbers) + 1] if max(numbers) + 1 < len(known) else None
    rows, kept = prompts.batches(trainer), []

    def keep(model: nn.Module, batch: Batch) -> Tensor:
        with tap(model, names) as seen:
            output_of(model, batch, names[-1], before=above)
        states = torch.stack([torch.stack([at_places(seen[name][-1], batch[place]) for place in PLACES], 1) for name in names], 1)
        kept.append((batch["number"].cpu(), states.to(torch.promote_types(states.dtype, torch.float32)).cpu()))
        return batch["number"]

    trainer.over_rows(model, rows.with_column("number", torch.arange(rows.count)), keep)
    parts = list(exchanged(kept)) if world_size() > 1 else kept
    order = torch.cat([numbers for numbers, _ in parts])
    return torch.cat([states for _, states in parts])[order.argsort()]


def row_shift(hidden: Float[Tensor, "B T D"], before: Float[Tensor, "B T D"], inside: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Return each row's mean over its tokens of ||h - h_0||^2, at least in fp32."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    squares = (wide - before.to(wide.dtype)).square().sum(-1)
    return (squares * inside).sum(1) / inside.sum(1).clamp(min=1)


def real_tokens(labels: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Say which tokens stand up to a row's last supervised one; what follows is padding."""
    return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


@dataclass(frozen=True)
class Probe:
    """A direction and an offset: a hidden state's score is h . direction + offset, positive for the first group."""

    direction: Float[Tensor, "D"]
    offset: float

    def score(self, hidden: Float[Tensor, "N D"]) -> np.ndarray:
        """Return each state's score, (N,)."""
        return (hidden.double() @ self.direction + self.offset).numpy()


def fit_probe(first: Float[Tensor, "N D"], second: Float[Tensor, "M D"]) -> Probe:
    """Return the logistic regression of the first group (1) against the second (0) on standardised states, groups of equal weight."""
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([first, second]).double()
    mean, spread = both.mean(0), both.std(0).clamp(min=1e-12)
    judge = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
    judge.fit(((both - mean) / spread).numpy(), np.r_[np.ones(len(first)), np.zeros(len(second))])
    direction = torch.from_numpy(judge.coef_[0]) / spread
    return Probe(direction, float(judge.intercept_[0]) - (mean @ direction).item())


def separation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the AUC: the probability that a score of the first group exceeds one of the second, ties counting half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(np.r_[np.ones(len(first)), np.zeros(len(second))], np.r_[first, second]))
