"""Miras as the paper writes it: token by token, on the weights themselves, with gradients by autograd. Nothing here is shared with the chunk form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.memory.miras import MirasMemory
from remanence.memory.miras_rule import Written


def plain_answer(memory: str, W: tuple[Tensor, ...], x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """M(x) for one token of every memory: x (N, D)."""
    if memory == "vector":
        return x * W[0][:, 0]
    if memory == "matrix":
        return torch.einsum("ni,nio->no", x, W[0])
    hidden = F.gelu(torch.einsum("ni,nio->no", x, W[0]))
    return x + F.layer_norm(torch.einsum("ni,nio->no", hidden, W[1]), x.shape[-1:], eps=1e-5) * scale + shift


def matrix_norm(A: Tensor, q: float) -> Tensor:
    return A.abs().pow(q).sum((-2, -1), keepdim=True).pow(1 / q)


def forward_link(settings: dict, A: Tensor) -> Tensor:
    """W from what has accumulated, as printed."""
    q, name = settings["q"], settings["retention"]
    if name == "lq" and settings["link"] == "literal":
        return A / matrix_norm(A, q) ** (q - 2)
    if name == "lq":
        return A.sign() * A.abs() ** (q - 1) / matrix_norm(A, q) ** (q - 2)
    if name == "elastic_net_ftrl":
        return F.softshrink(A, settings["sparsity"])
    if name == "bregman_sig":
        return torch.sigmoid(A)
    return A


def plain_update(settings: dict, W: Tensor, A: Tensor, g: Tensor, alpha: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """One token's update by gradient descent: W_t and A_t."""
    name, c = settings["retention"], settings["c"]
    if name == "kl":
        return c * torch.softmax(alpha * W.log() - eta * g, -1), A
    if name == "bregman_sig":
        return torch.sigmoid(alpha * (W.log() - (1 - W).log()) - eta * g), A
    if name == "elastic_net":
        b = alpha * eta / (1 - alpha)
        lam = b / (b + eta)
        zeta, gam = eta * lam, settings["sparsity"] * eta * b / (eta + b)
        moved = lam * W - zeta * g
        return moved.sign() * (moved.abs() - gam).clamp_min(0), A
    if name == "f_divergence":  # f = t log t
        grown = W * torch.exp(-eta * g)
        return W.sum(-1, keepdim=True) * grown / grown.sum(-1, keepdim=True), A
    A = alpha * A - eta * g
    return forward_link(settings, A), A


def plain_miras(
    layer: MirasMemory, Z: tuple[Tensor, ...], q: Tensor, tokens: Written, norm: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Read tokens one by one: outputs, last weights, norms of the gradients. Z is the first accumulator."""
    settings, choices = layer.settings, layer.choices
    memory, ys, norms = settings["memory"], [], []
    scale, shift = norm[0][:, 0], norm[1][:, 0]
    A = Z
    W = point = tuple(choices.retention.link(z) for z in Z)
    S = tuple(torch.zeros_like(z) for z in Z)
    for t in range(q.shape[1]):
        point = W if t % settings["chunk"] == 0 else point
        k, v, delta = tokens.k[:, t], tokens.v[:, t], tokens.delta[:, t]

        def loss(weights: tuple[Tensor, ...], k: Tensor = k, v: Tensor = v, delta: Tensor = delta) -> Tensor:
            return choices.bias.loss(plain_answer(memory, weights, k, scale, shift), v, settings["p"], delta).sum()

        g = torch.func.grad(loss)(point)
        size = sum(one.square().sum((1, 2)) for one in g).sqrt()
        norms.append(size)
        if settings["max_grad_norm"] is not None:
            g = tuple(one * (settings["max_grad_norm"] / size).clamp(max=1)[:, None, None] for one in g)
        new_W, new_A, new_S = [], [], []
        for l, (w, a, s, one) in enumerate(zip(W, A, S, g)):
            outward = memory == "vector" or l == 1  # the axis that a gate per channel runs along
            alpha, eta = (gate[:, t][:, None, :] if outward else gate[:, t][..., None] for gate in (tokens.alpha, tokens.eta))
            written = tokens.write[:, t, :, None]
            if tokens.mu is not None:
                pushed = tokens.mu[:, t, :, None] * s - eta * one
                kept = alpha * a + pushed
                new, s = forward_link(settings, kept), torch.where(written, pushed, s)
            else:
                new, kept = plain_update(settings, w, a, one, alpha, eta)
            new_W.append(torch.where(written, new, w))
            new_A.append(torch.where(written, kept, a))
            new_S.append(s)
        W, A, S = tuple(new_W), tuple(new_A), tuple(new_S)
        ys.append(plain_answer(memory, W, q[:, t], scale, shift))
    return torch.stack(ys, 1), W, torch.stack(norms, 1)
