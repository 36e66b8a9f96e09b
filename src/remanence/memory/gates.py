"""The gates of test-time memories, folded into matrices for all chunks at once: step theta, momentum eta, forgetting alpha and a mask of what is written.

Within a chunk, with a write mask w: S_t = eta_t S_{t-1} - theta_t u_t and M_t = (1 - alpha_t) M_{t-1} + w_t S_t, which the products below solve; where w_t = 0,
alpha = 0, eta = 1 and theta = 0. Running products of a triangular matrix, not quotients, so zeros are safe.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


class Gates(NamedTuple):
    """The gates of chunks: M_t = beta_t M_0 + f_t S_0 - sum_j G_tj u_j and S_t = m_t S_0 - sum_j n_tj u_j (f, m, n: None without momentum)."""

    beta: Float[Tensor, "*C b"]
    G: Float[Tensor, "*C b b"]
    f: Float[Tensor, "*C b"] | None
    m: Float[Tensor, "*C b"] | None
    n: Float[Tensor, "*C b b"] | None


class Steps(NamedTuple):
    """The gates of C chunks: beta, f, G as tokens read; last_* as the chunk's end is written (f, m, n: None without momentum)."""

    beta: Float[Tensor, "C N b 1"]
    G: Float[Tensor, "C N b b"]
    f: Float[Tensor, "C N b 1"] | None
    last_beta: Float[Tensor, "C N 1 1"]
    last_G: Float[Tensor, "C N b 1"]
    last_f: Float[Tensor, "C N 1 1"] | None
    last_m: Float[Tensor, "C N 1 1"] | None
    last_n: Float[Tensor, "C N b 1"] | None


def gate_matrices(
    theta: Float[Tensor, "*C b"], eta: Float[Tensor, "*C b"] | None, alpha: Float[Tensor, "*C b"] | None, write: Bool[Tensor, "*C b"]
) -> Gates:
    """Fold the gates of chunks: G = A diag(w) n, f = A (w m), n = E diag(theta), A and E the running products of 1 - alpha and eta (sheet: ours)."""
    w = write.to(theta.dtype)
    keep = torch.ones_like(theta) if alpha is None else 1 - alpha * w
    A, step = running_products(keep), (theta * w)[..., None, :]
    if eta is None:
        return Gates(keep.cumprod(-1), A * step, None, None, None)
    eta = torch.where(write, eta, 1)
    n, m, A = running_products(eta) * step, eta.cumprod(-1), A * w[..., None, :]
    return Gates(keep.cumprod(-1), A @ n, (A @ m[..., None])[..., 0], m, n)


def running_products(x: Float[Tensor, "*C b"]) -> Float[Tensor, "*C b b"]:
    """Return prod_{l=j+1..t} x_l at (t, j), 1 on the diagonal and 0 above it: without logarithms or quotients, so zeros are safe."""
    below = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).tril(-1)
    return torch.where(below, x[..., :, None], 1).cumprod(-2).tril()


def delayed(gates: Gates) -> Gates:
    """Return the gates one token earlier: the first token of a chunk reads the chunk's start."""
    f = None if gates.f is None else F.pad(gates.f, (1, 0))[..., :-1]
    return gates._replace(G=F.pad(gates.G, (0, 0, 1, 0))[..., :-1, :], beta=F.pad(gates.beta, (1, 0), value=1.0)[..., :-1], f=f)


def steps(write: Gates, read: Gates) -> Steps:
    """Return the gates as a loop over chunks takes them: those of reading in full, those of writing at the chunk's end."""
    return Steps(
        read.beta[..., None],
        read.G,
        None if read.f is None else read.f[..., None],
        write.beta[..., -1:, None],
        write.G[..., -1, :, None],
        None if write.f is None else write.f[..., -1:, None],
        None if write.m is None else write.m[..., -1:, None],
        None if write.n is None else write.n[..., -1, :, None],
    )
