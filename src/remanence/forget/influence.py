r"""Influence functions: forget by the step that the curvature says deletion makes, theta + (1/n) (H + lam I)^-1 sum of the forget rows' gradients.

At an optimum of the mean loss over D, taking D_f away moves the optimum by this much, to first order. It is the step that IAU approximates without H, and the
baseline that it is measured by. The inverse is taken exactly for small models, by conjugate gradients, or by LiSSA's recursion over batches.

Papers: Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions", arXiv 1703.04730, eq. 1 and section 3; Agarwal, Bullins and Hazan 2017
(LiSSA), arXiv 1602.03943.

| paper | here | shape | default |
|---|---|---|---|
| H, the Hessian of the mean loss over D = D_r + D_f, at theta | `directional`, `Trainer.summed_gradient`; `dense_hessian` | (P, P) | |
| lam (damping; the L2 weight of a regularised training) | damping | scalar | 0.01 |
| H^-1 v | solver: exact (P up to 5,000), cg, lissa | | cg |
| recursion depth, scale of LiSSA | iterations, scale | | 100, 10 |

Differs from the paper: deletion of a set at once; a mean over supervised tokens for language models. A network's Hessian has negative directions, where the
expansion means nothing: they are refused until the damping covers them. Cost: exact P gradients of gradients per batch and P^2 numbers; cg a gradient of a gradient
over D per iteration; lissa one over a batch per iteration. Memory: cg four vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake, nearest
from remanence.models.forward import evaluating
from remanence.stream import COLUMNS, Request
from remanence.training.batches import Batches
from remanence.training.curvature import directional, refuse_once_differentiable, slopes
from remanence.training.gradients import gradient_of
from remanence.training.losses import nll
from remanence.training.processes import is_sharded
from remanence.training.requests import retain_of
from remanence.training.scoring import walk
from remanence.training.trainer import Trainer

SOLVERS = ("exact", "cg", "lissa")
LARGEST = 5_000  # weights of a dense Hessian
Vector = Float[Tensor, " P"]


@dataclass(frozen=True)
class InfluenceFunction:
    """Move the weights as deletion moves the optimum, to first order.

    Args:
        solver: exact | cg | lissa.
        damping: added to the Hessian's diagonal.
        strength: factor of the step; 0 changes nothing.
        iterations: of cg and lissa, at most.
        tolerance: of cg: ends when the residual is this small a share of the right side.
        scale: of lissa, above the largest eigenvalue.

    Raises:
        Mistake: a value out of range or an unknown name.
    """

    solver: str = "cg"
    damping: float = 0.01
    strength: float = 1.0
    iterations: int = 100
    tolerance: float = 1e-4
    scale: float = 10.0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise Mistake("influence.solver", f"unknown value {self.solver!r}", nearest(self.solver, SOLVERS))
        for name in ("damping", "strength", "tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Mistake(f"influence.{name}", f"must be 0 or more, and finite, got {getattr(self, name)!r}", "correct the value")
        for name in ("iterations", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise Mistake(f"influence.{name}", f"must be above 0, and finite, got {getattr(self, name)!r}", "correct the value")

    def forget(self, model: nn.Module, request: Request, trainer: Trainer) -> nn.Module:
        """Solve (H + lam I) x = (1/n) sum grad l(D_f), and add x.

        Raises:
            Mistake: no retain rows, a layer without a second derivative, a direction of negative curvature, or a recursion that diverges.
        """
        from datasets import concatenate_datasets

        if is_sharded(model):
            raise Mistake("influence", "cannot step a sharded model", "run it in one process, or replicated")
        parts = [part.select_columns(list(COLUMNS[request.kind])) for part in (retain_of(request, "influence"), request.forget)]
        batches = trainer.batches(concatenate_datasets(parts), request.kind, stream="influence")
        model.to(trainer.accelerator.device)
        first = batches[0].to(trainer.accelerator.device)
        refuse_once_differentiable("influence", model, nll, first, "freeze it, or forget with IAU")
        gone = gradient_of(model, request.forget, request.kind, trainer)
        units = float(sum(batch.own_tokens() for batch in batches))
        right = torch.cat([value.flatten() for value in gone.total.values()]) / units
        like = dict(gone.total)
        if self.solver == "exact":
            found, residual = solve_dense(dense_hessian(model, batches) / units, right, self.damping), 0.0
        elif self.solver == "cg":

            def product(vector: Vector) -> Vector:
                named = trainer.summed_gradient(model, batches, directional(nll, split(vector, like)))
                return torch.cat([value.flatten() for value in named.values()]) / units + self.damping * vector

            found, residual = conjugate_gradients(product, right, self.iterations, self.tolerance)
        else:
            found, residual = self._lissa(model, batches, trainer, right, like), math.nan
        moves = split(self.strength * found, like)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in moves:
                    weight.add_(moves[name].to(weight.dtype))
        about = {
            "request": request.name,
            "solver": self.solver,
            "damping": self.damping,
            "residual": residual if residual == residual else None,
        }
        about |= {
            "norm_forget": right.norm().item(),
            "displacement": self.strength * found.norm().item(),
        }
        trainer.note("influence", about)
        return model

    def _lissa(self, model: nn.Module, batches: Batches, trainer: Trainer, right: Vector, like: dict[str, Tensor]) -> Vector:
        """Return the end of x <- b + x - (H_batch + lam I) x / scale, over scale, with another batch each time."""
        found = right
        with evaluating(model), torch.enable_grad():
            for number in range(self.iterations):
                named = trainer.gradient(model, directional(nll, split(found, like)), batches[number])
                curved = torch.cat([named[name].flatten().to(found.dtype) for name in like]) + self.damping * found
                found = right + found - curved / self.scale
        if not bool(found.isfinite().all()) or found.norm() > self.iterations * (1 + 1e-3) * right.norm():
            raise Mistake("influence.scale", f"LiSSA's recursion diverges with scale {self.scale:g}", "raise the scale, or the damping")
        return found / self.scale


def split(vector: Vector, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a flat vector as tensors of the given names and shapes."""
    pieces = vector.split([value.numel() for value in like.values()])
    return {name: piece.view_as(value) for (name, value), piece in zip(like.items(), pieces)}


