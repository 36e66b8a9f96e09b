"""Which weights may move: whole tensors frozen for a while, row ranges of fused tensors held, and an account of what did move.

A weight is held in earnest only if weight decay and momentum cannot move it either. A tensor that is frozen before the optimizer is made
gets no gradient and no optimizer state; a range of rows cannot be left out of its tensor's optimizer, so its values are written back after
each step.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.training.processes import whole


@contextlib.contextmanager
def frozen(model: nn.Module, trained: Iterable[str]) -> Iterator[list[str]]:
    """Let only the named parameters require a gradient; on leaving, give every parameter the flag it had.

    A tied weight is trained if any of its names is given. Gradients that the frozen ones still carry are dropped, since an optimizer would
    apply them. Make the optimizer inside.

    Args:
        model: whose parameters to freeze.
        trained: names of parameters, as in `model.named_parameters()`.

    Yields:
        The names of the frozen parameters (tied weights by their first name).

    Raises:
        Mistake: a name is unknown, nothing would be trained, or a named parameter cannot require a gradient.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    trained = list(trained)
    unknown = next((name for name in trained if name not in every), None)
    if unknown is not None:
        raise Mistake("model", f"has no parameter '{unknown}'", nearest(unknown, every))
    if not trained:
        raise Mistake("model", "no parameter would be trained", "name at least one")
    whole = next((name for name in trained if not (every[name].is_floating_point() or every[name].is_complex())), None)
    if whole is not None:
        raise Mistake(f"parameter '{whole}'", f"of type {every[whole].dtype} cannot be trained", "load the model without quantisation")
    chosen = {id(every[name]) for name in trained}
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    weights = dict(model.named_parameters())
    try:
        for weight in weights.values():
            if id(weight) in chosen:
                weight.requires_grad_(True)
            else:
                weight.requires_grad_(False)
                weight.grad = None
        yield [name for name, weight in weights.items() if id(weight) not in chosen]
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])


def check_pattern(place: str, pattern: str | None) -> None:
    """Refuse what is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise Mistake(place, f"is not a regular expression ({error})", "correct the pattern") from error


def matching(model: nn.Module, pattern: str | None, place: str) -> list[str]:
    """Return the names of the parameters that require a gradient and match the pattern (anywhere), a tied weight once.

    Raises:
        Mistake: there are none.
    """
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and re.search(pattern or "", name)]
    if not names:
        raise Mistake(place, f"no parameter that requires a gradient matches {pattern!r}", "free some, or change the pattern")
    return names


class RowMask:
    """Hold a range of rows of a parameter at its present values: see `hold_rows`.

    Call it after each optimizer step; any arguments are ignored, so that it can stand as an `after_step`. Used as a context manager, or by
    `release`, it lets the rows go.
    """

    def __init__(self, parameter: nn.Parameter, held: Bool[Tensor, "R"], axis: int):
        self.parameter, self.axis = parameter, axis
        self.rows: Int[Tensor, "N"] = torch.nonzero(held.to(parameter.device))[:, 0]
        self.values = parameter.detach().index_select(axis, self.rows).clone()
        self._hook = parameter.register_hook(self._mask) if parameter.requires_grad else None

    def _mask(self, grad: Tensor) -> Tensor:
        return grad.index_fill(self.axis, self.rows, 0)

    def __call__(self, *_: Any, **__: Any) -> None:
        """Write the held values back, bit for bit."""
        with torch.no_grad():
            self.parameter.index_copy_(self.axis, self.rows, self.values)

    def release(self) -> None:
        """Write the values back a last time and stop masking gradients."""
        self()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> RowMask:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold_rows(parameter: nn.Parameter, rows: slice | range | Iterable[int] | Tensor, axis: int = 0) -> RowMask:
    """Hold rows of a tensor (such as the query part of a fused qkv matrix) while the others train.

    Gradients of the held rows are zero (so clipping measures the trained rows only, and the optimizer's moments stay zero there). Weight
    decay, old momentum and noise still move them in a step: call the returned object after each one. Cost: a copy of the held rows.

    Args:
        parameter: the tensor, in which all other rows stay free.
        rows: a slice, indices, or a mask over the axis.
        axis: 0 for the outputs of `nn.Linear` (D_out, D_in), 1 for those of GPT-2's `Conv1D` (D_in, D_out).

    Raises:
        Mistake: no rows, or rows or an axis that the tensor does not have.
    """
    shape = tuple(parameter.shape)
    if not -len(shape) <= axis < len(shape):
        raise Mistake("row mask", f"axis {axis} of a tensor of shape {shape}", f"give an axis below {len(shape)}")
    size = shape[axis]
    held = torch.zeros(size, dtype=torch.bool)
    if isinstance(rows, slice):
        held[rows] = True
    else:
        index = rows.cpu() if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=torch.int64)
        fits = index.shape == (size,) if index.dtype == torch.bool else bool(((index >= -size) & (index < size)).all())
        if not fits:
            raise Mistake(
                "row mask",
                f"the rows do not fit axis {axis} of a tensor of shape {shape}",
                f"give indices below {size} or a mask of {size}",
            )
        held[index] = True
    if not held.any():
        raise Mistake("row mask", "there are no rows to hold", "leave the mask out, or name rows")
    return RowMask(parameter, held, axis % len(shape))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters to the CPU, by name, for `moved`."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()}


def moved(before: Mapping[str, Tensor], model: nn.Module) -> list[dict[str, Any]]:
    """Compare the parameters with earlier ones, and return a row for each tensor that changed.

    Args:
        before: what `weights_of` returned.
        model: the model now.

    Returns:
        Rows of `weight` (name), `size`, `changed` (elements that differ), and `relative`: ||now - before|| / ||before||, `None` where that
        was 0. A parameter that is new or has a new shape counts as changed everywhere, with `relative` `None`.
    """
    rows = []
    for name, weight in model.named_parameters():
        now = whole(weight.detach())
        if name not in before or before[name].shape != now.shape:
            rows.append({"weight": name, "size": now.numel(), "changed": now.numel(), "relative": None})
            continue
        old = whole(before[name]).to(now.device)
        changed = int((now != old).sum())
        if changed:
            length = torch.linalg.vector_norm(old, dtype=torch.float64).item()
            distance = torch.linalg.vector_norm(now.double() - old.double()).item()
            rows.append({"weight": name, "size": now.numel(), "changed": changed, "relative": distance / length if length else None})
    return rows
