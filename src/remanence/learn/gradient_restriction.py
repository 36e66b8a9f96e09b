r"""Gradient restriction: train with a penalty on the size of the gradient, so that no later deletion request finds a row with a huge one.

A request that is answered by a gradient step moves the weights as far as the forgotten rows' gradients reach; those of outliers reach far. A penalty on the
norm of each batch's gradient makes training end where gradients are small and curvature is low, and later steps are safe over a wider range of rates.

Paper: Liu, Wu, Lian and Chen 2025, "Efficient Machine Unlearning via Influence Approximation", arXiv 2507.23257, the module "gradient restriction" (GR loss).
Objective: L_GR(batch) = L(batch) + a S(grad L(batch)), differentiated through: grad L_GR = g + a H u, u = dS/dg.

| paper | here | shape | default |
|---|---|---|---|
| a | alpha | scalar | 0.005 (its range: 0 to 1) |
| \|\|grad l(z, theta)\|\|_2 | norm: per_tensor (sum over parameter tensors of their L2 norms, as the released code has it), global (one norm) | scalar | per_tensor |
| g, the gradient of the batch (of the whole step, under accumulation and processes) | `slopes`, `.grad` | (P,) | |
| H u (ours: (grad L(theta + eps u) - g) / eps) | derivative: exact (double backward), finite | (P,) | exact |
| eps (ours) | eps | scalar | 1e-3 |

Differs from the paper: a tensor whose gradient is zero adds nothing (its norm has no derivative there). `finite` (as in arXiv 2202.03599) needs no second derivatives,
so any attention kernel; in bf16 take a larger eps (0.05). With several micro-batches or processes S is that of the whole step's gradient and a second pass is made
with the same dropout; the logged loss is then L alone. Cost: `exact` about 3 times plain training, `finite` 2 times; a copy of the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.attention import plain_attention
from remanence.stream import Task
from remanence.training.batches import Batch
from remanence.training.curvature import directional, refuse_once_differentiable, slopes
from remanence.training.losses import nll
from remanence.training.processes import is_sharded, world_size
from remanence.training.trainer import Loss, Step, Trainer

NORMS = ("per_tensor", "global")
DERIVATIVES = ("exact", "finite")
TINY = 1e-24  # under the square root: a zero gradient has the derivative zero


@dataclass
class GradientRestriction:
    """Train on the task with a penalty on the norm of the gradient.

    Args:
        alpha: strength; 0 is plain training.
        norm: per_tensor | global.
        derivative: exact | finite.
        eps: how far the weights move along u to see the gradient change, in `finite`.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    alpha: float = 0.005
    norm: str = "per_tensor"
    derivative: str = "exact"
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise Mistake("gradient_restriction.alpha", f"must be 0 or more, and finite, got {self.alpha!r}", "correct the value")
        if not 0 < self.eps < float("inf"):
            raise Mistake("gradient_restriction.eps", f"must be above 0, and finite, got {self.eps!r}", "correct the value")
        for name, known in (("norm", NORMS), ("derivative", DERIVATIVES)):
            if getattr(self, name) not in known:
                place = f"gradient_restriction.{name}"
                raise Mistake(place, f"unknown value {getattr(self, name)!r}", nearest(str(getattr(self, name)), known))

    def learn(self, model: nn.Module, task: Task, trainer: Trainer) -> nn.Module:
        """Fit the task's rows under the penalty.

        Raises:
            Mistake: a layer that cannot be differentiated twice (in `exact`), or a model that is to be sharded.
        """
        batches = trainer.batches(task.train, task.kind)
        if self.alpha == 0:
            return trainer.fit(model, batches)
        if is_sharded(model) or str(trainer.accelerator.distributed_type).endswith("FSDP"):
            raise Mistake("gradient_restriction", "cannot train a sharded model", "run it replicated, or in one process")
        model.to(trainer.accelerator.device)
        if self.derivative == "exact":
            first = batches[0].to(trainer.accelerator.device)
            refuse_once_differentiable("gradient_restriction", model, nll, first, "set derivative: finite")
            if trainer.settings.accumulate * world_size() == 1:
                with plain_attention(model):  # around the loop: what checkpointing recomputes on the way back must be the same
                    return trainer.fit(model, batches, self.restricted)
        noise: list[list[Tensor]] = []  # the generators before each micro-batch of the step

        def plain(model: nn.Module, batch: Batch) -> Tensor:
            noise.append(noise_state(trainer.accelerator.device))
            return nll(model, batch)

        def restrict(model: nn.Module, step: Step) -> None:
            self._add_penalty(model, step, trainer, noise)
            noise.clear()

        with plain_attention(model) if self.derivative == "exact" else nullcontext():
            return trainer.fit(model, batches, plain, after_backward=restrict)

    def restricted(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Return L + a S(grad L) of one batch, differentiable."""
        value, found = slopes(nll, model, batch)
        return value + self.alpha * size_of(found.values(), self.norm)

    def _add_penalty(self, model: nn.Module, step: Step, trainer: Trainer, noise: list[list[Tensor]]) -> None:
        """Add a H u to `.grad`, which holds the gradient g of the whole step."""
        weights = {name: weight for name, weight in model.named_parameters() if weight.grad is not None}
        gradient = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        along = direction(gradient, self.norm)
        exact = self.derivative == "exact"
        with unmoved(model, weights):
            if not exact:
                torch._foreach_add_([weight.data for weight in weights.values()], list(along.values()), alpha=self.eps)
            loss = directional(nll, along) if exact else nll
            parts = [_again(model, loss, batch, trainer, state) for batch, state in zip(step.batches, noise, strict=True)]
        for name, weight in weights.items():
            change = sum(part[name] for part in parts) / len(parts)
            weight.grad = gradient[name] + self.alpha * (change if exact else (change - gradient[name]) / self.eps)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


def squares_of(gradient: Iterable[Tensor]) -> Float[Tensor, " n"]:
    """Return the squared L2 norm of each tensor, at least in fp32, and above zero."""
    return torch.stack([slope.to(torch.promote_types(slope.dtype, torch.float32)).square().sum() for slope in gradient]) + TINY


def size_of(gradient: Iterable[Tensor], norm: str) -> Float[Tensor, ""]:
    """Return S(g): the sum of the tensors' L2 norms (per_tensor, as the released code has it), or the L2 norm of all (global, the paper's formula)."""
    squares = squares_of(gradient)
    return squares.sqrt().sum() if norm == "per_tensor" else squares.sum().sqrt()


def direction(gradient: Mapping[str, Tensor], norm: str) -> dict[str, Tensor]:
    """Return u = dS/dg: each tensor over its own norm, or over the norm of all."""
    squares = squares_of(gradient.values())
    lengths = (squares if norm == "per_tensor" else squares.sum().expand_as(squares)).sqrt()
    return {name: slope / length.to(slope.dtype) for (name, slope), length in zip(gradient.items(), lengths)}


def noise_state(device: torch.device) -> list[Tensor]:
    """Return the state of the generators that dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def unmoved(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put weights, running statistics of batch norms and generators back at the end, bit for bit."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    held = [*(weight.data for weight in weights.values()), *(buffer for layer in norms for buffer in layer.buffers())]
    copies = [value.clone() for value in held]
    with torch.random.fork_rng(devices=sorted({value.device.index or 0 for value in held if value.is_cuda})):
        try:
            yield
        finally:
            for value, copy in zip(held, copies):
                value.copy_(copy)


def _again(model: nn.Module, loss: Loss, batch: Batch, trainer: Trainer, noise: list[Tensor]) -> dict[str, Tensor]:
    """Return the gradient of a loss on a micro-batch with the denominators and the dropout that it had before, averaged over processes."""
    rows, tokens = batch.rows, batch.tokens

    def same(model: nn.Module, batch: Batch) -> Tensor:
        batch._rows, batch._tokens = rows, tokens
        torch.set_rng_state(noise[0])
        if len(noise) > 1:
            torch.cuda.set_rng_state(noise[1], trainer.accelerator.device)
        return loss(model, batch)

    return trainer.gradient(model, same, batch)
