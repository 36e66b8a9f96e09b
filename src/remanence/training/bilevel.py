r"""A loss to raise and a loss to lower whose gradients should not share directions: gradient and curvature of the two levels of OFMU (arXiv 2509.22483).

    Phi = L_f - beta cos(g_f, g_r)          inner, raised;  g_f, g_r: gradients of L_f, L_r
    F   = L_r + rho ||grad Phi||^2          outer, lowered; grad F = g_r + 2 rho H_Phi grad Phi

Everything is made of gradients of scalars that are means over batches: with u_f, u_r the derivatives of the cosine by its two arguments, held fixed,
grad cos = H_f u_f + H_r u_r, and H u is the gradient of <grad L, u>. So it is exact under accumulation and over processes, no Hessian is ever formed, and
one graph of one loss is alive at a time. All trained parameters are one vector (P,), at least in fp32; what is differentiated more than once is outside
autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from remanence.errors import Mistake
from remanence.training.batches import Batch
from remanence.training.projection import flatten
from remanence.training.trainer import Loss, Trainer

Vector = Float[Tensor, " P"]

HVP = ("fd", "exact", "gauss")  # how H_Phi v is computed
SPAN = 1e-2  # length of the difference step of `hvp_fd` in weight space
EPS = 1e-8  # norm below which a gradient counts as this long in a cosine


@dataclass(frozen=True)
class Derivatives:
    """Derivatives of a mean loss by the parameters in training, at the weights as they are.

    Args:
        trainer: gives the gradient over all processes, in its precision.
        model: any module.
        loss: of (model, batch).
        batches: the micro-batches of a step.
    """

    trainer: Trainer
    model: nn.Module
    loss: Loss
    batches: Sequence[Batch]

    def first(self) -> Vector:
        """Return grad L."""
        return flatten(map(wide, self.trainer.gradient(self.model, self.loss, *self.batches).values()))

    def second(self, u: Vector) -> Vector:
        """Return H u."""
        return replace(self, loss=full(directional(self.loss, u))).first()

    def third(self, u: Vector, v: Vector) -> Vector:
        """Return grad <v, H u>, u and v held fixed."""
        return replace(self, loss=full(directional(directional(self.loss, u), v))).first()


def full(loss: Loss) -> Loss:
    """Return the loss outside autocast, in the weights' own precision."""

    def exact(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            return loss(model, batch)

    return exact


def directional(loss: Loss, u: Vector) -> Loss:
    """Return the loss (model, batch) -> <grad L, u>, whose gradient is H u (one double backward)."""

    def slope(model: nn.Module, batch: Batch) -> Tensor:
        weights = trained(model)
        grads = torch.autograd.grad(loss(model, batch), weights, create_graph=True, allow_unused=True)
        parts = [(grad * part).sum() for grad, part in zip(grads, apart(u, weights)) if grad is not None]
        still = torch.stack([weight.sum() for weight in weights]).sum() * 0.0  # a linear loss has a slope that no weight moves
        return torch.stack(parts).sum() + still

    return slope


def cosine_slopes(a: Vector, b: Vector) -> tuple[Float[Tensor, ""], Vector, Vector]:
    """Return s = cos(a, b), ds/da = (b/|b| - s a/|a|) / |a| and ds/db = (a/|a| - s b/|b|) / |b|; a vector shorter than EPS counts as that long."""
    long_a, long_b = a.norm().clamp(min=EPS), b.norm().clamp(min=EPS)
    unit_a, unit_b = a / long_a, b / long_b
    s = unit_a @ unit_b
    return s, (unit_b - s * unit_a) / long_a, (unit_a - s * unit_b) / long_b


def phi_gradient(forget: Derivatives, retain: Derivatives, beta: float, g_f: Vector, g_r: Vector) -> tuple[Vector, Float[Tensor, ""]]:
    """Return grad Phi = g_f - beta grad cos(g_f, g_r), and the cosine."""
    s, u_f, u_r = cosine_slopes(g_f, g_r)
    if beta == 0:
        return g_f, s
    return g_f - beta * (forget.second(u_f) + retain.second(u_r)), s


def hvp(mode: str, forget: Derivatives, retain: Derivatives, beta: float, v: Vector, g_f: Vector, g_r: Vector) -> Vector:
    """Return H_Phi v, v held fixed: exact, fd (a central difference of grad Phi) or gauss (H_f v alone, the cosine's part dropped)."""
    if mode == "fd":
        return hvp_fd(forget, retain, beta, v)
    along = forget.second(v)
    if mode == "gauss" or beta == 0:
        return along
    _, u_f, u_r = cosine_slopes(g_f, g_r)
    moved: Any = torch.func.jvp(cosine_slopes, (g_f, g_r), (along, retain.second(v)))
    _, du_f, du_r = moved[1]  # how u_f and u_r move along v
    return along - beta * (forget.third(u_f, v) + forget.second(du_f) + retain.third(u_r, v) + retain.second(du_r))


def hvp_fd(forget: Derivatives, retain: Derivatives, beta: float, v: Vector) -> Vector:
    """Return (grad Phi(theta + e v) - grad Phi(theta - e v)) / 2e with e = SPAN / |v|; the weights come back bit for bit.

    Raises:
        Mistake: a trained weight is in half precision, where so small a difference is lost.
    """
    weights, length = trained(forget.model), v.norm().item()
    half = next((weight.dtype for weight in weights if weight.dtype.itemsize < 4), None)
    if half is not None:
        remedy = "load the model in float32 (training may still run in bf16), or take hvp: gauss"
        raise Mistake("ofmu.hvp", f"weights in {half} cannot hold the small differences of fd", remedy)
    if length == 0:
        return v
    e, kept, ends = SPAN / length, [weight.detach().clone() for weight in weights], []
    forget, retain = (replace(side, loss=full(side.loss)) for side in (forget, retain))
    try:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for weight, start, part in zip(weights, kept, apart(v, weights)):
                    torch.add(start, part, alpha=sign * e, out=weight)
            ends.append(phi_gradient(forget, retain, beta, forget.first(), retain.first())[0])
    finally:
        with torch.no_grad():
            for weight, start in zip(weights, kept):
                weight.copy_(start)
    return (ends[0] - ends[1]) / (2 * e)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters in training, in the model's order (that of `Trainer.gradient`)."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def apart(vector: Vector, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a vector that belong to the weights, in their shapes; nothing is copied."""
    return [part.view_as(weight) for part, weight in zip(vector.split([weight.numel() for weight in weights]), weights)]


def wide(value: Tensor) -> Tensor:
    """Return a tensor at least in fp32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
