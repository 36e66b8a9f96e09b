"""Loss on a set of rows: token mean and perplexity for language, cross-entropy for classes. Also how all probes read a model.

A probe encodes its rows once per processor and keeps them. Rows are visited from the longest to the shortest, so that a batch is hardly
padded; results come back in the rows' order. Only supervised positions are scored: the model is asked for the logits of the time steps that
some row of the batch supervises (where it can do that), and log-probabilities are taken in fp32 in pieces of at most 2^24 logits, sums in
fp64.

A probe runs in the autocast context of its caller, if there is one. Cost: one forward pass over the rows, no state beyond the encoded rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.data.encode import TEMPLATE, encode_rows, feature_columns
from remanence.errors import Mistake
from remanence.models.forward import INPUTS, evaluating, logits_of, unwrapped
from remanence.stream import Moment, Scores, check_rows
from remanence.training.batches import IGNORED, Batch, Batches, Ragged

if TYPE_CHECKING:
    from datasets import Dataset

PIECE = 2**24  # logits that are turned to fp32 at a time


@dataclass(frozen=True, eq=False)
class Loss:
    """Measure the loss.

    Values: `loss`, the mean over supervised tokens (text, qa, chat; nats per token) or over rows (classes, images), and for
    tokens `perplexity` = exp(loss).

    Items: each row's own mean `loss`, with its number of `tokens`; of kind text an item is a block of `length` tokens, not a document.

    Args:
        rows: what to measure on.
        kind: text | qa | chat | classes | images.
        batch_size: rows per forward pass.
        length: longest row in tokens.
        template: of kind qa.

    Raises:
        Mistake: wrong columns, no rows, nothing supervised, a label that the model has no output for.
    """

    rows: Dataset
    kind: str = "text"
    batch_size: int = 64
    length: int = 256
    template: str = TEMPLATE
    _kept: dict[int, tuple[Any, Batches]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_rows("loss", self.rows, self.kind)
        check_size("loss", self.batch_size)

    def measure(self, model: nn.Module, at: Moment) -> Scores:
        """Return the mean loss and each row's loss."""
        rows = encoded(self._kept, at.processor, self.rows, self.kind, self.length, self.template)
        if self.kind in ("classes", "images"):
            return self._of_classes(model, rows)
        total, tokens = np.zeros(rows.count), np.zeros(rows.count, np.int64)
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                found = token_scores(model, batch)
                total[numbers] = -per_row(found.logp, found.row, len(numbers)).numpy()
                tokens[numbers] = torch.bincount(found.row, minlength=len(numbers)).numpy()
        if tokens.sum() == 0:
            raise Mistake("loss", "no token of the set is supervised", "raise `length` or check the rows")
        loss = float(total.sum() / tokens.sum())
        items = item_names(self.rows) if rows.count == len(self.rows) and self.kind != "text" else list(range(rows.count))
        return Scores(
            {"loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss)},
            [{"item": item, "loss": float(nll / n), "tokens": int(n)} for item, nll, n in zip(items, total, tokens) if n],
        )

    def _of_classes(self, model: nn.Module, rows: Batches) -> Scores:
        nll = np.zeros(rows.count)
        with evaluating(model):
            for numbers, batch in walk(rows, self.batch_size, model):
                logits = class_logits("loss", model, batch)
                nll[numbers] = F.cross_entropy(logits.float(), batch["labels"], reduction="none").double().cpu().numpy()
        return Scores(
            {"loss": float(nll.mean())}, [{"item": item, "loss": float(value)} for item, value in zip(item_names(self.rows), nll)]
        )


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


def class_logits(place: str, model: nn.Module, batch: Batch) -> Float[Tensor, "B K"]:
    """Return the logits of a classifier, refusing labels that it has no output for."""
    logits = logits_of(model, batch)
    highest = int(batch["labels"].max())
    if logits.dim() != 2 or int(batch["labels"].min()) < 0 or highest >= logits.shape[1]:
        raise Mistake(
            place, f"the model's output has shape {tuple(logits.shape)}, the labels go to {highest}", "give the model one output per class"
        )
    return logits


class TokenScores(NamedTuple):
    """What the model says about every supervised token of a batch, in row-major order, on the CPU (N tokens)."""

    row: Int[Tensor, " N"]
    logp: Float[Tensor, " N"]  # natural log of the probability of the right token, fp32
    top: Bool[Tensor, " N"]  # the right token is the argmax
    first_rank: Float[Tensor, " B"]  # rank of each row's first supervised token, NaN for a row without one; only if asked for


def token_scores(model: nn.Module, batch: Batch, *, ranks: bool = False) -> TokenScores:
    """Score the supervised next tokens of a batch with one forward pass."""
    labels = batch["labels"][:, 1:]
    supervised = labels != IGNORED
    row, time = supervised.nonzero(as_tuple=True)
    targets = labels[row, time]
    logits, column = supervised_logits(model, batch, supervised, time)
    piece = max(1, PIECE // logits.shape[-1])
    logp, top = [], []
    for first in range(0, len(row), piece):
        part = slice(first, first + piece)
        wide = logits[row[part], column[part]].float()  # (n, V)
        logp.append(wide.gather(1, targets[part, None]).squeeze(1) - wide.logsumexp(1))
        top.append((wide.argmax(1) == targets[part]) & ~logp[-1].isnan())
    first_rank = torch.full((len(labels),), math.nan, device=labels.device)
    if ranks and len(row):
        head = torch.ones_like(row, dtype=torch.bool)
        head[1:] = row[1:] != row[:-1]
        first_rank[row[head]] = rank_of(logits[row[head], column[head]].float(), targets[head])
    empty = torch.zeros(0, device=labels.device)
    return TokenScores(row.cpu(), torch.cat([empty, *logp]).cpu(), torch.cat([empty.bool(), *top]).cpu(), first_rank.cpu())


def supervised_logits(
    model: nn.Module, batch: Batch, supervised: Bool[Tensor, "B T-1"], time: Int[Tensor, " N"]
) -> tuple[Float[Tensor, "B S V"], Int[Tensor, " N"]]:
    """Return logits that hold at least the supervised time steps, and the column in them of each supervised token.

    Steps are named from the end (-T..-2): a prompt that an adapter puts in front does not move them.
    """
    length = batch["input_ids"].shape[1]
    needed = supervised.any(0).nonzero().squeeze(1)  # (S,)
    if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters:
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
