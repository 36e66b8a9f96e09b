"""The small network whose weights are a memory's state: its forward pass and the pieces of its gradient, written out by hand.

M(x) = W_L gelu(... gelu(W_1 x)), or x + LN(W_L ...) with a norm; weights multiply from the right, (N, D_in, D_out), one network per row of N.
The layer norm's scale and shift are slow parameters, no part of the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5  # of the layer norm
NORM_SCALE = 0.1  # its scale at first. At 1, LN(.) is as long as sqrt(D) while v is short: the first writes blow the weights up, and little is learned afterwards
Weights = tuple[Tensor, ...]
Norm = tuple[Tensor, Tensor]
Bias = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # prediction, value, extra -> gradient of the inner loss by the prediction


def network(W: Weights, x: Float[Tensor, "*N b D"], norm: Norm | None) -> Float[Tensor, "*N b D"]:
    """Return M(x): linear layers with gelu between them, and x + LN(.) at the end if there is a norm."""
    z = x
    for l, weight in enumerate(W):
        z = (F.gelu(z) if l else z) @ weight
    return finish(z, x, norm)


def finish(z: Float[Tensor, "*N b D"], x: Float[Tensor, "*N b D"], norm: Norm | None) -> Float[Tensor, "*N b D"]:
    """Return x + LN(z), or z if there is no norm."""
    return z if norm is None else x + standardised(z)[0] * norm[0] + norm[1]


def standardised(z: Float[Tensor, "*N D"]) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N 1"]]:
    """Return z with mean 0 and variance 1 over its features, and the deviation it was divided by."""
    centred = z - z.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / std, std


def layer_norm_backward(g: Float[Tensor, "*N D"], zhat: Float[Tensor, "*N D"], std: Float[Tensor, "*N 1"]) -> Float[Tensor, "*N D"]:
    """Return the gradient by z of sum(g zhat): (g - mean(g) - zhat mean(g zhat)) / std."""
    return (g - g.mean(-1, keepdim=True) - zhat * (g * zhat).mean(-1, keepdim=True)) / std


def gelu_slope(z: Tensor) -> Tensor:
    """Return the derivative of gelu: Phi(z) + z phi(z)."""
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z.square()) * (2 * torch.pi) ** -0.5


def gelu_with_slopes(z: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return gelu(z), its derivative Phi(z) + z phi(z), and if asked its second derivative phi(z) (2 - z^2)."""
    square = z.square()
    density = torch.exp(square * -0.5).mul_((2 * torch.pi) ** -0.5)
    mass = torch.erf(z * 0.5**0.5).add_(1).mul_(0.5)
    value = z * mass
    slope = mass.addcmul_(z, density)
    return value, slope, density.mul_(square.neg_().add_(2)) if second else None
