"""The blocks of a transformer: where they are, which weights they hold, and what the model computes without one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.forward import unwrapped
from remanence.models.roles import ATTENTION, LAYER, MLP, weights_by_role


def blocks(model: nn.Module) -> list[str]:
    """Return the module names of the blocks with attention and MLP, from the first layer to the last.

    Raises:
        Mistake: a family whose weights have no known roles, or a model without such blocks.
    """
    found: dict[int, str] = {}
    for weight in weights_by_role(model):
        place = LAYER.search(weight.name)
        if weight.layer is not None and place is not None and weight.role in (*ATTENTION, *MLP):
            found[weight.layer] = weight.name[: place.end() - 1]
    if not found:
        raise Mistake(type(unwrapped(model)).__name__, "has no blocks with attention and MLP", "choose a transformer language model")
    return [found[layer] for layer in sorted(found)]


def block_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the attention and MLP parameters in training by layer (under LoRA, of the adapter), layers without any left out."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found: dict[int, list[str]] = {}
    for weight in weights_by_role(model):
        if weight.layer is not None and weight.role in (*ATTENTION, *MLP) and weight.name in trained:
            found.setdefault(weight.layer, []).append(weight.name)
    return found


@contextlib.contextmanager
def bypassed(model: nn.Module, names: Sequence[str], gives: Tensor | None = None) -> Iterator[nn.Module]:
    """Let blocks hand on what comes in, as if all their weights were zero (what is left is the residual stream).

    No weight is written, so there is nothing to put back. A bypassed block costs no time.

    Args:
        model: any transformer of a known family.
        names: of the blocks (see `blocks`).
        gives: what the last of them gives instead of its input.
    """
    modules = [model.get_submodule(name) for name in names]
    before = [vars(module).get("forward") for module in modules]  # an instance may have its own: Accelerate puts one there
    try:
        for module in modules:
            module.forward = _handed_on
        if gives is not None:
            modules[-1].forward = lambda *args, **kwargs: gives
        yield model
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def _handed_on(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
