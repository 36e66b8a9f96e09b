"""Gradients of whole sets: of the rows of a request, and of all training rows in a file that stands for them when they are gone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.storage import digest_tensors, load_tree, save_tree
from remanence.stream import Request, keys_of
from remanence.training.processes import by_main
from remanence.training.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset


class Gradient(NamedTuple):
    """The gradient of a set, summed over its units.

    Args:
        total: by parameter in training.
        units: rows of classes, supervised tokens of a language model.
    """

    total: Mapping[str, Tensor]
    units: float


def norm_of(vector: Mapping[str, Tensor]) -> float:
    """Return the L2 norm over all tensors."""
    return torch.stack([value.double().square().sum() for value in vector.values()]).sum().sqrt().item()


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """Return the cosine between two vectors of tensors, `None` where one of them is zero."""
    product = torch.stack([(value.double() * other[name].double()).sum() for name, value in one.items()]).sum().item()
    size = norm_of(one) * norm_of(other)
    return product / size if size else None


def gradient_of(model: nn.Module, rows: Dataset, kind: str, trainer: Trainer, size: int | None = None) -> Gradient:
    """Return the summed gradient of the negative log-likelihood of rows, in evaluation mode.

    Raises:
        Mistake: nothing is supervised, or a gradient is not finite.
    """
    batches = trainer.batches(rows, kind, size=size)
    units = float(sum(batch.own_tokens() for batch in batches))
    if units == 0:
        raise Mistake("data", "no token of the set is supervised", "raise `length` or check the rows")
    total = trainer.summed_gradient(model, batches)
    broken = next((name for name, value in total.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise Mistake(f"parameter '{broken}'", "its gradient is not finite", "look for NaN in the weights or rows, or use fp32")
    return Gradient(total, units)


def save_total_gradient(path: str | Path, model: nn.Module, rows: Dataset, kind: str, trainer: Trainer, size: int | None = None) -> None:
    """Write the gradient of all training rows, for a forgetter's `total_gradient`: a request then costs its own rows alone.

    The file knows its rows (by hash) and the weights; after a request the weights are others, so write it again, or put many rows into one request.

    Args:
        path: of the safetensors file.
        model: as it is when the request comes.
        rows: all that the model was trained on, the rows to be forgotten among them.
        kind: of the rows; not text, whose blocks go across documents.
        trainer: encodes the rows.
        size: rows per pass; `None`: the trainer's.
    """
    _refuse_text(kind)
    found = gradient_of(model, rows, kind, trainer, size)
    about = {"kind": kind, "template": trainer.settings.template, "units": found.units}
    weights = _digest(model)
    by_main(lambda: save_tree(path, {"gradient": found.total, "rows": row_hashes(rows, kind), "about": about, "weights": weights}))


def load_total_gradient(path: str | Path, model: nn.Module, request: Request, trainer: Trainer) -> tuple[Gradient, int]:
    """Read what `save_total_gradient` wrote, for a request about some of its rows; return it and the number of rows behind it.

    Raises:
        Mistake: no such file, one of another kind of data, of other weights, or without the request's rows.
    """
    tree = load_tree(path)
    if not isinstance(tree, dict) or "gradient" not in tree or "rows" not in tree:
        raise Mistake(path, "holds no gradient of a data set", "name a file that save_total_gradient wrote")
    about = tree["about"]
    _refuse_text(request.kind)
    if about["kind"] != request.kind or about["template"] != trainer.settings.template:
        raise Mistake(path, f"is of rows of kind '{about['kind']}' or of another template", "compute it anew on rows of the request's kind")
    if tree["weights"] != _digest(model):
        raise Mistake(path, "was computed at other weights", "compute it anew: every request and every training step changes them")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    if trained != set(tree["gradient"]):
        raise Mistake(path, "is of other parameters than those in training", "compute it anew with the same parameters free")
    known, wanted = tree["rows"].numpy(), row_hashes(request.forget, request.kind).numpy()
    asked, counts = np.unique(wanted, return_counts=True)
    present = np.searchsorted(np.sort(known), asked, "right") - np.searchsorted(np.sort(known), asked, "left")
    if bool((present != counts).any()):
        number = int(np.flatnonzero(np.isin(wanted, asked[present != counts]))[0])
        times, own = int(present[asked == wanted[number]][0]), int(counts[asked == wanted[number]][0])
        problem = f"row {number} of the forget set stands {times} times among the training rows, and {own} times in the request"
        raise Mistake(f"request '{request.name}'", problem, "ask for rows of the training set, with all of their copies")
    return Gradient(tree["gradient"], about["units"]), len(known)


def row_hashes(rows: Dataset, kind: str) -> Tensor:
    """Return one 63-bit number per row, from the columns that the kind trains on: int64 (N,)."""
    keys = (key if isinstance(key, bytes) else repr(key).encode() for key in keys_of(rows, kind))
    return torch.tensor([int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1 for key in keys], dtype=torch.int64)


def _digest(model: nn.Module) -> str:
    """Return the hash of all that a gradient in evaluation mode depends on."""
    return digest_tensors([*model.named_parameters(), *model.named_buffers()])


def _refuse_text(kind: str) -> None:
    if kind == "text":
        raise Mistake(
            "total gradient", "rows of kind text are trained in blocks across documents", "give retain rows, or use kind qa or chat"
        )