def conjugate_gradients(product: Callable[[Vector], Vector], right: Vector, iterations: int, tolerance: float) -> tuple[Vector, float]:
    """Solve A x = b for a positive definite A, given as a product; return x and |b - A x| / |b|.

    Raises:
        Mistake: a direction of negative curvature.
    """
    found, residual = torch.zeros_like(right), right.clone()
    along, squared, start = residual.clone(), residual.dot(residual), right.norm()
    if start == 0:
        return found, 0.0
    for _ in range(iterations):
        if residual.norm() <= tolerance * start:
            break
        curved = product(along)
        curvature = along.dot(curved)
        if not curvature > 0:
            bound = (curvature / along.dot(along)).item()
            raise Mistake(
                "influence.damping", f"damped, the loss still curves down in some direction (by {bound:.3g})", "raise it by more than that"
            )
        length = squared / curvature
        found, residual = found + length * along, residual - length * curved
        squared, before = residual.dot(residual), squared
        along = residual + squared / before * along
    return found, (residual.norm() / start).item()


def dense_hessian(model: nn.Module, batches: Batches) -> Float[Tensor, "P P"]:
    """Return the Hessian of the loss summed over all rows, over the parameters in training.

    Raises:
        Mistake: there are too many weights.
    """
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = list(named.values())
    count = sum(weight.numel() for weight in weights)
    if count > LARGEST:
        raise Mistake("influence.solver", f"an exact inverse of {count:,} weights is too large", "set solver: cg")
    total = torch.zeros(count, count, dtype=weights[0].dtype, device=weights[0].device)
    units = torch.eye(count, dtype=total.dtype, device=total.device)
    with evaluating(model), torch.enable_grad():
        for _, batch in walk(batches, batches.size, model):
            batch._rows = batch._tokens = 1.0
            found = slopes(nll, model, batch)[1]
            flat = torch.cat([found.get(name, 0 * weight).flatten() for name, weight in named.items()])
            rows = torch.autograd.grad(flat, weights, units, is_grads_batched=True, allow_unused=True, materialize_grads=True)
            total += torch.cat([row.flatten(1) for row in rows], dim=1)
    return total


def solve_dense(hessian: Float[Tensor, "P P"], right: Vector, damping: float) -> Vector:
    """Solve (H + lam I) x = b.

    Raises:
        Mistake: it is not positive definite.
    """
    damped = (hessian + hessian.T) / 2 + damping * torch.eye(len(right), dtype=hessian.dtype, device=hessian.device)
    factor, wrong = torch.linalg.cholesky_ex(damped)
    if wrong:
        raise Mistake("influence.damping", "the loss curves down, or not at all, in some direction", "raise the damping")
    return torch.cholesky_solve(right.to(hessian.dtype)[:, None], factor)[:, 0]
