r"""What the curvature does to a direction: Hessian-vector products by differentiating twice, and the layers that cannot be differentiated twice.

H v = grad <grad L, v> with v held fixed, so `directional(loss, v)` is an ordinary loss whose gradient is H v; `Trainer.summed_gradient` sums it over a set.
Attention runs in its plain form meanwhile: the fused kernels have no second derivative. Cost: about three times that of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.models.attention import plain_attention
from remanence.models.forward import evaluating
from remanence.training.batches import Batch
from remanence.training.trainer import Loss

ONCE = ("is not implemented", "once_differentiable")  # how torch says that there is no second derivative


def slopes(loss: Loss, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss and its gradient by parameter in training, both still differentiable; parameters that it does not reach are left out."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad(), plain_attention(model):
        value = loss(model, batch)
        found = torch.autograd.grad(value, list(trained.values()), create_graph=True, allow_unused=True)
    return value, {name: slope for name, slope in zip(trained, found) if slope is not None}


def directional(loss: Loss, vector: Mapping[str, Tensor]) -> Loss:
    """Return the loss (model, batch) -> <grad L, v>, whose gradient is H v."""

    def product(model: nn.Module, batch: Batch) -> Tensor:
        _, found = slopes(loss, model, batch)
        return torch.stack([(slope * vector[name].to(slope.dtype)).sum() for name, slope in found.items()]).sum()

    return product


def refuse_once_differentiable(place: str, model: nn.Module, loss: Loss, batch: Batch, remedy: str) -> None:
    """Differentiate the loss of a batch twice, and refuse a model where that fails; it is left as it was.

    Args:
        place: of the Mistake.
        model: at rest.
        loss: of (model, batch).
        batch: on the model's device.
        remedy: of the Mistake.

    Raises:
        Mistake: naming the innermost layer that has no second derivative.
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    with evaluating(model):
        try:
            _differentiate(list(slopes(loss, model, batch)[1].values()))
        except RuntimeError as error:
            if not any(words in str(error) for words in ONCE):
                raise
            layer = _culprit(model, lambda: loss(model, batch)) or type(model).__name__
            reason = str(error).splitlines()[0][:120]
            raise Mistake(place, f"the layer '{layer}' cannot be differentiated twice ({reason})", remedy) from error
        finally:
            for parameter, grad in kept:
                parameter.grad = grad


def _differentiate(values: list[Tensor]) -> None:
    """Go back from the sum of squares into `.grad`: a gradient that is asked of some leaves passes by the nodes that would raise."""
    with torch.enable_grad():
        curved = [value.float().square().sum() for value in values if value.requires_grad]
        if curved:
            torch.stack(curved).sum().backward()


def _culprit(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Return the name of a layer without a second derivative, inner ones first."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        calls.setdefault(layer, (args, kwargs))

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in model.modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, layer in reversed(list(model.named_modules())) if layer in calls and _fails(layer, *calls[layer])), None)


def _fails(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether a layer by itself cannot be differentiated twice."""

    def free(value: Any) -> Any:
        return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tuple(map(free, args)), {name: free(value) for name, value in kwargs.items()}
    leaves = [value for value in (*args, *kwargs.values(), *layer.parameters()) if isinstance(value, Tensor) and value.requires_grad]
    with torch.enable_grad(), plain_attention(layer):
        output = layer(*args, **kwargs)
        outputs = output if isinstance(output, tuple) else (getattr(output, "logits", output),)
        curved = [value.float().square().sum() for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        if not curved:
            return False
        first = torch.autograd.grad(torch.stack(curved).sum(), leaves, create_graph=True, allow_unused=True)
    try:
        _differentiate([slope for slope in first if slope is not None])
    except RuntimeError as error:
        return any(words in str(error) for words in ONCE)
    return False
