"""What forgetters ask of a request: its retain rows, and a term that holds them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.training.losses import nll
from remanence.training.reference import frozen_copy, mean_kl

if TYPE_CHECKING:
    from datasets import Dataset

    from remanence.stream import Request
    from remanence.training.batches import Batch, Batches
    from remanence.training.trainer import Loss, Trainer

RETAIN = ("nll", "kl", "none")


def check_terms(method: str, gamma: float, alpha: float, retain: str = "nll") -> None:
    """Hold the weights and the retain term of L = gamma L_forget + alpha R to what they may be.

    Raises:
        Mistake: a weight below 0 or not finite, or an unknown term.
    """
    check_numbers(method, gamma=gamma, alpha=alpha)
    if retain not in RETAIN:
        raise Mistake(f"{method}.retain", f"unknown value {retain!r}", nearest(retain, RETAIN))


def check_numbers(method: str, *, above: bool = False, **values: float) -> None:
    """Hold numbers to be finite and 0 or more, or above 0.

    Raises:
        Mistake: naming the method's field.
    """
    for name, value in values.items():
        if not 0 <= value < math.inf or (above and value == 0):
            raise Mistake(
                f"{method}.{name}", f"must be {'above 0' if above else '0 or more'}, and finite, got {value!r}", "correct the value"
            )


def retain_of(request: Request, method: str, remedy: str = "add retain rows to the request, or forget with gradient ascent") -> Dataset:
    """Return the retain set of a request.

    Raises:
        Mistake: it has none; the method that needs it is named.
    """
    if request.retain is None:
        raise Mistake(f"request '{request.name}'", f"has no retain set, and {method} needs one", remedy)
    return request.retain


def retain_batches(request: Request, trainer: Trainer, method: str, retain: str = "nll") -> Batches | None:
    """Return the stream of retain rows, `None` where the term is `none`.

    Raises:
        Mistake: the term needs retain rows and the request has none.
    """
    if retain == "none":
        return None
    rows = retain_of(request, f"{method} with the retain term '{retain}'", "add retain rows to the request, or set retain: none")
    return trainer.batches(rows, request.kind, stream="retain")


def retain_term(retain: str, model: nn.Module, trainer: Trainer) -> Loss:
    """Return R(model, batch), to be minimised on the retain rows: nll; kl: KL(p_0 || p), p_0 the model as it is now; none: 0.

    kl holds a copy of the parameters in training (under LoRA, of the adapter alone).
    """
    if retain == "none":
        return _nothing
    if retain == "nll":
        return nll
    reference = frozen_copy(model).to(trainer.accelerator.device)
    return lambda model, batch: mean_kl(model, reference, batch)


def scalarised(term: Loss, retain: str, gamma: float, alpha: float, model: nn.Module, trainer: Trainer) -> Loss:
    """Return L(model, batch) = gamma term(model, batch["forget"]) + alpha R(model, batch["retain"]), with R as in `retain_term`."""
    keep = retain_term(retain, model, trainer)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = gamma * term(model, batch["forget"])
        return value + alpha * keep(model, batch["retain"]) if "retain" in batch else value

    return loss


def _nothing(model: nn.Module, batch: Batch) -> Tensor:
    return next(model.parameters()).new_zeros(())
