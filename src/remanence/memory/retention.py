r"""The retention of a memory: how much of what it was must remain when something is written, which fixes the form of its forget gate.

Each rule is the solution of W_t = argmin_W eta_t <g_t, W> + Ret(W, W_{t-1}). Where Ret is measured against what has been written so far, the solution is a
dual accumulator that is linear in the gradients, Z_t = alpha_t Z_{t-1} - eta_t g_t, seen through a link, W_t = link(Z_t); a linear recurrence can be computed
for a whole chunk at once, whatever the link. Two rules have no such accumulator and go token by token (`step`).

Paper: Behrouz, Razaviyayn, Zhong and Mirrokni 2025, "It's All Connected", arXiv 2504.13173, section 5.2.

| name | link, or step | inverse | stationary point of |
|---|---|---|---|
| l2 | W = Z | Z = W | -<Z, W> + 1/2 \|\|W\|\|^2 |
| lq, literal | Z / \|\|Z\|\|_q^(q-2) | W \|\|W\|\|_q^((q-2)/(3-q)) | nothing that we know of |
| lq, mirror | sgn(Z) \|Z\|^(q-1) / \|\|Z\|\|_q^(q-2) | the same with q* | -<Z, W> + 1/2 \|\|W\|\|_q*^2, 1/q + 1/q* = 1 |
| kl | c softmax(Z) over the last axis | log W | -<Z, W> + sum W log W, sum W = c |
| bregman_sig | sigmoid(Z) | logit W | -<Z, W> + sum W log W + (1-W) log(1-W) |
| elastic_net_ftrl | S_s(Z), S the soft threshold | W + s sgn W | -<Z, W> + 1/2 \|\|W\|\|^2 + s \|\|W\|\|_1 |
| elastic_net | S_(s alpha eta)(alpha (W_{t-1} - eta g)) | step | <g, W> + \|\|W - W_{t-1}\|\|^2 / (2 eta) + \|\|W\|\|^2 / (2 b) + s \|\|W\|\|_1, alpha = b / (b + eta) |
| f_divergence | W_{t-1} g_f(-zeta_t - eta g), g_f = (f')^-1, zeta_t so that each slice keeps its mass c | step | eta <g, W> + sum W_{t-1} f(W / W_{t-1}) |

| paper | here | default |
|---|---|---|
| q of the norm | q | 4 |
| c, the mass of a slice | c | 1 |
| 1 / a (elastic net) | sparsity = s | 0.01 |
| f | divergence: kl (t log t), chi2 ((t-1)^2 / 2), reverse_kl (-log t) | kl |

Differs from the paper: the printed lq link is homogeneous of degree 3 - q, so that at q = 4 a ten times larger accumulator is a ten times smaller memory; it
is `literal`, and `mirror` is the minimiser of the stated problem. The norm runs over one head's matrix, the softmax over its last axis (ours; unsaid there).
The elastic net's b is written as the gate alpha, which keeps retention and step size apart. f is shifted so that f'(1) = 0, which zeta takes up.
Cost: O(size of W) per read of a link; f_divergence finds zeta by 50 bisections per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from remanence.errors import Mistake, nearest

Map = Callable[[Tensor], Tensor]  # (..., I, O) -> (..., I, O)
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # W_{t-1}, eta g, alpha, eta -> W_t


@dataclass(frozen=True)
class Retention:
    """One retention rule.

    Args:
        link: from the accumulator to the weights.
        inverse: from weights to an accumulator.
        begin: from the learned outer parameter to the first accumulator.
        scale: where the link is one factor per matrix, link(Z) = scale(Z) Z; None where it is not.
        step: for a rule without a linear accumulator; its state is W itself.
        mass: whether each slice of the last axis has a fixed sum.
        linear: whether the link does nothing at all.
    """

    link: Map
    inverse: Map
    begin: Map
    scale: Map | None = None
    step: Step | None = None
    mass: bool = False
    linear: bool = False


CUSTOM: dict[str, Retention] = {}
NAMES = ("l2", "lq", "kl", "bregman_sig", "elastic_net", "elastic_net_ftrl", "f_divergence")


def retention(
    name: str, *, q: float = 4.0, link: str = "literal", c: float = 1.0, sparsity: float = 0.01, divergence: str = "kl"
) -> Retention:
    """Return a retention rule by name, its settings checked.

    Args:
        name: of `NAMES`, or one that was registered.
        q: of the norm (lq).
        link: literal | mirror (lq).
        c: mass of a slice (kl, f_divergence).
        sparsity: s, the pull towards zero (elastic nets).
        divergence: kl | chi2 | reverse_kl (f_divergence).

    Raises:
        Mistake: an unknown name, or a value out of range.
    """
    if name not in (*NAMES, *CUSTOM):
        raise Mistake("miras.retention", f"there is no retention '{name}'", nearest(name, (*NAMES, *CUSTOM)))
    if link not in ("literal", "mirror"):
        raise Mistake("miras.link", f"there is no link '{link}'", nearest(link, ("literal", "mirror")))
    if name == "lq" and not (q >= 2 if link == "literal" else q > 1):
        raise Mistake(
            "miras.q", f"must be {'at least 2' if link == 'literal' else 'above 1'} for the {link} link, got {q!r}", "4 is the paper's"
        )
    if not 0 < c < float("inf"):
        raise Mistake("miras.c", f"must be above 0, and finite, got {c!r}", "1 makes each slice a distribution")
    if not 0 <= sparsity < float("inf"):
        raise Mistake("miras.sparsity", f"must be at least 0, and finite, got {sparsity!r}", "0 switches the soft threshold off")
    if divergence not in DIVERGENCES:
        raise Mistake("miras.divergence", f"there is no divergence '{divergence}'", nearest(divergence, DIVERGENCES))
    same: Map = lambda tensor: tensor  # noqa: E731
    on_simplex = partial(softmax_link, c=c)
    match name:
        case "l2":
            return Retention(same, same, same, linear=True)
        case "lq" if link == "literal":
            factor, back = partial(literal_scale, q=q), partial(literal_inverse, q=q)
            return Retention(lambda z: z * factor(z), back, back, scale=factor)
        case "lq":
            mirrored = partial(mirror_link, q=q / (q - 1))
            return Retention(partial(mirror_link, q=q), mirrored, mirrored)
        case "kl":
            return Retention(on_simplex, log_link, same, mass=True)
        case "bregman_sig":
            return Retention(torch.sigmoid, torch.logit, same)
        case "elastic_net_ftrl":
            widened: Map = lambda w: w + sparsity * w.sign()  # noqa: E731
            return Retention(lambda z: soft_threshold(z, z.new_tensor(sparsity)), widened, widened)
        case "elastic_net":
            return Retention(same, same, same, step=partial(elastic_step, sparsity=sparsity))
        case "f_divergence":
            return Retention(same, same, on_simplex, step=partial(divergence_step, divergence=divergence), mass=True)
    return CUSTOM[name]


def register_retention(name: str, link: Map, inverse_link: Map) -> None:
    """Add a retention of one's own: weights = link(Z) of a linear accumulator Z that starts at inverse_link(W_0).

    Args:
        name: new.
        link: of (..., I, O), for any leading axes.
        inverse_link: with link(inverse_link(W)) = W.

    Raises:
        Mistake: the name is taken.
    """
    if name in (*NAMES, *CUSTOM):
        raise Mistake("register_retention", f"there is a retention '{name}' already", "choose another name")
    CUSTOM[name] = Retention(link, inverse_link, inverse_link)


def norm(z: Float[Tensor, "*n I O"], q: float) -> Float[Tensor, "*n 1 1"]:
    """Return ||Z||_q over one matrix, never exactly zero."""
    tiny = torch.finfo(z.dtype).tiny
    largest = z.detach().abs().amax((-2, -1), keepdim=True).clamp_min(tiny**0.25)  # powers of what is far from 1 would underflow
    return largest * ((z / largest).abs().pow(q).sum((-2, -1), keepdim=True) + tiny).pow(1 / q)


def literal_scale(z: Float[Tensor, "*n I O"], q: float) -> Float[Tensor, "*n 1 1"]:
    """Return ||Z||_q^(2-q), the factor of the printed link (section 5.2, Moneta)."""
    return norm(z, q).pow(2 - q)


def literal_inverse(w: Float[Tensor, "*n I O"], q: float) -> Float[Tensor, "*n I O"]:
    """Return A with A / ||A||_q^(q-2) = W (ours); at q = 3 the link keeps only the direction, so that A = W."""
    return w if q == 3 else w * norm(w, q).pow((q - 2) / (3 - q))


def mirror_link(z: Float[Tensor, "*n I O"], q: float) -> Float[Tensor, "*n I O"]:
    """Return the gradient of 1/2 ||Z||_q^2 (ours): the minimiser of -<Z, W> + 1/2 ||W||_q*^2."""
    return z * ((z / norm(z, q)).square() + torch.finfo(z.dtype).tiny).pow(q / 2 - 1)


def softmax_link(z: Float[Tensor, "*n I O"], c: float) -> Float[Tensor, "*n I O"]:
    """Return c softmax(Z) over the last axis (Memora)."""
    return c * z.softmax(-1)


def log_link(w: Float[Tensor, "*n I O"]) -> Float[Tensor, "*n I O"]:
    """Return log W; what is not positive counts as the smallest positive number."""
    return w.clamp_min(torch.finfo(w.dtype).tiny).log()


def soft_threshold(w: Tensor, threshold: Tensor) -> Tensor:
    """Return S(W): each entry moved towards zero by the threshold, and stopped there."""
    return w.sign() * (w.abs() - threshold).clamp_min(0)


def elastic_step(w: Tensor, push: Tensor, alpha: Tensor, eta: Tensor, *, sparsity: float) -> Tensor:
    """Return S_(s alpha eta)(alpha (W - eta g)), the proximal step of the elastic net."""
    return soft_threshold(alpha * (w - push), sparsity * alpha * eta)


def divergence_step(w: Float[Tensor, "*n I O"], push: Tensor, alpha: Tensor, eta: Tensor, *, divergence: str) -> Float[Tensor, "*n I O"]:
    """Return W g(-zeta - eta g), each slice keeping its mass; alpha has no part in it."""
    g, slope = DIVERGENCES[divergence]
    mass = w.sum(-1, keepdim=True)
    with torch.no_grad():
        low, high = -push.amax(-1, keepdim=True), -push.amin(-1, keepdim=True)  # g(0) = 1: too much mass at low, too little at high
        for _ in range(50):
            middle = (low + high) / 2
            over = (w * g(-middle - push)).sum(-1, keepdim=True) > mass
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        zeta = high  # the side where g is finite
        steep = (w * slope(-zeta - push)).sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    zeta = zeta + ((w * g(-zeta - push)).sum(-1, keepdim=True) - mass) / steep  # one Newton step: it carries the implicit gradient
    return w * g(-zeta - push)


DIVERGENCES: dict[str, tuple[Map, Map]] = {  # g = (f')^-1 with f'(1) = 0, and its slope
    "kl": (torch.exp, torch.exp),
    "chi2": (lambda u: (1 + u).clamp_min(0), lambda u: (u > -1).to(u.dtype)),
    "reverse_kl": (lambda u: torch.where(u < 1, 1 / (1 - u.clamp(max=1)), float("inf")), lambda u: (1 - u.clamp(max=1)).pow(-2)),
}
