r"""The attentional bias of a memory: what its inner loss asks it to store, and the error that is sent back through it.

A memory M that reads a key k and should have answered v pays a loss; the derivative of the loss by the answer, r = dl/dM(k), is all that the rest of the
engine sees. The loss decides what survives: with squared error one wild value moves the memory as far as it is wild, a Huber loss bounds its pull.

Paper: Behrouz, Razaviyayn, Zhong and Mirrokni 2025, "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online
Optimization", arXiv 2504.13173, section 5.1. With e = M(k) - v:

| name | loss l | error r |
|---|---|---|
| dot | -<M(k), v> | -v (Hebbian: no error at all) |
| l2 | \|\|e\|\|^2 | 2 e |
| lp | sum (e^2 + eps)^(p/2) | p e (e^2 + eps)^(p/2-1) |
| huber_coord | sum_j H_delta(e_j) | e_j clipped to [-delta, delta] |
| huber_norm | H_delta(\|\|e\|\|) | e, shortened to the length delta |
| huber_mixed (Yaad) | \|\|e\|\|^2 if \|\|e\|\| <= delta, else delta sum sqrt(e^2 + eps) | 2 e, else delta e / sqrt(e^2 + eps) |
| robust_shift | max over \|\|dv\|\| <= delta of 1/2 \|\|e - dv\|\|^2 = 1/2 (\|\|e\|\| + delta)^2 | e + delta e / \|\|e\|\| |

| paper | here | shape | default |
|---|---|---|---|
| p | p | scalar, >= 1 | 3 |
| delta_t, Delta | delta | (..., 1), a threshold per token | 1 |
| (smoothing) | SMOOTH = eps | scalar | 1e-6 |

Differs from the paper: |e| is sqrt(e^2 + eps) in loss and error alike, where the paper writes tanh(a e) for the sign and so has an error that belongs to no loss;
only so is lp with p = 2 the squared error exactly, and every error the derivative of its loss. The mixed rule jumps at the threshold (length 2 delta below it,
about delta sqrt(D) above), as in the paper; huber_norm does not. Cost: O(D) per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from remanence.errors import Mistake, nearest

SMOOTH = 1e-6
Loss = Callable[[Tensor, Tensor, float, Tensor], Tensor]  # prediction (..., D), value (..., D), p, delta (..., 1)


@dataclass(frozen=True)
class Bias:
    """One attentional bias.

    Args:
        loss: of (prediction, value, p, delta), summed over features: (...).
        error: its derivative by the prediction: (..., D).
        threshold: whether it reads delta.
    """

    loss: Loss
    error: Loss
    threshold: bool = False


def bias(name: str, p: float = 3.0) -> Bias:
    """Return a bias by name, its settings checked.

    Raises:
        Mistake: an unknown name, or p below 1 (the loss would have no finite slope).
    """
    if name not in BIASES:
        raise Mistake("miras.bias", f"there is no bias '{name}'", nearest(name, BIASES))
    if not 1 <= p < float("inf"):
        raise Mistake(
            "miras.p", f"must be at least 1, and finite, got {p!r}", "p = 1 stores signs, 2 is squared error, the paper's Moneta has 3"
        )
    return BIASES[name]


def register_bias(name: str, loss: Loss, threshold: bool = False) -> None:
    """Add a bias of one's own; its error is the loss's gradient, taken by autograd.

    Args:
        name: new.
        loss: of (prediction, value, p, delta): one number per token, twice differentiable almost everywhere.
        threshold: whether it reads delta, which then is a learned gate.

    Raises:
        Mistake: the name is taken.
    """
    if name in BIASES:
        raise Mistake("register_bias", f"there is a bias '{name}' already", "choose another name")

    def error(prediction: Tensor, value: Tensor, p: float, delta: Tensor) -> Tensor:
        return torch.func.grad(lambda answer: loss(answer, value, p, delta).sum())(prediction)

    BIASES[name] = Bias(loss, error, threshold)


def length(e: Float[Tensor, "*n D"]) -> Float[Tensor, "*n 1"]:
    """Return ||e||, smooth at zero (ours)."""
    return (e.square().sum(-1, keepdim=True) + SMOOTH**2).sqrt()


def size(e: Tensor) -> Tensor:
    """Return |e|, smooth at zero (ours)."""
    return (e.square() + SMOOTH).sqrt()


def huber(magnitude: Tensor, delta: Tensor) -> Tensor:
    """Return H_delta: half the square up to delta, linear beyond."""
    inside = magnitude.clamp(max=delta)  # the square's part; beyond it only the linear one grows
    return inside.square() / 2 + delta.clamp(max=torch.finfo(delta.dtype).max) * (magnitude - inside)


def _dot_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return -(m * v).sum(-1)


def _dot_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return -v


def _l2_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return (m - v).square().sum(-1)


def _l2_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return 2 * (m - v)


def _lp_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return ((m - v).square() + SMOOTH).pow(p / 2).sum(-1)


def _lp_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return p * (m - v) * ((m - v).square() + SMOOTH).pow(p / 2 - 1)


def _huber_coord_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return huber((m - v).abs(), delta).sum(-1)


def _huber_coord_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(m - v, -delta), delta)


def _huber_norm_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return huber(length(m - v), delta).squeeze(-1)


def _huber_norm_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return (m - v) * (delta / length(m - v)).clamp(max=1)


def _mixed_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    near = length(m - v) <= delta
    return torch.where(near, (m - v).square(), _finite(delta) * size(m - v)).sum(-1)


def _mixed_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    near = length(m - v) <= delta
    return torch.where(near, 2 * (m - v), _finite(delta) * (m - v) / size(m - v))


def _shift_loss(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return (length(m - v) + delta).square().squeeze(-1) / 2


def _shift_error(m: Tensor, v: Tensor, p: float, delta: Tensor) -> Tensor:
    return (m - v) * (1 + delta / length(m - v))


def _finite(delta: Tensor) -> Tensor:
    return delta.clamp(max=1e6)  # delta = inf selects the other branch, but inf * 0 would leak NaN into its gradient


BIASES: dict[str, Bias] = {
    "dot": Bias(_dot_loss, _dot_error),
    "l2": Bias(_l2_loss, _l2_error),
    "lp": Bias(_lp_loss, _lp_error),
    "huber_coord": Bias(_huber_coord_loss, _huber_coord_error, threshold=True),
    "huber_norm": Bias(_huber_norm_loss, _huber_norm_error, threshold=True),
    "huber_mixed": Bias(_mixed_loss, _mixed_error, threshold=True),
    "robust_shift": Bias(_shift_loss, _shift_error, threshold=True),
}
