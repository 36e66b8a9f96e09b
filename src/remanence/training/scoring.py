"""Reading a model: log-probabilities, hits and ranks of every supervised token, without gradients, for probes and audits.

Rows are visited from the longest to the shortest, so that a batch is hardly padded; results come back in the rows' order. Only supervised positions are
scored: the model is asked for the logits of the time steps that some row of the batch supervises (where it can do that), and log-probabilities are taken in
fp32 in pieces of at most 2^24 logits, sums in fp64. Cost: one forward pass over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from remanence.data.encode import encode_rows, feature_columns
from remanence.errors import Mistake
from remanence.models.forward import INPUTS, keeps_logits, logits_of
from remanence.training.batches import IGNORED, Batch, Batches, Ragged

if TYPE_CHECKING:
    from datasets import Dataset

PIECE = 2**24  # logits that are turned to fp32 at a time


def check_size(place: str, size: int) -> None:
    """Refuse an empty batch."""
    if size < 1:
        raise Mistake(place, f"batch_size is {size}", "give at least 1")


def encoded(kept: dict[int, tuple[Any, Batches]], processor: Any, rows: Dataset, kind: str, length: int, template: str) -> Batches:
    """Return the encoded rows, encoding them when this processor comes for the first time."""
    if id(processor) not in kept:  # the processor is kept too, so that no other one gets its id
        plain = feature_columns(rows) if kind == "classes" else None
        inputs = plain or encode_rows(rows, kind, processor, length=length, template=template)
        kept[id(processor)] = processor, Batches(inputs, 1, shuffle=False)
    return kept[id(processor)][1]


def walk(rows: Batches, size: int, model: nn.Module) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield (row numbers, batch on the model's device), the longest rows first: memory runs out at once or never."""
    column = rows.columns.get("input_ids")
    order = np.argsort(-column.lengths, kind="stable") if isinstance(column, Ragged) else np.arange(rows.count)
    weight = next(model.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    for first in range(0, rows.count, size):
        numbers = order[first : first + size]
        yield numbers, rows.take(numbers).to(device)


def item_names(rows: Dataset) -> list[Any]:
    """Return each row's `id`, or its number where there is no such column."""
    return list(rows.with_format(None)["id"]) if "id" in rows.column_names else list(range(len(rows)))


class TokenScores(NamedTuple):
    """What the model says about every supervised token of a batch, in row-major order, on the CPU (N tokens)."""

    row: Int[Tensor, " N"]
    logp: Float[Tensor, " N"]  # natural log of the probability of the right token, fp32
    top: Bool[Tensor, " N"]  # the right token is the argmax
    first_rank: Float[Tensor, " B"]  # rank of each row's first supervised token, NaN for a row without one; only if asked for
    mean: Float[Tensor, " M"]  # of log p under p over the whole vocabulary; M = N if asked for, else 0
    deviation: Float[Tensor, " M"]  # of the same


def token_scores(model: nn.Module, batch: Batch, *, ranks: bool = False, moments: bool = False) -> TokenScores:
    """Score the supervised next tokens of a batch with one forward pass."""
    labels = batch["labels"][:, 1:]
    supervised = labels != IGNORED
    row, time = supervised.nonzero(as_tuple=True)
    targets = labels[row, time]
    logits, column = supervised_logits(model, batch, supervised, time)
    piece = max(1, PIECE // logits.shape[-1])
    logp, top, mean, deviation = [], [], [], []
    for first in range(0, len(row), piece):
        part = slice(first, first + piece)
        wide = logits[row[part], column[part]].float()  # (n, V)
        logp.append(wide.gather(1, targets[part, None]).squeeze(1) - wide.logsumexp(1))
        top.append((wide.argmax(1) == targets[part]) & ~logp[-1].isnan())
        if moments:
            first_moment, second = vocabulary_moments(wide)
            mean.append(first_moment)
            deviation.append(second)
    first_rank = torch.full((len(labels),), math.nan, device=labels.device)
    if ranks and len(row):
        head = torch.ones_like(row, dtype=torch.bool)
        head[1:] = row[1:] != row[:-1]
        first_rank[row[head]] = rank_of(logits[row[head], column[head]].float(), targets[head])
    empty = torch.zeros(0, device=labels.device)
    columns = (torch.cat([start, *found]).cpu() for start, found in ((empty, logp), (empty.bool(), top), (empty, mean), (empty, deviation)))
    logps, tops, means, deviations = columns
    return TokenScores(row.cpu(), logps, tops, first_rank.cpu(), means, deviations)


def vocabulary_moments(logits: Float[Tensor, "N V"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return mean and standard deviation of log p(v) where v is drawn from p = softmax(logits) (what Min-K++ standardises by)."""
    logp = logits.log_softmax(1)
    odds = logp.exp()
    finite = torch.where(odds > 0, logp, 0)  # what the model rules out (-inf) has no weight
    mean = (odds * finite).sum(1)
    return mean, (odds * (finite - mean[:, None]) ** 2).sum(1).sqrt()


def supervised_logits(
    model: nn.Module, batch: Batch, supervised: Bool[Tensor, "B T-1"], time: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "B S V"], Int[Tensor, " N"]]:
    """Return logits that hold at least the supervised time steps, and the column in them of each supervised token.

    Steps are named from the end (-T..-2): a prompt that an adapter puts in front does not move them.
    """
    length = batch["input_ids"].shape[1]
    needed = supervised.any(0).nonzero().squeeze(1)  # (S,)
    if keeps_logits(model):
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        logits = model(**inputs, logits_to_keep=needed - length).logits
        if logits.shape[1] == len(needed):
            return logits, torch.searchsorted(needed, time)
    else:
        logits = logits_of(model, batch)
    return logits[:, -length:], time


def rank_of(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the rank of the target among all logits: 1 is best, ties share the mean of their ranks, NaN where a logit is NaN."""
    own = logits.gather(1, targets[:, None])
    rank = (logits > own).sum(1) + ((logits == own).sum(1) + 1) / 2
    return rank.masked_fill(logits.isnan().any(1), math.nan)


def per_row(values: Float[Tensor, " N"], row: Int[Tensor, " N"], rows: int) -> Float[Tensor, " B"]:
    """Return the sum of each row's values, in fp64."""
    return torch.zeros(rows, dtype=torch.float64).index_add_(0, row, values.double())
