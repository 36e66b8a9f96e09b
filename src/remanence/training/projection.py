"""Gradients that must not hurt the old: projection onto a reference gradient's half-space (A-GEM, Chaudhry et al., arXiv 1812.00420)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def flatten(grads: Mapping[str, Tensor] | Iterable[Tensor]) -> Float[Tensor, "P"]:
    """Concatenate tensors into one vector, in their order. Copies."""
    return torch.cat([grad.reshape(-1) for grad in (grads.values() if isinstance(grads, Mapping) else grads)])


def agem_project(g: Float[Tensor, "..."], g_ref: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return g - (g.g_ref / g_ref.g_ref) g_ref if g.g_ref < 0, else g itself (eq. 11).

    Both products are taken in fp64, so that the result's is 0 to rounding.

    Raises:
        ValueError: the shapes differ.
    """
    return agem_project_named({"": g}, {"": g_ref})[""]


def agem_project_named(g: Mapping[str, Tensor], g_ref: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Project as `agem_project` does, over all tensors together, without concatenating; if nothing conflicts they come back as they are.

    Raises:
        ValueError: names or shapes differ.
    """
    if g.keys() != g_ref.keys():
        raise ValueError(f"expected gradients of the same names, differing in {sorted(g.keys() ^ g_ref.keys())[:3]}")
    wrong = [name for name in g if g[name].shape != g_ref[name].shape]
    if wrong:
        raise ValueError(f"expected '{wrong[0]}' in one shape, got {tuple(g[wrong[0]].shape)} and {tuple(g_ref[wrong[0]].shape)}")
    product = dot(g, g_ref)
    if not product < 0:  # NaN too: it is for the caller's check on the loss
        return dict(g)
    share = product / dot(g_ref, g_ref)
    return {name: grad - (share * g_ref[name].double()).to(grad.dtype) for name, grad in g.items()}


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the inner product over all tensors, in fp64."""
    parts = [torch.dot(value.reshape(-1).double(), other[name].reshape(-1).double()) for name, value in one.items()]
    return math.fsum(torch.stack([part.cpu() for part in parts]).tolist()) if parts else 0.0
